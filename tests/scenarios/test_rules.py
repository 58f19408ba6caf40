"""Nobody gets past the rules: models, paths, objects and keys, through a running proxy."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import brotli
import pytest
import zstandard
from yarl import URL

from proxy.config.schema import Client, Config, Disclosure, Pool, Replica, Secret, Server, Tenants
from proxy.control.messages import Explain
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import Asked, Failure, OpenAIUpstream

CHEAP = {"authorization": "Bearer sk-cheap"}
FREE = {"authorization": "Bearer sk-free"}
OTHER = {"authorization": "Bearer sk-other"}
CHAT = {"model": "dear", "messages": [{"role": "user", "content": "hi"}]}


def client(name: str, *models: str) -> Client:
    """A client whose key is sk-NAME."""
    return Client(name=name, key_sha256=hashlib.sha256(f"sk-{name}".encode()).hexdigest(), models=models or ("*",))


CLIENTS = (client("cheap", "cheap*"), client("free"), client("other"))


def keyed(url: str, **server: Any) -> Config:
    """One pool whose replica has a key of the operator's, for three clients, one of them limited to cheap models."""
    pool = Pool(name="p", replicas=(Replica(url, key=Secret("sk-operator")),))
    return config_for((), pools=(pool,), clients=CLIENTS, server=Server(port=0, **server))


@asynccontextmanager
async def proxied(**server: Any) -> AsyncIterator[tuple[OpenAIUpstream, Cairn]]:
    """An upstream behind such a proxy."""
    models = ("cheap", "cheap-2", "dear")
    async with OpenAIUpstream(models=models) as upstream, running(keyed(upstream.url, **server)) as cairn:
        upstream.requests.clear()
        yield upstream, cairn


def relayed(upstream: OpenAIUpstream) -> list[Asked]:
    """The requests of clients, without what Cairn asks for itself."""
    return [asked for asked in upstream.requests if asked.header(b"user-agent")]


async def status_of(http: aiohttp.ClientSession, cairn: Cairn, method: str, path: str, **kwargs: Any) -> int:
    """The status of a request whose path is sent exactly as given."""
    url = URL(f"http://127.0.0.1:{cairn.port}{path}", encoded=True)
    async with http.request(method, url, **kwargs) as answer:
        await answer.read()
        return answer.status


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/chat%2Fcompletions",
        "/v1/%63hat/completions",
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "//v1/chat/completions",
        "/v1/chat/./completions",
        "/v1/x/../chat/completions",
        "/v1/x/%2e%2e/chat/completions",
        "/v1/chat%5Ccompletions",
        "/v1/%2563hat/completions",
        "/chat/completions",
        "/v1/v1/chat/completions",
        "/v1/Chat/Completions",
        "/v1/chat/completions;x",
        "/v1/chat/completions%20",
    ],
)
async def test_a_limited_client_cannot_reach_another_model_by_any_spelling(http, path: str) -> None:
    """However the path is written, either the model is read and refused, or nothing reaches the upstream."""
    async with proxied() as (upstream, cairn):
        assert await status_of(http, cairn, "POST", path, json=CHAT, headers=CHEAP) in (400, 403, 404)
        assert relayed(upstream) == []


@pytest.mark.parametrize(
    "path", ["/v1/%63hat/completions/", "/chat/completions", "/v1/v1/chat/completions", "//v1/chat//completions"]
)
async def test_a_path_that_a_server_would_understand_is_served_with_all_rules(http, path: str) -> None:
    """It is counted as a chat, and the upstream gets the plain path."""
    async with proxied() as (upstream, cairn):
        assert await status_of(http, cairn, "POST", path, json=CHAT, headers=FREE) == 200
        assert [asked.target for asked in relayed(upstream)] == ["/v1/chat/completions"]
        assert cairn.tokens("output") > 0


FORM = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\n%b\r\n--b--\r\n'
CHEAP_FORM = {**CHEAP, "content-type": "multipart/form-data; boundary=b"}


@pytest.mark.parametrize(
    "path",
    [
        "images/generations",
        "audio/speech",
        "rerank",
        "score",
        "classify",
        "pooling",
        "moderations",
        "responses/compact",
        "messages/count_tokens",
        "embeddings",
    ],
)
async def test_a_model_is_checked_wherever_a_path_has_one(http, path: str) -> None:
    """A limited client's models are served, others are refused, and so are bodies that cannot be read."""
    async with proxied() as (upstream, cairn):
        bodies: tuple[object, ...] = (
            {"model": "dear"},
            {"mod\\u0065l": "dear"},
            {},
            [],
            {"model": "cheap", "Model": "dear"},
            {"model": "cheap", "models": ["dear"]},
            {"model": "cheap", "fallbacks": [{"x": 1}]},
            {"model": "cheap", "tools": [{"type": "image_generation", "model": "dear"}]},
            {"model": "cheap", "tools": [{"type": "image_generation"}]},
            {"model": "cheap", "lora_path": "dear"},
        )
        for body in bodies:
            raw = json.dumps(body).replace("\\\\", "\\").encode()
            sent = {"data": raw, "headers": {**CHEAP, "content-type": "application/json"}}
            assert await status_of(http, cairn, "POST", f"/v1/{path}", **sent) in (400, 403), body
        assert relayed(upstream) == []
        good = {"model": "cheap", "input": "x", "models": ["cheap-2"]}
        assert await status_of(http, cairn, "POST", f"/v1/{path}", json=good, headers=CHEAP) == 200


