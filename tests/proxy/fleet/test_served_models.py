"""What replicas lack, as it follows from their lists and their answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from proxy.fleet.model_list import read_listing
from proxy.fleet.served_models import MODELS_AT_MOST, REFUSAL_SECONDS, REFUSALS_AT_MOST, Listing, Need, ServedModels

LORA: Need = ("", "lora", "")
BOTH = (0, 1)


def listing(*names: str, owner: str = "vllm", is_whole: bool = True, **more: Any) -> Listing:
    """A list with these names."""
    return entries(*[{"id": name, "owned_by": owner, **more} for name in names], has_more=not is_whole)


def entries(*data: dict[str, Any], has_more: bool = False) -> Listing:
    """A list with these entries."""
    read = read_listing(json.dumps({"data": data, "has_more": has_more}).encode())
    assert read is not None
    return read[1]


def served(*lists: Listing | None) -> ServedModels:
    """Replicas 0, 1, ... of the pool `p`, with these lists."""
    models = ServedModels()
    for number, each in enumerate(lists):
        models.listed("p", number, each)
    return models


def lacking(models: ServedModels, need: Need = LORA, now_seconds: float = 0.0) -> set[int]:
    """Those of two replicas that lack something."""
    return set(models.lacking("p", (need,), BOTH, now_seconds))


def test_equal_lists_and_none_at_all_cost_nothing() -> None:
    """Nothing is looked up in a pool whose replicas serve the same."""
    assert not served(None, None).is_uneven("p")
    models = served(listing("base"), listing("base"))
    assert not models.is_uneven("p")
    models.listed("p", 1, listing("base", "lora"))
    assert models.is_uneven("p")
    models.listed("p", 0, listing("lora", "base"))
    assert not models.is_uneven("p")


def test_a_name_is_listed_if_a_replica_lists_exactly_this_one() -> None:
    """As servers compare names; a pattern in a list says nothing of what lies below a name."""
    models = served(None, listing("org/name", "any/*"))
    assert models.lists("p", "org/name")
    assert models.lists("p", "ORG/name:latest")
    assert not models.lists("p", "any/other")
    assert not models.lists("p", "any/*/x")
    assert not models.lists("other", "org/name")


@pytest.mark.parametrize(
    ("other", "lacks"),
    [
        (lambda: listing("base"), {1}),
        (lambda: listing("base", owner="llamacpp"), set()),
        (lambda: listing("base", is_whole=False), set()),
        (lambda: listing("base", "LORA:latest"), set()),
        (lambda: listing("base", "lo*"), set()),
        (lambda: listing("base", "no*"), {1}),
        (lambda: entries({"id": "base", "owned_by": "vllm", "aliases": ["lora"]}), set()),
        (listing, set()),
        (lambda: None, set()),
    ],
)
def test_a_list_without_the_model_counts_where_names_are_checked(
    other: Callable[[], Listing | None], lacks: set[int]
) -> None:
    """Patterns, aliases and other spellings are the model; a first page, an empty or no list proves nothing."""
    assert lacking(served(listing("base", "lora"), other())) == lacks


def test_an_adapter_is_lacking_wherever_a_list_does_not_show_it() -> None:
    """Such a server would answer with its base model."""
    one = entries({"id": "lora", "owned_by": "sglang", "parent": "base"})
    assert lacking(served(one, listing("base", owner="sglang"))) == {1}
    assert lacking(served(one, None)) == set()


def test_an_entry_with_aliases_has_its_own_name_too() -> None:
    """And each of them."""
    both = entries({"id": "base", "owned_by": "vllm", "aliases": ["lora", 7, "other"]})
    models = served(listing("base", "lora", "other", "more"), both)
    assert [lacking(models, ("", name, "")) for name in ("base", "lora", "other", "more")] == [
        set(),
        set(),
        set(),
        {1},
    ]


def test_a_list_that_is_gone_proves_nothing_and_leaves_those_of_others() -> None:
    """It cannot be read any more, or its replica has left; one that has none may leave too."""
    for leaves in (False, True):
        models = served(listing("base", "lora"), listing("base"), listing("base"), None)
        if leaves:
            models.forget("p", 1)
        else:
            models.listed("p", 1, None)
        assert models.lacking("p", (LORA,), range(4), 0.0) == {2}
        models.listed("p", 3, None)
        models.forget("p", 3)
        assert models.lacking("p", (LORA,), range(4), 0.0) == {2}


def test_the_kind_of_a_request_says_nothing_of_the_model() -> None:
    """Neither if it is served nor if it is lacking; nor does a request without a model."""
    models = served(listing("base", "lora"), listing("base"))
    for need in (("", "lora", "tools"), ("", "", "")):
        models.served("p", 1, [need])
        assert lacking(models, need) == set()
        assert lacking(models) == {1}


def test_what_a_replica_served_while_it_listed_it_is_not_held_to_be_there_for_ever() -> None:
    """It may be unloaded."""
    models = served(listing("base", "lora"), listing("base"))
    models.served("p", 0, [LORA])
    models.listed("p", 0, listing("base"))
    models.listed("p", 1, listing("base", "lora"))
    assert lacking(models) == {0}


def test_a_server_that_has_served_one_name_without_listing_it_may_have_others() -> None:
    """Whatever its software usually does."""
    models = served(listing("base", "lora", "other"), listing("base"))
    assert lacking(models, ("", "other", "")) == {1}
    models.served("p", 1, [LORA])
    assert lacking(models, ("", "other", "")) == set()


def test_if_all_that_list_a_model_have_refused_it_those_that_do_not_are_asked() -> None:
    """The lists may be old."""
    models = served(listing("base", "lora"), listing("base"))
    models.refused("p", 0, LORA, 0.0)
    assert lacking(models) == {0}


def test_those_that_lack_any_of_a_request_s_needs_are_left_out() -> None:
    """As long as one is left."""
    models, media = served(None, None, None), ("", "lora", "media")
    models.refused("p", 1, LORA, 0.0)
    models.refused("p", 2, media, 0.0)
    assert models.lacking("p", (LORA, media), range(3), 0.0) == {1, 2}


def test_as_few_replicas_as_list_all_models_are_found() -> None:
    """The first of those with equal lists, and none whose list is part of another."""
    lists = [listing("a", "b"), listing("a"), listing("c"), listing("b", "a"), None]
    models = served(*lists)
    assert models.listing_all("p", [4, 3, 2, 1, 0]) == [3, 2]
    assert models.listing_all("p", [1, 4]) == [1]
    assert models.listing_all("other", [1]) == []
    assert models.lists_differ("p")
    assert not models.lists_differ("other")


def test_lists_differ_by_the_names_in_them_only() -> None:
    """How long prompts may be does not change the list that a client gets."""
    assert not served(listing("a"), listing("a")).lists_differ("p")
    models = served(listing("a", max_model_len=9), listing("a", max_model_len=8))
    assert models.is_uneven("p")
    assert not models.lists_differ("p")
    assert served(listing("a"), listing("a", "b")).lists_differ("p")


def test_a_server_is_believed_by_its_last_answer() -> None:
    """One that refuses a name checks names; one that serves what it does not list does not."""
    models = served(listing("base", "lora"), listing("base", owner="x"))
    models.refused("p", 1, ("", "other", ""), 0.0)
    assert lacking(models) == {1}
    models.served("p", 1, [LORA])
    assert lacking(models) == set()
    models.refused("p", 0, LORA, 0.0)  # which it lists: that shows nothing of other names
    models.listed("p", 0, listing("base", owner="x"))
    models.listed("p", 1, listing("base", "lora"))
    assert lacking(models, now_seconds=REFUSAL_SECONDS) == set()


def test_a_name_that_was_served_without_being_listed_is_remembered() -> None:
    """A refusal of another name does not take that back; its own does. Adapters do not count."""
    models = served(listing("base", "lora"), listing("base", owner="x"))
    models.served("p", 1, [LORA])
    models.refused("p", 1, ("", "typo", ""), 0.0)
    assert lacking(models) == set()
    models.refused("p", 1, LORA, 0.0)
    assert lacking(models, now_seconds=REFUSAL_SECONDS) == {1}
    models = served(entries({"id": "lora", "parent": "base"}), listing("base", owner="x"))
    models.served("p", 1, [LORA])
    models.refused("p", 1, ("", "typo", ""), 0.0)
    assert lacking(models) == {1}


def test_a_refusal_counts_for_its_key_and_for_a_time_or_until_the_replica_has_it() -> None:
    """It is withdrawn by a success and by a list that has become longer, but not by one that was wrong before."""
    models = served(None, listing("base"))
    for withdrawn in (lambda: models.served("p", 1, [LORA]), lambda: models.listed("p", 1, listing("base", "lora"))):
        models.refused("p", 1, LORA, 0.0)
        assert lacking(models, ("tenant", "lora", "")) == set()
        assert lacking(models, ("", "lora", "tools")) == set()
        assert lacking(models) == {1}
        withdrawn()
        assert lacking(models) == set()
        assert not models.is_uneven("p")
    models.refused("p", 1, LORA, 0.0)
    models.listed("p", 1, listing("base", "lora", "more"))
    assert lacking(models, now_seconds=REFUSAL_SECONDS - 1) == {1}
    assert lacking(models, now_seconds=REFUSAL_SECONDS) == set()
    assert not models.is_uneven("p")


def test_what_all_lack_rules_nobody_out() -> None:
    """Also if each lacks another thing: the first one in the request's needs counts."""
    models = served(None, None)
    for number in BOTH:
        models.refused("p", number, LORA, 0.0)
        assert models.refuses("p", number, [LORA], 0.0)
    assert lacking(models) == set()
    tools, media = ("", "lora", "tools"), ("", "lora", "media")
    models = served(None, None)
    models.refused("p", 0, tools, 0.0)
    models.refused("p", 1, media, 0.0)
    assert models.lacking("p", (tools, media), BOTH, 0.0) == {0}
    assert models.is_refused("p", media)
    assert not models.is_refused("p", LORA)


