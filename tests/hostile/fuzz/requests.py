"""Well-formed requests to every endpoint of the client port and of the admin port, made from a seeded generator.

Each has a number, which travels in a header that Cairn passes on, so that the upstream's record of it can be found.
"""

from __future__ import annotations

import enum
import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import brotli
import zstandard

Headers = list[tuple[bytes, bytes]]

MARK = b"x-fuzz"
JSON = (b"content-type", b"application/json")
MODELS = ("m-0", "m-1", "m-2", "org/m-3")
_WORDS = [
    "the",
    "context",
    "of",
    "a",
    "prompt",
    "is",
    "longer",
    "than",
    "its",
    "question",
    "and",
    "is",
    "sent",
    "again",
    "with",
    "every",
    "turn",
]
_COLLECTIONS = (
    "batches", "chat/completions", "containers", "conversations", "files", "messages/batches", "responses", "uploads",
    "videos",
)  # fmt: skip
_INFERENCE = (
    "audio/speech", "audio/transcriptions", "audio/translations", "classify", "fim/completions", "images/edits",
    "images/generations", "images/variations", "messages/count_tokens", "moderations", "ocr", "pooling", "rerank",
    "responses/compact", "responses/input_tokens", "score",
)  # fmt: skip
_ADMIN_PATHS = (
    "/healthz", "/readyz", "/metrics", "/savings", "/savings?since=7d&by=model", "/", "/page.js", "/page.css",
    "/explain", "/nothing",
)  # fmt: skip


class Must(enum.Enum):
    """The required outcome of a request."""

    PASS = "pass"  # relayed, once, with the upstream's own answer
    ANSWER = "answer"  # answered by Cairn itself, with no 5xx
    EITHER = "either"  # relayed once, or answered by Cairn


@dataclass(slots=True)
class Request:
    """One request. `kind` is its row in the table; `plain_body` the body before it was compressed.

    `splices` is True if Cairn may edit the body, other than by `stream_options`.
    """

    number: int
    kind: str
    method: str
    target: bytes
    headers: Headers
    body: bytes = b""
    plain_body: bytes = b""
    must: Must = Must.PASS
    splices: bool = False
    is_admin: bool = False


@dataclass(slots=True)
class Known:
    """Ids that answers named within one session, to be used by its later requests."""

    contexts: list[str] = field(default_factory=list)
    objects: list[tuple[str, str]] = field(default_factory=list)  # collection and id
    key: bytes = b""


def well_formed(random: Random, number: int, known: Known) -> Request:
    """Make the next request of a session."""
    make = random.choices(_MAKERS, _WEIGHTS)[0]
    request = make(random, number, known)
    request.headers += [(MARK, mark(number)), (b"host", b"127.0.0.1" if request.is_admin else b"cairn.test")]
    if known.key:
        request.headers.append((b"authorization", b"Bearer " + known.key))
    request.plain_body = request.body
    if request.must is Must.PASS and request.kind == "prompt" and random.random() < 0.05:
        _compress(request, random)
    random.shuffle(request.headers)
    return request


def mark(number: int) -> bytes:
    """Return the value of the header that numbers a request; a changed digit makes it invalid."""
    return b"%d.%08x" % (number, zlib.crc32(b"%d" % number))


def number_of(value: bytes) -> int | None:
    """Return the number of a mark, or None if it is not one."""
    digits, _, _ = value.partition(b".")
    return int(digits) if digits.isdigit() and len(digits) < 16 and mark(int(digits)) == value else None


def encoded(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()


def _text(random: Random, most: int = 400) -> str:
    words = random.randrange(1, most) if random.random() < 0.3 else random.randrange(1, 30)
    return " ".join(random.choices(_WORDS, k=words)) + random.choice(("", "?", " ä€😀", "\n"))


def _messages(random: Random) -> list[dict[str, Any]]:
    # few first messages, so that prefixes are shared
    system = f"system prompt {random.randrange(20)} " + "shared words " * random.choice((10, 200, 500))
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    turns = range(random.randrange(1, 4))
    messages += [{"role": ("user", "assistant")[turn % 2], "content": _text(random)} for turn in turns]
    if random.random() < 0.1:
        url = "data:image/png;base64," + "iVBORw0KGgo" * random.randrange(1, 50)
        messages.append(
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}],
            }
        )
    return messages


def _tools(random: Random) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {"q": {"type": "string"}}}
    return [
        {"type": "function", "function": {"name": f"tool_{index}", "parameters": parameters}}
        for index in range(random.randrange(1, 4))
    ]


