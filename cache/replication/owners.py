"""Map the ids of objects that upstreams made (responses, files) to the names of replicas.

Pure and bounded. Where clients share a key, an id is preceded by its tenant and a slash, and only the tenant whose
object is found here may use it: no tenant that makes many objects must make those of others be forgotten. If there is
no room, a tenant with more than an equal share forgets its oldest. The journal shares the map among workers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

OWNERS_AT_MOST = 65_536
"""Ids remembered unless configured, about 10 MB; a request for a forgotten one goes to the least loaded replica."""

ID_CHARACTERS_AT_MOST = 256

_LOOKED_AT = 8
"""Tenants among which one with more than its share is looked for, so that very many tenants take no time."""


class ObjectLocations:
    """Maps object ids to the names of the replicas that have them."""

    def __init__(self) -> None:
        self._most = OWNERS_AT_MOST
        self._count = 0
        self._names: OrderedDict[str, dict[str, str]] = OrderedDict()  # by tenant, the oldest first

    def __len__(self) -> int:
        return self._count

    def limit(self, most: int) -> None:
        """Set the number of ids that are remembered, before there are any."""
        self._most = most

    def of(self, made_id: str) -> str | None:
        """Return the name of the replica that has `made_id`, None if unknown."""
        names = self._names.get(_tenant_of(made_id))
        return None if names is None else names.get(made_id)

    def in_path(self, path: str) -> str | None:
        """Return the name of the replica for the first segment of `path` that is a known id."""
        if not self._count:
            return None
        for segment in path.split("/"):
            if name := self.of(segment):
                return name
        return None

    def learn(self, made_id: str, name: str) -> bool:
        """Remember that `made_id` is on the replica `name`; return False if that is known or the id is not valid."""
        if not 0 < len(made_id) <= ID_CHARACTERS_AT_MOST or self.of(made_id) == name:
            return False
        if not made_id.isprintable():  # lone surrogates, which cannot be encoded, are not printable
            return False
        tenant = _tenant_of(made_id)
        names = self._names.setdefault(tenant, {})
        if names.pop(made_id, None) is None:
            self._count += 1
        names[made_id] = name
        if self._count > self._most:
            self._forget_one(tenant)
        return True

    def chunks(self, size: int) -> Iterator[dict[str, str]]:
        """Yield all entries, each tenant's oldest first, in parts of at most `size`.

        Changes made meanwhile may be missing.
        """
        rest = iter([entry for names in self._names.values() for entry in names.items()])
        while part := dict(islice(rest, size)):
            yield part

    def _forget_one(self, newest: str) -> None:
        """Forget the oldest id of a tenant with more than an equal share: of `newest`, if it has that, or another."""
        share = max(1, self._most // len(self._names))
        tenant = newest
        for _ in range(min(_LOOKED_AT, len(self._names))):
            if len(self._names[tenant]) > share:
                break
            tenant = next(iter(self._names))
            self._names.move_to_end(tenant)  # the next search begins with another one
        names = self._names[tenant]
        del names[next(iter(names))]
        self._count -= 1
        if not names:
            del self._names[tenant]


def _tenant_of(made_id: str) -> str:
    """Return the tenant of an id such as `tenant/file-1` or `checked:client:tenant/file-1`; empty if it has none."""
    before, slash, _ = made_id.partition("/")
    return before.rpartition(":")[2] if slash else ""
