"""Tenants and priorities: who is served next, and how much each gets."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count, pairwise
from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.replication import codec
from proxy.routing import fair_shares
from proxy.routing.fair_shares import (
    ACTIVE_SECONDS,
    CHECK_SECONDS,
    FLOOR,
    MAX_OWED_TOKENS,
    MAX_PEERS,
    MAX_TENANTS,
    NEWCOMER_GROUPS,
    QUANTUM_TOKENS,
    SENDS,
    Claimant,
    FairQueue,
    Priority,
    TenantShares,
)
from proxy.routing.shortest_job import Entry, ShortestJobQueue
from tests.support.operations import operations


def queue(shares: TenantShares | None = None) -> FairQueue[str]:
    """First come, first served within a tenant."""
    return FairQueue(shares or TenantShares(), lambda: ShortestJobQueue(inf, 1.0))


def claimant(
    name: str, tenant: str = "a", tokens: float = 100.0, priority: Priority = Priority.NORMAL, weight: float = 1.0
) -> Claimant[str]:
    return Claimant(name, tenant, weight, priority, tokens)


def served(waiting: FairQueue[str], count: int) -> list[Claimant[str]]:
    """The next `count` requests, taken out."""
    out = []
    for _ in range(count):
        head = waiting.head(0.0)
        assert head is not None
        waiting.serve(head)
        out.append(head)
    return out


def test_one_tenant_alone_is_served_in_the_order_of_the_queue():
    """Its rounds do not matter, and it gets everything."""
    waiting = queue()
    for number in range(10):
        waiting.join(claimant(str(number), tokens=5 * QUANTUM_TOKENS), 0.0, float(number))
    assert [each.item for each in served(waiting, 10)] == [str(number) for number in range(10)]
    assert waiting.head(0.0) is None


def test_a_request_of_another_tenant_does_not_wait_for_a_flood():
    """It goes after the one that is served now, though 24 long ones came before it."""
    waiting = queue()
    for number in range(24):
        waiting.join(claimant(f"flood {number}", "flood", 100_000), 0.0, float(number))
    served(waiting, 1)
    waiting.join(claimant("small", "other", 200), 0.0, 30.0)
    assert [each.item for each in served(waiting, 1)] == ["small"]


def test_being_idle_earns_nothing():
    """A tenant that comes after an hour of the other's work gets its share from then on, and not the hour."""
    shares = TenantShares()
    for _ in range(100):
        shares.serve("old", 50_000)
    waiting = queue(shares)
    for number in range(40):
        waiting.join(claimant("old", "old", QUANTUM_TOKENS), 0.0, float(number))
        waiting.join(claimant("new", "new", QUANTUM_TOKENS), 0.0, float(number))
    first = [each.item for each in served(waiting, 20)]
    assert 9 <= first.count("new") <= 17  # equal but for the last of the old one's work, which was 50,000 tokens


@given(
    st.lists(st.floats(1.0, 50_000.0), min_size=8, max_size=12).map(lambda sizes: sizes * 10),
    st.lists(st.floats(1.0, 50_000.0), min_size=8, max_size=12).map(lambda sizes: sizes * 10),
    st.sampled_from([0.5, 1.0, 2.0, 5.0]),
)
def test_two_that_always_wait_differ_by_no_more_than_a_round_and_a_request(ours, theirs, weight):
    """Work over weight, at every moment while both wait, whatever the sizes."""
    waiting = queue()
    for tenant, sizes, each in (("a", ours, weight), ("b", theirs, 1.0)):
        for number, tokens in enumerate(sizes):
            waiting.join(claimant("", tenant, tokens, weight=each), 0.0, float(number))
    got = {"a": 0.0, "b": 0.0}
    left = {"a": len(ours), "b": len(theirs)}
    while min(left.values()) > 0:
        head = waiting.head(0.0)
        assert head is not None
        waiting.serve(head)
        got[head.tenant] += head.tokens / head.weight
        left[head.tenant] -= 1
        if min(left.values()) > 0:
            largest = max(*ours, *(each * weight for each in theirs)) / weight
            assert abs(got["a"] - got["b"]) <= largest + QUANTUM_TOKENS


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(list(Priority)), st.floats(1, 90_000)), max_size=60)
)
def test_every_request_is_served_once_or_left(requests):
    """Nothing is lost or served twice, and the count is right."""
    waiting = queue()
    all_of = [
        waiting.join(claimant(str(n), tenant, tokens, priority), 0.0, float(n))
        for n, (tenant, priority, tokens) in enumerate(requests)
    ]
    for gone in all_of[::3]:
        waiting.leave(gone)
        waiting.leave(gone)
    remain = {each.item for each in all_of} - {each.item for each in all_of[::3]}
    assert len(waiting) == len(remain) == sum(waiting.waiting().values())
    assert {each.item for each in served(waiting, len(remain))} == remain
    assert len(waiting) == 0


