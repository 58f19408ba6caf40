"""Replicas that come and go behind a name."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from cache import UNLIMITED_TOKENS, PrefixIndex
from cache.index.hashing import cut
from proxy.config.load import load
from proxy.config.schema import Client, Config, Pool, PoolKind, Replica, Secret, Server
from proxy.errors import ConfigError
from proxy.fleet import Fleet
from proxy.fleet.discovery import FORGET_SECONDS, Discovery, resolve
from proxy.fleet.pools import ReplicaEndpoint
from tests.support.clock import FakeClock

NAME = "dns+http://engines.default.svc:8000"


class Names:
    """A resolver that says what it is told to."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] = addresses
        self.fails = False
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        self.asked.append((name, port))
        if self.fails:
            raise OSError("no answer")
        return self.addresses


class Bench:
    """A membership with all that it fills."""

    def __init__(self, names: Names, *replicas: Replica) -> None:
        self.clock = FakeClock()
        self.fleet = Fleet(Random(1).random)
        self.index = PrefixIndex()
        self.config = Config(pools=(Pool(name="engines", replicas=replicas or (Replica(NAME),)),))
        self.members = Discovery(self.config, self.fleet, self.index, self.clock, names)
        self.added: list[int] = []
        self.forgotten: list[int] = []
        self.members.subscribe(self)

    def replicas_changed(self, joined: Sequence[int]) -> None:
        self.added += joined

    def replica_forgotten(self, number: int, endpoint: ReplicaEndpoint) -> None:
        self.forgotten.append(number)

    def names(self) -> list[str]:
        return sorted(view.name for view in self.fleet.snapshot("engines", 0.0) if view.available)


async def test_the_addresses_of_a_name_are_replicas_as_long_as_it_has_them():
    """New ones are met, gone ones get nothing more, and their numbers stay theirs."""
    names = Names("10.0.0.1", "10.0.0.2")
    bench = Bench(names)
    assert bench.names() == []
    await bench.members.look()
    assert names.asked == [("engines.default.svc", 8000)]
    assert bench.names() == ["10.0.0.1:8000", "10.0.0.2:8000"]
    assert bench.added == [0, 1]
    names.addresses = ("10.0.0.2", "fd00::3")
    await bench.members.look()
    assert bench.names() == ["10.0.0.2:8000", "[fd00::3]:8000"]
    assert bench.added == [0, 1, 2]
    assert bench.members.pools.served == {1, 2}
    assert bench.members.pools.backends[2].origin.host == "fd00::3"
    assert bench.members.pools.backends[0].name == "10.0.0.1:8000"  # requests under way may still need it


async def test_a_name_server_in_trouble_changes_nothing():
    """Neither an error nor an empty answer removes the engines."""
    names = Names("10.0.0.1")
    bench = Bench(names)
    await bench.members.look()
    names.fails = True
    await bench.members.look()
    names.fails, names.addresses = False, ()
    await bench.members.look()
    assert bench.names() == ["10.0.0.1:8000"]


async def test_what_a_replica_held_is_kept_while_it_may_come_back():
    """A probe that failed once costs no prefix; one that stays away is forgotten."""
    names = Names("10.0.0.1", "10.0.0.2")
    bench = Bench(names)
    await bench.members.look()
    chain = cut(0, [b"x" * 9_000])
    bench.index.place(0, chain, 2_000, 0.0)
    names.addresses = ("10.0.0.2",)
    await bench.members.look()
    bench.clock.advance(FORGET_SECONDS - 1)
    bench.members.forget()
    names.addresses = ("10.0.0.1", "10.0.0.2")
    await bench.members.look()
    bench.clock.advance(FORGET_SECONDS)
    bench.members.forget()
    assert 0 in bench.index.match(chain).held
    names.addresses = ("10.0.0.2",)
    await bench.members.look()
    bench.clock.advance(FORGET_SECONDS)
    bench.members.forget()
    assert bench.index.match(chain).held == {}


async def test_replicas_that_come_and_go_behind_a_name_leave_nothing_behind():
    """After two thousand of them there is one endpoint, one number and one budget."""
    names = Names("10.0.0.1")
    bench = Bench(names)
    for number in range(2_000):
        names.addresses = (f"10.1.{number // 250}.{number % 250}",)
        await bench.members.look()
        bench.clock.advance(FORGET_SECONDS + 1)
        bench.members.forget()
    assert len(bench.members.pools.backends) == 1
    assert len(bench.fleet.members()) == 1
    assert len(bench.index.replicas()) <= 1
    assert len(bench.forgotten) == 1_999
    assert max(bench.added) <= 1


async def test_a_name_with_a_label_that_is_too_long_is_a_failed_look_up():
    """The codec for host names raises no OSError."""

    async def resolve(name: str, port: int) -> Sequence[str]:
        return [name.encode("idna").decode()]

    bench = Bench(Names("10.0.0.1"))
    bench.members._resolve = resolve  # noqa: SLF001 - internal state that no public name shows
    bench.config = Config(pools=(Pool(name="engines", replicas=(Replica(f"dns+http://{'a' * 70}.svc:80"),)),))
    bench.members.adopt(bench.config)
    await bench.members.look()
    assert bench.names() == []


