"""A fleet that changes under load: replicas behind a name, limits that processes share, scraped capacities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from proxy.config.schema import Config, Pool, Queueing, Replica
from proxy.metrics import definitions as metrics
from proxy.metrics.exposition import SHOWN_SECONDS
from proxy.worker.lifecycle import Worker
from tests.scenarios.test_conversations import words
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import Failure, OpenAIUpstream
from tests.support.valkey import Valkey, eventually, free_port
from tests.support.valkey import running as valkey_running


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with valkey_running() as valkey:
        yield valkey


async def ask(http: aiohttp.ClientSession, cairn: Cairn, text: str) -> tuple[int, str]:
    body = {"model": "test-model", "messages": [{"role": "user", "content": text}]}
    async with http.post(f"{cairn.url}/chat/completions", json=body) as answer:
        await answer.read()
        return answer.status, answer.headers.get("x-cairn-replica", "")


def queued(cairn: Cairn) -> float:
    cairn.worker.reporter.report()
    return cairn.heard.exposition.series(metrics.UPSTREAM_QUEUED).get(
        (cairn.worker.replicas.fleet.name_of(0) or "",), 0
    )


class At(OpenAIUpstream):
    """An upstream at another loopback address, all on one port as pods are."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(port=port)
        self.host = host

    async def __aenter__(self) -> At:
        self._runner = web.ServerRunner(web.Server(self._handle, handler_cancellation=True), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, self.port).start()
        return self


async def test_replicas_behind_a_name_come_and_go_under_load(http: aiohttp.ClientSession) -> None:
    """A new address takes its share at the next look, one that is gone gets nothing more, and no request is lost."""
    port = free_port()
    hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    addresses = hosts[:2]

    async def resolve(name: str, asked_port: int) -> Sequence[str]:
        assert (name, asked_port) == ("engines.test", port)
        return addresses

    def prepare(worker: Worker) -> None:
        worker.replicas.discovery._resolve = resolve  # noqa: SLF001 - internal state that no public name shows

    pool = Pool(name="engines", replicas=(Replica(f"dns+http://engines.test:{port}"),))
    async with AsyncExitStack() as stack:
        for host in hosts:
            await stack.enter_async_context(At(host, port))
        cairn = await stack.enter_async_context(running(config_for([], pools=[pool]), prepare))

        async def load(label: str) -> set[str]:
            answers = await asyncio.gather(*(ask(http, cairn, words(f"{label}{n}", 600)) for n in range(30)))
            assert {status for status, _ in answers} == {200}
            return {replica.partition(":")[0] for _, replica in answers}

        assert await load("a") == {"127.0.0.2", "127.0.0.3"}
        addresses = hosts
        await cairn.worker.replicas.discovery.look()
        assert await load("b") == set(hosts)
        addresses = hosts[1:]
        await cairn.worker.replicas.discovery.look()
        assert await load("c") == set(hosts[1:])