def test_a_higher_priority_goes_first_and_a_lower_one_keeps_a_floor():
    """Twenty to one while both wait; afterwards the lower one has everything."""
    waiting = queue()
    for number in range(200):
        waiting.join(claimant("high", tokens=1_000, priority=Priority.HIGH), 0.0, float(number))
    for number in range(20):
        waiting.join(claimant("low", tokens=1_000, priority=Priority.LOW), 0.0, float(number))
    order = [each.item for each in served(waiting, 105)]
    assert order[0] == "high"
    assert order.count("low") == round(FLOOR * 100)
    assert {each.item for each in served(waiting, 115)} == {"high", "low"}
    assert len(waiting) == 0


def test_a_priority_saves_up_only_while_its_requests_wait():
    """One that comes after much work of a higher priority has no claim to a part of it."""
    waiting = queue()
    for number in range(300):
        waiting.join(claimant("high", tokens=1_000, priority=Priority.HIGH), 0.0, float(number))
    served(waiting, 200)
    waiting.join(claimant("low", tokens=1_000, priority=Priority.LOW), 0.0, 300.0)
    assert {each.item for each in served(waiting, 10)} == {"high"}


def test_a_request_longer_than_the_floor_saves_up_is_served_all_the_same():
    """Or a very long prompt of a low priority would starve."""
    waiting = queue()
    waiting.join(claimant("long", tokens=10 * MAX_OWED_TOKENS, priority=Priority.LOW), 0.0, 0.0)
    for number in range(100):
        waiting.join(claimant("high", tokens=100_000, priority=Priority.HIGH), 0.0, float(number))
    assert "long" in [each.item for each in served(waiting, 60)]


def test_what_other_processes_served_counts_here():
    """A tenant that floods another proxy waits here until the others have as much."""
    here, there = TenantShares(), TenantShares()
    there.serve("flood", 10 * QUANTUM_TOKENS)
    here.absorb("there", there.rows(), 0.0)
    waiting = queue(here)
    waiting.join(claimant("flood", "flood"), 0.0, 0.0)
    waiting.join(claimant("other", "other"), 0.0, 1.0)
    assert served(waiting, 1)[0].item == "other"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([500.0, 9_000.0, 90_000.0])), min_size=1, max_size=60),
    st.dictionaries(st.sampled_from("abc"), st.floats(0.0, 1e6)),
)
def test_what_goes_before_a_request_is_known_when_it_comes(requests, done):
    """If nobody else comes: for each other tenant by no more than a round and a request."""
    shares = TenantShares()
    for tenant, tokens in done.items():
        shares.serve(tenant, tokens, contended=True)
    waiting = queue(shares)
    for place, (tenant, tokens) in enumerate(requests):
        waiting.join(claimant(str(place), tenant, tokens), 0.0, float(place))
    last = requests[-1][0]
    own, others = 0.0, dict.fromkeys({tenant for tenant, _ in requests} - {last}, 0.0)
    for tenant, tokens in requests[:-1]:
        if tenant == last:
            own += tokens
        else:
            others[tenant] += tokens
    expected = {each: shares.most_before(last, own, {each: tokens}) for each, tokens in others.items()}
    actual = dict.fromkeys(others, 0.0)
    while (head := served(waiting, 1)[0]).item != str(len(requests) - 1):
        if head.tenant != last:
            actual[head.tenant] += head.tokens
    for tenant, tokens in actual.items():
        assert abs(tokens - expected[tenant]) <= QUANTUM_TOKENS + 90_000.0


def test_what_goes_before_a_request_depends_on_the_weights_of_both_tenants():
    """The rounds are of work over weight."""
    shares = TenantShares()
    for tenant, weight in (("own", 2.0), ("other", 4.0)):
        shares.seen(tenant, weight, 0.0)
    assert shares.most_before("own", 0.0, {"other": inf}) == 4 * QUANTUM_TOKENS
    assert shares.most_before("own", 2 * QUANTUM_TOKENS, {"other": inf}) == 8 * QUANTUM_TOKENS


def test_a_tenant_begins_where_it_is_if_it_waits_and_else_no_lower_than_the_point_reached():
    """What goes before it depends on that; who is a round behind goes first with as much as that."""
    shares = TenantShares()
    shares.serve("slow", QUANTUM_TOKENS, contended=True)
    shares.serve("fast", 5 * QUANTUM_TOKENS, contended=True)
    shares.serve("fast", QUANTUM_TOKENS, contended=True)  # the point reached is that of the last begin: five rounds
    assert shares.most_before("slow", 0.0, {"fast": inf}) == 0.0
    assert shares.most_before("slow", 0.0, {"new": inf}) == QUANTUM_TOKENS
    shares.waits("slow", 1)
    assert shares.most_before("slow", 0.0, {"new": inf}) == 0.0
    assert shares.most_before("new", 0.0, {"slow": inf}) == 5 * QUANTUM_TOKENS


