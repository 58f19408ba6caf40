"""Long prefills of other processes, as leaders at this process's gate (`proxy.routing.prefill_gate`).

Another process's placement arrives through the journal before it is answered. It leads here until its first token is
announced the same way, or for as long as its prefill may take. No process asks another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cache import Placement
from proxy.routing.prefill_gate import PATIENCE, PATIENCE_SECONDS, Prefill, PrefillGate


class RemotePrefills:
    """Receives what the journal reports of other processes' requests (`cache.Elsewhere`).

    `wait_seconds(replica, tokens)` predicts the time until the first token of a prefill of `tokens` uncached tokens
    there, including the work before it.
    """

    def __init__(self, gate: PrefillGate, wait_seconds: Callable[[int, float], float]) -> None:
        self._gate = gate
        self._wait_seconds = wait_seconds
        self._leading: dict[int, tuple[Prefill, asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return len(self._leading)

    def placed(self, placement: Placement, prompt_tokens: int) -> None:
        """Let requests follow another process's request if it computes a long part of its prompt."""
        uncached = prompt_tokens - placement.predicted_tokens
        if uncached <= self._gate.cold_tokens or placement.id in self._leading:
            return
        prefill = self._gate.lead(
            placement.replica, placement.fingerprint.hashes, placement.held_blocks, placement.predicted_tokens
        )
        patience = PATIENCE * self._wait_seconds(placement.replica, uncached) + PATIENCE_SECONDS
        alarm = asyncio.get_running_loop().call_later(patience, self.computed, placement.id)
        self._leading[placement.id] = prefill, alarm

    def computed(self, placement_id: int) -> None:
        """Let the followers go after the first token, or after too long a time. May be called twice."""
        if (prefill := self._pop(placement_id)) is not None:
            prefill.first_token()

    def failed(self, placement_id: int) -> None:
        """Promote the first follower, because the placement was taken back or the client left."""
        if (prefill := self._pop(placement_id)) is not None:
            prefill.failed()

    def _pop(self, placement_id: int) -> Prefill | None:
        prefill, alarm = self._leading.pop(placement_id, (None, None))
        if alarm is not None:
            alarm.cancel()
        return prefill
