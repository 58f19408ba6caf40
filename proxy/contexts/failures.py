"""The one place where what goes wrong with a stored context gets the status that a client reads."""

from __future__ import annotations

from cache import CacheError, PastExpiry, QuotaFull, StoreCorrupt, UnknownContext
from proxy.errors import BadRequest, CairnError, ContextDamaged, ContextNotFound, ContextsAway, QuotaExceeded

RETRY_SECONDS = 2.0
"""When to come back while Redis is away: it is tried again about every second."""


def shown(error: CacheError) -> CairnError:
    """What the client is told."""
    if isinstance(error, UnknownContext):
        return unknown()
    if isinstance(error, PastExpiry):
        return BadRequest("The end lies in the past.", param="expired_at")
    if isinstance(error, QuotaFull):
        return QuotaExceeded(str(error))
    if isinstance(error, StoreCorrupt):
        return ContextDamaged("What is stored of this context is damaged; upload it again.")
    return ContextsAway("Stored contexts cannot be reached now.", retry_after_seconds=RETRY_SECONDS)


def unknown() -> ContextNotFound:
    """The same for what never was, is no more, and is another's."""
    return ContextNotFound("There is no such stored context or tag.")


def inactive() -> ContextNotFound:
    """It has expired, and was not asked to be revived."""
    return ContextNotFound(
        "This stored context has expired; PUT with a ttl, or use with reset_ttl, revives it.", code="context_inactive"
    )
