"""Ask one question over plain HTTP, as any client of the API would, and time the response.

Works the same against Cairn and against an engine.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from demo.questions import Question, chat_request
from proxy.clock import Clock

ANSWER_TIMEOUT_SECONDS = 120.0  # a cold document on a slow, busy machine


@dataclass(frozen=True, slots=True)
class Answer:
    """The response to one question. `cached_tokens` and `replica` are None if they were not reported."""

    question: Question
    replica: str | None
    prompt_tokens: int
    cached_tokens: int | None
    ttft_seconds: float
    text: str


class AskFailed(Exception):
    """The question got no usable response; the message can be shown to the user."""


def ask(base_url: str, model: str, question: Question, clock: Clock) -> Answer:
    """Send the question to `base_url` (without /v1) and read the stream to its end. Raises `AskFailed`."""
    address = urlsplit(base_url).netloc
    connection = http.client.HTTPConnection(address, timeout=ANSWER_TIMEOUT_SECONDS)
    try:
        body = json.dumps(chat_request(question, model)).encode()
        sent_seconds = clock.monotonic()
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise AskFailed(f"{address} answered {response.status}: {_reason(response.read())}")
        return _read(response, question, sent_seconds, clock)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise AskFailed(f"no response from {address}: {error or type(error).__name__}") from error
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, question: Question, sent_seconds: float, clock: Clock) -> Answer:
    """Read the stream. The first token is the first content that is not empty, so not the chunk with the role."""
    pieces: list[str] = []
    ttft_seconds = None
    usage: dict[str, Any] = {}
    for event in events(response):
        piece = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
        if piece and ttft_seconds is None:
            ttft_seconds = clock.monotonic() - sent_seconds
        pieces.append(piece)
        usage = event.get("usage") or usage
    return Answer(
        question=question,
        replica=response.getheader("x-cairn-replica"),
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        ttft_seconds=clock.monotonic() - sent_seconds if ttft_seconds is None else ttft_seconds,
        text="".join(pieces),
    )


def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON of each server-sent event up to `[DONE]`. Raises `AskFailed` if the stream ends before that."""
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return
        event = json.loads(payload)
        if "error" in event:
            raise AskFailed(f"the response was cut off: {_reason(payload)}")
        yield event
    raise AskFailed("the response was cut off before its end")


def _reason(body: bytes) -> str:
    """Return the message of an error in OpenAI's format, or the body itself."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]