@pytest.mark.parametrize("path", ["chat/completions", "rerank"])
async def test_a_limited_client_reaches_no_model_that_some_servers_read_where_others_do_not(http, path: str) -> None:
    """Behind a semicolon of the query, behind a NUL, or in letters of another charset."""
    body = {"model": "cheap", "messages": [], "query": "q"}
    utf7 = b'{"model":"cheap","messages":[],"+AG0-odel":"dear"}'
    sent: dict[str, dict[str, Any]] = {
        "?model=cheap;model=dear": {"json": body},
        "?x;model=dear": {"json": body},
        "?": {"json": body | {"model": "cheap\0dear"}},
        "": {"data": utf7, "headers": {**CHEAP, "content-type": 'application/json; charset="utf-7"'}},
    }
    async with proxied() as (upstream, cairn):
        for query, request in sent.items():
            named = {"headers": CHEAP, **request}
            assert await status_of(http, cairn, "POST", f"/v1/{path}{query}", **named) == 403, query
        assert relayed(upstream) == []
        utf8 = {"json": body, "headers": {**CHEAP, "content-type": "application/json; charset=UTF-8"}}
        assert await status_of(http, cairn, "POST", f"/v1/{path}?a=b;c=d", **utf8) == 200


@pytest.mark.parametrize("path", ["images/edits", "audio/transcriptions", "audio/translations"])
async def test_the_model_of_a_form_is_checked(http, path: str) -> None:
    """Forms are read strictly: two models, or a form that parsers read differently, are refused."""
    async with proxied() as (upstream, cairn):
        twice = FORM.replace(b"--b--", b"") % b"cheap" + FORM % b"dear"
        quoted = FORM.replace(b'"model"', b'"mo\\del"') % b"cheap"
        for body in (FORM % b"dear", twice, quoted, b"", FORM[:-4] % b"cheap", b"--c" + FORM[3:] % b"cheap"):
            sent = {"data": body, "headers": CHEAP_FORM}
            assert await status_of(http, cairn, "POST", f"/v1/{path}", **sent) in (400, 403), body
        assert relayed(upstream) == []
        sent = {"data": FORM % b"cheap", "headers": CHEAP_FORM}
        assert await status_of(http, cairn, "POST", f"/v1/{path}", **sent) == 200
        assert relayed(upstream)[0].body == FORM % b"cheap"


async def test_a_batch_of_a_limited_client_has_only_its_models(http) -> None:
    """Every line of an uploaded batch is read."""
    line = b'{"custom_id":"1","method":"POST","url":"/v1/chat/completions","body":{"model":"%b","messages":[]}}'
    form = (
        b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
        b'content-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n%b\r\n--b--\r\n'
    )
    async with proxied() as (upstream, cairn):
        for lines in (line % b"dear", line % b"cheap" + b"\n" + line % b"dear", b"{", b'{"body":{}}'):
            sent = {"data": form % lines, "headers": CHEAP_FORM}
            assert await status_of(http, cairn, "POST", "/v1/files", **sent) == 403
        requests = {"requests": [{"params": {"model": "cheap"}}, {"params": {"model": "dear"}}]}
        assert await status_of(http, cairn, "POST", "/v1/messages/batches", json=requests, headers=CHEAP) == 403
        assert relayed(upstream) == []
        sent = {"data": form % (line % b"cheap"), "headers": CHEAP_FORM}
        assert await status_of(http, cairn, "POST", "/v1/files", **sent) == 200
        requests = {"requests": [{"params": {"model": "cheap"}}]}
        assert await status_of(http, cairn, "POST", "/v1/messages/batches", json=requests, headers=CHEAP) == 200


def upload(purpose: str, content: bytes = b"%PDF") -> dict[str, Any]:
    """The form of a file with a purpose, sent by the limited client."""
    head = f'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n--b\r\n'.encode()
    file = b'content-disposition: form-data; name="file"; filename="a"\r\n\r\n%b\r\n--b--\r\n' % content
    return {"data": head + file, "headers": CHEAP_FORM}


@pytest.mark.parametrize("purpose", ["user_data", "assistants", "fine-tune", ""])
async def test_only_a_file_whose_models_were_checked_becomes_the_batch_of_a_limited_client(
    http, purpose: str
) -> None:
    """A file of another purpose may be uploaded, with any content, and is nothing that runs models."""
    dear = b'{"custom_id":"1","method":"POST","url":"/v1/chat/completions","body":{"model":"dear","messages":[]}}'
    async with proxied() as (upstream, cairn):
        for file_id, sent in (
            ("file-1", upload(purpose, dear)), ("file-2", upload("batch", dear.replace(b"dear", b"cheap"))),
        ):  # fmt: skip
            upstream.answers["/v1/files"] = b'{"id":"%b","object":"file"}' % file_id.encode()
            assert await status_of(http, cairn, "POST", "/v1/files", **sent) == 200
        for batch, status in (
            ({"input_file_id": "file-1"}, 403),
            ({"input_file_id": "file-2"}, 200),
            ({"input_file_id": "file-3"}, 404),
            ({}, 403),
        ):
            sent = {"json": batch, "headers": CHEAP}
            assert await status_of(http, cairn, "POST", "/v1/batches", **sent) == status, batch
        assert await status_of(http, cairn, "GET", "/v1/files/file-1", headers=CHEAP) == 200


