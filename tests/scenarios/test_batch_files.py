"""A batch is no way around the rules: the lines of its file may name what their client may name, through a proxy."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest

from tests.scenarios.test_rules import FREE, OTHER, proxied, relayed, status_of
from tests.support.cairn import Cairn
from tests.support.openai_upstream import OpenAIUpstream

MINE, OTHERS = "file-mine", "file-others"


def line(body: Any, url: str = "/v1/responses", **members: Any) -> bytes:
    """One request of a batch."""
    named = {"custom_id": "1", "method": "POST", "url": url, "body": body, **members}
    return json.dumps(named, ensure_ascii=False).encode()


def field(name: str, value: bytes, more: str = "") -> bytes:
    """One field of a form whose boundary is b."""
    return f'--b\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


def form(content: bytes, purpose: str = "batch", *, purpose_last: bool = False) -> dict[str, Any]:
    """The upload of a file by the client called free."""
    fields = [field("purpose", purpose.encode()), field("file", content, '; filename="a.jsonl"')]
    body = b"".join(fields[::-1] if purpose_last else fields) + b"--b--\r\n"
    return {"data": body, "headers": {**FREE, "content-type": "multipart/form-data; boundary=b"}}


async def owned(http: aiohttp.ClientSession, upstream: OpenAIUpstream, cairn: Cairn) -> None:
    """Let both clients make an object of each kind, whose id ends in its maker's name."""
    for headers, name in ((FREE, "mine"), (OTHER, "others")):
        item = {"id": f"msg-{name}", "type": "message"}
        upstream.answers["/v1/responses"] = json.dumps({"id": f"resp-{name}", "output": [item]}).encode()
        for path in ("files", "containers", "conversations"):
            upstream.answers[f"/v1/{path}"] = json.dumps({"id": f"{path[:-1]}-{name}"}).encode()
            body: dict[str, Any] = {"data": b""} if path == "files" else {"json": {}}
            assert await status_of(http, cairn, "POST", f"/v1/{path}", headers=headers, **body) == 200
        sent = {"json": {"model": "m", "input": "x"}, "headers": headers}
        assert await status_of(http, cairn, "POST", "/v1/responses", **sent) == 200
    upstream.requests.clear()


def request(**more: Any) -> dict[str, Any]:
    return {"model": "m", "input": "x", **more}