async def test_a_configured_capacity_is_said_once():
    """What was learned from responses since is kept when addresses change."""
    names = Names("10.0.0.1")
    bench = Bench(names, Replica(NAME, capacity_tokens=1_000))
    await bench.members.look()
    assert bench.index.replicas()[0].budget_tokens == 1_000
    bench.index.set_budget(0, 900)
    names.addresses = ("10.0.0.1", "10.0.0.2")
    await bench.members.look()
    assert bench.index.replicas()[0].budget_tokens == 900
    assert bench.index.replicas()[1].budget_tokens == 1_000


async def test_a_configured_capacity_is_where_learning_starts():
    """One that was set too low or too high is put right by the answers."""
    bench = Bench(Names("10.0.0.1"), Replica(NAME, capacity_tokens=1_000))
    await bench.members.look()
    bench.index.set_budget(0, 1_250)
    assert bench.index.replicas()[0].budget_tokens == 1_250


async def test_an_address_that_is_named_itself_too_is_one_replica():
    """It belongs to the one listed first."""
    bench = Bench(Names("10.0.0.1"), Replica("http://10.0.0.1:8000"), Replica(NAME))
    await bench.members.look()
    assert bench.names() == ["10.0.0.1:8000"]


def test_the_scheme_is_accepted_and_no_other(tmp_path):
    """https would need the name in its certificate, so it is not followed."""
    file = tmp_path / "cairn.yaml"
    file.write_text(f'pools: [{{name: engines, replicas: [{{url: "{NAME}"}}]}}]')
    replica = load(file, {}).config.pools[0].replicas[0]
    assert replica.is_followed
    file.write_text(file.read_text().replace("dns+http:", "dns+https:"))
    with pytest.raises(ConfigError, match=r"\$.pools\[0\].replicas\[0\].url: expected http"):
        load(file, {})


async def test_the_ranks_of_an_engine_are_replicas_that_differ_by_a_header():
    """Four caches behind one URL, each with its own name, number and stated capacity."""
    bench = Bench(
        Names(), Replica("http://engine:8000", ranks=4, capacity_tokens=9_000), Replica("http://plain:8000")
    )
    assert bench.names() == [*(f"engine:8000/rank-{rank}" for rank in range(4)), "plain:8000"]
    endpoints = [bench.members.pools.backends[number] for number in range(5)]
    assert [(each.url, each.rank) for each in endpoints] == [
        *(("http://engine:8000", rank) for rank in range(4)),
        ("http://plain:8000", None),
    ]
    assert [stats.budget_tokens for stats in bench.index.replicas().values()] == [9_000] * 4


async def test_the_addresses_of_a_name_have_ranks_each():
    bench = Bench(Names("10.0.0.1", "10.0.0.2"), Replica(NAME, ranks=2))
    await bench.members.look()
    assert bench.names() == [f"10.0.0.{host}:8000/rank-{rank}" for host in (1, 2) for rank in (0, 1)]


async def test_an_engine_becomes_as_many_replicas_as_its_metrics_show_ranks():
    """And fewer again after a restart with fewer; what is known of the others stays."""
    bench = Bench(Names(), Replica("http://engine:8000"), Replica("http://plain:8000"))
    engine = bench.members.pools.backends[0]
    assert bench.members.ranks_found(engine, 3)
    assert bench.names() == [*(f"engine:8000/rank-{rank}" for rank in range(3)), "plain:8000"]
    ranks = [bench.members.pools.backends[number] for number in bench.added]
    assert [(each.rank, each.ranks, each.url) for each in ranks] == [(n, 3, "http://engine:8000") for n in range(3)]
    assert not bench.members.ranks_found(ranks[1], 3), "nothing is new"
    assert bench.members.ranks_found(ranks[2], 1)
    assert bench.names() == ["engine:8000", "plain:8000"]
    assert not bench.members.ranks_found(engine, 10**9), "a mistake of the page"


async def test_the_configuration_overrides_the_ranks_that_metrics_show():
    bench = Bench(Names(), Replica("http://engine:8000", ranks=1), Replica("http://other:8000", ranks=2))
    names = bench.names()
    for number in range(3):
        assert not bench.members.ranks_found(bench.members.pools.backends[number], 4)
    assert bench.names() == names == ["engine:8000", "other:8000/rank-0", "other:8000/rank-1"]


async def test_an_address_resolves_to_itself():
    """By the system's resolver."""
    assert set(await resolve("127.0.0.1", 80)) == {"127.0.0.1"}


async def test_what_a_replica_with_a_request_left_held_is_forgotten_when_that_has_ended():
    """Its number is not given away before."""
    names = Names("10.0.0.1", "10.0.0.2")
    bench = Bench(names)
    await bench.members.begin()
    charge = bench.fleet.charge(0, 10.0, 0.0)
    names.addresses = ("10.0.0.2",)
    await bench.members.look()
    bench.clock.advance(FORGET_SECONDS + 1)
    bench.members.forget()
    assert bench.forgotten == []
    bench.fleet.finish(charge, 1.0)
    bench.members.forget()
    assert bench.forgotten == [0]
    await bench.members.close()


