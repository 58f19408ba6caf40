"""Limit what a tenant learns about a prompt to prefixes that it has sent itself, although all share the index.

Prompts are routed by the prompts of all tenants. Response headers and /explain describe only prefixes that the asking
tenant has had answered at this worker. Two traces remain: a prompt that another tenant sent is answered sooner, and
the upstream's usage shows its cached tokens.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from cache import Fingerprint, Held, Match
from proxy.model import CacheStatus, MissReason, RouteReason
from proxy.records import Candidate, Plan, Tenant

BLOCKS_MOST: Final = 262_144
"""Blocks remembered in each of two generations, 20 MB in all; 250 prompts of 2 MB, or 5,000 of 64 KB."""

_BY_PREFIX = frozenset({RouteReason.WARM, RouteReason.SPREAD, RouteReason.COLD})
_ABOUT_REPLICAS = frozenset({MissReason.NONE, MissReason.SHORT, MissReason.ELSEWHERE, MissReason.DOWN})
_KEY_BYTES: Final = 8


class Told(NamedTuple):
    """The part of a plan that the client may see."""

    cache: CacheStatus
    miss: MissReason
    reason: RouteReason
    matched_tokens: float


class OwnPrefixes:
    """Remembers which prefixes each tenant has had answered; the oldest are forgotten. One per worker."""

    def __init__(self, blocks_most: int = BLOCKS_MOST) -> None:
        self._blocks_most = blocks_most
        self._young: set[int] = set()
        self._old: set[int] = set()

    def known_blocks(self, tenant: Tenant, fingerprint: Fingerprint) -> int:
        """Return how many leading blocks the tenant has had answered.

        A hash covers all blocks before it, so that any block that is found proves all before it. If some blocks were
        forgotten, bisection may find fewer than there are, but never more.
        """
        hashes, key = fingerprint.hashes, _key(tenant)
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            mixed = hashes[middle] ^ key
            if mixed in self._young or mixed in self._old:
                low = middle + 1
            else:
                high = middle
        return low

    def add(self, tenant: Tenant, fingerprint: Fingerprint, known_blocks: int) -> None:
        """Remember a prompt that was answered, `known_blocks` of which are known already."""
        if len(self._young) >= self._blocks_most:
            self._old, self._young = self._young, set()
        self._young.update(map(_key(tenant).__xor__, fingerprint.hashes[known_blocks:]))


def _key(tenant: Tenant) -> int:
    return int.from_bytes(tenant.salt[:_KEY_BYTES], "big")


def limited(match: Match, fingerprint: Fingerprint, own_blocks: int) -> Match:
    """Return `match` as it would be had only the tenant's own blocks been placed."""
    own_blocks = min(own_blocks, match.known_blocks)
    if not own_blocks:
        return Match({})
    own_bytes = fingerprint.ends[own_blocks - 1]
    held = {
        replica: have
        if have.blocks <= own_blocks
        else Held(own_blocks, own_bytes, round(have.tokens * own_bytes / have.size_bytes))
        for replica, have in match.held.items()
    }
    known_tokens = round(match.known_tokens * own_bytes / match.known_bytes)
    return Match(held, known_blocks=own_blocks, known_bytes=own_bytes, known_tokens=known_tokens)


def told(
    plan: Plan, candidate: Candidate, match: Match | None, fingerprint: Fingerprint | None, own_blocks: int
) -> Told:
    """Return the part of `plan` that a tenant may see which has had `own_blocks` of the prompt answered before.

    A prompt that only others have sent looks the same as one that nobody has.
    """
    if match is None or fingerprint is None:
        return Told(plan.cache, plan.miss, plan.reason, candidate.matched_tokens)
    own_bytes = fingerprint.ends[own_blocks - 1] if own_blocks else 0
    matched_bytes = min(candidate.matched_bytes, own_bytes)
    if not matched_bytes:
        return Told(CacheStatus.MISS, MissReason.COLD, _by_prefix(plan.reason, RouteReason.COLD), 0.0)
    if own_blocks >= match.known_blocks:
        miss = plan.miss if plan.miss in _ABOUT_REPLICAS else MissReason.NONE
        return Told(plan.cache, miss, plan.reason, candidate.matched_tokens)
    tokens = candidate.matched_tokens * matched_bytes / candidate.matched_bytes
    return Told(CacheStatus.PARTIAL, MissReason.NONE, _by_prefix(plan.reason, RouteReason.WARM), tokens)


def undisclosed_tokens(candidate: Candidate, fingerprint: Fingerprint | None, own_blocks: int | None) -> float:
    """Return the matched tokens that the tenant, which has had `own_blocks` of the prompt answered, may not know of.

    `own_blocks` is None if it may know of all.
    """
    if own_blocks is None or fingerprint is None or not candidate.matched_bytes:
        return 0.0
    own_bytes = fingerprint.ends[own_blocks - 1] if own_blocks else 0
    return candidate.matched_tokens * max(0.0, 1.0 - own_bytes / candidate.matched_bytes)


def _by_prefix(reason: RouteReason, instead: RouteReason) -> RouteReason:
    return instead if reason in _BY_PREFIX else reason