async def test_a_file_made_of_parts_is_no_batch_of_a_limited_client_and_the_refusal_says_what_to_do(http) -> None:
    """Its parts pass unread, so that its models are unknown; as any other file it may be used."""
    async with proxied() as (upstream, cairn):
        upstream.answers["/v1/uploads"] = b'{"id":"upload-1","object":"upload"}'
        upstream.answers["/v1/uploads/upload-1/complete"] = b'{"id":"upload-1","file":{"id":"file-9"}}'
        for path in upstream.answers.copy():
            assert await status_of(http, cairn, "POST", path, json={"purpose": "batch"}, headers=CHEAP) == 200
        assert await status_of(http, cairn, "GET", "/v1/files/file-9", headers=CHEAP) == 200
        batch = {"input_file_id": "file-9"}
        async with http.post(f"{cairn.url}/batches", json=batch, headers=CHEAP) as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["param"]) == (403, "model_not_allowed", "input_file_id")
        assert "Send the file to /v1/files in one request" in error["message"]


async def test_clients_of_one_tenant_share_objects_and_a_limited_one_runs_no_batch_of_another(http) -> None:
    """A batch file that a colleague with more models uploaded was not checked for it."""
    team = tuple(
        Client(name=name, key_sha256=hashlib.sha256(f"sk-{name}".encode()).hexdigest(), models=models, tenant="team")
        for name, models in (("cheap", ("cheap*",)), ("free", ("*",)))
    )
    async with OpenAIUpstream() as upstream:
        pool = Pool(name="p", replicas=(Replica(upstream.url, key=Secret("sk-operator")),))
        async with running(config_for((), pools=(pool,), clients=(*team, client("other")))) as cairn:
            upstream.answers["/v1/files"] = b'{"id":"file-1","object":"file"}'
            sent = upload("batch", b'{"body":{"model":"dear"}}') | {"headers": {**CHEAP_FORM, **FREE}}
            assert await status_of(http, cairn, "POST", "/v1/files", **sent) == 200
            for headers, status in ((FREE, 200), (CHEAP, 200), (OTHER, 404)):
                assert await status_of(http, cairn, "GET", "/v1/files/file-1", headers=headers) == status
            for headers, status in ((FREE, 200), (CHEAP, 403), (OTHER, 404)):
                batch = {"input_file_id": "file-1"}
                assert await status_of(http, cairn, "POST", "/v1/batches", json=batch, headers=headers) == status


@pytest.mark.parametrize("path", ["containers", "containers/mine/files", "conversations", "conversations/mine/items"])
async def test_an_object_cannot_be_filled_with_anothers_files(http, path: str) -> None:
    """Its body is read, also of a client that may use every model."""
    async with proxied() as (upstream, cairn):
        for made_path, made_id, headers in (
            ("files", "file-1", OTHER), ("containers", "mine", FREE), ("conversations", "mine", FREE),
        ):  # fmt: skip
            upstream.answers[f"/v1/{made_path}"] = b'{"id":"%b"}' % made_id.encode()
            assert await status_of(http, cairn, "POST", f"/v1/{made_path}", data=b"", headers=headers) == 200
        for body in ({"file_ids": ["file-1"]}, {"items": [{"content": [{"file_id": "file-1"}]}]}):
            assert await status_of(http, cairn, "POST", f"/v1/{path}", json=body, headers=FREE) == 404
        assert await status_of(http, cairn, "POST", f"/v1/{path}", json={"name": "n"}, headers=FREE) == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": []}),
        ("completions", {"prompt": "x"}),
        ("messages", {"messages": []}),
        ("responses", {"input": "x"}),
        ("embeddings", {"input": "x"}),
    ],
)
@pytest.mark.parametrize(
    "member", ["previous_response_id", "conversation", "container_id", "vector_store_ids", "file_ids", "part_ids"]
)
async def test_a_prompt_names_only_one_s_own_objects_in_any_member(http, path: str, body: Any, member: str) -> None:
    """Also in one that its dialect does not have: a gateway behind may translate it to one that has."""
    async with proxied() as (upstream, cairn):
        for made, headers in (("mine", FREE), ("others", OTHER)):
            upstream.answers["/v1/containers"] = json.dumps({"id": made}).encode()
            assert await status_of(http, cairn, "POST", "/v1/containers", json={}, headers=headers) == 200
        for named, status in (("mine", 200), ("others", 404)):
            given = {member: [named] if member.endswith("s") else named}
            for more in (given, {"extra_body": {"x": [given]}}):
                sent = {"json": {"model": "dear", **body, **more}, "headers": FREE}
                assert await status_of(http, cairn, "POST", f"/v1/{path}", **sent) == status
            own = {"metadata": given, "response_format": {"json_schema": {"properties": {member: {"id": 1}}}}}
            sent = {"json": {"model": "dear", **body, **own}, "headers": FREE}
            assert await status_of(http, cairn, "POST", f"/v1/{path}", **sent) == 200


