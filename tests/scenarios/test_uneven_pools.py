"""Replicas of one pool that do not serve the same: who is asked, what is tried elsewhere, what the client gets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from proxy.config.schema import Config, Pool, Replica, Secret, Upstream
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import Asked, Failure, OpenAIUpstream

CHAT = "chat/completions"


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=json.dumps(body).encode(), content_type="application/json")


def _is_prompt(asked: Asked) -> bool:
    """Whether a client sent it: Cairn itself asks engines how they render."""
    return asked.method == "POST" and asked.target.startswith("/v1/")


class Engine(OpenAIUpstream):
    """A server that checks names, as vLLM does; `refuses` are its answers by a part of the request."""

    def __init__(self, *models: str, owner: str = "vllm", lists: Sequence[str] | None = None, **more: Any) -> None:
        super().__init__(models=models, **more)
        self.owner = owner
        self.lists = lists  # None: what it serves
        self.list_status = 200
        self.has_more = False
        self.rooms: dict[str, int] = {}
        self.adapters: set[str] = set()
        self.checks_names = True
        self.refuses: dict[str, tuple[int, Any]] = {}  # by a part of the target and body
        self.refused = 0

    @property
    def asked(self) -> int:
        """Prompts that came."""
        return len([each for each in self.requests if _is_prompt(each)])

    async def _serve(self, request: web.BaseRequest, asked: Asked, failure: Failure | None) -> web.StreamResponse:
        if asked.target == "/v1/models":
            if self.list_status != 200:
                return _json({"detail": "sick"}, self.list_status)
            data = [self._entry(name) for name in (self.models if self.lists is None else self.lists)]
            return _json({"object": "list", "data": data, "has_more": self.has_more})
        if not _is_prompt(asked):
            return await super()._serve(request, asked, failure)
        text = f"{asked.target} {asked.body.decode()}"
        for part, (status, body) in self.refuses.items():
            if part in text:
                self.refused += 1
                return _json(body, status)
        model = asked.json()["model"]
        if self.checks_names and model not in self.models:
            self.refused += 1
            return _json({"error": {"message": f"The model `{model}` does not exist.", "code": 404}}, 404)
        return await super()._serve(request, asked, failure)

    def _entry(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"id": name, "object": "model", "owned_by": self.owner}
        if name in self.rooms:
            entry["max_model_len"] = self.rooms[name]
        if name in self.adapters:
            entry["parent"] = "base"
        return entry


@asynccontextmanager
async def pool_of(*engines: Engine, keys: Sequence[str] = (), **upstream: Any) -> AsyncIterator[Cairn]:
    """A worker before the engines, in one pool."""
    config: Config = config_for([engine.url for engine in engines], upstream=Upstream(**upstream))
    if keys:
        replicas = [Replica(each.url, key=Secret(key)) for each, key in zip(engines, keys, strict=True)]
        config = config_for([], pools=[Pool(name="engines", replicas=tuple(replicas))], upstream=Upstream(**upstream))
    async with running(config) as cairn:
        yield cairn


async def ask(
    http: aiohttp.ClientSession, cairn: Cairn, model: str, n: int = 0, path: str = CHAT, **more: Any
) -> tuple[int, str, Any]:
    """Status, body and headers; `n` makes the prompt its own."""
    body: dict[str, Any] = {"model": model, **more}
    if "tools" in body:
        body["tools"] = [{"type": "function", "function": {"name": f"f{n}", "description": "x" * 999}}]
    if path == "embeddings":
        body["input"] = f"hi {n}"
    elif path == "responses":
        body.setdefault("input", f"hi {n}")
    else:
        body.setdefault("messages", [{"role": "user", "content": f"hi {n} " * 100}])
    async with http.post(f"{cairn.url}/{path}", json=body) as response:
        return response.status, await response.text(), response.headers


async def checked(cairn: Cairn) -> None:
    """Have all replicas checked, as every 15 seconds."""
    pools = cairn.worker.replicas.pools
    await asyncio.gather(*[cairn.worker.health.check(number) for number in pools.served])


@pytest.mark.parametrize("stream", [False, True])
async def test_an_adapter_that_one_replica_has_is_asked_of_that_one(
    http: aiohttp.ClientSession, stream: bool
) -> None:
    """The lists tell it beforehand; what all have is spread as ever."""
    async with Engine("base", "lora") as one, Engine("base") as two, pool_of(one, two) as cairn:
        for number in range(40):
            status, text, headers = await ask(http, cairn, "lora", number, stream=stream)
            assert (status, "x-cairn-tried" in headers) == (200, False), text
        assert two.asked == 0
        for number in range(40):
            assert (await ask(http, cairn, "base", number))[0] == 200
        assert two.asked > 5


@pytest.mark.parametrize("list_status", [404, 401, 500])
async def test_without_lists_the_refusal_is_tried_elsewhere_and_remembered(
    http: aiohttp.ClientSession, list_status: int
) -> None:
    """For some seconds, by model: 10 models cost at most 10 refusals, which use up no budget of retries."""
    names = [f"lora-{number}" for number in range(10)]
    async with Engine("base", *names, owner="x") as one, Engine("base", owner="x") as two:
        one.list_status = two.list_status = list_status
        async with pool_of(one, two) as cairn:
            for number in range(100):
                status, _, headers = await ask(http, cairn, names[number % 10], number)
                assert status == 200
                if "x-cairn-tried" in headers:
                    assert headers["x-cairn-tried"].endswith(";model_not_found")
            assert 0 < two.refused <= 10


async def test_a_model_that_nobody_has_is_an_honest_404(http: aiohttp.ClientSession) -> None:
    """Each replica is asked once, and then one for each request; nobody is closed for it."""
    async with Engine("base") as one, Engine("base") as two, pool_of(one, two) as cairn:
        for number in range(20):
            status, text, _ = await ask(http, cairn, "nobody", number)
            assert (status, "does not exist" in text) == (404, True)
        assert one.refused + two.refused <= 21
        assert (await ask(http, cairn, "base"))[0] == 200


async def test_adapters_that_are_loaded_and_unloaded_move_with_the_answers(http: aiohttp.ClientSession) -> None:
    """The lists are 15 seconds old at most; meanwhile the answers correct them."""
    async with Engine("base", "lora") as one, Engine("base") as two, pool_of(one, two) as cairn:
        assert (await ask(http, cairn, "lora"))[0] == 200
        one.models, two.models = ("base",), ("base", "lora")  # moved, and nobody has been asked again
        for number in range(10):
            assert (await ask(http, cairn, "lora", number))[0] == 200
        assert one.refused == 1
        await checked(cairn)
        one.models, two.models = ("base", "lora"), ("base",)  # and back, as the next check finds
        await checked(cairn)
        for number in range(10):
            assert (await ask(http, cairn, "lora", number))[0] == 200
        assert (one.refused, two.refused <= 1) == (1, True)


async def test_an_adapter_that_was_just_loaded_is_found_among_many(http: aiohttp.ClientSession) -> None:
    """More replicas may refuse it than failures are tried again, since a refusal takes no time."""
    engines = [Engine("base") for _ in range(5)]
    async with engines[0], engines[1], engines[2], engines[3], engines[4], pool_of(*engines) as cairn:
        engines[3].models = ("base", "lora")
        for number in range(20):
            assert (await ask(http, cairn, "lora", number))[0] == 200
        assert sum(engine.refused for engine in engines) <= 4


async def test_a_server_that_takes_any_name_goes_on_getting_its_share(http: aiohttp.ClientSession) -> None:
    """As llama.cpp and SGLang do: what it lists is no proof of what it refuses."""
    async with Engine("base") as one, Engine("a.gguf", owner="llamacpp") as two, pool_of(one, two) as cairn:
        two.checks_names = False
        for number in range(40):
            assert (await ask(http, cairn, "base", number))[0] == 200
        assert two.asked > 5


async def test_an_adapter_is_not_asked_of_a_server_that_would_answer_with_its_base_model(
    http: aiohttp.ClientSession,
) -> None:
    """It takes any name, and so hides that it has no such adapter."""
    async with Engine("base", "lora", owner="sglang") as one, Engine("base", owner="sglang") as two:
        one.adapters, one.checks_names, two.checks_names = {"lora"}, False, False
        async with pool_of(one, two) as cairn:
            for number in range(40):
                assert (await ask(http, cairn, "lora", number))[0] == 200
            assert two.asked == 0


@pytest.mark.parametrize("lists", [("*",), ("LORA:latest",), ("lor?",)])
async def test_patterns_and_other_spellings_in_lists_count(
    http: aiohttp.ClientSession, lists: tuple[str, ...]
) -> None:
    """As LiteLLM's wildcards, Ollama's tags and letters in any case."""
    one, two = Engine("base", "lora"), Engine("base", "lora", lists=lists)
    async with one, two, pool_of(one, two) as cairn:
        for number in range(40):
            assert (await ask(http, cairn, "lora", number))[0] == 200
        assert two.asked > 5


@pytest.mark.parametrize("kind", ["paged", "empty", "thousands"])
async def test_odd_lists_lose_no_request(http: aiohttp.ClientSession, kind: str) -> None:
    """A first page tells nothing of the rest, and a list may be of any length."""
    async with Engine("base", "lora") as one, Engine("base", "lora", lists=("base",)) as two:
        if kind == "paged":
            two.has_more = True
        elif kind == "empty":
            two.lists = ()
        else:
            two.lists = [f"adapter-{number:0500}" for number in range(20_000)]  # 12 MB
        async with pool_of(one, two) as cairn:
            for number in range(40):
                assert (await ask(http, cairn, "lora", number))[0] == 200
            assert two.asked > 5


async def test_while_the_only_holder_is_away_the_client_is_not_told_that_there_is_no_such_model(
    http: aiohttp.ClientSession,
) -> None:
    """503, which clients try again, and not 404, which they do not."""
    async with Engine("base", "lora") as one, Engine("base") as two, pool_of(one, two) as cairn:
        one.refuses["lora"] = (500, {"error": {"message": "sick"}})
        assert (await ask(http, cairn, "lora"))[0] == 500
        await one.stop()
        statuses = {(await ask(http, cairn, "lora", number))[0] for number in range(5)}
        assert statuses <= {502, 503}
        assert two.asked == 0
    async with Engine("base", "lora", owner="x") as one, Engine("base", owner="x") as two:
        one.list_status = two.list_status = 500
        async with pool_of(one, two) as cairn:
            one.refuses["lora"] = (500, {"error": {"message": "sick"}})
            for number in range(10):
                status, text, _ = await ask(http, cairn, "lora", number)
                assert status in (500, 503), text


SUPPORT = [
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, '"tools"', 400,
     '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, '"tools"', 500,
     "tools param requires --jinja flag"),
    (CHAT, {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}]}]}, "image_url", 400,
     "base is not a multimodal model"),
    (CHAT, {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}]}]}, "image_url", 500,
     "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"),
    ("embeddings", {}, "/embeddings", 400, "The model does not support Embeddings API"),
    ("embeddings", {}, "/embeddings", 501, "This server does not support embeddings. Start it with `--embeddings`"),
    ("responses", {}, "/responses", 404, None),
    ("responses", {}, "/responses", 405, "Method Not Allowed"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "more", "part", "status", "message"), SUPPORT)
async def test_a_kind_of_request_that_one_replica_lacks_is_served_by_another(
    http: aiohttp.ClientSession, path: str, more: dict[str, Any], part: str, status: int, message: str | None
) -> None:
    """It is refused once; other requests are spread as before, since the replica is well."""
    async with Engine("base") as one, Engine("base") as two, pool_of(one, two) as cairn:
        body = {"detail": "Not Found"} if message is None else {"error": {"message": message, "code": status}}
        two.refuses[part] = (status, body)
        for number in range(30):
            got, text, _ = await ask(http, cairn, "base", number, path, **more)
            assert got == 200, text
        assert two.refused <= 1
        before = two.asked
        for number in range(40):
            assert (await ask(http, cairn, "base", number))[0] == 200
        assert two.asked - before > 5
        one.refuses[part] = two.refuses[part]
        assert (await ask(http, cairn, "base", 99, path, **more))[0] == status


async def test_a_prompt_that_is_too_long_for_one_replica_goes_to_one_with_more_room(
    http: aiohttp.ClientSession,
) -> None:
    """Beforehand if that can be told from its length, else after the refusal."""
    too_long = (400, {"error": {"message": "This model's maximum context length is 2000 tokens.", "code": 400}})
    async with Engine("base") as one, Engine("base") as two:
        one.rooms, two.rooms = {"base": 100_000}, {"base": 2_000}
        two.refuses["too long"] = too_long
        async with pool_of(one, two) as cairn:
            for number in range(20):
                long = [{"role": "user", "content": f"too long {number} " * 2_000}]
                assert (await ask(http, cairn, "base", messages=long))[0] == 200
            assert two.asked == 0
            for number in range(20):
                dense = [{"role": "user", "content": f"too long {number}"}]
                assert (await ask(http, cairn, "base", messages=dense))[0] == 200
            assert two.refused > 0
            one.refuses["too long"] = too_long
            assert (await ask(http, cairn, "base", messages=dense))[0] == 400
    async with Engine("base") as one, Engine("base") as two:
        one.rooms = two.rooms = {"base": 2_000}
        one.refuses["too long"] = two.refuses["too long"] = too_long
        async with pool_of(one, two) as cairn:
            assert (await ask(http, cairn, "base", messages=dense))[0] == 400
            assert one.asked + two.asked == 1


@pytest.mark.parametrize("status", [401, 403])
async def test_a_key_of_the_operator_that_one_replica_refuses_is_no_error_of_the_client(
    http: aiohttp.ClientSession, status: int
) -> None:
    """That replica is left alone; if all refuse, or the key is the client's own, the answer is passed on."""
    refusal = (status, {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}})
    async with Engine("base") as one, Engine("base") as two:
        two.refuses[""] = refusal
        async with pool_of(one, two, keys=["a", "b"]) as cairn:
            for number in range(50):
                assert (await ask(http, cairn, "base", number))[0] == 200
            assert 0 < two.refused <= 5
    async with Engine("base") as one, Engine("base") as two, pool_of(one, two) as cairn:
        one.refuses[""] = two.refuses[""] = refusal
        assert (await ask(http, cairn, "base"))[0] == status
        assert one.refused + two.refused == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}),
        (402, {"message": "Insufficient Balance"}),
        (400, {"message": "Your credit balance is too low to access the API."}),
    ],
)
async def test_an_account_that_has_nothing_left_is_left_alone_for_longer_than_a_rate_limit(
    http: aiohttp.ClientSession, status: int, error: dict[str, Any]
) -> None:
    """It is asked once, and no request of many fails; a rate limit without a time would be tried every second."""
    async with Engine("base") as one, Engine("base") as two:
        two.refuses[""] = (status, {"error": error})
        async with pool_of(one, two, keys=["a", "b"]) as cairn:
            for number in range(60):
                assert (await ask(http, cairn, "base", number))[0] == 200
            now = cairn.worker.basics.clock.monotonic()
            views = cairn.worker.replicas.fleet.snapshot("engines", now + 30, ("", "base"))
            assert [view.available for view in views] == [True, False]
            assert two.refused == 1