def test_a_row_that_is_repeated_adds_nothing_though_its_process_has_learned_of_more():
    """The others tell that themselves."""
    here = TenantShares()
    for total in (QUANTUM_TOKENS, QUANTUM_TOKENS, 9 * QUANTUM_TOKENS):
        here.absorb("there", {"\0tenant:a": (QUANTUM_TOKENS, total, 0.0)}, 0.0)
    assert here.most_before("b", 0.0, {"a": inf}) == 0.0
    assert here.round_of("a") == 1


def test_a_new_configuration_changes_the_weights_of_what_waits_already():
    """And what is known of the tenants' parts; whoever is not in it keeps the weight that it had."""
    shares = TenantShares()
    waiting: FairQueue[str] = FairQueue(shares, lambda: ShortestJobQueue(120.0))
    for tenant in "abc":
        shares.seen(tenant, 1.0, 0.0)
        for _ in range(40):
            waiting.join(claimant(tenant, tenant, QUANTUM_TOKENS), 0.0, 0.0)
    shares.set_weights({"a": 1.0, "b": 4.0})
    got: list[str] = []
    for _ in range(36):
        head = waiting.head(0.0)
        assert head is not None
        waiting.serve(head)
        got.append(head.item)
    assert [got.count(each) for each in "abc"] == [6, 24, 6]
    assert shares.share_of("b", 0.05) == pytest.approx(4 / 6)
    assert shares.weight_of("c") == 1.0


def test_what_another_process_did_for_a_tenant_leaves_the_weight_that_is_known_here():
    """It is unknown only where no request of the tenant came."""
    here = TenantShares()
    here.seen("a", 4.0, 0.0)
    here.absorb("there", {f"\0tenant:{tenant}": (1.0, 1.0, 0.0) for tenant in "ab"}, 0.0)
    assert here.most_before("b", 0.0, {"a": inf}) == pytest.approx(4 * QUANTUM_TOKENS)
    assert here.share_of("b", 0.0) == pytest.approx(0.2)


def test_a_process_of_which_nothing_is_known_can_be_forgotten():
    """And tenants that some processes never served, once there are too many."""
    here = TenantShares()
    here.forget("unknown")
    here.absorb("there", {"\0tenant:x": (1.0, 1.0, 0.0)}, 0.0)
    for number in range(2 * MAX_TENANTS):
        here.serve(str(number), 1.0)
    assert len(here._tenants) == MAX_TENANTS  # noqa: SLF001 - internal state that no public name shows


def test_rows_may_be_lost_repeated_and_come_again():
    """They are cumulative: the newest alone counts, and a repeated one changes nothing."""
    there, lossy, exact = TenantShares(), TenantShares(), TenantShares()
    for number in range(10):
        there.serve("a", QUANTUM_TOKENS, contended=True)
        exact.absorb("there", there.rows(), 0.0)
        if number in (3, 9):
            lossy.absorb("there", there.rows(), 0.0)
            lossy.absorb("there", there.rows(), 0.0)
    assert lossy.round_of("a") == exact.round_of("a") == 10


def test_work_of_a_process_that_is_gone_stays_counted():
    """Otherwise its tenant would be given it a second time."""
    here, there = TenantShares(), TenantShares()
    there.serve("a", 5 * QUANTUM_TOKENS)
    here.absorb("there", there.rows(), 0.0)
    here.forget("there")
    assert here.round_of("a") == 5


def test_a_process_that_begins_anew_under_the_same_name_adds_to_what_is_counted():
    """Its counts begin at zero again, and are not the difference from those of its predecessor."""
    here = TenantShares()
    for _ in range(2):
        there = TenantShares()
        here.serve("a", QUANTUM_TOKENS)
        there.absorb("here", here.rows(), 0.0)
        there.serve("a", 4 * QUANTUM_TOKENS)
        here.absorb("there", there.rows(), 0.0)
        here.forget("there")
    assert here.round_of("a") == 10


def test_a_process_that_begins_counts_no_tenant_s_past_twice():
    """It knows the point that service has reached, and no tenant's own work."""
    old, new = TenantShares(), TenantShares()
    for _ in range(1_000):
        for tenant in ("a", "b"):
            old.serve(tenant, QUANTUM_TOKENS, contended=True)
    while old.rows():
        pass  # its news are old
    old.serve("b", QUANTUM_TOKENS, contended=True)
    new.absorb("old", old.rows(), 0.0)
    new.activate("a")
    new.serve("a", QUANTUM_TOKENS, contended=True)
    old.absorb("new", new.rows(), 0.0)
    old.serve("a", QUANTUM_TOKENS, contended=True)
    new.absorb("old", old.rows(), 0.0)
    assert old.round_of("a") in range(1_001, 1_004)
    assert new.round_of("a") in range(1_001, 1_004)


