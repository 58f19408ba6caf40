"""The command as a whole: workers that share a port, one killed under load, a drain, a reload, explanations."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.scenarios.test_conversations import words
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.served import Served, served
from tests.support.valkey import eventually, free_port

CHAT: dict[str, Any] = {"model": "test-model", "messages": [{"role": "user", "content": words("x", 800)}]}


async def ask(http: aiohttp.ClientSession, cairn: Served, body: dict[str, Any]) -> str:
    """How it ended: the status, or the exception's name."""
    try:
        async with http.post(f"{cairn.url}/chat/completions", json=body) as answer:
            await answer.read()
            return str(answer.status)
    except (aiohttp.ClientError, ConnectionError) as error:
        return type(error).__name__


@pytest.mark.once
async def test_a_worker_killed_under_load_loses_only_its_own_requests_in_flight(tmp_path: Path) -> None:
    """Sixteen requests are held; the worker of some dies; the others are answered, and a new worker serves."""
    gate = asyncio.Event()
    async with (
        OpenAIUpstream(gate=gate) as upstream,
        served(["--workers", "2", "--upstream", upstream.url], tmp_path) as cairn,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http,
    ):
        await eventually(lambda: len(cairn.worker_pids()) == 2)
        bodies = [CHAT | {"seed": number} for number in range(16)]
        asked = [asyncio.get_running_loop().create_task(ask(http, cairn, body)) for body in bodies]
        await eventually(lambda: upstream.in_flight == 16)
        os.kill(cairn.worker_pids()[0], signal.SIGKILL)
        lost_upstream = 16
        await eventually(lambda: upstream.in_flight < lost_upstream)
        gate.set()
        endings = Counter(await asyncio.gather(*asked))
        assert 0 < endings["200"] < 16
        assert endings["200"] + endings["ServerDisconnectedError"] + endings["ClientOSError"] == 16
        await eventually(lambda: len(cairn.worker_pids()) == 3)
        assert {await ask(http, cairn, CHAT | {"seed": number}) for number in range(16)} == {"200"}

        async def counted() -> bool:
            whole = await cairn.metric(http, "cairn_requests_total", endpoint="chat_completions")
            return whole == endings["200"] + 16

        await eventually(counted)
        assert await cairn.metric(http, "cairn_worker_restarts_total") == 1


@pytest.mark.once
async def test_what_runs_is_finished_when_told_to_end(tmp_path: Path) -> None:
    """SIGTERM while a request is under way: it is answered whole, then the exit code is 0."""
    gate = asyncio.Event()
    async with (
        OpenAIUpstream(gate=gate) as upstream,
        aiohttp.ClientSession() as http,
        served(["--upstream", upstream.url], tmp_path) as cairn,
    ):
        asked = asyncio.get_running_loop().create_task(ask(http, cairn, CHAT))
        await eventually(lambda: upstream.in_flight == 1)
        cairn.stop()
        await eventually(lambda: any("draining" in line for line in cairn.lines))
        gate.set()
        assert await asked == "200"