def _prompt(random: Random, number: int, known: Known) -> Request:
    path = random.choice(
        ("chat/completions", "chat/completions", "completions", "responses", "messages", "embeddings")
    )
    body: dict[str, Any] = {"model": random.choice(MODELS), "user": f"u{number % 50}"}
    if path in ("chat/completions", "messages"):
        body["messages"] = _messages(random)
        if random.random() < 0.3:
            body["tools"] = _tools(random)
        if path == "messages":
            body["max_tokens"] = 10
    elif path == "completions":
        body["prompt"] = _text(random) if random.random() < 0.8 else [1, 2, 3]
    elif path == "responses":
        body["input"] = _text(random) if random.random() < 0.5 else _messages(random)
        body["instructions"] = "be brief " * random.choice((1, 600))
    else:
        body["input"] = [_text(random) for _ in range(random.randrange(1, 4))]
    if path != "embeddings" and random.random() < 0.4:
        body["stream"] = True
        if random.random() < 0.3:
            body["stream_options"] = random.choice(({"include_usage": True}, {"include_usage": False}, None, {}))
    headers = [JSON]
    if random.random() < 0.3:
        headers.append((b"accept-encoding", random.choice((b"gzip", b"gzip, deflate, br, zstd", b"identity", b"*"))))
    prefix = random.choice((b"/v1/", b"/v1/", b"/v1/", b"/", b"/v1/v1/", b"/v1//", b"/%761/"))
    return Request(number, "prompt", "POST", prefix + path.encode(), headers, encoded(body))


def _compress(request: Request, random: Random) -> None:
    name, compress = random.choice(
        (
            (b"gzip", gzip.compress),
            (b"zstd", zstandard.ZstdCompressor().compress),
            (b"br", brotli.compress),
            (b"deflate", zlib.compress),
        )
    )
    request.body = compress(request.body)
    request.headers.append((b"content-encoding", name))
    request.kind = "compressed"


def _form(random: Random, fields: list[tuple[str, str | bytes, bool]]) -> tuple[bytes, bytes]:
    boundary = b"----form%d" % random.randrange(10**6)
    parts = b""
    for name, value, is_file in fields:
        raw = value.encode() if isinstance(value, str) else value
        more = '; filename="a.bin"\r\nContent-Type: application/octet-stream' if is_file else ""
        parts += b"--%b\r\nContent-Disposition: form-data; name=\"%b\"%b\r\n\r\n%b\r\n" % (
            boundary, name.encode(), more.encode(), raw,
        )  # fmt: skip
    return b"multipart/form-data; boundary=" + boundary, parts + b"--%b--\r\n" % boundary


def _inference(random: Random, number: int, known: Known) -> Request:
    path = random.choice(_INFERENCE).encode()
    if path.startswith((b"audio/tr", b"images/e", b"images/v")):
        content = random.randbytes(random.choice((10, 1000, 50_000)))
        kind, body = _form(random, [("model", random.choice(MODELS), False), ("file", content, True)])
        return Request(number, "form", "POST", b"/v1/" + path, [(b"content-type", kind)], body)
    body = encoded({"model": random.choice(MODELS), "input": _text(random), "query": "q", "documents": ["a", "b"]})
    return Request(number, "inference", "POST", b"/v1/" + path, [JSON], body)


def _created(random: Random, number: int, known: Known) -> Request:
    collection = random.choice(("files", "uploads", "containers", "conversations", "batches", "videos"))
    target = f"/v1/{collection}".encode()
    if collection == "files":
        purpose, content = "assistants", random.randbytes(random.choice((10, 5000, 300_000)))
        if random.random() < 0.4:
            purpose, content = "batch", b"\n".join(_lines(random, random.choice((1, 3, 200))))
        fields: list[tuple[str, str | bytes, bool]] = [("purpose", purpose, False)]
        kind, body = _form(random, [*fields, ("file", content, True)])
        return Request(number, "created", "POST", target, [(b"content-type", kind)], body)
    tree: dict[str, Any] = {"model": random.choice(MODELS), "metadata": {"n": str(number)}}
    must = Must.PASS
    if collection == "batches":
        files = [each for kind_, each in known.objects if kind_ == "files"]
        tree = {"input_file_id": random.choice(files or ["file-unknown"]), "endpoint": "/v1/chat/completions"}
        must = Must.EITHER
    return Request(number, "created", "POST", target, [JSON], encoded(tree), must=must)


def _lines(random: Random, count: int) -> list[bytes]:
    """Return the requests of a batch."""
    bodies = [{"model": random.choice(MODELS), "input": _text(random)} for _ in range(count)]
    return [encoded({"custom_id": str(at), "url": "/v1/responses", "body": body}) for at, body in enumerate(bodies)]


