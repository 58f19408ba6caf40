"""Explain how a request would be routed now, without routing it: the answer of `/explain`.

It runs the pipeline's own phases, so its result is theirs, and it changes nothing.
"""

from __future__ import annotations

from typing import Any

import msgspec

from proxy.clock import Clock
from proxy.control.messages import Explain
from proxy.errors import BadRequest, CairnError
from proxy.model import Endpoint
from proxy.pipeline.admission import Authenticator
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.pipeline import Pipeline
from proxy.pipeline.routes import Routes
from proxy.records import Call, Candidate
from proxy.routing.cold_turn import Verdict
from proxy.wire.errors import error_response


class Explainer:
    """Answers `/explain` in a worker."""

    def __init__(self, pipeline: Pipeline, routes: Routes, clock: Clock) -> None:
        self._pipeline = pipeline
        self._routes = routes
        self._clock = clock

    async def explain(self, question: Explain, authenticator: Authenticator) -> tuple[int, bytes]:
        """Return an HTTP status and JSON: the choice, its reason, and each replica's matched tokens and cost."""
        try:
            route = self._routes.route("POST", question.path)
            if not route.endpoint.is_generation:
                raise BadRequest("Only requests with a prompt are routed by their prefix.", param="path")
            now_seconds = self._clock.monotonic()
            tenant = authenticator.tenant_of(question.credential)
            call = Call(
                request_id="explain",
                tenant=tenant,
                endpoint=route.endpoint,
                method="POST",
                target=route.target,
                headers=question.headers,
                body=question.body,
                received_seconds=now_seconds,
                read_seconds=now_seconds,
                path_model=route.model,
            )
            exchange = Exchange(call)
            exchange.only_explained = True
            await self._pipeline.decide(exchange)
            verdict = self._pipeline.cold_turns.judge(exchange)
        except CairnError as error:
            answer = error_response(error, Endpoint.CHAT)
            return answer.status, answer.body
        return 200, msgspec.json.encode(_explanation(exchange, verdict))


def _explanation(exchange: Exchange, verdict: Verdict | None) -> dict[str, Any]:
    plan, pool, prompt = exchange.plan, exchange.pool, exchange.prompt
    assert plan is not None  # noqa: S101 - the phases ran
    assert pool is not None  # noqa: S101
    assert prompt is not None  # noqa: S101
    return {
        "model": prompt.model,
        "pool": pool.name,
        "prompt_bytes": prompt.size_bytes,
        "prompt_tokens": round(plan.prompt_tokens),
        "blocks": 0 if exchange.fingerprint is None else len(exchange.fingerprint),
        "choice": plan.chosen.replica.name,
        "reason": plan.reason.value,
        "cache": plan.cache.value,
        "miss": plan.miss.value,
        "wait": _wait(exchange, verdict),
        "replicas": [_row(candidate) for candidate in plan.candidates],
    }


def _wait(exchange: Exchange, verdict: Verdict | None) -> dict[str, Any] | None:
    """Return whether the request would wait, why, for about how long, and its class; None if it never waits."""
    if verdict is None:
        return None
    return {
        "kind": verdict.kind.value,
        "waits": verdict.waits,
        "reason": verdict.reason,
        "seconds": round(verdict.seconds, 3),
        "priority": exchange.priority_to_wait_by().name.lower(),
    }


def _row(candidate: Candidate) -> dict[str, Any]:
    replica = candidate.replica
    return {
        "replica": replica.name,
        "matched_bytes": candidate.matched_bytes,
        "matched_tokens": round(candidate.matched_tokens),
        "uncached_tokens": round(candidate.uncached_tokens),
        "pending_tokens": round(replica.pending_tokens),
        "in_flight": replica.in_flight,
        "queued": replica.queued,
        "prefill_tokens_per_second": round(replica.rate_tokens_per_second),
        "lateness_seconds": round(replica.lateness_seconds, 6),
        "cost_seconds": round(candidate.cost_seconds, 6),
    }