async def keep_asking(cairn: Served, served_once: asyncio.Event) -> tuple[int, bool]:
    """Send requests one behind the other on one connection until told that it ends; how many, and whether told."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(cairn.url.rpartition(":")[2].partition("/")[0]))
    body = json.dumps(CHAT).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    count = 0
    try:
        while True:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
            assert head.startswith(b"http/1.1 200 ")
            count += 1
            served_once.set()
            if b"\r\nconnection: close\r\n" in head:
                return count, await reader.read() == b""
    except (ConnectionError, asyncio.IncompleteReadError):
        return count, False
    finally:
        writer.close()


async def test_no_request_of_a_kept_connection_is_lost_when_told_to_end(tmp_path: Path) -> None:
    """SIGTERM under load: each of 16 busy clients is told `Connection: close` with an answer, and loses nothing."""
    async with (
        OpenAIUpstream() as upstream,
        served(["--workers", "2", "--upstream", upstream.url], tmp_path) as cairn,
    ):
        await eventually(lambda: len(cairn.worker_pids()) == 2)
        started = [asyncio.Event() for _ in range(16)]
        loop = asyncio.get_running_loop()
        clients = [loop.create_task(keep_asking(cairn, event)) for event in started]
        async with asyncio.timeout(60):
            await asyncio.gather(*[event.wait() for event in started])
            cairn.stop()
            ends = await asyncio.gather(*clients)
        assert [told for _, told in ends] == [True] * 16
        assert len(upstream.generations) == sum(count for count, _ in ends)


async def test_a_reload_takes_new_replicas_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    """SIGHUP: requests go to the new replica; after a bad file they still do."""
    file = tmp_path / "cairn.yaml"

    def write(url: str) -> None:
        file.write_text(json.dumps({"pools": [{"name": "p", "replicas": [{"url": url}]}]}))

    async with OpenAIUpstream() as old, OpenAIUpstream() as new, aiohttp.ClientSession() as http:
        write(old.url)
        async with served(["--config", str(file)], tmp_path) as cairn:
            assert await ask(http, cairn, CHAT) == "200"
            assert len(old.generations) == 1
            write(new.url)
            cairn.process.send_signal(signal.SIGHUP)

            async def moved() -> bool:
                return await ask(http, cairn, CHAT) == "200" and len(new.generations) > 0

            await eventually(moved)
            file.write_text("pools: 3")
            cairn.process.send_signal(signal.SIGHUP)

            async def refused() -> bool:
                return await cairn.metric(http, "cairn_config_reload_failures_total") == 1

            await eventually(refused)
            before = len(new.generations)
            assert await ask(http, cairn, CHAT) == "200"
            assert len(new.generations) == before + 1


@pytest.mark.once
async def test_a_name_with_a_label_that_is_too_long_prevents_neither_a_start_nor_a_reload(tmp_path: Path) -> None:
    """Whether a name is followed or plain: the other replicas serve, and a reload still adds new ones."""
    label = "x" * 70
    bad = [f"dns+http://{label}.example:8000", f"http://{label}.example:9000"]
    file = tmp_path / "cairn.yaml"

    def write(*urls: str) -> None:
        file.write_text(json.dumps({"pools": [{"name": "p", "replicas": [{"url": url} for url in urls]}]}))

    async with OpenAIUpstream() as old, OpenAIUpstream() as new, aiohttp.ClientSession() as http:
        write(old.url, *bad)
        async with served(["--config", str(file)], tmp_path) as cairn:
            assert await ask(http, cairn, CHAT) == "200"
            assert len(old.generations) == 1
            write(new.url, *reversed(bad))
            cairn.process.send_signal(signal.SIGHUP)

            async def moved() -> bool:
                return await ask(http, cairn, CHAT) == "200" and len(new.generations) > 0

            await eventually(moved)
            assert await cairn.metric(http, "cairn_background_task_failures_total") == 0


async def test_explain_agrees_with_what_is_routed(tmp_path: Path) -> None:
    """The choice that is told is the one that is made, with each replica's figures."""
    async with OpenAIUpstream() as a, OpenAIUpstream() as b, aiohttp.ClientSession() as http:
        arguments = ["--upstream", a.url, "--upstream", b.url]
        async with served(arguments, tmp_path) as cairn:
            for turn in range(2):
                for number in range(6):
                    body = {"model": "test-model", "messages": [{"role": "user", "content": words(f"{number}", 900)}]}
                    async with http.post(f"{cairn.admin}/explain", json=body) as answer:
                        told = await answer.json()
                    async with http.post(f"{cairn.url}/chat/completions", json=body) as answer:
                        await answer.read()
                        assert answer.headers["x-cairn-replica"] == told["choice"]
                        assert answer.headers["x-cairn-reason"] == told["reason"] == ("warm" if turn else "cold")
                    assert {row["replica"] for row in told["replicas"]} == {a.url[7:-3], b.url[7:-3]}


async def test_no_prompt_and_no_key_is_in_the_log_or_the_metrics(tmp_path: Path) -> None:
    """Confidential content of a client is in no place where an operator looks."""
    secret_words = "the heron waits at the weir"
    body: dict[str, Any] = CHAT | {"messages": [{"role": "user", "content": secret_words}], "stream": True}
    async with OpenAIUpstream() as upstream, aiohttp.ClientSession() as http:
        async with served(["--upstream", upstream.url], tmp_path) as cairn:
            headers = {"authorization": "Bearer sk-very-secret-key"}
            for bad in (body, {"messages": secret_words}, body | {"model": secret_words}):
                async with http.post(f"{cairn.url}/chat/completions", json=bad, headers=headers) as answer:
                    text = await answer.text()
                    assert "sk-very" not in text
            async with http.get(f"{cairn.admin}/metrics") as answer:
                page = await answer.text()
            await eventually(lambda: len(cairn.access_lines()) >= 3)
        logged = "".join(cairn.lines)
        assert "sk-very" not in page + logged
        assert "heron" not in page
        assert "heron waits" not in "".join(line for line in cairn.lines if '"model":"the heron' not in line)


@pytest.mark.once
async def test_what_all_workers_find_at_a_replica_is_one_line_of_the_log(tmp_path: Path) -> None:
    """The start lists each replica once, and a change is one line with its reason."""
    async with OpenAIUpstream() as upstream:
        down = f"http://127.0.0.1:{free_port()}"
        arguments = ["--workers", "3", "--upstream", upstream.url, "--upstream", down]
        async with served(arguments, tmp_path) as cairn:
            await eventually(lambda: len(cairn.worker_pids()) == 3)
        text = "".join(cairn.lines)
        assert text.count(f"replica {upstream.url[7:-3]} (pool default) is up: models test-model") == 1
        assert text.count(f"replica {down[7:]} (pool default) is down") == 1
        assert text.count(f"replica {down[7:]} (pool default) is down: the upstream cannot be reached") == 1
