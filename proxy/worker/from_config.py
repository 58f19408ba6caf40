"""Translate the configuration into the parameters of the objects that it configures."""

from __future__ import annotations

import msgspec

from cache import ContextLimits
from proxy.clock import Clock
from proxy.config.checks import is_loopback
from proxy.config.schema import (
    Admission,
    AdmissionMode,
    Client,
    Config,
    Contexts,
    Disclosure,
    Queueing,
    RequestPriority,
    Upstream,
)
from proxy.fleet import BreakerSettings
from proxy.pipeline.admission import Authenticator, KnownClient
from proxy.pipeline.dispatch import HOLD_SECONDS, RetryPolicy
from proxy.pipeline.page_guard import PageGuard
from proxy.pipeline.response_relay import StreamLimits
from proxy.pipeline.silence import SilenceWatch
from proxy.routing.cold_turn import GateLimits
from proxy.routing.replica_queue import QueueLimits
from proxy.upstream import Limits

_PRIORITIES = {RequestPriority.HIGH: 0, RequestPriority.NORMAL: 1, RequestPriority.LOW: 2}


def breaker_settings(upstream: Upstream) -> BreakerSettings:
    """Return the pauses after a replica's failures."""
    return BreakerSettings(
        first_seconds=upstream.backoff_seconds,
        most_seconds=upstream.backoff_max_seconds,
        most_retry_after_seconds=upstream.retry_after_max_seconds,
    )


def retry_policy(upstream: Upstream) -> RetryPolicy:
    """Return the limits of sending a request to another replica."""
    return RetryPolicy(
        max_retries=upstream.max_retries,
        statuses=frozenset(upstream.retry_statuses),
        hold_seconds=min(upstream.comment_seconds or HOLD_SECONDS, HOLD_SECONDS),
        first_byte_seconds=upstream.first_byte_seconds,
        idle_seconds=upstream.idle_seconds,
    )


def stream_limits(upstream: Upstream) -> StreamLimits:
    """Return the longest silences of a stream."""
    return StreamLimits(
        idle_seconds=upstream.idle_seconds,
        thinking_seconds=upstream.thinking_seconds,
    )


def silence_watch(upstream: Upstream, clock: Clock) -> SilenceWatch:
    """Return the watch that sends comments to the clients of silent streams."""
    return SilenceWatch(upstream.comment_seconds, clock, before_head=upstream.comment_before_head)


def upstream_limits(upstream: Upstream) -> Limits:
    """Return the time limits and the pool size of connections to a replica."""
    return Limits(
        connect_seconds=upstream.connect_seconds,
        first_byte_seconds=upstream.first_byte_seconds,
        idle_seconds=upstream.idle_seconds,
        pool_wait_seconds=upstream.pool_seconds,
        max_connections=upstream.max_connections,
        idle_expiry_seconds=upstream.keepalive_seconds,
    )


def health_check_limits(upstream: Upstream) -> Limits:
    """Return the limits of each question of a health check: an answer takes no prefill."""
    return msgspec.structs.replace(
        upstream_limits(upstream), first_byte_seconds=upstream.check_seconds, idle_seconds=upstream.check_seconds
    )


def context_limits(contexts: Contexts) -> ContextLimits:
    """Return the budgets and quotas of stored contexts."""
    pinned, unchecked = contexts.unlisted_pinned_bytes, contexts.unchecked_bytes
    return ContextLimits(
        total_bytes=contexts.total_bytes,
        tenant_bytes=contexts.tenant_bytes,
        pinned_bytes=contexts.pinned_bytes,
        unlisted_pinned_bytes=contexts.total_bytes // 2 if pinned is None else pinned,
        unchecked_bytes=contexts.total_bytes // 4 if unchecked is None else unchecked,
        contexts_at_most=contexts.max_contexts,
        tags_at_most=contexts.max_tags,
        grace_seconds=contexts.grace_seconds,
        memory_bytes=contexts.memory_bytes,
        warming_seconds=contexts.warming_seconds,
    )


def queue_limits(queue: Queueing) -> QueueLimits:
    """Return how long requests may wait for a replica, and how many."""
    return QueueLimits(queue.deadline_seconds, queue.max_waiting)


def known_clients(clients: tuple[Client, ...]) -> list[KnownClient]:
    """Return the clients that are listed in the configuration."""
    return [
        KnownClient(
            bytes.fromhex(client.key_sha256),
            client.tenant or client.name,
            client.models,
            client.name,
            client.weight,
            _PRIORITIES[client.highest_priority],
        )
        for client in clients
    ]


def authenticator(config: Config, secret: bytes) -> Authenticator:
    """Return the authenticator for the clients of the configuration."""
    discloses_all = config.tenants.disclosure is Disclosure.ALL
    return Authenticator(known_clients(config.clients), secret, discloses_all=discloses_all, pages=page_guard(config))


def page_guard(config: Config) -> PageGuard:
    """Return which pages may send requests without a key; the replicas' keys are for localhost, unless allowed."""
    server = config.server
    is_local = config.has_replica_keys and not server.open and is_loopback(server.host)
    return PageGuard(server.cors_origins, local_only=is_local)


def gate_limits(admission: Admission) -> GateLimits:
    """Return whether and how long cold turns may wait."""
    return GateLimits(
        enabled=admission.enabled is not AdmissionMode.NEVER,
        max_wait_seconds=admission.max_wait_seconds,
        max_waiting_bytes=admission.max_waiting_bytes,
        quiet_seconds=admission.quiet_seconds,
        rest_seconds=admission.rest_seconds,
        memory_seconds=admission.memory_seconds,
    )


def model_names(config: Config) -> list[str]:
    """Return the model names and patterns of all pools."""
    return [pattern for pool in config.pools for pattern in pool.models]
