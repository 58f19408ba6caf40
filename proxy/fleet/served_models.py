"""Learn how the replicas of a pool differ: in models and adapters, kinds of request, and room for a prompt.

Replicas list their models, and answer what they lack with a refusal. A list alone is no proof: some servers accept
any name, list a part of what they serve, or load what is asked for. So it counts only at a server that is known to
check names: vLLM, and any other that has refused a name; one that then serves a name which it does not list is
believed less again. An adapter is an exception, since a server without it may answer with its base model as if it
were the adapter. A refusal counts for some seconds, for the key that met it, until the replica lists or serves what
it had refused.

Nothing here closes a replica: where nobody is known to serve a model, all are asked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, Protocol

from proxy.patterns import is_pattern, matches_any

Need = tuple[str, str, str]
"""A need of a request: the key that upstreams see, the model, and a kind of request, empty for the model itself."""

REFUSAL_SECONDS: Final = 30.0
"""Time for which a refusal counts: two intervals of the health checks, which read the lists."""

REFUSALS_AT_MOST: Final = 1024
"""Needs remembered per pool; clients choose the names of models."""

MODELS_AT_MOST: Final = 1024
"""Models per worker whose holders are remembered; they are found again when another one is asked for."""

_VLLM: Final = "vllm"
_LATEST: Final = ":latest"
NOBODY: Final[frozenset[int]] = frozenset()
_NO_ROOMS: Final[dict[int, int]] = {}


class Listed(Protocol):
    """An entry of a list of models, as it came: any member may have any type."""

    @property
    def id(self) -> Any: ...
    @property
    def aliases(self) -> Any: ...
    @property
    def owned_by(self) -> Any: ...
    @property
    def parent(self) -> Any: ...
    @property
    def max_model_len(self) -> Any: ...


class Listing:
    """The names in one replica's list of models.

    `adapters` are those of `names` that are adapters of another one. `rooms` are the most tokens of a prompt and its
    answer, by name. `checks_names` means that the server is known to refuse other names than these. Of a list that is
    not whole, nothing follows for names that are not in it.
    """

    __slots__ = ("adapters", "checks_names", "is_whole", "names", "patterns", "rooms")

    def __init__(self, models: Iterable[Listed], *, is_whole: bool = True) -> None:
        names: set[str] = set()
        adapters: set[str] = set()
        self.rooms: dict[str, int] = {}
        self.checks_names = False
        for model in models:
            if model.owned_by == _VLLM:
                self.checks_names = True
            own = [_normal(model.id)] if isinstance(model.id, str) else []
            if isinstance(model.aliases, list):
                own += [_normal(name) for name in model.aliases if isinstance(name, str)]
            room = model.max_model_len
            for name in own:
                names.add(name)
                if model.parent:
                    adapters.add(name)
                if isinstance(room, int) and room > 0:
                    self.rooms[name] = room
        self.names = frozenset(names)
        self.adapters = frozenset(adapters)
        self.patterns = tuple(sorted([name for name in names if is_pattern(name)]))
        self.is_whole = is_whole

    def has(self, name: str) -> bool:
        """Return whether a name in normal form is listed, or fits a pattern that is."""
        return name in self.names or (bool(self.patterns) and matches_any(name, self.patterns))

    def equals(self, other: Listing) -> bool:
        """Return whether two lists say the same."""
        return (
            self.names == other.names
            and self.adapters == other.adapters
            and self.rooms == other.rooms
            and self.checks_names == other.checks_names
            and self.is_whole == other.is_whole
        )


class _Holders:
    """The replicas of one model, by number: who lists or has served it, who lacks it, and their rooms."""

    __slots__ = ("listing", "rooms", "without")

    def __init__(self, listing: frozenset[int], without: frozenset[int], rooms: dict[int, int]) -> None:
        self.listing = listing
        self.without = without
        self.rooms = rooms


class ServedModels:
    """Knowledge of what each replica serves. One per worker; every call is synchronous."""

    def __init__(self) -> None:
        self._lists: dict[str, dict[int, Listing]] = {}
        self._checks_names: dict[int, bool] = {}  # as its answers showed
        self._also: dict[int, set[str]] = {}  # names that it has served without listing them
        self._uneven_lists: set[str] = set()  # pools whose replicas list different things
        self._refused: dict[str, dict[Need, dict[int, float]]] = {}  # by pool: until when, by replica
        self._holders: dict[tuple[str, str], _Holders] = {}

    # -- what is learned

    def listed(self, pool: str, number: int, listing: Listing | None) -> None:
        """Take over a replica's list; None if it has none that can be read."""
        lists = self._lists.setdefault(pool, {})
        before = lists.get(number)
        if listing is None:
            if before is not None:
                self._drop_list(pool, number)
            return
        if before is not None and before.equals(listing):
            return
        lists[number] = listing
        for need, until in list(self._refused.get(pool, {}).items()):
            name = _normal(need[1])
            if listing.has(name) and not (before is not None and before.has(name)):
                self._withdraw(pool, need, number, until)
        self._changed(pool)

    def refused(self, pool: str, number: int, need: Need, now_seconds: float) -> None:
        """Note that a replica refused a request for what it lacks."""
        refused = self._refused.setdefault(pool, {})
        until = refused.pop(need, None)
        if until is None:
            until = {}
            if len(refused) >= REFUSALS_AT_MOST:
                del refused[next(iter(refused))]
        until[number] = now_seconds + REFUSAL_SECONDS
        refused[need] = until
        if not need[2] and not self._lists_it(pool, number, need[1]):
            self._show(number, checks_names=True)
            if _normal(need[1]) in self._also.get(number, ()):
                self._also[number].discard(_normal(need[1]))
                self._holders.clear()

    def served(self, pool: str, number: int, needs: Iterable[Need]) -> None:
        """Note a success of a replica, where `is_uneven`."""
        refused = self._refused.get(pool)
        for need in needs:
            until = refused.get(need) if refused else None
            if until is not None and number in until:
                self._withdraw(pool, need, number, until)
            if not need[2] and need[1] and pool in self._uneven_lists:
                holders = self._of(pool, need[1])
                if number not in holders.listing:
                    self._served_unlisted(pool, number, need[1], holders)

    def forget(self, pool: str, number: int) -> None:
        """Forget all about a replica that leaves a pool."""
        self._checks_names.pop(number, None)
        self._also.pop(number, None)
        for need, until in list(self._refused.get(pool, {}).items()):
            if number in until:
                self._withdraw(pool, need, number, until)
        self._drop_list(pool, number)

    # -- what is known

    def is_uneven(self, pool: str) -> bool:
        """Return whether anything is known by which a pool's replicas differ. It takes no time."""
        return pool in self._uneven_lists or pool in self._refused

    def is_refused(self, pool: str, need: Need) -> bool:
        """Return whether any replica of a pool has lately refused this."""
        refused = self._refused.get(pool)
        return refused is not None and need in refused

    def lacking(
        self, pool: str, needs: Iterable[Need], members: Collection[int], now_seconds: float
    ) -> frozenset[int]:
        """Return those of a pool's `members` that are known to lack what a request needs.

        What all that are left lack rules nobody out: somebody has to be asked, since what is known may be old.
        """
        without = NOBODY
        for need in needs:
            lacking = self._lacking(pool, need, now_seconds)
            if lacking and not without.union(lacking).issuperset(members):
                without |= lacking
        return without

    def refuses(self, pool: str, number: int, needs: Iterable[Need], now_seconds: float) -> bool:
        """Return whether a replica has lately refused what a request needs."""
        return any(number in self._refusing(pool, need, now_seconds) for need in needs)

    def rooms(self, pool: str, model: str) -> Mapping[int, int]:
        """Return the most tokens of a prompt for a model, by replica, if they differ; else nothing."""
        return self._of(pool, model).rooms if pool in self._uneven_lists else _NO_ROOMS

    def lists(self, pool: str, model: str) -> bool:
        """Return whether a replica of a pool lists a model by exactly this name, not by a pattern that it fits."""
        name = _normal(model)
        return any(name in listing.names for listing in self._lists.get(pool, {}).values())

    def lists_differ(self, pool: str) -> bool:
        """Return whether a pool's replicas list different models. It takes no time for most pools."""
        return pool in self._uneven_lists and len({each.names for each in self._lists[pool].values()}) > 1

    def listing_all(self, pool: str, numbers: Iterable[int]) -> list[int]:
        """Return as few of the replicas `numbers` as list all that any of them lists, the first of equal ones."""
        first: dict[frozenset[str], int] = {}
        for number in numbers:
            listing = self._lists.get(pool, {}).get(number)
            if listing is not None:
                first.setdefault(listing.names, number)
        return [number for names, number in first.items() if not any(names < other for other in first)]

    def _lacking(self, pool: str, need: Need, now_seconds: float) -> frozenset[int]:
        refusing = self._refusing(pool, need, now_seconds)
        if need[2] or not need[1] or pool not in self._uneven_lists:
            return refusing
        holders = self._of(pool, need[1])
        return refusing | holders.without if holders.listing - refusing else refusing

    def _refusing(self, pool: str, need: Need, now_seconds: float) -> frozenset[int]:
        refused = self._refused.get(pool)
        until = refused.get(need) if refused else None
        if until is None:
            return NOBODY
        for number in [number for number, seconds in until.items() if seconds <= now_seconds]:
            self._withdraw(pool, need, number, until)
        return frozenset(until)

    def _lists_it(self, pool: str, number: int, model: str) -> bool:
        listing = self._lists.get(pool, {}).get(number)
        return listing is not None and listing.has(_normal(model))

    def _of(self, pool: str, model: str) -> _Holders:
        found = self._holders.get((pool, model))
        if found is None:
            found = self._search(pool, model)
            if len(self._holders) >= MODELS_AT_MOST:
                self._holders.clear()
            self._holders[pool, model] = found
        return found

    def _search(self, pool: str, model: str) -> _Holders:
        name, lists = _normal(model), self._lists.get(pool, {})
        listing = frozenset([number for number, each in lists.items() if each.has(name)])
        is_adapter = any(name in lists[number].adapters for number in listing)
        if not is_adapter:  # which a server may seem to serve, see above
            listing |= {number for number in lists if name in self._also.get(number, ())}
        without = frozenset(
            [
                number
                for number, each in lists.items()
                if number not in listing
                and each.is_whole
                and (is_adapter or self._checks_names.get(number, each.checks_names))
            ]
        )
        rooms = {number: each.rooms[name] for number, each in lists.items() if name in each.rooms}
        return _Holders(listing, without, rooms if len(set(rooms.values())) > 1 else _NO_ROOMS)

    # -- changes

    def _served_unlisted(self, pool: str, number: int, model: str, holders: _Holders) -> None:
        """Note that a replica has a model by another name than its list shows, or by loading it."""
        if number not in self._lists.get(pool, {}):
            return
        also = self._also.setdefault(number, set())
        if _normal(model) not in also:
            if len(also) >= REFUSALS_AT_MOST:
                also.clear()
            also.add(_normal(model))
            self._holders.clear()
        if number in holders.without:
            self._show(number, checks_names=False)

    def _show(self, number: int, *, checks_names: bool) -> None:
        if self._checks_names.get(number) is not checks_names:
            self._checks_names[number] = checks_names
            self._holders.clear()

    def _withdraw(self, pool: str, need: Need, number: int, until: dict[int, float]) -> None:
        until.pop(number, None)
        if not until:
            refused = self._refused.get(pool, {})
            refused.pop(need, None)
            if not refused:
                self._refused.pop(pool, None)

    def _drop_list(self, pool: str, number: int) -> None:
        lists = self._lists.get(pool)
        if lists is not None and lists.pop(number, None) is not None:
            if not lists:
                del self._lists[pool]
            self._changed(pool)

    def _changed(self, pool: str) -> None:
        self._holders.clear()
        lists = list(self._lists.get(pool, {}).values())
        if any(not each.equals(lists[0]) for each in lists):
            self._uneven_lists.add(pool)
        else:
            self._uneven_lists.discard(pool)


def _normal(name: str) -> str:
    """Return a name as servers compare it that ignore case and the tag which stands for none."""
    return name.casefold().removesuffix(_LATEST)