NOT_TRIED = [
    (400, {"error": {"message": "The response was filtered: content management policy.", "code": "content_filter"}}),
    (403, {"error": {"message": "Your input was flagged by moderation.", "code": 403}}),
    (400, {"error": {"message": "'temperature' must be at most 2", "code": 400}}),
    (404, {"error": {"message": "Response with id 'resp_1' not found.", "code": 404}}),
    (404, {"error": {"message": "The model `other` does not exist.", "code": 404}}),
]


@pytest.mark.parametrize(("status", "body"), NOT_TRIED)
async def test_what_is_about_the_request_is_asked_once(http: aiohttp.ClientSession, status: int, body: Any) -> None:
    """A filter above all: nobody may get round it by another replica."""
    async with Engine("base") as one, Engine("base") as two, pool_of(one, two, keys=["a", "b"]) as cairn:
        one.refuses[""] = two.refuses[""] = (status, body)
        assert (await ask(http, cairn, "base"))[0] == status
        assert one.refused + two.refused == 1


async def test_a_replica_without_memory_is_left_alone_whatever_status_it_gives(http: aiohttp.ClientSession) -> None:
    """As some servers give 400 for an error of CUDA."""
    async with Engine("base") as one, Engine("base") as two, pool_of(one, two) as cairn:
        two.refuses[""] = (400, {"error": {"message": "CUDA out of memory. Tried to allocate 2 GiB"}})
        for number in range(40):
            assert (await ask(http, cairn, "base", number))[0] == 200
        assert 0 < two.refused <= 5


