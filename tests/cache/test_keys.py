"""The keyspace: every key of Cairn's begins alike, and what one script touches lies in one slot."""

from __future__ import annotations

import pytest
from redis.crc import key_slot

from cache import keys


def test_every_key_has_the_prefix() -> None:
    """A Redis can therefore be shared, and Cairn's keys in it can be found."""
    names = [value for name, value in vars(keys).items() if name.isupper()]
    assert len(names) >= 8
    assert all(name.startswith("cairn:") for name in names)


def test_the_journals_keys_lie_in_one_slot() -> None:
    """Stream, lease, snapshot and its parts are touched by one script."""
    together = [keys.JOURNAL, keys.LEASE, keys.SNAPSHOT, keys.GENERATION, keys.WRITERS, keys.snapshot_chunk("a", 7)]
    assert len({key_slot(key.encode()) for key in together}) == 1


def test_a_snapshots_parts_are_named_as_the_commit_script_names_them() -> None:
    """It drops the old one's parts by name."""
    assert keys.snapshot_chunk("a", 7) == f"{keys.SNAPSHOT}:a:7"


def test_a_tenants_keys_lie_in_one_slot_and_apart_from_anothers() -> None:
    """The keyed hash is the hash tag."""
    one = [keys.tenant("9f", "context", "x"), keys.tenant("9f", "tag", "y")]
    assert len({key_slot(key.encode()) for key in one}) == 1
    assert keys.tenant("9f", "context", "x") != keys.tenant("9e", "context", "x")


@pytest.mark.parametrize("bad", ["", "a}b", "{a"])
def test_a_tenant_cannot_break_out_of_its_tag(bad: str) -> None:
    """An empty tag or a brace would put keys into other slots."""
    with pytest.raises(ValueError, match="keyed hash"):
        keys.tenant(bad, "context", "x")
