"""Which pool serves a model."""

from __future__ import annotations

import pytest

from proxy.errors import NotFound
from proxy.fleet.pools import Pools, ReplicaEndpoint, ServedPool
from proxy.upstream import Origin

ENDPOINT = ReplicaEndpoint("a", "small", "http://a", Origin.parse("http://a"))
SMALL, ALL = ServedPool("small", ("tiny-*", "mini")), ServedPool("all", ("*",))


def test_the_first_pool_whose_patterns_fit_serves_a_model() -> None:
    """However often it is asked for."""
    pools = Pools((SMALL, ALL), "all", {0: ENDPOINT})
    for _ in range(2):
        assert [pools.serving(model) for model in ("tiny-1", "mini", "mini-2", "x")] == [SMALL, SMALL, ALL, ALL]
    assert pools.default is ALL
    assert Pools((ALL, SMALL), None, {}).serving("mini") is ALL


def test_a_model_that_no_pool_serves_is_not_found_and_the_error_names_the_field() -> None:
    with pytest.raises(NotFound) as caught:
        Pools((SMALL,), None, {}).serving("other")
    assert (caught.value.status, caught.value.param) == (404, "model")


def test_a_removed_pool_has_a_successor_only_if_a_pool_serves_its_model_in_its_way() -> None:
    """Nor while it is there itself, with or without replicas."""
    pools = Pools((ALL,), "all", {})
    assert pools.successor(SMALL, "mini") is ALL
    assert pools.successor(SMALL, None) is ALL
    assert pools.successor(ServedPool("small", ("mini",), isolated=True), "mini") is None
    assert pools.successor(ServedPool("all", ("mini",)), "mini") is None
    assert Pools((SMALL,), None, {}).successor(ALL, "other") is None
    assert Pools((SMALL,), None, {}).successor(ALL, None) is None


def test_many_made_up_models_take_a_bounded_amount_of_memory() -> None:
    pools = Pools((SMALL, ALL), None, {})
    for number in range(5_000):
        assert pools.serving(f"model-{number}") is ALL
    assert len(pools._found) <= 1024  # noqa: SLF001 - internal state that no public name shows
    assert pools.serving("mini") is SMALL


def test_a_reload_counts_from_the_next_request_on_and_keeps_the_way_to_removed_replicas() -> None:
    """Requests under way may still need them; `forget` ends that."""
    pools = Pools((SMALL, ALL), "all", {0: ENDPOINT})
    assert pools.serving("mini") is SMALL
    pools.adopt(Pools((ALL,), None, {1: ENDPOINT}))
    assert pools.serving("mini") is ALL
    assert (set(pools.served), set(pools.backends)) == ({1}, {0, 1})
    assert pools.forget(0) is ENDPOINT
    assert set(pools.backends) == {1}
