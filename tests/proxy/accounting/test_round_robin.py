"""Routing's own part: what was cached beyond what round robin would have had."""

from __future__ import annotations

import random
from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from cache import UNLIMITED_TOKENS, Fingerprint, PrefixIndex, ReplicaStats, chain_root, cut
from proxy.accounting.round_robin import OFFSETS_BYTES, PLACES_SEEN, Gain, RoundRobinBaseline, depths_of_offsets
from proxy.fleet.pools import Pools, ReplicaEndpoint, ServedPool
from proxy.upstream import Origin

URL = "http://127.0.0.1:1/v1"
TOKENS_PER_BYTE = 0.25


class Fleet:
    """Replicas, the real index that routes to them by `replica`, and the shadow beside it."""

    def __init__(
        self,
        replicas: int,
        *,
        budget: int = UNLIMITED_TOKENS,
        provider: bool = False,
        most_places: int = PLACES_SEEN,
    ) -> None:
        backends = {
            n: ReplicaEndpoint(f"r{n}", "p", URL, Origin.parse(URL), is_provider=provider) for n in range(replicas)
        }
        self.shadow = RoundRobinBaseline(Pools([ServedPool("p", ("*",))], "p", backends), most_places)
        self.index = PrefixIndex()
        self.numbers = range(replicas)
        self.follow(budget)

    def follow(self, budget: int = UNLIMITED_TOKENS, epochs: dict[int, int] | None = None) -> None:
        known = epochs or {}
        self.shadow.follow({n: ReplicaStats(0, 0, budget, known.get(n, 0), 0) for n in self.numbers})

    def ask(self, fingerprint: Fingerprint, replica: int = 0) -> Gain | None:
        """Route a prompt to `replica`, whose engine caches exactly what the index says."""
        tokens = int(fingerprint.size_bytes * TOKENS_PER_BYTE)
        held = self.index.match(fingerprint).held.get(replica)
        placement = self.index.place(replica, fingerprint, tokens, 0.0)
        cached = int((held.size_bytes if held else 0) * TOKENS_PER_BYTE)
        self.index.answered(placement, tokens, cached, 10, 0.0)
        return self.shadow.answered(placement, tokens, cached)


def prompt(*parts: str) -> Fingerprint:
    """A prompt of 4,000 bytes for each part; equal parts are equal text."""
    return cut(chain_root([b"m"]), [(part.encode() * 4000)[:4000] for part in parts])


def gained(gain: Gain | None) -> float:
    assert gain is not None
    return gain.cached_tokens - gain.round_robin_tokens


def test_every_place_is_a_boundary_of_every_prompt_that_reaches_it() -> None:
    """This does not depend on where its messages end: two prompts that share a prefix must share its places."""
    chosen = random.Random(3)
    sizes = [chosen.randint(1, 30_000) for _ in range(20)]
    fingerprint = cut(chain_root([b"m"]), [bytes(size) for size in sizes])
    reached = {offset for offset in OFFSETS_BYTES if offset <= sum(sizes)}
    assert reached <= set(fingerprint.ends)


@given(
    st.one_of(
        st.lists(st.one_of(st.integers(1, 600), st.integers(1, 200_000)), min_size=1, max_size=40).map(
            lambda sizes: list(cut(1, [bytes(size) for size in sizes]).ends)
        ),
        st.sets(st.integers(1, 2**26), min_size=1, max_size=200).map(sorted),  # as another version may have cut it
    )
)
def test_each_place_is_found_where_a_search_finds_it(ends: list[int]) -> None:
    """It holds for messages of any lengths, and for boundaries that are not those of the grid."""
    reached = [offset for offset in OFFSETS_BYTES if offset <= ends[-1]]
    assert depths_of_offsets(ends) == [bisect_left(ends, offset) for offset in reached]


def test_a_conversation_that_stays_where_it_began_gains_what_its_turns_would_have_missed() -> None:
    """Of two replicas in turn, each knows the conversation as it was two turns ago."""
    fleet = Fleet(2)
    turns = "abcdefghijklmnop"
    gains = [gained(fleet.ask(prompt(*turns[:count]))) for count in range(1, 17)]
    assert gains[0] == 0
    assert gains[1] == 1000  # the other replica has none of it
    for gain in gains[2:]:
        assert gain == 1000  # one turn less


