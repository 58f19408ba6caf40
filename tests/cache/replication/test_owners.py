"""Locations of objects: found by id or in a path, bounded, and shared in parts."""

from __future__ import annotations

import pytest

from cache.replication.owners import ID_CHARACTERS_AT_MOST, ObjectLocations


def test_an_object_is_found_by_its_id_and_in_a_path() -> None:
    """The first segment that is a known id counts."""
    locations = ObjectLocations()
    assert locations.in_path("/v1/responses/resp_1") is None
    assert locations.learn("resp_1", "http://one")
    assert locations.learn("file_2", "http://two")
    assert (locations.of("resp_1"), locations.of("resp_9"), len(locations)) == ("http://one", None, 2)
    assert locations.in_path("/v1/responses/resp_1/input_items") == "http://one"
    assert locations.in_path("/v1/models") is None


def test_what_is_known_is_not_learned_again_and_a_move_is() -> None:
    """Nothing is therefore sent to other workers twice."""
    locations = ObjectLocations()
    assert locations.learn("a", "http://one")
    assert not locations.learn("a", "http://one")
    assert locations.learn("a", "http://two")
    assert locations.of("a") == "http://two"


@pytest.mark.parametrize("bad", ["", "x" * (ID_CHARACTERS_AT_MOST + 1), "\ud800", "a\nb"])
def test_what_cannot_be_an_id_is_not_learned(bad: str) -> None:
    """Empty, too long, or not printable, which could not be sent on."""
    locations = ObjectLocations()
    assert not locations.learn(bad, "http://one")
    assert len(locations) == 0


def test_the_oldest_is_forgotten_first_and_parts_hold_all() -> None:
    """In order, the oldest first."""
    locations = ObjectLocations()
    locations.limit(3)
    for name in "abcd":
        locations.learn(name, "http://one")
    assert [list(part) for part in locations.chunks(2)] == [["b", "c"], ["d"]]


def test_who_makes_many_objects_makes_nobody_elses_be_forgotten() -> None:
    """Objects that are only marked count as well; a tenant that had all the room yields its oldest to a new one."""
    locations = ObjectLocations()
    locations.limit(12)
    for number in range(12):
        locations.learn(f"flood/{number}", "http://one")
    locations.learn("quiet/file", "http://one")
    for number in range(12, 100):
        for key in (f"flood/{number}", f"background:flood/{number}", f"checked:name:flood/{number}"):
            locations.learn(key, "http://one")
    locations.learn("third/file", "http://one")
    assert len(locations) == 12
    assert locations.of("quiet/file") == locations.of("third/file") == "http://one"
    assert locations.of("flood/99") == "http://one"
    assert locations.of("flood/0") is None


def test_very_many_tenants_have_one_object_each_and_the_number_stays_bounded() -> None:
    """No tenant without an object is kept."""
    locations = ObjectLocations()
    locations.limit(100)
    for number in range(1000):
        locations.learn(f"t{number}/file", "http://one")
        assert locations.of(f"t{number}/file") == "http://one"
    assert len(locations) == 100
    assert sum(len(part) for part in locations.chunks(7)) == 100
