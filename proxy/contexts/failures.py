"""Map the cache's errors about stored contexts to those that a client sees: the only place that knows both."""

from __future__ import annotations

from cache import CacheError, PastExpiry, PinRefused, QuotaFull, StoreCorrupt, UnknownContext
from proxy.errors import (
    BadRequest,
    CairnError,
    ContextDamaged,
    ContextNotFound,
    ContextsAway,
    Forbidden,
    QuotaExceeded,
)

RETRY_SECONDS = 2.0
"""Seconds after which to retry while Redis is away; it is probed about once a second."""


def shown(error: CacheError) -> CairnError:
    """Return the error for the client."""
    if isinstance(error, UnknownContext):
        return unknown()
    if isinstance(error, PastExpiry):
        return BadRequest("The expiry must be in the future.", param="expired_at")
    if isinstance(error, QuotaFull):
        return QuotaExceeded(str(error))
    if isinstance(error, PinRefused):
        return Forbidden(str(error), param="metadata", code="pin_refused")
    if isinstance(error, StoreCorrupt):
        return ContextDamaged("The stored data of this context is damaged; upload the context again.")
    return ContextsAway("Stored contexts are not available now; try again.", retry_after_seconds=RETRY_SECONDS)


def unknown() -> ContextNotFound:
    """Return the same error for a context that never existed, one that is gone, and another tenant's."""
    return ContextNotFound("There is no such stored context or tag.")


def inactive() -> ContextNotFound:
    """Return the error for a context that has expired."""
    return ContextNotFound(
        "This stored context has expired; revive it by a PUT with a ttl, or by using it with reset_ttl.",
        code="context_inactive",
    )