def test_nothing_is_kept_of_a_replica_that_leaves() -> None:
    """Its list does not keep others from being asked."""
    models = served(listing("base", "lora"), listing("base"))
    models.refused("p", 0, ("", "base", ""), 0.0)
    models.forget("p", 0)
    assert lacking(models) == set()
    models.forget("p", 1)
    assert not models.is_uneven("p")


def test_names_that_clients_choose_take_bounded_memory() -> None:
    """The oldest refusals are dropped."""
    models = served(listing("base", "lora"), listing("base"))
    for number in range(max(REFUSALS_AT_MOST, MODELS_AT_MOST) + 9):
        need = ("", f"m{number}", "")
        models.refused("p", 1, need, 0.0)
        models.lacking("p", (need,), BOTH, 0.0)
    assert not models.is_refused("p", ("", "m0", ""))
    assert models.is_refused("p", ("", f"m{number}", ""))
    assert lacking(models) == {1}
    assert len(models._refused["p"]) == REFUSALS_AT_MOST  # noqa: SLF001 - nothing else shows what is kept
    assert len(models._holders) <= MODELS_AT_MOST  # noqa: SLF001
    unlisted = served(listing("base", "lora"), listing("base", owner="x"))
    for number in range(REFUSALS_AT_MOST + 1):
        assert len(unlisted._also.get(1, ())) == number  # noqa: SLF001
        unlisted.served("p", 1, [("", f"m{number}", "")])
    assert unlisted._also[1] == {f"m{number}"}  # noqa: SLF001