async def test_a_redirect_of_one_replica_is_not_for_the_client(http: aiohttp.ClientSession) -> None:
    """A login page before one engine, say; if all redirect, the client sees it."""

    class Redirecting(Engine):
        async def _serve(self, request: web.BaseRequest, asked: Asked, failure: Failure | None) -> web.StreamResponse:
            if not _is_prompt(asked):
                return await super()._serve(request, asked, failure)
            self.refused += 1
            return web.Response(status=302, headers={"location": "https://login.example/"})

    async with Engine("base") as one, Redirecting("base") as two, pool_of(one, two) as cairn:
        for number in range(40):
            assert (await ask(http, cairn, "base", number))[0] == 200
        assert 0 < two.refused <= 5


async def test_clients_are_shown_the_models_of_all_replicas(http: aiohttp.ClientSession) -> None:
    """Otherwise an adapter would come and go in their lists; one that does not answer hides only its own."""
    one, two = Engine("base", "one"), Engine("base", "two")
    async with one, two, Engine("base") as three, pool_of(one, two, three) as cairn:

        async def names() -> list[str]:
            async with http.get(f"{cairn.url}/models") as response:
                return sorted([model["id"] for model in (await response.json())["data"]])

        for _ in range(5):
            assert await names() == ["base", "one", "two"]
        two.list_status = 500
        assert await names() == ["base", "one"]