def test_it_does_not_matter_who_notes_first_that_a_process_is_gone():
    """Its work is counted once by everyone, though one who knows speaks to one who does not."""
    gone, first, second = TenantShares(), TenantShares(), TenantShares()
    gone.serve("a", 10 * QUANTUM_TOKENS)
    for each in (first, second):
        each.absorb("gone", gone.rows(), 0.0)
    first.forget("gone")
    first.serve("a", QUANTUM_TOKENS)
    second.absorb("first", first.rows(), 0.0)
    second.forget("gone")
    second.serve("a", QUANTUM_TOKENS)
    first.absorb("second", second.rows(), 0.0)
    assert first.round_of("a") == second.round_of("a") == 12


def test_only_the_latest_processes_are_remembered():
    """One that was killed says no goodbye."""
    here, there = TenantShares(), TenantShares()
    for number in range(MAX_PEERS + 10):
        there.serve("a", 1.0)
        here.absorb(f"there-{number}", there.rows(), 0.0)
    assert len(here._peers) == MAX_PEERS  # noqa: SLF001 - nothing else shows it


class Processes:
    """Processes that serve two tenants which always wait, and hear of each other now and then."""

    def __init__(self, random: Random, names: Iterable[int]) -> None:
        self.random = random
        self.shares = {name: TenantShares() for name in names}
        self.served = {"a": 0.0, "b": 0.0}

    def serve(self) -> None:
        shares = self.random.choice(list(self.shares.values()))
        tenant = min(self.served, key=lambda each: (shares.round_of(each), self.random.random()))
        tokens = self.random.choice([1_000.0, 20_000.0, 100_000.0])
        shares.serve(tenant, tokens, contended=True)
        self.served[tenant] += tokens

    def tell(self, name: int, loss: float) -> None:
        rows = self.shares[name].rows()
        for other, shares in self.shares.items():
            if other != name and self.random.random() >= loss:
                shares.absorb(str(name), rows, 0.0)

    def replace(self, successor: int) -> None:
        name = self.random.choice(list(self.shares))
        del self.shares[name]
        for shares in self.shares.values():
            if self.random.random() < 0.5:
                shares.forget(str(name))
        self.shares[successor] = TenantShares()
        for tenant in self.served:
            self.shares[successor].activate(tenant)


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.3]))
def test_two_that_always_wait_get_the_same_while_processes_come_and_go(seed: int, loss: float) -> None:
    """The difference is that of some messages, however much was served before, and does not grow."""
    processes = Processes(Random(seed), range(3))
    for step in range(400):
        processes.serve()
        for name in processes.shares:
            processes.tell(name, loss)
        if step % 40 == 39:
            processes.replace(step)
    assert abs(processes.served["a"] - processes.served["b"]) < 1_500_000.0


def test_a_row_that_is_a_replicas_changes_nothing():
    """The rows travel beside those of replicas."""
    here = TenantShares()
    here.serve("a", 100.0)
    before = here.round_of("a"), here.round_of("other")
    here.absorb("there", {"replica-1": (1.0, 2.0), "\0tenant:a": (1.0, 1e9)}, 0.0)
    assert (here.round_of("a"), here.round_of("other")) == before


def test_only_what_changed_lately_is_told():
    """A quiet process has nothing to say."""
    here = TenantShares()
    assert here.rows() == {}
    here.serve("a", 100.0)
    assert {len(here.rows()) for _ in range(SENDS)} == {2}
    assert here.rows() == {}


@pytest.mark.parametrize("damage", [0.0, 1e18])
def test_what_is_told_is_understood_after_a_year_and_after_a_damaged_message(damage: float) -> None:
    """A hundredth as weight, and a hundred replicas of 20,000 tokens a second."""
    here = TenantShares()
    here.absorb("damaged", {"\0shares": (damage,), "\0tenant:a": (0.0, damage, damage)}, 0.0)
    for tenant in ("a", "b", "a"):
        here.serve(tenant, 2e6 * 31e6, 0.01)
    vector = codec.Vector(1, {**here.rows(), "replica-1": (1.0,) * 7})
    assert codec.decode_vector(codec.encode_vector(codec.own_head(codec.VECTOR_VERSION, "w"), vector))[1] == vector
    assert len(vector.rows) == (1 if damage else 4)


def test_a_tenant_is_active_for_ten_seconds_and_its_part_is_its_weight():
    """One that is alone has all of it."""
    here = TenantShares()
    here.seen("a", 1.0, 0.0)
    assert (here.share_of("a", 1.0), here.is_contended(1.0)) == (1.0, False)
    here.seen("b", 3.0, 2.0)
    assert (here.share_of("a", 2.0), here.share_of("b", 2.0), here.is_contended(2.0)) == (0.25, 0.75, True)
    here.seen("a", 1.0, 11.0)
    assert (here.share_of("a", 12.5), here.is_contended(12.5)) == (1.0, False)