BELOW = (
    ("POST", "batches/batch-1/requests", {"batch_requests": [{"batch_request": {"previous_response_id": "%s"}}]}),
    ("PATCH", "batches/batch-1", {"input_file_id": "%s"}),
    ("PUT", "containers/container-1", {"file_ids": ["%s"]}),
    ("POST", "videos/video-1/remix", {"prompt": "x", "input_reference": {"file_id": "%s"}}),
    ("POST", "uploads/upload-1/complete", {"part_ids": ["%s"]}),
)


@pytest.mark.parametrize("method", ["PUT", "POST", "PATCH"])
@pytest.mark.parametrize("end", ["", "/content"])
async def test_the_content_of_a_file_is_not_replaced_after_it_was_checked(http, method: str, end: str) -> None:
    """Or it would be the input of a batch that nobody has checked."""
    async with proxied() as (upstream, cairn):
        upstream.answers["/v1/files"] = b'{"id":"file-1"}'
        sent = upload("batch", b'{"body":{"model":"dear"}}') | {"headers": {**CHEAP_FORM, **FREE}}
        assert await status_of(http, cairn, "POST", "/v1/files", **sent) == 200
        for path, status in (("file-1", 403), ("file-2", 404)):
            sent = {"data": b"{}", "headers": FREE}
            assert await status_of(http, cairn, method, f"/v1/files/{path}{end}", **sent) == status
        assert await status_of(http, cairn, "GET", f"/v1/files/file-1{end}", headers=FREE) == 200
        assert await status_of(http, cairn, "DELETE", "/v1/files/file-1", headers=FREE) == 200


@pytest.mark.parametrize(("method", "path", "body"), BELOW, ids=[path for _, path, _ in BELOW])
async def test_what_is_sent_to_one_s_own_object_names_one_s_own(http, method: str, path: str, body: Any) -> None:
    """Whatever the kind of object, since some of them run models or take in others."""
    collection, own = path.split("/")[:2]
    async with proxied() as (upstream, cairn):
        sent: dict[str, Any] = {"json": {"model": "dear", "prompt": "x"} if collection == "videos" else {}}
        for made, headers in ((own, FREE), ("mine", FREE), ("others", OTHER)):
            upstream.answers[f"/v1/{collection}"] = json.dumps({"id": made}).encode()
            assert await status_of(http, cairn, "POST", f"/v1/{collection}", headers=headers, **sent) == 200
        of_mine = 403 if "input_file_id" in body else 200  # it was not checked as the input of a batch
        for named, status in (("others", 404), ("mine", of_mine)):
            text = (json.dumps(body) % named).encode()
            assert await status_of(http, cairn, method, f"/v1/{path}", data=text, headers=FREE) == status
        if collection == "uploads":  # its parts are pieces of a file, which may contain anything
            part = {"data": (json.dumps({"file_id": "others"})).encode(), "headers": FREE}
            assert await status_of(http, cairn, "POST", f"/v1/uploads/{own}/parts", **part) == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("conversations", {"model": "%s", "inputs": "x"}),
        ("conversations", {"agent_id": "%s", "inputs": "x"}),
        ("conversations/cheap-1", {"inputs": "x", "completion_args": {"model": "%s"}}),
        ("batches/cheap-1/requests", {"batch_requests": [{"batch_request": {"model": "%s"}}]}),
        ("videos/cheap-1/remix", {"prompt": "x", "model": "%s"}),
    ],
)
async def test_a_limited_client_s_objects_run_only_its_models(http, path: str, body: Any) -> None:
    """When they are made, and by what is sent to them later."""
    collection, _, own = path.partition("/")
    async with proxied() as (upstream, cairn):
        if own:
            for tenant_path in ("conversations", "videos", "files", "batches"):
                upstream.answers[f"/v1/{tenant_path}"] = b'{"id":"cheap-1"}'
            sent = upload("batch", b'{"body":{"model":"cheap"}}')
            assert await status_of(http, cairn, "POST", "/v1/files", **sent) == 200
            made = {"model": "cheap"} | ({"input_file_id": "cheap-1"} if collection == "batches" else {})
            assert await status_of(http, cairn, "POST", f"/v1/{collection}", json=made, headers=CHEAP) == 200
        for model, status in (("dear", 403), ("cheap", 200)):
            text = (json.dumps(body) % model).encode()
            sent = {"data": text, "headers": {**CHEAP, "content-type": "application/json"}}
            assert await status_of(http, cairn, "POST", f"/v1/{path}", **sent) == status