def picture(url: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return {"model": "m", "messages": [{"role": "user", "content": content}]}


NAMING = {
    "file": lambda who: line(request(input=[{"role": "user", "content": [{"file_id": f"file-{who}"}]}])),
    "url": lambda who: line(picture(f"ms://file-{who}"), "/v1/chat/completions"),
    "response": lambda who: line(request(previous_response_id=f"response-{who}".replace("response", "resp"))),
    "conversation": lambda who: line(request(conversation={"id": f"conversation-{who}"})),
    "container": lambda who: line({"model": "m", "messages": [], "container": f"container-{who}"}, "/v1/messages"),
    "tool": lambda who: line(request(tools=[{"type": "code_interpreter", "container": f"container-{who}"}])),
    "item": lambda who: line(request(input=[{"type": "item_reference", "id": f"msg-{who}"}])),
    "an item without a type": lambda who: line(request(input=[{"id": f"msg-{who}"}])),
    "another letter case": lambda who: line(request(Previous_Response_ID=f"resp-{who}")),
    "an escape": lambda who: line(request(conversation=f"conversation-{who}")).replace(b"conv", b"c\\u006fnv", 1),
    "an unexpected url": lambda who: line(request(previous_response_id=f"resp-{who}"), "/v1/embeddings"),
    "beside the body": lambda who: line(request(), params=request(previous_response_id=f"resp-{who}")),
}


@pytest.mark.parametrize("naming", NAMING)
@pytest.mark.parametrize("purpose_last", [False, True])
async def test_a_line_of_a_batch_names_only_its_client_s_own_objects(http, naming: str, purpose_last: bool) -> None:
    """In every way in which a request may name one; the upstream gets no file whose line names another's."""
    async with proxied() as (upstream, cairn):
        await owned(http, upstream, cairn)
        upstream.answers["/v1/files"] = b'{"id":"file-batch"}'
        first = line(request())
        for who, status in (("others", 404), ("mine", 200)):
            sent = form(first + b"\n\n" + NAMING[naming](who), purpose_last=purpose_last)
            async with http.post(f"{cairn.url}/files", **sent) as answer:
                said = await answer.json()
            assert answer.status == status
            if status == 404:
                message = "Line 2 of the file: The request names an object that does not exist."
                assert (said["error"]["message"], said["error"]["code"]) == (message, "object_not_found")
        assert len(relayed(upstream)) == 1
        batch = {"json": {"input_file_id": "file-batch"}, "headers": FREE}
        assert await status_of(http, cairn, "POST", "/v1/batches", **batch) == 200


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        line(request())[:-1],
        line("x"),
        json.dumps({"custom_id": "1", "url": "/v1/responses"}).encode(),
        line(request(), "/v1/responses/resp-others/cancel"),
        line(request(), "/v1/files/file-others/content"),
        line(request(), "/v1/threads/t/messages"),
        line(request(), "/v1/responses?previous_response_id=resp-others"),
        line(request(), "http://example/v1/responses"),
        line(request()).replace(b"POST", b"GET"),
        line(request(), Body=request(previous_response_id="resp-others")),
        line(request())[:-1] + b',"body":{"model":"m","input":"x"}}',
        line(request(previous_response_id="resp-others"))[:-2] + b',"previous_response_id":"resp-mine"}}',
        line(request()).decode().encode("utf-16"),
        line(request()) + b"\r" + line(request()),
    ],
    ids=range(16),
)
async def test_a_line_that_cannot_be_judged_is_refused(http, content: bytes) -> None:
    """It might name any object to a server that reads it in another way, or run what is no model."""
    async with proxied() as (upstream, cairn):
        await owned(http, upstream, cairn)
        async with http.post(f"{cairn.url}/files", **form(content)) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["message"].startswith("Line 1 of the file: ")
        assert relayed(upstream) == []


def coded(encoding: str) -> bytes:
    """A form whose file is coded, which only some parsers undo."""
    content = line(request(previous_response_id="resp-others"))
    more = f'; filename="a"\r\ncontent-transfer-encoding: {encoding}'
    return field("purpose", b"batch") + field("file", content, more) + b"--b--\r\n"


@pytest.mark.parametrize(
    "body",
    [
        form(line(request()))["data"][:-4],
        form(line(request()))["data"] + field("file", line(request(previous_response_id="resp-others"))),
        coded("quoted-printable"),
        coded("base64"),
        b"",
        b"x",
    ],
    ids=range(6),
)
async def test_a_form_that_cannot_be_read_makes_no_batch(http, body: bytes) -> None:
    """It passes or is broken off; its file, if the upstream makes one, is the input of no batch."""
    async with proxied() as (upstream, cairn):
        upstream.answers["/v1/files"] = b'{"id":"file-batch"}'
        sent = {**form(b""), "data": body}
        assert await status_of(http, cairn, "POST", "/v1/files", **sent) in (200, 400)
        batch = {"json": {"input_file_id": "file-batch"}, "headers": FREE}
        assert await status_of(http, cairn, "POST", "/v1/batches", **batch) in (403, 404)