def test_a_tenant_that_only_another_process_serves_has_the_part_of_one():
    """Its weight is not known here."""
    here, there = TenantShares(), TenantShares()
    there.serve("theirs", QUANTUM_TOKENS)
    here.seen("ours", 1.0, 0.0)
    here.absorb("there", there.rows(), 0.0)
    assert here.share_of("ours", 0.0) == 0.5


def test_a_tenant_whose_requests_wait_is_active_however_long_ago_they_came():
    """A flood that came at once is as active as one that goes on coming; and so is whoever was just served."""
    shares = TenantShares()
    waiting = queue(shares)
    for tenant in ("flood", "other"):
        shares.seen(tenant, 1.0, 0.0)
    flood = waiting.join(claimant("long", "flood"), 0.0, 0.0)
    assert shares.share_of("other", 60.0) == 1.0  # only the flood is left
    shares.seen("other", 1.0, 60.0)
    assert shares.share_of("other", 60.5) == 0.5
    waiting.serve(flood)
    assert shares.share_of("other", 69.0) == 0.5
    assert shares.share_of("other", 80.0) == 1.0


def jain(amounts: list[float]) -> float:
    """Jain's index of fairness: 1 if all have the same, 1/n if one has everything."""
    return sum(amounts) ** 2 / (len(amounts) * sum(amount * amount for amount in amounts))


def test_four_equal_tenants_are_served_equally_whatever_they_send():
    """Jain's index of the work done is at least .95 from the fourth round of the longest requests on, and of
    requests of 200 to 100,000 tokens."""
    shares = TenantShares()
    waiting = queue(shares)
    sizes = {"short": 200.0, "middle": 4_000.0, "long": 20_000.0, "longest": 100_000.0}
    done = dict.fromkeys(sizes, 0.0)
    for tenant, tokens in sizes.items():
        for number in range(int(2_000_000 / tokens)):
            waiting.join(claimant(str(number), tenant, tokens), 0.0, 0.0)
    while sum(done.values()) < 4_000_000:
        head = waiting.head(0.0)
        assert head is not None
        waiting.serve(head)
        done[head.tenant] += head.tokens
        if sum(done.values()) > 1_600_000:  # several of the longest requests each
            assert jain(list(done.values())) >= 0.95
    assert jain(list(done.values())) >= 0.99


def test_weights_are_the_shares_of_the_work():
    """A tenant of weight 3 has three quarters of it while both wait."""
    waiting = queue()
    for number in range(400):
        waiting.join(claimant(str(number), "heavy", 4_000.0, weight=3.0), 0.0, 0.0)
        waiting.join(claimant(str(number), "light", 4_000.0), 0.0, 0.0)
    order = [each.tenant for each in served(waiting, 400)]
    assert 0.72 < order.count("heavy") / len(order) < 0.78


def test_a_tenant_that_comes_back_is_lifted_to_the_others_and_no_further():
    """Its pause is no credit, and costs it nothing either: from then on they take turns."""
    shares = TenantShares()
    for tenant in "ab":
        shares.seen(tenant, 1.0, 0.0)
    for _ in range(10):
        shares.serve("a", QUANTUM_TOKENS)
    for _ in range(30):
        shares.serve("b", QUANTUM_TOKENS)
    shares.serve("a", QUANTUM_TOKENS)
    assert abs(shares.round_of("a") - shares.round_of("b")) <= 1


def test_tenants_that_are_no_longer_active_are_forgotten_even_if_no_request_ever_waits():
    """Without listed clients every key is a tenant, and a client may invent as many as it likes."""
    shares = TenantShares()
    for number in range(5 * MAX_TENANTS):
        shares.seen(f"key {number}", 1.0, number * 10.0 * ACTIVE_SECONDS / MAX_TENANTS)
    assert len(shares._seen) <= MAX_TENANTS + 1  # noqa: SLF001 - nothing else shows it
    assert shares.share_of(f"key {5 * MAX_TENANTS - 1}", 5e9) == 1.0