@pytest.mark.parametrize("stream", [False, True])
async def test_an_item_of_an_earlier_response_is_its_makers_alone(http, stream: bool) -> None:
    """Whether the response was streamed or not, and however the reference is written."""
    item = {"id": "msg_1", "type": "message"}
    whole = json.dumps({"id": "resp_1", "object": "response", "output": [item]})
    added = json.dumps({"type": "response.output_item.added", "item": item})
    events = f'data: {{"type":"response.created","response":{whole}}}\n\ndata: {added}\n\n'
    async with proxied() as (upstream, cairn):
        upstream.answers["/v1/responses"] = (events if stream else whole).encode()
        body: dict[str, Any] = {"model": "m", "input": "x", "stream": stream}
        assert await status_of(http, cairn, "POST", "/v1/responses", json=body, headers=FREE) == 200
        for reference in ({"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}):
            for path in ("/v1/responses", "/v1/responses/input_tokens"):
                body = {"model": "m", "input": [reference, {"role": "user", "content": "x"}]}
                for headers, status in ((FREE, 200), (OTHER, 404)):
                    assert await status_of(http, cairn, "POST", path, json=body, headers=headers) == status


async def test_a_limited_client_sees_its_own_models_with_one_pool(http) -> None:
    """The list is narrowed, and a single model is checked like any other."""
    async with proxied() as (_, cairn):
        async with http.get(f"{cairn.url}/models", headers=CHEAP) as answer:
            assert [model["id"] for model in (await answer.json())["data"]] == ["cheap", "cheap-2"]
        async with http.get(f"{cairn.url}/models", headers=FREE) as answer:
            assert len((await answer.json())["data"]) == 3
        assert await status_of(http, cairn, "GET", "/v1/models/dear", headers=CHEAP) == 403
        assert await status_of(http, cairn, "GET", "/v1/models/cheap", headers=CHEAP) == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/organization/api_keys"),
        ("POST", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/v1/files"),
        ("GET", "/v1/chat/completions"),
        ("DELETE", "/v1/models/cheap"),
        ("GET", "/v1/models/cheap/permissions"),
        ("POST", "/v1/realtime/client_secrets"),
        ("GET", "/v1/files/file-1/content"),
        ("DELETE", "/v1/responses/resp_1"),
        ("POST", "/v1/batches/b/cancel"),
    ],
)
async def test_with_the_operators_key_administration_and_others_objects_are_out_of_reach(http, method, path) -> None:
    """Even a client that may use every model does not spend the key on anything else."""
    async with proxied() as (upstream, cairn):
        for headers in (FREE, CHEAP):
            assert await status_of(http, cairn, method, path, headers=headers) in (403, 404)
        assert relayed(upstream) == []


async def test_an_allowed_path_is_served_to_clients_without_limits(http) -> None:
    """The operator may open more than inference; a limited client still cannot use what is not read."""
    async with proxied(allowed_paths=("/v1/fine_tuning/*",)) as (_, cairn):
        assert await status_of(http, cairn, "GET", "/v1/fine_tuning/jobs", headers=FREE) == 200
        assert await status_of(http, cairn, "GET", "/v1/fine_tuning/jobs", headers=CHEAP) == 403
        assert await status_of(http, cairn, "GET", "/v1/organization", headers=FREE) == 403


async def test_an_object_is_its_makers_and_nobody_elses(http) -> None:
    """A file, and what refers to it: the maker gets it, another client gets the 404 of what does not exist."""
    made = b'{"id":"file-1","object":"file"}'
    async with proxied() as (upstream, cairn):
        upstream.answers["/v1/files"] = made
        sent = upload("batch", b'{"body":{"model":"dear"}}') | {"headers": {**CHEAP_FORM, **FREE}}
        assert await status_of(http, cairn, "POST", "/v1/files", **sent) == 200
        responses = {
            "model": "m",
            "input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}],
        }
        hidden = json.dumps(responses).replace("file_id", "file\\u005fid").encode()
        for headers, status in ((FREE, 200), (OTHER, 404)):
            assert await status_of(http, cairn, "GET", "/v1/files/file-1", headers=headers) == status
            assert await status_of(http, cairn, "GET", "/v1/files/%66ile-1/content", headers=headers) == status
            assert await status_of(http, cairn, "POST", "/v1/responses", json=responses, headers=headers) == status
            assert await status_of(http, cairn, "POST", "/v1/responses", data=hidden, headers=headers) == status
            batch = {"input_file_id": "file-1"}
            assert await status_of(http, cairn, "POST", "/v1/batches", json=batch, headers=headers) == status
        assert await status_of(http, cairn, "DELETE", "/v1/files/file-1", headers=FREE) == 200
        targets = [asked.target for asked in relayed(upstream)]
        assert len(targets) == 7


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stored_completion_is_its_makers(http, stream: bool) -> None:
    """It is kept by the upstream only if the client asked for that."""
    async with proxied() as (_, cairn):
        for store, status in ((True, 200), (False, 404)):
            body = CHAT | {"store": store, "stream": stream}
            async with http.post(f"{cairn.url}/chat/completions", json=body, headers=FREE) as answer:
                text = await answer.text()
            made = text.partition('"id": "')[2].partition('"')[0]
            for end in ("", "/messages"):
                path = f"/v1/chat/completions/{made}{end}"
                assert await status_of(http, cairn, "GET", path, headers=FREE) == status
                assert await status_of(http, cairn, "GET", path, headers=OTHER) == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("videos", {"model": "dear", "prompt": "x"}),
        ("messages/batches", {"requests": [{"params": {"model": "dear"}}]}),
    ],
)
async def test_what_runs_a_model_later_is_created_in_the_pool_of_the_model(http, path: str, body: Any) -> None:
    """And not in the default pool, which need not serve it; without a default pool it is created all the same."""
    async with OpenAIUpstream() as cheap, OpenAIUpstream() as dear:
        pools = (
            Pool(name="cheap", models=("cheap",), default=True, replicas=(Replica(cheap.url),)),
            Pool(name="dear", models=("dear",), replicas=(Replica(dear.url),)),
        )
        async with running(config_for((), pools=pools, clients=CLIENTS)) as cairn:
            for headers, status in ((FREE, 200), (CHEAP, 403)):
                assert await status_of(http, cairn, "POST", f"/v1/{path}", json=body, headers=headers) == status
        assert [asked.target for asked in relayed(dear)] == [f"/v1/{path}"]
        assert relayed(cheap) == []