def _object(random: Random, number: int, known: Known) -> Request:
    method = random.choice(("GET", "GET", "DELETE", "POST", "HEAD"))
    if known.objects and random.random() < 0.7:
        collection, name = random.choice(known.objects)
        must = Must.EITHER  # made at a replica that this worker knows; by another tenant it is a 404
    else:
        collection, name, must = random.choice(_COLLECTIONS), f"id-{random.randrange(1000)}", Must.EITHER
    rest = random.choice(("", "", "/content", "/cancel", "/input_items?limit=2", "/parts"))
    target = f"/v1/{collection}/{name}{rest}".encode()
    body = b"{}" if method == "POST" else b""
    return Request(number, "object", method, target, [JSON] if body else [], body, must=must)


def _context(random: Random, number: int, known: Known) -> Request:
    roll = random.random()
    if not known.contexts or roll < 0.3:
        tree: dict[str, Any] = {"model": random.choice(MODELS), "messages": _messages(random)[:1]}
        if random.random() < 0.3:
            tree |= {"tags": ["doc"], "metadata": {"pin": "true"}, "ttl": 100}
        return Request(number, "context", "POST", b"/v1/caching", [JSON], encoded(tree), must=Must.ANSWER)
    name = random.choice(known.contexts)
    if roll < 0.6:
        reference = random.choice((f"cache_id={name}", f"cache_id={name};reset_ttl=60", "tag=doc"))
        messages = [{"role": "cache", "content": reference}, {"role": "user", "content": _text(random)}]
        body = encoded({"model": random.choice(MODELS), "messages": messages, "stream": random.random() < 0.3})
        return Request(
            number, "context use", "POST", b"/v1/chat/completions", [JSON], body, must=Must.EITHER, splices=True
        )
    path = random.choice(
        (f"/{name}", "", "?limit=5", "/refs/tags", "/refs/tags/doc", "/refs/tags/doc/content", "?metadata[a]=b")
    )
    method = random.choice(("GET", "GET", "PUT", "DELETE", "POST"))
    tree = {"metadata": {"a": "b"}, "ttl": 50, "tag": "doc", "cache_id": name}
    return Request(number, "context", method, b"/v1/caching" + path.encode(), [JSON], encoded(tree), must=Must.ANSWER)


def _other(random: Random, number: int, known: Known) -> Request:
    method, target, must = random.choice(
        (
            ("GET", b"/v1/models", Must.EITHER),
            ("GET", b"/models", Must.EITHER),
            ("GET", b"/v1/models/m-0", Must.EITHER),
            ("HEAD", b"/health", Must.ANSWER),
            ("GET", b"/healthz", Must.ANSWER),
            ("OPTIONS", b"/v1/chat/completions", Must.EITHER),
            ("GET", b"/v1/organization/api_keys", Must.EITHER),
            ("DELETE", b"/v1/fine_tuning/jobs/x", Must.EITHER),
            ("POST", b"/v1/load_lora_adapter", Must.EITHER),
            ("POST", b"/tokenize", Must.EITHER),
            ("GET", b"/version", Must.EITHER),
            ("POST", b"/openai/deployments/m-0/chat/completions?api-version=2024-10-21", Must.PASS),
            ("GET", b"/nothing/at/all", Must.ANSWER),
            ("PATCH", b"/v1/chat/completions", Must.EITHER),
        )
    )
    body = encoded({"model": "m-0", "prompt": "x", "messages": []}) if method in ("POST", "PATCH") else b""
    return Request(number, "other", method, target, [JSON] if body else [], body, must=must, splices=False)


def _admin(random: Random, number: int, known: Known) -> Request:
    target = random.choice(_ADMIN_PATHS)
    headers: Headers = []
    body, method = b"", "GET"
    if target == "/explain":
        method = "POST"
        path = random.choice(("", "?path=/v1/completions", "?path=/v1/messages", "?path=/v1/nothing"))
        target += path
        body = encoded({"model": random.choice(MODELS), "messages": _messages(random), "prompt": "x"})
        headers = [JSON, (b"x-cairn-client-key", b"key-%d" % random.randrange(5))]
    return Request(number, "admin", method, target.encode(), headers, body, must=Must.ANSWER, is_admin=True)


_MAKERS: tuple[Callable[[Random, int, Known], Request], ...] = (
    _prompt, _inference, _created, _object, _context, _other, _admin,
)  # fmt: skip
_WEIGHTS = (50, 8, 6, 8, 14, 8, 6)