def test_a_tenant_that_is_served_alone_is_at_the_point_that_service_has_reached() -> None:
    """It does not save up turns while nobody else waits."""
    for others, expected in ((0, 21), (1, 11)):
        shares = TenantShares()
        queue: FairQueue[int] = FairQueue(shares, lambda: ShortestJobQueue(120.0))
        for _ in range(2):
            shares.serve("a", 10 * QUANTUM_TOKENS)
        waits = queue.join(Claimant(1, "b", 1.0, Priority.NORMAL, QUANTUM_TOKENS), 1.0, 0.0)
        for number in range(others):
            queue.join(Claimant(number, "c", 1.0, Priority.NORMAL, 1.0), 1.0, 0.0)
        shares.serve("a", 1.0)
        queue.serve(waits)
        assert shares.round_of("b") == expected


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(Priority), st.floats(1.0, 1e5)), max_size=20),
    st.sampled_from(["", "a"]),
)
def test_the_requests_in_order_are_all_that_wait_each_once_and_the_first_is_the_head(requests, skipped):
    """But for those of tenants that are skipped; within a tenant and priority in the order of their queue."""
    waiting = queue()
    for number, (tenant, priority, tokens) in enumerate(requests):
        waiting.join(claimant(str(number), tenant, tokens, priority), 0.0, float(number))
    order = list(waiting.in_order(0.0, {skipped}))
    assert next(iter(order), None) is waiting.head(0.0, {skipped})
    expected = [number for number, (tenant, _, _) in enumerate(requests) if tenant != skipped]
    assert sorted(int(each.item) for each in order) == expected
    places = [(each.tenant, each.priority, int(each.item)) for each in order]
    for mine in {place[:2] for place in places}:
        assert [place for place in places if place[:2] == mine] == sorted(
            place for place in places if place[:2] == mine
        )


class Plain:
    """The rule, by a look at all who wait each time: reads the rounds of `shares`, and changes nothing there."""

    def __init__(self, shares: TenantShares, deadline_seconds: float) -> None:
        self.shares = shares
        self.deadline_seconds = deadline_seconds
        self.lines: dict[tuple[Priority, str], ShortestJobQueue[int]] = {}
        self.entries: dict[int, tuple[Priority, str, float, Entry[int]]] = {}
        self.owed = dict.fromkeys(Priority, 0.0)

    def join(self, number: int, of: Claimant[int], work_seconds: float, now: float) -> None:
        key = of.priority, of.tenant
        line = self.lines.setdefault(key, ShortestJobQueue(self.deadline_seconds))
        self.entries[number] = *key, of.tokens, line.join(number, work_seconds, now)

    def leave(self, number: int, *, is_served: bool = False) -> None:
        priority, tenant, tokens, entry = self.entries.pop(number)
        self.lines[priority, tenant].leave(entry)
        if is_served:
            self.owed[priority] = max(self.owed[priority] - tokens, 0.0)
            waiting = {each for each, *_ in self.entries.values()}
            for lower in [each for each in Priority if each > priority]:
                saved = min(self.owed[lower] + FLOOR * tokens, MAX_OWED_TOKENS)
                self.owed[lower] = saved if lower in waiting else 0.0

    def in_order(self, now: float, skipped: set[str]) -> list[int]:
        left = {
            key: [entry.item for entry in line.in_order(now)]
            for key, line in self.lines.items()
            if len(line) and key[1] not in skipped
        }
        order = []
        while left:
            firsts: dict[Priority, tuple[int, float, str]] = {}
            for (priority, tenant), numbers in left.items():
                entry = self.entries[numbers[0]][3]
                place = self.shares.round_of(tenant), self.lines[priority, tenant].key(entry), tenant
                firsts[priority] = min(place, firsts.get(priority, place))
            tokens = {each: self.entries[left[each, firsts[each][2]][0]][2] for each in firsts}
            owed = [each for each in sorted(firsts) if self.owed[each] >= min(tokens[each], MAX_OWED_TOKENS)]
            chosen = next((each for each in owed if each > min(firsts)), min(firsts))
            key = chosen, firsts[chosen][2]
            order.append(left[key].pop(0))
            if not left[key]:
                del left[key]
        return order


@pytest.mark.parametrize("seed", range(30))
def test_the_order_is_that_of_a_look_at_all_who_wait(seed: int, monkeypatch: pytest.MonkeyPatch):
    """Whoever joins, leaves and is served in this queue or another one, whatever other processes say, with any
    deadline, any tenants skipped, and tenants forgotten that still wait."""
    random = Random(seed)
    monkeypatch.setattr(fair_shares, "MAX_TENANTS", random.choice([3, 8, MAX_TENANTS]))
    shares, deadline_seconds, now = TenantShares(), random.choice([inf, 20.0, 5.0]), 0.0
    waiting: FairQueue[int] = FairQueue(shares, lambda: ShortestJobQueue(deadline_seconds))
    plain, claimants = Plain(shares, deadline_seconds), dict[int, Claimant[int]]()
    tenants = [f"t{number}" for number in range(random.choice([1, 3, 10]))]
    peers = {name: TenantShares() for name in "pq"}
    for number in range(200):
        now += random.choice([0.0, 0.1, 1.0, 5.0])
        tenant, tokens = random.choice(tenants), random.choice([100.0, 3_000.0, QUANTUM_TOKENS, 90_000.5])
        action, skipped = random.random(), set(random.sample(tenants, random.randrange(min(len(tenants), 3) + 1)))
        if action < 0.45:
            claims = Claimant(number, tenant, random.choice([1.0, 2.0, 0.01]), random.choice([*Priority]), tokens)
            work_seconds = 20.0 * random.random()
            claimants[number] = waiting.join(claims, work_seconds, now)
            plain.join(number, claims, work_seconds, now)
        elif action < 0.55 and claimants:
            leaves = random.choice([*claimants])
            waiting.leave(claimants.pop(leaves))
            plain.leave(leaves)
        elif action < 0.65:
            name, peer = random.choice([*peers.items()])
            peer.serve(tenant, tokens, contended=action < 0.6)
            shares.absorb(name, {key: row for key, row in peer.rows().items() if random.random() < 0.9}, now)
        elif action < 0.7:
            shares.serve(tenant, tokens)
        elif (head := waiting.head(now)) is not None:
            waiting.serve(head)
            claimants.pop(head.item)
            plain.leave(head.item, is_served=True)
        expected = plain.in_order(now, skipped)
        head = waiting.head(now, skipped)
        assert (None if head is None else head.item) == next(iter(expected), None)
        assert [each.item for each in waiting.in_order(now, skipped)] == expected
        assert waiting.highest(skipped) == min([plain.entries[each][0] for each in expected], default=None)