async def test_what_counts_or_compacts_a_response_goes_where_it_is(http) -> None:
    """So does a prompt whose tools use a container."""
    async with OpenAIUpstream() as one, OpenAIUpstream() as two, running(config_for((one.url, two.url))) as cairn:
        for number in range(6):
            for upstream in (one, two):
                upstream.answers["/v1/containers"] = json.dumps({"id": f"cntr_{number}"}).encode()
                upstream.requests.clear()
            async with http.post(f"{cairn.url}/responses", json={"model": "m", "input": f"{number}"}) as answer:
                made = (await answer.json())["id"]
            (place,) = [upstream for upstream in (one, two) if relayed(upstream)]
            for path in ("compact", "input_tokens"):
                body: dict[str, Any] = {"model": "m", "input": "x", "previous_response_id": made}
                assert await status_of(http, cairn, "POST", f"/v1/responses/{path}", json=body) == 200
            assert len(relayed(place)) == 3
            for upstream in (one, two):
                upstream.requests.clear()
            assert await status_of(http, cairn, "POST", "/v1/containers", json={"name": "n"}) == 200
            (place,) = [upstream for upstream in (one, two) if relayed(upstream)]
            tool = {"type": "code_interpreter", "container": f"cntr_{number}"}
            body = {"model": "m", "input": f"x {number}", "tools": [tool]}
            assert await status_of(http, cairn, "POST", "/v1/responses", json=body) == 200
            assert len(relayed(place)) == 2


async def test_another_clients_response_is_not_continued(http) -> None:
    """`previous_response_id` and `conversation` are checked, in the body of a response and of what compacts one."""
    async with proxied() as (_, cairn):
        async with http.post(f"{cairn.url}/responses", json={"model": "m", "input": "x"}, headers=FREE) as answer:
            made = (await answer.json())["id"]
        for path in ("/v1/responses", "/v1/responses/compact"):
            for field in ("previous_response_id", "conversation"):
                body = {"model": "m", "input": "x", field: made}
                assert await status_of(http, cairn, "POST", path, json=body, headers=OTHER) == 404
                assert await status_of(http, cairn, "POST", path, json=body, headers=FREE) == 200
        assert await status_of(http, cairn, "GET", f"/v1/responses/{made}", headers=OTHER) == 404
        assert await status_of(http, cairn, "GET", f"/v1/responses/{made}", headers=FREE) == 200


async def test_where_clients_bring_their_own_keys_every_path_passes(http) -> None:
    """The upstream judges the key, so nothing is kept from it."""
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        for path in ("/v1/organization/api_keys", "/v1/files", "/v1/files/file-1", "/v1/anything"):
            assert await status_of(http, cairn, "GET", path, headers=FREE) == 200
        assert relayed(upstream)[-1].header(b"authorization") == b"Bearer sk-free"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "BEARER sk-free"},
        {"authorization": "sk-free"},
        {"x-api-key": "sk-free"},
        {"api-key": "sk-free"},
        {"authorization": "Bearer placeholder", "x-api-key": "sk-free"},
        {"api-key": "placeholder", "authorization": "bearer sk-free"},
        {"x-api-key": "Bearer sk-free"},
        {"authorization": "Bearer", "api-key": "sk-free"},
        {"authorization": "Bearer\tsk-free"},
    ],
)
async def test_a_key_counts_in_every_form_and_none_reaches_the_upstream(http, headers) -> None:
    """The upstream gets the operator's key and nothing of the client's."""
    sent = {**headers, "openai-organization": "org-1", "x-goog-api-key": "sk-free"}
    async with proxied() as (upstream, cairn):
        path = "/v1/chat/completions?api-key=sk-free&api-version=1"
        assert await status_of(http, cairn, "POST", path, json=CHAT, headers=sent) == 200
        asked = relayed(upstream)[0]
        assert asked.header(b"authorization") == b"Bearer sk-operator"
        assert asked.target == "/v1/chat/completions?api-version=1"
        assert not [name for name, value in asked.headers if b"sk-free" in value or b"org-1" in value]
        assert await status_of(http, cairn, "POST", path, json=CHAT, headers={"api-key": "sk-unknown"}) == 401


async def test_a_missing_model_is_the_upstreams_to_judge_with_one_pool(http) -> None:
    """With one pool there is nothing to choose; with several, or for a limited client, the field is needed."""
    body = {"messages": [{"role": "user", "content": "hi"}]}
    async with proxied() as (upstream, cairn):
        assert await status_of(http, cairn, "POST", "/v1/chat/completions", json=body, headers=FREE) == 200
        assert await status_of(http, cairn, "POST", "/v1/chat/completions", json=body, headers=CHEAP) == 400
        assert len(relayed(upstream)) == 1
        two = config_for([upstream.url], pools=(Pool(name="b", replicas=(Replica(upstream.url, name="b"),)),))
        async with running(two) as cairn_of_two:
            assert await status_of(http, cairn_of_two, "POST", "/v1/chat/completions", json=body) == 400