def test_rooms_are_told_only_if_they_differ() -> None:
    """A prompt fits everywhere or nowhere otherwise."""
    assert served(listing("base", max_model_len=9), listing("base", max_model_len=9)).rooms("p", "base") == {}
    equal = served(listing("base", max_model_len=9), listing("base", "lora", max_model_len=9))
    assert equal.rooms("p", "base") == {}
    for nonsense in (0, -1, "8", None):
        assert served(listing("a", max_model_len=nonsense), listing("a", max_model_len=9)).rooms("p", "a") == {}
    assert served(listing("a", max_model_len=1), listing("a", max_model_len=9)).rooms("p", "a") == {0: 1, 1: 9}
    models = served(listing("base", max_model_len=9), listing("base", max_model_len=8), listing("base"))
    assert models.rooms("p", "base") == {0: 9, 1: 8}
    assert models.rooms("p", "other") == {}


@pytest.mark.parametrize(
    ("page", "is_whole"),
    [
        (b'{"data":[{"id":"a"}]}', True),
        (b'{"data":[{"id":"a"}],"has_more":false}', True),
        (b'{"data":[{"id":"a"}],"has_more":true}', False),
        (b'{"data":[{"id":"a"}],"nextPageToken":"x"}', False),
        (b'{"data":[{"id":7,"aliases":3,"max_model_len":"x"}]}', True),
    ],
)
def test_a_list_says_whether_it_is_whole(page: bytes, is_whole: bool) -> None:
    """Anthropic and Google send pages."""
    read = read_listing(page)
    assert read is not None
    assert read[1].is_whole is is_whole


@pytest.mark.parametrize("page", [b"", b"{}", b'{"data":null}', b"[]", b"<html>"])
def test_what_is_no_list_is_none(page: bytes) -> None:
    """It tells nothing."""
    assert read_listing(page) is None
