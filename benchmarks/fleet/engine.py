"""A replica's engine on a virtual clock, as a model: one prefill at a time, decodes beside it, an LRU of blocks.

Prefill computes 8,000 uncached tokens a second, divided by 1 + active/128 for `active` decoding requests, plus 10 ms;
the first token comes 20 ms after. Decoding takes 20 ms a token, times 1 + active/64. Blocks of 512 tokens can be
reused when the prefill that computed them ends; the least recently used go first, of one prompt the deepest first.
Routing is not part of it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Protocol

from benchmarks.fleet.trace import BLOCK_TOKENS, Request
from proxy.routing.shortest_job import ShortestJobQueue

PREFILL_TOKENS_PER_SECOND = 8_000.0
PREFILL_SLOWDOWN = 1.0 / 128.0
PREFILL_FIXED_SECONDS = 0.010
FIRST_TOKEN_SECONDS = 0.020
DECODE_SECONDS = 0.020
DECODE_SLOWDOWN = 1.0 / 64.0
QUEUE_DEADLINE_SECONDS = 1e9
"""The published figures know no deadline."""


class BlockCache:
    """Least recently used blocks, in tokens; None for no limit. Serves the engine and the other routers' indexes."""

    def __init__(self, capacity_tokens: int | None, block_tokens: int = BLOCK_TOKENS) -> None:
        self._block_tokens = block_tokens
        self._most = None if capacity_tokens is None else max(capacity_tokens // block_tokens, 1)
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def matched_tokens(self, request: Request) -> int:
        """Return the tokens of the longest cached prefix."""
        holds, matched = self.holds, 0
        for block in request.blocks:
            if not holds(block):
                break
            matched += 1
        return min(matched * self._block_tokens, request.input_tokens)

    def use(self, blocks: Iterable[int]) -> None:
        """Make them the newest, the first of them newest of all."""
        kept = self._blocks
        for block in reversed(tuple(blocks)):
            kept[block] = None
            kept.move_to_end(block)
        self._evict()

    def holds(self, block: int) -> bool:
        return block in self._blocks

    def _evict(self) -> None:
        if self._most is not None:
            kept = self._blocks
            while kept and len(self) > self._most:
                kept.popitem(last=False)


class PinningCache(BlockCache):
    """A cache that keeps the blocks of running requests: they are evicted only once the last of these has ended."""

    def __init__(self, capacity_tokens: int, block_tokens: int = BLOCK_TOKENS) -> None:
        super().__init__(capacity_tokens, block_tokens)
        self._users: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._blocks) + len(self._users)

    def holds(self, block: int) -> bool:
        return block in self._blocks or block in self._users

    def fits(self, blocks: Iterable[int]) -> bool:
        """Return True if a request fits beside the running ones, or if none runs."""
        new = sum(1 for block in blocks if block not in self._users)
        return not self._users or self._most is None or len(self._users) + new <= self._most

    def pin(self, blocks: Iterable[int]) -> None:
        """Keep the blocks of a running request; missing ones are computed, and others evicted for them."""
        users = self._users
        for block in blocks:
            users[block] = users.get(block, 0) + 1
            self._blocks.pop(block, None)
        self._evict()

    def unpin(self, blocks: Iterable[int]) -> None:
        """Release the blocks of an ended request: unused ones become the newest, the first of them newest of all."""
        users, kept = self._users, self._blocks
        for block in reversed(tuple(blocks)):
            left = users[block] - 1
            if left:
                users[block] = left
            else:
                del users[block]
                kept[block] = None
        self._evict()


class Listener(Protocol):
    """Listener of an engine's events."""

    def started(self, request: Request, now: float) -> None: ...
    def first_token(self, request: Request, replica: int, cached_tokens: int, now: float) -> None: ...
    def ended(self, request: Request, replica: int, now: float) -> None: ...


class Engine:
    """One replica. `at(time, call)` is the simulation's calendar.

    With `pins` the blocks of running requests cannot be evicted, and a prefill begins only if its prompt fits beside
    them; such an engine is first in, first out.
    """

    def __init__(
        self,
        replica: int,
        capacity_tokens: int,
        at: Callable[[float, Callable[[float], None]], None],
        listener: Listener,
        *,
        rate: float = PREFILL_TOKENS_PER_SECOND,
        ordered: bool = False,
        pins: bool = False,
    ) -> None:
        self.replica = replica
        self._pinning = PinningCache(capacity_tokens) if pins else None
        self.cache = BlockCache(capacity_tokens) if self._pinning is None else self._pinning
        self._at = at
        self._listener = listener
        self._rate = rate
        self._fifo: deque[Request] = deque()
        self._line: ShortestJobQueue[Request] | None = ShortestJobQueue(QUEUE_DEADLINE_SECONDS) if ordered else None
        self._busy = False
        self._decoding = 0

    @property
    def waiting(self) -> int:
        """Requests whose prefill has not begun."""
        return len(self._fifo) if self._line is None else len(self._line)

    def submit(self, request: Request, work_seconds: float, now: float) -> None:
        """Take a request; `work_seconds` is its predicted prefill, for the order of the queue."""
        if self._line is None:
            self._fifo.append(request)
        else:
            self._line.join(request, work_seconds, now)
        if not self._busy:
            self._start(now)

    def _next(self, now: float) -> Request | None:
        if self._pinning is not None:
            fits = self._fifo and self._pinning.fits(self._fifo[0].blocks)
            return self._fifo.popleft() if fits else None
        if self._line is not None:
            return self._line.next(now)
        return self._fifo.popleft() if self._fifo else None

    def _start(self, now: float) -> None:
        request = self._next(now)
        if request is None:
            self._busy = False
            return
        self._busy = True
        if self._line is not None:
            self._listener.started(request, now)
        cached = min(self.cache.matched_tokens(request), request.input_tokens - 1)
        slower = 1.0 + self._decoding * PREFILL_SLOWDOWN
        seconds = (request.input_tokens - cached) / self._rate * slower + PREFILL_FIXED_SECONDS

        held = cached // BLOCK_TOKENS

        def computed(then: float) -> None:
            self._computed(request, held)
            self._decoding += 1
            self._at(then + FIRST_TOKEN_SECONDS, lambda at: self._decode(request, cached, at))
            self._start(then)

        self._reuse(request, held)
        self._at(now + seconds, computed)

    def _reuse(self, request: Request, held: int) -> None:
        """Note that a prefill begins with `held` cached blocks."""
        if self._pinning is not None:
            self._pinning.pin(request.blocks[:held])
        else:
            self.cache.use(request.blocks[:held])

    def _computed(self, request: Request, held: int) -> None:
        if self._pinning is not None:
            self._pinning.pin(request.blocks[held:])
        else:
            self.cache.use(request.blocks)

    def _decode(self, request: Request, cached: int, now: float) -> None:
        self._listener.first_token(request, self.replica, cached, now)
        seconds = request.output_tokens * DECODE_SECONDS * (1.0 + self._decoding * DECODE_SLOWDOWN)
        self._at(now + seconds, lambda at: self._ended(request, at))

    def _ended(self, request: Request, now: float) -> None:
        self._decoding -= 1
        if self._pinning is not None:
            self._pinning.unpin(request.blocks)
            if not self._busy:
                self._start(now)
        self._listener.ended(request, self.replica, now)