CODINGS = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_compressed_request_is_read_and_passes_as_it_came(http, coding: str) -> None:
    """Its model is checked and its prompt hashed; the upstream gets the same bytes, or the edited text."""
    plain = json.dumps({"model": "cheap", "messages": [{"role": "user", "content": "hi " * 3000}]}).encode()
    headers = {**CHEAP, "content-encoding": coding, "content-type": "application/json"}
    async with proxied(max_body_bytes=100_000) as (upstream, cairn):
        packed = CODINGS[coding](plain)
        assert await status_of(http, cairn, "POST", "/v1/messages/count_tokens", data=packed, headers=headers) == 200
        asked = relayed(upstream)[0]
        assert asked.body == packed
        assert asked.header(b"content-encoding") == coding.encode()
        streamed = CODINGS[coding](plain.replace(b'{"model"', b'{"stream":true,"model"'))
        assert await status_of(http, cairn, "POST", "/v1/chat/completions", data=streamed, headers=headers) == 200
        asked = relayed(upstream)[1]
        assert asked.header(b"content-encoding") is None
        assert asked.json()["stream_options"] == {"include_usage": True}
        refused = CODINGS[coding](plain.replace(b"cheap", b"dear"))
        assert await status_of(http, cairn, "POST", "/v1/chat/completions", data=refused, headers=headers) == 403
        bomb = CODINGS[coding](b'{"model":"cheap","x":"' + b"a" * 1_000_000 + b'"}')
        assert await status_of(http, cairn, "POST", "/v1/chat/completions", data=bomb, headers=headers) == 413
        cut = packed[: len(packed) // 2]
        assert await status_of(http, cairn, "POST", "/v1/chat/completions", data=cut, headers=headers) == 400
        assert len(relayed(upstream)) == 2


async def test_an_unknown_content_encoding_is_refused(http) -> None:
    """A body that cannot be read cannot be checked; a coding that is none is not looked at."""
    async with proxied() as (_, cairn):
        packed = gzip.compress(json.dumps(CHAT).encode())
        for coding in ("gzip, identity", "identity,gzip"):
            sent = {"data": packed, "headers": {**FREE, "content-encoding": coding}}
            assert await status_of(http, cairn, "POST", "/v1/messages/count_tokens", **sent) == 200
        for coding in ("lzma", "gzip, br"):
            headers = {**CHEAP, "content-encoding": coding}
            assert await status_of(http, cairn, "POST", "/v1/chat/completions", data=b"x", headers=headers) == 400


async def test_liveness_needs_no_key_and_tells_nothing(http) -> None:
    """Probes of clients and balancers are answered alike; nothing in the answer is about the upstreams."""
    async with proxied() as (upstream, cairn):
        for path in ("/", "/health", "/healthz", "/api/hello"):
            for method in ("GET", "HEAD"):
                async with http.request(method, f"http://127.0.0.1:{cairn.port}{path}") as answer:
                    assert answer.status == 200
                    assert await answer.read() in (b"", b"ok\n")
        assert relayed(upstream) == []


async def test_a_page_of_a_listed_origin_may_ask_and_read_errors_too(http) -> None:
    """The preflight comes without a key; every answer to the page names its origin, those of Cairn itself too."""
    origin = {"origin": "https://chat.example"}
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with proxied(cors_origins=("https://chat.example",)) as (upstream, cairn):
        url = f"{cairn.url}/chat/completions"
        async with http.options(url, headers={**origin, **asking}) as answer:
            assert answer.status == 204
            assert answer.headers["access-control-allow-origin"] == "https://chat.example"
            assert answer.headers["access-control-allow-headers"] == "authorization"
        assert relayed(upstream) == []
        for headers, status in ((origin, 401), ({**origin, **FREE}, 200), ({**origin, **CHEAP}, 403)):
            async with http.post(url, json=CHAT, headers=headers) as answer:
                assert answer.status == status
                assert answer.headers["access-control-allow-origin"] == "https://chat.example"
                assert answer.headers["vary"] == "Origin"
        stream = {**CHAT, "stream": True}
        async with http.post(url, json=stream, headers={**origin, **FREE}) as answer:
            assert answer.headers["access-control-allow-origin"] == "https://chat.example"
            assert b"[DONE]" in await answer.read()
        async with http.options(url, headers={"origin": "https://evil.example", **asking}) as answer:
            assert answer.status != 204
            assert "access-control-allow-origin" not in answer.headers
        async with http.post(url, json=CHAT, headers={"origin": "https://evil.example", **FREE}) as answer:
            assert "access-control-allow-origin" not in answer.headers


async def test_engine_paths_are_routed_by_their_model_if_they_are_configured(http) -> None:
    """/tokenize goes to the pool of its model, outside /v1; a deployment's path names the model."""
    paths = ("/tokenize", "/openai/deployments/*")
    async with OpenAIUpstream() as cheap, OpenAIUpstream() as dear:
        pools = (
            Pool(name="cheap", models=("cheap",), replicas=(Replica(cheap.url),)),
            Pool(name="dear", models=("dear",), replicas=(Replica(dear.url),)),
        )
        config = config_for((), pools=pools, clients=CLIENTS, server=Server(port=0, engine_paths=paths))
        async with running(config) as cairn:
            for upstream in (cheap, dear):
                upstream.requests.clear()
            for model, headers, status in (("cheap", FREE, 200), ("dear", FREE, 200), ("dear", CHEAP, 403)):
                sent = {"json": {"model": model, "prompt": "x"}, "headers": headers}
                assert await status_of(http, cairn, "POST", "/tokenize", **sent) == status
                chat = {"json": {"messages": []}, "headers": headers}
                path = f"/openai/deployments/{model}/chat/completions?api-version=1"
                assert await status_of(http, cairn, "POST", path, **chat) == status
            assert await status_of(http, cairn, "POST", "/detokenize", json={"model": "cheap"}, headers=FREE) == 404
        for upstream, model in ((cheap, "cheap"), (dear, "dear")):
            assert [asked.target for asked in relayed(upstream)] == [
                "/tokenize",
                f"/openai/deployments/{model}/chat/completions?api-version=1",
            ]


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/responses/", "/v1/%72esponses", "//v1//realtime?model=m", "/v1/realtime/translations"]
)
@pytest.mark.parametrize("upgrade", ["websocket", "WebSocket", "h2c, websocket"])
async def test_a_websocket_is_refused_at_once_however_its_path_is_written(http, path: str, upgrade: str) -> None:
    """Without asking for the key, so that the client falls back to HTTP."""
    async with proxied() as (upstream, cairn):
        headers = {"upgrade": upgrade, "connection": "Upgrade"}
        assert await status_of(http, cairn, "GET", path, headers=headers) == 426
        assert relayed(upstream) == []