@pytest.mark.parametrize("how", ["parts", "gzip", "another purpose"])
async def test_a_file_that_was_not_checked_is_no_input_of_a_batch_and_the_refusal_says_what_to_do(
    http, how: str
) -> None:
    """Whatever it is named as: a file of several parts, a compressed one, and one whose lines are no requests."""
    batches: list[dict[str, Any]] = [
        {"json": {"input_file_id": "file-1"}},
        {
            "data": field("input_file_id", b"file-1") + b"--b--\r\n",
            "headers": {"content-type": "multipart/form-data; boundary=b"},
        },
    ]
    async with proxied() as (upstream, cairn):
        if how == "parts":
            upstream.answers["/v1/uploads"] = b'{"id":"upload-1"}'
            upstream.answers["/v1/uploads/upload-1/complete"] = b'{"id":"upload-1","file":{"id":"file-1"}}'
            for path in upstream.answers.copy():
                assert await status_of(http, cairn, "POST", path, json={}, headers=FREE) == 200
        else:
            upstream.answers["/v1/files"] = b'{"id":"file-1"}'
            sent = form(line(request()) if how == "gzip" else b"%PDF-1.7\n\x00\xff", "user_data")
            if how == "gzip":
                sent["data"] = gzip.compress(sent["data"])
                sent["headers"]["content-encoding"] = "gzip"
            assert await status_of(http, cairn, "POST", "/v1/files", **sent) == 200
        assert await status_of(http, cairn, "GET", "/v1/files/file-1", headers=FREE) == 200
        upstream.requests.clear()
        for batch in batches:
            sent = {**batch, "headers": {**FREE, **batch.get("headers", {})}}
            async with http.post(f"{cairn.url}/batches", **sent) as answer:
                error = (await answer.json())["error"]
            assert (answer.status, error["code"], error["param"]) == (403, "input_not_checked", "input_file_id")
            assert "Send the file to /v1/files in one request" in error["message"]
        assert relayed(upstream) == []


async def test_a_batch_of_the_openai_sdk_works_from_its_file_to_its_output(http) -> None:
    """As a user writes it, with lines that name the client's own file."""
    async with proxied() as (upstream, cairn):
        client = openai.AsyncOpenAI(base_url=cairn.url, api_key="sk-free", max_retries=0)
        upstream.answers["/v1/files"] = b'{"id":"file-picture","object":"file"}'
        picture_file = await client.files.create(file=("a.png", b"\x89PNG"), purpose="user_data")
        content = [{"type": "input_file", "file_id": picture_file.id}]
        lines = [line(request(input=[{"role": "user", "content": content}])), line(request(input="\u2028\r x"))]
        upstream.answers |= {
            "/v1/files": b'{"id":"file-in","object":"file"}',
            "/v1/batches": b'{"id":"batch-1","object":"batch"}',
            "/v1/batches/batch-1": b'{"id":"batch-1","object":"batch","output_file_id":"file-out"}',
            "/v1/files/file-out/content": b'{"custom_id":"1"}',
        }
        file = await client.files.create(file=io.BytesIO(b"\xef\xbb\xbf" + b"\r\n".join(lines)), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
        output = (await client.batches.retrieve(batch.id)).output_file_id
        assert output is not None
        assert (await client.files.content(output)).text == '{"custom_id":"1"}'
        assert await status_of(http, cairn, "GET", "/v1/files/file-out/content", headers=OTHER) == 404
        await client.close()


async def test_a_long_file_passes_while_it_is_checked_and_little_of_it_is_held(http) -> None:
    """More than a request's body may have; the loop goes on meanwhile, and a bad last line still stops it."""
    lines = [line(request(input="x" * 1000, metadata={"n": str(n)})) + b"\n" for n in range(3000)]

    async def pieces(last: bytes) -> AsyncIterator[bytes]:
        head, tail = form(b"\0")["data"].split(b"\0")
        yield head
        for each in lines:
            yield each
        yield last + tail

    async with proxied(max_body_bytes=1_000_000) as (upstream, cairn):
        await owned(http, upstream, cairn)
        upstream.answers["/v1/files"] = b'{"id":"file-batch"}'
        for last, status in ((line(request(previous_response_id="resp-others")), 404), (line(request()), 200)):
            sent = {**form(b""), "data": pieces(last)}
            assert await status_of(http, cairn, "POST", "/v1/files", **sent) == status
        assert len(relayed(upstream)) == 1
        assert cairn.worker.http_server.clients.bodies.used == 0