def test_a_prompt_that_everybody_has_gains_nothing() -> None:
    """Once each replica has been through it."""
    fleet = Fleet(3)
    gains = [gained(fleet.ask(prompt("system", f"q{number}"))) for number in range(12)]
    assert sum(gains[:3]) > 0
    assert gains[3:] == [0] * 9


def test_what_round_robin_would_have_done_better_is_a_loss() -> None:
    """A prompt routed to a cold replica that the turn would have found warm."""
    fleet = Fleet(2)
    fleet.ask(prompt("a", "b"), replica=0)
    fleet.ask(prompt("x", "y"), replica=0)
    assert gained(fleet.ask(prompt("a", "b"), replica=1)) < 0


def test_with_one_replica_or_before_a_provider_there_is_nothing_to_say() -> None:
    """Round robin is all that could be done, or it is another's to do."""
    assert Fleet(1).ask(prompt("a")) is None
    assert Fleet(2, provider=True).ask(prompt("a")) is None


def test_a_prefix_from_before_this_worker_says_nothing() -> None:
    """The index was loaded from a snapshot; what round robin would hold of it nobody knows."""
    fleet = Fleet(2)
    old = prompt("a", "b")
    fleet.index.answered(fleet.index.place(0, old, 2000, 0.0), 2000, 0, 10, 0.0)
    assert fleet.ask(old) is None
    assert fleet.ask(old) is not None


def test_what_other_workers_route_is_known_too() -> None:
    """Their turns are told by the ids of their placements."""
    fleet = Fleet(2)
    shared = prompt("a", "b")
    for placement in (100, 101):
        fleet.index.apply_place(0, shared, 2000, 0, placement, 0.0)
        fleet.shadow.placed(placement, 0, shared, 2000)
    assert gained(fleet.ask(shared)) == 0


def test_a_replica_that_began_anew_holds_nothing_on_paper_either() -> None:
    """Its epoch is the index's."""
    fleet = Fleet(2)
    shared = prompt("a", "b")
    for _ in range(4):
        fleet.ask(shared)
    fleet.follow(epochs={0: 1, 1: 1})
    assert gained(fleet.ask(shared)) == 2000


def test_a_paper_cache_is_emptied_over_its_budget_from_the_longest_unused() -> None:
    """Six documents of 1,000 tokens go round twice; on paper a replica has room for two."""
    fleet = Fleet(2, budget=2 * 1000)
    documents = [prompt(f"doc{number}") for number in range(6)]
    for document in documents:
        fleet.ask(document)
    second = [gained(fleet.ask(document)) for document in documents]
    assert second == [1000] * 6
    assert all(paper.tokens <= 2 * 1000 for paper in fleet.shadow._caches.values())  # noqa: SLF001 - internal state that no public name shows


def test_memory_is_bounded() -> None:
    """The bound holds for any budget."""
    fleet = Fleet(2, most_places=160)
    for number in range(200):
        fleet.ask(prompt(f"doc{number}"))
    assert all(len(paper.places) <= 40 for paper in fleet.shadow._caches.values())  # noqa: SLF001 - internal state that no public name shows
    assert len(fleet.shadow._seen) <= 160  # noqa: SLF001 - internal state that no public name shows


def test_an_upstream_that_reports_no_tokens_says_nothing_wrong() -> None:
    """Nothing is worth nothing, and the next answers are counted as ever."""
    fleet = Fleet(2)
    asked = prompt("a", "b")
    for _ in range(3):
        placement = fleet.index.place(0, asked, 0, 0.0)
        assert gained(fleet.shadow.answered(placement, 0, 0)) == 0


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 5000)), max_size=50))
def test_the_counter_is_the_highest_that_the_sum_ever_was(gains: list[tuple[int, float]]) -> None:
    """It never falls, and differs from the sum at its highest by less than a token."""
    shadow = Fleet(2).shadow
    total = sum_ = highest = 0.0
    for cached, round_robin in gains:
        added = shadow.count("m", Gain(cached, round_robin))
        assert added >= 0
        total += added
        sum_ += cached - round_robin
        highest = max(highest, sum_)
        assert highest - 1.001 <= total <= highest + 0.001


def test_models_are_counted_apart() -> None:
    """One's loss is not made up for by another's gain."""
    shadow = Fleet(2).shadow
    assert shadow.count("a", Gain(0, 100.0)) == 0
    assert shadow.count("b", Gain(50, 0.0)) == 50
    assert shadow.count("a", Gain(130, 0.0)) == 30
