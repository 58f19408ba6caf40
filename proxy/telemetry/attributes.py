"""Attributes of spans, by OpenTelemetry's conventions for generative AI and for HTTP. Pure.

A span contains no prompt, no key, no hash and nothing of the tenant. Names that are not in the conventions begin with
`cairn.`.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from proxy.accounting.access_log import route_of
from proxy.model import Ending, Endpoint
from proxy.records import Call, Outcome, Prompt

Attributes: TypeAlias = dict[str, str | int | float | bool]

_MODEL_CHARACTERS: Final = 128  # a client may send any name

_OPERATIONS: Final = {
    Endpoint.CHAT: "chat",
    Endpoint.RESPONSES: "chat",
    Endpoint.MESSAGES: "chat",
    Endpoint.COMPLETIONS: "text_completion",
    Endpoint.EMBEDDINGS: "embeddings",
}
_FAILED: Final = frozenset(
    {Ending.UPSTREAM_FAILED, Ending.UPSTREAM_BROKE, Ending.UPSTREAM_ERROR, Ending.TRUNCATED, Ending.INTERNAL}
)


def server_span_name(call: Call) -> str:
    """Return the name of a request's span: method and route, with `{id}` in place of an object's id."""
    return f"{call.method} {route_of(call)}"


def inference_span_name(call: Call, model: str | None) -> str:
    """Return the name of the span of the upstream's work, such as `chat llama-3`."""
    operation = _OPERATIONS.get(call.endpoint)
    if operation is None:
        return "relay"
    return f"{operation} {model[:_MODEL_CHARACTERS]}" if model else operation


def server_attributes(call: Call, outcome: Outcome) -> Attributes:
    """Describe a request as the client saw it."""
    route = route_of(call)
    found: Attributes = {
        "http.request.method": call.method,
        "http.route": route,
        "url.path": route,
        "url.scheme": "http",
        "http.request.body.size": outcome.request_bytes,
        "http.response.body.size": outcome.response_bytes,
        "cairn.request_id": call.request_id,
        "cairn.endpoint": call.endpoint.value,
        "cairn.ending": outcome.ending.value,
    }
    if outcome.status:
        found["http.response.status_code"] = outcome.status
    if outcome.model:
        found["gen_ai.request.model"] = outcome.model[:_MODEL_CHARACTERS]
    if error := error_type(outcome):
        found["error.type"] = error
    return found


def inference_attributes(
    call: Call, outcome: Outcome, prompt: Prompt | None, started_seconds: float, address: tuple[str, int] | None
) -> Attributes:
    """Describe the work of the upstream.

    Args:
        call: the request.
        outcome: how it ended.
        prompt: the prompt as it was read, or None.
        started_seconds: when the relay began, on the monotonic clock.
        address: host and port of the replica, or None if none was tried.
    """
    found: Attributes = {"cairn.ending": outcome.ending.value, "cairn.retries": outcome.retries}
    if operation := _OPERATIONS.get(call.endpoint):
        found["gen_ai.operation.name"] = operation
        # by the dialect: the company whose engine or service answers is not known
        found["gen_ai.provider.name"] = "anthropic" if call.endpoint is Endpoint.MESSAGES else "openai"
    if outcome.model:
        found["gen_ai.request.model"] = outcome.model[:_MODEL_CHARACTERS]
    if prompt is not None and prompt.max_output_tokens is not None:
        found["gen_ai.request.max_tokens"] = prompt.max_output_tokens
    if outcome.stream:
        found["gen_ai.request.stream"] = True
    if address is not None:
        found["server.address"], found["server.port"] = address
    if outcome.status:
        found["http.response.status_code"] = outcome.status
    if error := error_type(outcome, client_errors=True):
        found["error.type"] = error
    _add_times(found, outcome, started_seconds)
    _add_plan(found, outcome)
    _add_usage(found, outcome)
    return found


def error_type(outcome: Outcome, *, client_errors: bool = False) -> str | None:
    """Return why a request failed, or None if it did not.

    A status from 400 to 499 is the client's error, and counts only with `client_errors`.
    """
    if outcome.ending in _FAILED or outcome.status >= (400 if client_errors else 500):
        return outcome.error_code or (str(outcome.status) if outcome.status >= 400 else outcome.ending.value)
    return None


def _add_times(found: Attributes, outcome: Outcome, started_seconds: float) -> None:
    times = outcome.times
    if outcome.stream and times.first_token_seconds is not None:
        found["gen_ai.response.time_to_first_chunk"] = round(times.first_token_seconds - started_seconds, 6)
    if times.waited_seconds:
        found["cairn.waited_seconds"] = round(times.waited_seconds, 6)


def _add_plan(found: Attributes, outcome: Outcome) -> None:
    plan, replica = outcome.plan, outcome.replica
    if replica is not None:
        found["cairn.replica"] = replica.name
    if plan is not None:
        found["cairn.cache"], found["cairn.reason"] = plan.cache.value, plan.reason.value
        found["cairn.miss"] = plan.miss.value
        if plan.candidates:
            found["cairn.predicted_cached_tokens"] = round(plan.chosen.matched_tokens)


def _add_usage(found: Attributes, outcome: Outcome) -> None:
    usage = outcome.usage
    if usage is None:
        return
    found["gen_ai.usage.input_tokens"] = usage.prompt_tokens
    found["gen_ai.usage.output_tokens"] = usage.output_tokens
    if usage.cached_tokens is not None:
        found["gen_ai.usage.cache_read.input_tokens"] = usage.cached_tokens
    if written := usage.cache_write_5m_tokens + usage.cache_write_1h_tokens:
        found["gen_ai.usage.cache_creation.input_tokens"] = written
    if usage.reasoning_tokens:
        found["gen_ai.usage.reasoning.output_tokens"] = usage.reasoning_tokens