def test_who_is_next_takes_no_longer_to_find_where_more_tenants_wait():
    """A worker looks hundreds of times a second, and without listed clients every key is a tenant."""

    def cost(tenants: int) -> int:
        waiting = queue()
        for number in range(tenants):
            waiting.join(claimant("", f"t{number:04}"), 0.0, float(number))
        waiting.head(0.0, {"t0000"})
        return operations(lambda: (waiting.head(0.0), waiting.highest(), waiting.head(0.0, {"t0000"})))

    assert cost(1_000) == cost(10)


def test_if_the_first_may_not_go_the_next_one_of_the_same_tenant_comes_next_in_order():
    """By rounds, as if the first did not wait."""
    waiting = queue()
    mine = [waiting.join(claimant(str(n), "a"), 0.0, float(n)) for n in range(2)]
    other = waiting.join(claimant("other", "b"), 0.0, 0.5)
    urgent = waiting.join(claimant("urgent", "b", priority=Priority.HIGH), 0.0, 2.0)
    assert list(waiting.in_order(2.0)) == [urgent, mine[0], other, mine[1]]


def test_a_message_costs_no_more_where_its_sender_has_served_more_tenants():
    """It names a few, and comes two hundred times a second from each other worker."""

    def cost(tenants: int) -> int:
        here = TenantShares()
        here.absorb("there", {f"\0tenant:{number}": (5.0, 5.0, 0.0) for number in range(tenants)}, 0.0)
        return operations(lambda: here.absorb("there", {"\0tenant:0": (6.0, 6.0, 0.0)}, 0.0))

    assert cost(MAX_TENANTS) == cost(1)


def test_what_another_process_says_is_remembered_of_no_more_tenants_than_there_may_be():
    """However many it has served in all."""
    here = TenantShares()
    for number in range(2 * MAX_TENANTS):
        here.absorb("there", {f"\0tenant:{number}": (5.0, 5.0, 0.0)}, 0.0)
    assert len(here._peers["there"]) == MAX_TENANTS  # noqa: SLF001 - internal state that no public name shows


class Strangers:
    """One replica, and tenants that send one turn after another, some of which were answered before."""

    def __init__(self, answered: Iterable[str]) -> None:
        self.shares, self.now = TenantShares(), 0.0
        self.waiting = queue(self.shares)
        self.numbers = count()
        for tenant in answered:
            self.shares.answered(tenant)

    def ask(self, tenant: str, tokens: float = 20_000.0) -> None:
        name = self.shares.name_of(tenant)
        if name == tenant:
            self.shares.seen(tenant, 1.0, self.now)
        else:
            self.shares.newcomer_seen(tenant, self.now)
        self.waiting.join(claimant(tenant, name, tokens, weight=self.shares.weight_of(name)), 0.0, self.now)

    def serve(self, turns: int) -> list[str]:
        """Serve at 10,000 tokens a second; each asks again, with another key if it made up the first. Return who was
        served, in order."""
        out = []
        for _ in range(turns):
            head = self.waiting.head(self.now)
            assert head is not None
            self.waiting.serve(head)
            self.now += head.tokens / 10_000.0
            self.ask(f"made up {next(self.numbers)}" if head.item.startswith("made up") else head.item)
            out.append(head.item)
        return out


def gaps(order: list[str], tenant: str) -> int:
    """The most turns of others between two of a tenant."""
    places = [-1, *[place for place, each in enumerate(order) if each == tenant], len(order)]
    return max(after - before - 1 for before, after in pairwise(places))


@pytest.mark.parametrize("known", [1, 4])
def test_made_up_tenants_without_end_get_at_most_half_while_others_wait(known: int):
    """400 newcomers wait, each with 2 s of work: the others wait for a few of them each time, not for all."""
    tenants = [f"known {number}" for number in range(known)]
    bench = Strangers(tenants)
    for tenant in tenants:
        bench.ask(tenant)
    bench.now += 1.0
    for _ in range(400):
        bench.ask(f"made up {next(bench.numbers)}")
    order = bench.serve(400)
    of_known = [each for each in order if each in tenants]
    assert 0.45 * len(order) <= len(of_known) <= 0.6 * len(order)
    for tenant in tenants:
        assert gaps(order, tenant) <= len(NEWCOMER_GROUPS) + 2 * known


