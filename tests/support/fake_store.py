"""A store without Redis, scripted: replies by operation, errors on demand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from cache.errors import CacheError
from cache.store.store import Script, Store, StoreState


class FakeStore:
    """Answers scripts by name and commands by their first word; `errors` are raised first, one per operation."""

    state = StoreState.AVAILABLE

    def __init__(self) -> None:
        self.replies: dict[str, Any] = {}
        self.errors: deque[CacheError] = deque()
        self.ran: list[tuple[str, tuple[Any, ...]]] = []
        self.did: Callable[[], None] = lambda: None

    async def wait_available(self) -> None:
        """It always is."""

    async def wait_writable(self) -> None:
        """It always is."""

    async def run_script(
        self, script: Script, script_keys: Sequence[str], args: Sequence[Any] = (), limit_seconds: float | None = None
    ) -> Any:
        del script_keys, limit_seconds
        return self._answer(script.name, tuple(args))

    async def execute(self, *command: Any, limit_seconds: float | None = None) -> Any:
        del limit_seconds
        return self._answer(command[0], command[1:])

    async def execute_many(self, commands: Sequence[Sequence[Any]], limit_seconds: float | None = None) -> list[Any]:
        del limit_seconds
        return [self._answer(command[0], tuple(command[1:])) for command in commands]

    def _answer(self, name: str, args: tuple[Any, ...]) -> Any:
        self.ran.append((name, args))
        self.did()
        if self.errors:
            raise self.errors.popleft()
        reply = self.replies.get(name)
        return reply(*args) if callable(reply) else reply

    def as_store(self) -> Store:
        """Itself, as the type that its users name."""
        return cast(Store, self)
