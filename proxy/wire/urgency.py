"""Read the urgency that a client states for its request: a priority and a deadline, in headers or body. Pure.

`x-cairn-priority` is `high`, `normal` or `low`. The body may contain the priority as OpenAI's `service_tier`
(`priority` or `flex`) or as vLLM's `priority` (a whole number, lower first, 0 by default). The header takes
precedence. `x-request-deadline` is in seconds from the arrival of the request, such as `2.5`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from msgspec import Raw

from proxy.errors import BadRequest
from proxy.model import Body
from proxy.wire.schemas import DECODE_ERRORS, NONE, decode_priority, decode_tier, decode_urgent

PRIORITY_HEADER: Final = b"x-cairn-priority"
DEADLINE_HEADER: Final = b"x-request-deadline"
MAX_DEADLINE_SECONDS: Final = 86_400.0
HIGH: Final = 0
NORMAL: Final = 1
LOW: Final = 2

_LENGTHS: Final = frozenset({len(PRIORITY_HEADER), len(DEADLINE_HEADER)})
_SECONDS: Final = re.compile(rb"[ \t]*((?:[0-9]{1,5}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,2})?)[ \t]*")
_LEVELS: Final = {b"high": HIGH, b"normal": NORMAL, b"low": LOW}
_TIERS: Final = {"priority": HIGH, "flex": LOW}


class Urgency(NamedTuple):
    """The values of the headers; None for a missing one."""

    priority: int | None = None
    deadline_seconds: float | None = None


UNSAID: Final = Urgency()


def urgency_of(headers: Iterable[tuple[bytes, bytes]]) -> Urgency:
    """Read both headers.

    Raises:
        BadRequest: a header has an invalid value.
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


def priority_in(body: Body) -> int | None:
    """Return the priority that the body of a request asks for which is no prompt, None if it asks for none.

    It takes a pass over the body.
    """
    try:
        fields = decode_urgent(body)
    except DECODE_ERRORS:
        return None  # a form, or left to the upstream
    return body_priority(fields.service_tier, fields.priority)


def body_priority(tier: Raw, number: Raw) -> int | None:
    """Return the priority that a body's `service_tier` and `priority` ask for, None if they ask for none."""
    if tier is not NONE:
        try:
            named = _TIERS.get(decode_tier(tier))
        except DECODE_ERRORS:
            named = None  # left to the upstream
        if named is not None:
            return named
    if number is NONE:
        return None
    try:
        value = decode_priority(number)
    except DECODE_ERRORS:
        return None
    return HIGH if value < 0 else LOW if value > 0 else NORMAL


def _seconds(value: bytes) -> float:
    written = _SECONDS.fullmatch(value)
    seconds = float(written[1]) if written else 0.0
    if not 0 < seconds <= MAX_DEADLINE_SECONDS:
        raise BadRequest(
            "x-request-deadline must be a number of seconds, above 0 and at most 86400.", param="x-request-deadline"
        )
    return seconds