async def test_a_replica_with_another_address_is_checked_at_once_and_keeps_its_number():
    """It may have been moved because it was down, and would stay so until its next probe is due."""
    bench = Bench(Names(), Replica("http://old:8000", name="a"), Replica("http://b:8000", name="b"))
    moved = Replica("http://new:8000", name="a")
    bench.members.adopt(Config(pools=(Pool(name="engines", replicas=(moved, Replica("http://b:8000", name="b"))),)))
    assert bench.added == [0]
    assert bench.members.pools.backends[0].origin.host == "new"


async def test_a_reload_to_another_name_is_never_without_replicas():
    """The new name is looked up before the replicas of the old one are removed; one that is known is not again."""
    names = Names("10.0.0.1")
    bench = Bench(names)
    await bench.members.look()
    moved = Config(pools=(Pool(name="engines", replicas=(Replica("dns+http://others.default.svc:9000"),)),))
    found = await bench.members.look_ahead(moved)
    await bench.members.look()
    assert bench.names() == ["10.0.0.1:8000"]
    bench.members.adopt(moved, found)
    assert bench.names() == ["10.0.0.1:9000"]
    names.asked.clear()
    assert await bench.members.look_ahead(moved) == {}
    assert names.asked == []


async def test_a_pool_that_turns_out_to_be_engines_keeps_prefixes_as_they_do():
    """What was known of the room of an engine that becomes a provider no longer counts."""
    bench = Bench(Names(), Replica("http://a:8000"))
    bench.index.set_capacity(0, 500)  # as the engine states
    bench.index.set_budget(0, 500)
    replicas = (Replica("http://a:8000"),)
    bench.members.adopt(Config(pools=(Pool(name="engines", replicas=replicas, kind=PoolKind.PROVIDER),)))
    assert bench.index.replicas()[0].budget_tokens == UNLIMITED_TOKENS
    bench.members.adopt(bench.config)
    chain = cut(0, [b"x" * 9_000])
    bench.index.place(0, chain, 2_000, 0.0)
    bench.index.tend(1e6)
    assert 0 in bench.index.match(chain).held


async def test_a_configured_capacity_that_is_removed_no_longer_counts():
    """Nor does it stay as a bound of what is learned."""
    bench = Bench(Names(), Replica("http://a:8000", capacity_tokens=1_000))
    bench.members.adopt(Config(pools=(Pool(name="engines", replicas=(Replica("http://a:8000"),)),)))
    assert bench.index.replicas()[0].budget_tokens == UNLIMITED_TOKENS
    bench.members.adopt(bench.config)
    assert bench.index.replicas()[0].budget_tokens == 1_000


async def test_what_a_provider_was_sent_ends_by_time_and_its_capacity_is_not_used():
    """Nothing shows what a provider can hold."""
    pool = Pool("cloud", (Replica("http://cloud", capacity_tokens=5),), kind=PoolKind.PROVIDER, ttl_seconds=300.0)
    index = PrefixIndex()
    members = Discovery(Config(pools=(pool,)), Fleet(Random(1).random), index, FakeClock(), Names())
    chain = cut(0, [b"x" * 9_000])
    index.place(0, chain, 2_000, 0.0)
    assert members.pools.all[0].is_provider
    assert index.replicas()[0].budget_tokens != 5
    index.tend(299.0)
    assert 0 in index.match(chain).held
    index.tend(301.0)
    assert index.match(chain).held == {}


@pytest.mark.parametrize(
    ("clients", "key", "shares"),
    [((), None, False), ((), Secret("own"), True), ((Client("a", "0" * 64),), None, True)],
)
def test_clients_share_a_key_if_the_replica_has_its_own_or_if_they_are_listed(
    clients: tuple[Client, ...], key: Secret | None, shares: bool
) -> None:
    """Then only Cairn knows whose an object is."""
    config = Config(pools=(Pool("p", (Replica("http://r", key=key),)),), clients=clients)
    members = Discovery(config, Fleet(Random(1).random), PrefixIndex(), FakeClock(), Names())
    assert members.pools.all[0].shares_key is shares
    assert members.pools.all[0].has_own_key is (key is not None)


@pytest.mark.parametrize(
    ("clients", "key", "is_open", "accepts"),
    [
        ((), Secret("own"), True, True),
        ((), Secret("own"), False, False),
        ((), None, True, False),
        ((Client("a", "0" * 64),), Secret("own"), True, False),
    ],
)
def test_any_key_is_accepted_where_a_replica_s_own_is_open_to_anyone(
    clients: tuple[Client, ...], key: Secret | None, is_open: bool, accepts: bool
) -> None:
    """Neither Cairn nor the upstream checks the keys of clients then."""
    pools = (Pool("p", (Replica("http://r", key=key),)),)
    config = Config(pools=pools, clients=clients, server=Server(open=is_open))
    members = Discovery(config, Fleet(Random(1).random), PrefixIndex(), FakeClock(), Names())
    assert members.pools.all[0].accepts_any_key is accepts