async def test_replicas_that_came_and_went_behind_a_name_leave_nothing_behind(
    http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endpoints, queues, connections, series and facts are dropped; what was counted is still counted."""
    monkeypatch.setattr("proxy.fleet.discovery.FORGET_SECONDS", 0.0)
    port = free_port()
    addresses: list[str] = []

    async def resolve(name: str, asked_port: int) -> Sequence[str]:
        return addresses

    def prepare(worker: Worker) -> None:
        worker.replicas.discovery._resolve = resolve  # noqa: SLF001 - internal state that no public name shows

    pool = Pool(name="engines", replicas=(Replica(f"dns+http://engines.test:{port}"),))
    async with running(config_for([], pools=[pool]), prepare) as cairn:
        worker = cairn.worker
        for generation in range(1, 201):
            addresses = [f"127.0.1.{generation}"]
            async with At(addresses[0], port):
                await worker.replicas.discovery.look()
                assert (await ask(http, cairn, words(f"g{generation}", 600)))[0] == 200
        addresses = ["127.0.2.99"]
        async with At(addresses[0], port):
            await worker.replicas.discovery.look()
            worker.replicas.discovery.forget()
            assert (await ask(http, cairn, words("last", 600)))[0] == 200
            assert cairn.count(metrics.REQUESTS) == 201
            for now_seconds in (0.0, SHOWN_SECONDS):
                cairn.heard.exposition.pass_time(now_seconds)
            assert cairn.count(metrics.REQUESTS) == 201
            assert {labels[2] for labels in cairn.heard.exposition.labels(metrics.REQUESTS)} == {
                metrics.GONE,
                f"127.0.2.99:{port}",
            }
            assert len(worker.replicas.pools.backends) == 1
            assert len(worker.requests.queues.by_replica) == 1
            await eventually(lambda: len(worker.replicas.client.counts()) == 1)  # a probe may still be under way
            assert len(worker.memory.index.replicas()) <= 1


async def test_two_processes_keep_one_limit_together(http: aiohttp.ClientSession, valkey: Valkey) -> None:
    """A burst at both of them never has more than four at the replica; then one alone may have all four."""
    most = 0

    class Counting(OpenAIUpstream):
        async def _serve(self, *args):
            nonlocal most
            await asyncio.sleep(0.03)
            most = max(most, self.in_flight)
            return await super()._serve(*args)

    async with Counting() as upstream:
        pool = Pool(name="engines", replicas=(Replica(upstream.url, max_concurrent=4),))
        config = config_for([], valkey.url, pools=[pool])
        async with running(config) as one, running(config) as two:
            await eventually(
                lambda: one.worker.sharing.journal.others == 1 and two.worker.sharing.journal.others == 1
            )
            burst = [ask(http, cairn, words(f"{n}", 300)) for n in range(16) for cairn in (one, two)]
            assert {status for status, _ in await asyncio.gather(*burst)} == {200}
            assert most == 4
            most = 0
            await asyncio.sleep(0.1)
            assert {status for status, _ in await asyncio.gather(*(ask(http, one, "short") for _ in range(16)))} == {
                200
            }
            assert most == 4


async def test_the_queue_has_the_length_and_the_deadline_that_are_configured(http: aiohttp.ClientSession) -> None:
    """Beyond its length 429, at its deadline 503; its places are seen in metrics and are zero at the end."""

    def configured(url: str, deadline_seconds: float) -> Config:
        pool = Pool(name="engines", replicas=(Replica(url, max_concurrent=1),))
        return config_for([], pools=[pool], queue=Queueing(deadline_seconds=deadline_seconds, max_waiting=2))

    gate = asyncio.Event()
    async with OpenAIUpstream(gate=gate) as upstream:
        async with running(configured(upstream.url, 60.0)) as cairn:
            first = asyncio.get_running_loop().create_task(ask(http, cairn, "a"))
            await eventually(lambda: len(upstream.generations) == 1)
            rest = [asyncio.get_running_loop().create_task(ask(http, cairn, "b")) for _ in range(3)]
            await eventually(lambda: queued(cairn) == 2 and any(each.done() for each in rest))
            gate.set()
            assert sorted([(await each)[0] for each in (first, *rest)]) == [200, 200, 200, 429]
            assert queued(cairn) == 0
        gate.clear()
        async with running(configured(upstream.url, 0.1)) as cairn:
            first = asyncio.get_running_loop().create_task(ask(http, cairn, "a"))
            await eventually(lambda: upstream.in_flight == 1)
            assert (await ask(http, cairn, "b"))[0] == 503
            gate.set()
            assert (await first)[0] == 200
            assert queued(cairn) == 0


@asynccontextmanager
async def scripted(pages: dict[str, str]) -> AsyncIterator[str]:
    """An engine that answers with `pages` by path, else 404."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        page = pages.get(request.path)
        return web.Response(status=404) if page is None else web.Response(text=page)

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


MODELS = '{"object": "list", "data": [{"id": "test-model"}]}'
VLLM = 'process_start_time_seconds {at}\nvllm:cache_config_info{{block_size="16",num_gpu_blocks="{blocks}"}} 1.0\n'


async def test_a_capacity_is_scraped_and_said_again_only_when_it_changes() -> None:
    """What was learned from responses since then is kept; a later start time means a new epoch."""
    pages = {"/v1/models": MODELS, "/metrics": VLLM.format(at=1000.0, blocks=1_000)}
    async with scripted(pages) as url, running(config_for([url])) as cairn:
        worker = cairn.worker
        assert worker.memory.index.replicas()[0].budget_tokens == 16_000
        worker.memory.index.set_budget(0, 14_400)
        await worker.health.check(0)
        assert worker.memory.index.replicas()[0].budget_tokens == 14_400
        epoch = worker.memory.index.epoch(0)
        pages["/metrics"] = VLLM.format(at=2000.0, blocks=2_000)
        await worker.health.check(0)
        assert worker.memory.index.replicas()[0].budget_tokens == 32_000
        assert worker.memory.index.epoch(0) == epoch + 1
        await worker.health.check(0)
        assert worker.memory.index.epoch(0) == epoch + 1


async def test_capacity_and_places_of_llama_cpp_and_sglang_are_scraped() -> None:
    """From /props and /get_server_info."""
    llama = {"/v1/models": MODELS, "/props": '{"total_slots": 4, "default_generation_settings": {"n_ctx": 2048}}'}
    sglang = {
        "/v1/models": MODELS,
        "/get_server_info": '{"max_total_num_tokens": 9000, "max_running_requests": 7}',
    }
    async with scripted(llama) as one, scripted(sglang) as two, running(config_for([one, two])) as cairn:
        worker = cairn.worker
        assert [worker.memory.index.replicas()[n].budget_tokens for n in (0, 1)] == [8_192, 9_000]
        assert [worker.replicas.fleet.limit_of(n) for n in (0, 1)] == [4, 7]


def siblings() -> list[str]:
    """Fifty prompts that share some 8,000 tokens."""
    shared = words("document", 3_500)
    return [f"{shared} question {number}" for number in range(50)]


def cold(*upstreams: OpenAIUpstream) -> int:
    """Generations of which less than half was cached."""
    return sum(
        cached < prompt / 2
        for upstream in upstreams
        for prompt, cached in zip(upstream.prompt_tokens, upstream.cached_tokens, strict=True)
    )


async def test_siblings_at_another_proxy_wait_for_the_first_ones_prefill(
    http: aiohttp.ClientSession, valkey: Valkey
) -> None:
    """The second proxy learns of the first one's request, and its own requests go after that one's first token."""
    gate = asyncio.Event()
    async with OpenAIUpstream(gate=gate) as a, OpenAIUpstream(gate=gate) as b:
        config = config_for([a.url, b.url], valkey.url)
        async with running(config) as one, running(config) as two:
            await eventually(
                lambda: one.worker.sharing.journal.others == 1 and two.worker.sharing.journal.others == 1
            )
            first, *rest = siblings()
            asked = [asyncio.get_running_loop().create_task(ask(http, one, first))]
            await eventually(lambda: len(two.worker.sharing.remote_prefills) == 1)
            asked += [asyncio.get_running_loop().create_task(ask(http, two, text)) for text in rest]
            await eventually(lambda: two.worker.requests.in_flight_limit.requests == 49)
            assert len(a.generations) + len(b.generations) <= 2
            gate.set()
            assert {(await each)[0] for each in asked} == {200}
            assert len(two.worker.sharing.remote_prefills) == 0
            assert cold(a, b) <= 2


async def test_a_burst_of_siblings_at_two_proxies_makes_at_most_two_prefills(
    http: aiohttp.ClientSession, valkey: Valkey
) -> None:
    """Fifty at once, by turns: both proxies choose the same replica for the one that goes ahead."""
    gate = asyncio.Event()
    async with OpenAIUpstream(gate=gate) as a, OpenAIUpstream(gate=gate) as b:
        config = config_for([a.url, b.url], valkey.url)
        async with running(config) as one, running(config) as two:
            await eventually(
                lambda: one.worker.sharing.journal.others == 1 and two.worker.sharing.journal.others == 1
            )
            asked = [
                asyncio.get_running_loop().create_task(ask(http, (one, two)[n % 2], text))
                for n, text in enumerate(siblings())
            ]
            await eventually(
                lambda: (
                    one.worker.requests.in_flight_limit.requests + two.worker.requests.in_flight_limit.requests == 50
                )
            )
            assert len(a.generations) + len(b.generations) <= 2
            gate.set()
            assert {(await each)[0] for each in asked} == {200}
            assert cold(a, b) <= 2


async def test_one_whose_client_leaves_elsewhere_lets_ours_go_ahead(
    http: aiohttp.ClientSession, valkey: Valkey
) -> None:
    """Long before patience ends: nobody's first token will tell that the prefix is there."""
    gate = asyncio.Event()
    async with OpenAIUpstream(gate=gate) as a:
        config = config_for([a.url], valkey.url)
        async with running(config) as one, running(config) as two:
            await eventually(
                lambda: one.worker.sharing.journal.others == 1 and two.worker.sharing.journal.others == 1
            )
            first, *rest = siblings()[:4]
            leaving = asyncio.get_running_loop().create_task(ask(http, one, first))
            await eventually(lambda: len(two.worker.sharing.remote_prefills) == 1 and len(a.generations) == 1)
            asked = [asyncio.get_running_loop().create_task(ask(http, two, text)) for text in rest]
            await eventually(lambda: two.worker.requests.in_flight_limit.requests == 3)
            assert len(a.generations) == 1
            leaving.cancel()
            await eventually(lambda: len(two.worker.sharing.remote_prefills) == 0 and len(a.generations) == 2, 2.0)
            assert two.worker.memory.index.stats().blocks > 0
            gate.set()
            assert {(await each)[0] for each in asked} == {200}


async def test_one_that_fails_elsewhere_lets_ours_go_ahead(http: aiohttp.ClientSession, valkey: Valkey) -> None:
    """Its placement is taken back, and the first of ours that waits computes the prefix."""
    gate = asyncio.Event()
    async with OpenAIUpstream(gate=gate) as a:
        config = config_for([a.url], valkey.url)
        async with running(config) as one, running(config) as two:
            await eventually(
                lambda: one.worker.sharing.journal.others == 1 and two.worker.sharing.journal.others == 1
            )
            first, second, *_ = siblings()
            a.failures = [Failure(500)]
            failing = asyncio.get_running_loop().create_task(ask(http, one, first))
            assert (await failing)[0] == 500
            await eventually(lambda: two.worker.sharing.journal.stats.applied_deltas >= 2)
            asked = asyncio.get_running_loop().create_task(ask(http, two, second))
            await eventually(lambda: len(a.generations) == 2)
            assert len(two.worker.sharing.remote_prefills) == 0
            gate.set()
            assert (await asked)[0] == 200
