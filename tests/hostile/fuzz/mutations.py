"""Change a well-formed request: its JSON, the bytes of its body, its target, its headers, or the whole message."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from tests.hostile.fuzz.requests import JSON, MARK, Must, Request, encoded
from tests.hostile.mutated_bytes import change_at

_DEEP = 3000
_RAW_VALUES = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 5000, b"-0", b"1.0", b"1e-400", b"true", b"null",
    b'""', b"[]", b"{}", b"[[]]", b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff"', b'"\xc3"', b'"\xed\xa0\x80"',
    b'"\\u0000"', b'"a\nb"', b"[" * _DEEP + b"]" * _DEEP, b'{"a":' * _DEEP + b"1" + b"}" * _DEEP, b"[1,]", b"{,}",
    b"'x'", b"\xef\xbb\xbf1", b"18446744073709551616", b'"' + b"x" * 70_000 + b'"', b"01", b"+1", b".5", b"tru",
)  # fmt: skip
_BYTES = (
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":",
    b"\\u",
    b"\\ud800", b"\r\n", b"\n", b"--", b"data: ", b"cache_id=", b'"stream":true,', b'"model":"m-1",', b"\x1f\x8b",
)  # fmt: skip
_HEADER_VALUES = (
    b"", b" ", b"\t", b"\xff\xfe", "ä€".encode(), b"x" * 3000, b"0", b"-1", b"1e9", b"99999999999999999999", b"NaN",
    b"chunked", b"close", b"keep-alive, x-drop", b"*/*", b"Bearer", b"Bearer \xff", b"bearer  two words",
    b"\xed\xa0\x80",
    b"application/json; charset=utf-16", b"multipart/form-data", b"multipart/form-data; boundary=", b"text/plain",
    b"multipart/form-data; boundary=\xff", b"http://evil.example", b"null", b"a" * 129, b"gzip, gzip", b"br;q=0",
    b"tag=doc", b"cache_id=\xff", b"cache_id=cache-x;reset_ttl=-1", b"identity", b"xyz", b"zstd",
)  # fmt: skip
_HEADER_NAMES = (
    b"content-type", b"content-encoding", b"accept", b"accept-encoding", b"authorization", b"x-api-key", b"api-key",
    b"x-request-id", b"origin", b"access-control-request-method", b"referer", b"user-agent", b"cookie", b"te",
    b"trailer", b"via", b"forwarded", b"x-forwarded-for", b"connection", b"keep-alive", b"x-cairn-replica",
    b"x-msh-context-cache", b"x-msh-context-cache-reset-ttl", b"if-none-match", b"range", b"expect", b"upgrade",
    b"proxy-connection", b"priority", b"x-priority", b"session-id", b"x-session-id", b"sec-fetch-site",
    b"max-forwards",
    b"openai-organization", b"anthropic-version", b"traceparent", b"x-made-up",
)  # fmt: skip
_TARGET_PIECES = (
    b"%2e%2e/", b"../", b"./", b"//", b"%2f", b"%5c", b"\\", b"%00", b"%25", b"%ff", b"%", b"%zz", b"?",
    b"?a=b", b"&",
    b";x=y", b"%3f", b"%23", b"/", b"v1/", b"%76%31/", b"http://evil.example", b"@evil", b":", b"*", b"%c3%a4", b"+",
    b"?path=%ff", b"?since=\xc2\xb2d", b"?by=x", b"?limit=\xc2\xb2", b"?limit=-1", b"?after=%00", b"x" * 9000, b"..",
)  # fmt: skip
_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "LINK", "post")
INSERTED = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"\xff", b"0\r\n\r\n", b"\r\n\r\n", b"transfer-encoding: chunked\r\n",
    b"content-length: 5\r\n", b"connection: upgrade\r\nupgrade: h2c\r\n", b"expect: 100-continue\r\n",
    b"ffffffff\r\n", b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n", b"HTTP/1.1", b";ext=1",
)  # fmt: skip


def mutate(random: Random, request: Request) -> None:
    """Change `request` in up to three ways, all of which leave its framing valid."""
    body = request.body
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        roll = random.random()
        if request.body and roll < 0.45:
            _mutate_tree(random, request)
        elif request.body and roll < 0.65:
            request.body = _with_bytes(random, request.body)
        elif roll < 0.8:
            _mutate_target(random, request)
        elif roll < 0.97:
            _mutate_headers(random, request)
        else:
            request.method = random.choice(_METHODS)
    if request.body != body:
        request.plain_body = request.body
        request.splices = any(name == b"content-encoding" for name, _ in request.headers)
    request.kind += ", mutated"
    request.must = Must.EITHER
    if any(name == b"x-msh-context-cache" for name, _ in request.headers) or b"cache" in request.body:
        request.splices = True


def _mutate_tree(random: Random, request: Request) -> None:
    """Replace one value of a JSON body by a strange one, or repeat, rename or leave out a member."""
    places: list[tuple[Any, Any]] = []
    try:
        tree = json.loads(request.body)
        _collect(tree, places)
    except (ValueError, RecursionError):  # Python 3.12 and newer read trees that are too deep to walk
        request.body = _with_bytes(random, request.body)
        return
    if not places:
        return
    holder, key = random.choice(places)
    hole = f"@@{random.randrange(10**9)}@@"
    roll = random.random()
    if isinstance(holder, dict) and roll < 0.1:
        holder[random.choice(("model", "messages", "stream", "\ud800", "", "é", "x" * 300))] = holder.pop(key)
    elif isinstance(holder, dict) and roll < 0.2:
        del holder[key]
    elif roll < 0.3:
        other_holder, other_key = random.choice(places)
        holder[key] = json.loads(json.dumps(other_holder[other_key]))
    else:
        holder[key] = hole
    escapes = random.random() < 0.3
    text = json.dumps(tree, ensure_ascii=escapes, indent=1 if random.random() < 0.1 else None)
    body = text.encode("utf-8", "surrogatepass")
    value = random.choice(_RAW_VALUES)
    if isinstance(holder, dict) and random.random() < 0.2:
        name = encoded(str(key)) if str(key).isascii() else b'"model"'
        value += b"," + name + b":" + random.choice(_RAW_VALUES)  # the same name twice
    request.body = body.replace(b'"%b"' % hole.encode(), value)


def _collect(tree: Any, places: list[tuple[Any, Any]]) -> None:
    members = (
        list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    )
    for key, value in members:
        places.append((tree, key))
        _collect(value, places)


def _with_bytes(random: Random, body: bytes) -> bytes:
    changed = bytearray(body)
    for _ in range(random.randrange(1, 5)):
        at = random.randrange(len(changed) + 1)
        roll = random.randrange(5)
        if roll == 0:
            changed[at : at + 1] = bytes([random.randrange(256)])
        elif roll < 3:
            changed[at:at] = random.choice(_BYTES)
        elif roll == 3:
            del changed[at : at + random.randrange(1, 30)]
        else:
            changed[at:at] = changed[at : at + random.randrange(1, 200)]
    return bytes(changed)


def _mutate_target(random: Random, request: Request) -> None:
    target = request.target
    at = random.randrange(1, len(target) + 1)
    roll = random.random()
    if roll < 0.5:
        target = target[:at] + random.choice(_TARGET_PIECES) + target[at:]
    elif roll < 0.7:
        target = target[:at] + b"%%%02x" % target[at - 1] + target[at + 1 :]
    elif roll < 0.85:
        target = (
            target.upper() if random.random() < 0.3 else target[:at] + target[at : at + 1].upper() + target[at + 1 :]
        )
    else:
        target = target[: at - 1] + target[at:] or b"/"
    request.target = b"".join([b"%c" % byte for byte in target if byte > 0x20 and byte != 0x7F]) or b"/"


def _mutate_headers(random: Random, request: Request) -> None:
    roll = random.random()
    name, value = random.choice(_HEADER_NAMES), random.choice(_HEADER_VALUES)
    if roll < 0.15:
        name = b"x-h%d" % random.randrange(100_000)
    if roll > 0.9:
        request.headers += [(b"x-many", value[:20])] * random.choice((5, 50, 250))
    elif roll > 0.75:
        changeable = [at for at, (header, _) in enumerate(request.headers) if header not in (MARK, b"host")]
        if changeable:
            at = random.choice(changeable)
            request.headers[at] = (request.headers[at][0], value)
    elif roll > 0.7 and JSON in request.headers:
        request.headers.remove(JSON)
    else:
        request.headers.append((name, value))


def mutate_wire(random: Random, message: bytes) -> bytes:
    """Change up to six bytes or pieces of what goes over the wire, framing included."""
    changed = bytearray(message)
    end_of_head = message.find(b"\r\n\r\n") + 4
    for _ in range(random.randrange(1, 6)):
        most = len(changed) if random.random() < 0.4 else min(len(changed), max(end_of_head, 1))
        change_at(random, changed, random.randrange(most + 1), INSERTED)
    return bytes(changed)