async def test_an_unknown_path_names_the_likely_one(http) -> None:
    """Somebody who mistyped the base URL is told what was probably meant."""
    async with proxied() as (_, cairn), http.post(f"http://127.0.0.1:{cairn.port}/v2/chat/completions") as answer:
        assert answer.status == 404
        message = (await answer.json())["error"]["message"]
        assert "/v1/chat/completions" in message
        assert "admin port" in message


LONG = {"model": "cheap", "messages": [{"role": "user", "content": "a long prompt " * 2000}]}


async def told(http: aiohttp.ClientSession, cairn: Cairn, headers: dict[str, str]) -> tuple[str, int, str, bool]:
    """Cache status, matched tokens, reason, and whether times are told, of a long prompt."""
    async with http.post(f"{cairn.url}/chat/completions", json=LONG, headers=headers) as answer:
        assert answer.status == 200
        named = answer.headers
        matched = int(named["x-cairn-matched-tokens"])
        return named["cache-status"], matched, named["x-cairn-reason"], "server-timing" in named


@asynccontextmanager
async def two_replicas(disclosure: Disclosure) -> AsyncIterator[Cairn]:
    """Two replicas of one pool that several tenants share."""
    async with OpenAIUpstream() as one, OpenAIUpstream() as two:
        config = config_for((one.url, two.url), clients=CLIENTS, tenants=Tenants(disclosure=disclosure))
        async with running(config) as cairn:
            yield cairn


async def test_nobody_is_told_that_another_tenant_sent_a_prompt(http) -> None:
    """The second tenant's first request reads like a cold one, its second like a warm one; routing is shared."""
    async with two_replicas(Disclosure.OWN) as cairn:
        cold = await told(http, cairn, FREE)
        assert cold == ("Cairn; fwd=miss; detail=cold", 0, "cold", False)
        assert await told(http, cairn, OTHER) == cold
        for headers in (FREE, OTHER):
            status, matched, reason, _ = await told(http, cairn, headers)
            assert (status, reason) == ("Cairn; hit", "warm")
            assert matched > 0


async def test_a_refused_request_does_not_make_anothers_prefix_ones_own(http) -> None:
    """Only what was answered counts as sent."""
    one, two = OpenAIUpstream(), OpenAIUpstream()
    async with one, two, running(config_for((one.url, two.url), clients=CLIENTS)) as cairn:
        await told(http, cairn, FREE)
        one.failures, two.failures = [Failure(400)], [Failure(400)]
        async with http.post(f"{cairn.url}/chat/completions", json=LONG, headers=OTHER) as answer:
            assert answer.status == 400
        one.failures, two.failures = [], []
        assert (await told(http, cairn, OTHER))[1] == 0


async def test_the_operator_may_have_everything_told(http) -> None:
    """With disclosure of all, the headers describe the shared index."""
    async with two_replicas(Disclosure.ALL) as cairn:
        await told(http, cairn, FREE)
        status, matched, _, times = await told(http, cairn, OTHER)
        assert status == "Cairn; hit"
        assert matched > 0
        assert times


async def test_explain_describes_the_asking_tenants_prefixes_only(http) -> None:
    """The plan is the one that the tenant's own prompts would lead to."""
    async with two_replicas(Disclosure.OWN) as cairn:
        await told(http, cairn, FREE)
        shown = {}
        for name in ("free", "other"):
            question = Explain(1, "/v1/chat/completions", json.dumps(LONG).encode(), f"sk-{name}".encode())
            status, body = await cairn.worker.explainer.explain(question, cairn.worker.http_server.authenticator)
            assert status == 200
            shown[name] = json.loads(body)
        assert shown["free"]["cache"] == "hit"
        assert shown["other"]["cache"] == "miss"
        assert not any(row["matched_bytes"] for row in shown["other"]["replicas"])
