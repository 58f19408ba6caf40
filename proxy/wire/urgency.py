"""How urgent a client says its request is: a priority and a deadline, in headers or in the body. Pure.

`x-cairn-priority` is `high`, `normal` or `low`. The body may say the same as OpenAI's `service_tier` (`priority` or
`flex`) or as vLLM's `priority` (a whole number, lower first, 0 by default). The header goes before the body.
`x-request-deadline` is in seconds from the arrival of the request, such as `2.5`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from proxy.errors import BadRequest
from proxy.model import Body
from proxy.wire.schemas import decode_urgency

PRIORITY_HEADER: Final = b"x-cairn-priority"
DEADLINE_HEADER: Final = b"x-request-deadline"
MAX_DEADLINE_SECONDS: Final = 86_400.0
HIGH: Final = 0
NORMAL: Final = 1
LOW: Final = 2

_LENGTHS: Final = frozenset({len(PRIORITY_HEADER), len(DEADLINE_HEADER)})
_LEVELS: Final = {b"high": HIGH, b"normal": NORMAL, b"low": LOW}
_TIERS: Final = {"priority": HIGH, "flex": LOW}


class Urgency(NamedTuple):
    """As the headers say it; None for what they leave out."""

    priority: int | None = None
    deadline_seconds: float | None = None


UNSAID: Final = Urgency()


def urgency_of(headers: Iterable[tuple[bytes, bytes]]) -> Urgency:
    """Read both headers.

    Raises:
        BadRequest: a header has a value that it cannot have.
    """
    priority: int | None = None
    deadline: float | None = None
    for name, value in headers:
        if len(name) not in _LENGTHS:
            continue
        if name == PRIORITY_HEADER:
            priority = _LEVELS.get(value.strip().lower())
            if priority is None:
                raise BadRequest("x-cairn-priority must be high, normal or low.", param="x-cairn-priority")
        elif name == DEADLINE_HEADER:
            deadline = _seconds(value)
    return UNSAID if priority is None and deadline is None else Urgency(priority, deadline)


def body_priority(body: Body) -> int | None:
    """Return the priority that the body says, None if it says none. Skips through the whole body once."""
    if b'"priority"' not in body and b'"service_tier"' not in body:
        return None
    try:
        fields = decode_urgency(body)
    except msgspec.MsgspecError:
        return None  # the upstream judges it
    tier = fields.service_tier
    if isinstance(tier, str) and tier in _TIERS:
        return _TIERS[tier]
    number = fields.priority
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    return HIGH if number < 0 else LOW if number > 0 else NORMAL


def _seconds(value: bytes) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_DEADLINE_SECONDS:
        raise BadRequest(
            "x-request-deadline must be a number of seconds, above 0 and at most 86400.", param="x-request-deadline"
        )
    return seconds