def test_a_few_newcomers_get_what_they_would_get_as_tenants():
    """One beside three others has a quarter."""
    bench = Strangers("abc")
    for tenant in "abc":
        bench.ask(tenant)
    bench.now += 1.0
    bench.ask("new")
    assert 9 <= bench.serve(40).count("new") <= 11


def test_tenants_are_equal_while_nobody_was_answered_and_once_all_were():
    """A proxy that has just started knows nobody; a flood keeps no other newcomer waiting then."""
    shares = TenantShares()
    assert shares.name_of("a") == "a"
    shares.answered("b")
    assert shares.name_of("a") in NEWCOMER_GROUPS
    shares.answered("a")
    assert [shares.name_of(each) for each in "ab"] == ["a", "b"]


def test_a_newcomer_that_is_answered_does_not_share_with_itself():
    """It has everything if it is alone, and is as active as before."""
    shares = TenantShares()
    shares.answered("gone")
    shares.newcomer_seen("new", 0.0)
    shares.answered("new")
    assert shares.share_of("new", 1.0) == 1.0
    shares.seen("other", 1.0, 1.5)
    assert shares.share_of("other", 1.5) == 0.5


def test_a_tenant_has_its_share_from_its_first_request_on():
    """Also within the time for which the set of active tenants is kept: a flood would be sent whole in it."""
    shares = TenantShares()
    shares.seen("old", 1.0, 0.0)
    shares.answered("old")
    assert shares.share_of("old", 0.0) == 1.0
    shares.newcomer_seen("new", CHECK_SECONDS / 4)
    assert shares.share_of(shares.name_of("new"), CHECK_SECONDS / 4) == 0.5
    assert shares.share_of("old", CHECK_SECONDS / 4) == 0.5
    shares.seen("third", 2.0, CHECK_SECONDS / 2)
    assert shares.share_of("third", CHECK_SECONDS / 2) == 0.5


@pytest.mark.parametrize(("newcomers", "is_alone"), [(1, True), (40, False)])
def test_a_newcomer_that_was_answered_while_its_requests_waited_is_alone_once_these_have_gone(newcomers, is_alone):
    """Its group does not stay active for ten seconds, unless other newcomers are in it."""
    shares = TenantShares()
    shares.answered("gone")
    for number in range(newcomers):
        shares.newcomer_seen(f"new {number}", 0.0)
    group = shares.name_of("new 0")
    shares.waits(group, 1)
    shares.answered("new 0")
    assert shares.share_of("new 0", 1.0) < 1.0
    shares.waits(group, -1)
    assert (shares.share_of("new 0", 2.0) == 1.0) is is_alone


def test_the_other_processes_know_who_was_answered():
    """A tenant that always came to one worker is no newcomer at another one."""
    here, there = TenantShares(), TenantShares()
    here.answered("known")
    vector = codec.Vector(1, here.rows())
    told = codec.decode_vector(codec.encode_vector(codec.own_head(codec.VECTOR_VERSION, "w"), vector))[1]
    there.absorb("w", told.rows, 0.0)
    there.answered("other")
    assert there.name_of("known") == "known"
    assert there.round_of("known") == here.round_of("known")


def test_newcomers_at_other_workers_weigh_together_no_more_than_one_tenant_there():
    """Their weight is not known here, and there may be few of them in each group."""
    here, there = TenantShares(), TenantShares()
    here.seen("known", 1.0, 0.0)
    for group in NEWCOMER_GROUPS:
        there.serve(group, 1_000.0)
    here.absorb("there", there.rows(), 0.0)
    assert here.share_of("known", 0.0) == 0.5


def test_what_is_remembered_of_newcomers_and_answered_tenants_is_bounded(monkeypatch: pytest.MonkeyPatch):
    """Those that were answered lately stay."""
    monkeypatch.setattr(fair_shares, "MAX_ANSWERED", 10)
    shares = TenantShares()
    for number in range(3 * MAX_TENANTS):
        shares.answered("regular")
        shares.answered(f"once {number}")
        shares.newcomer_seen(f"new {number}", 0.0)
    assert shares.name_of("regular") == "regular"
    assert shares.name_of("once 1") != "once 1"
    assert len(shares._newcomers) == MAX_TENANTS  # noqa: SLF001 - nothing else shows it
    assert len(shares._answered) == 10  # noqa: SLF001
    shares.newcomer_seen("late", 2 * ACTIVE_SECONDS)
    assert list(shares._newcomers) == ["late"]  # noqa: SLF001
