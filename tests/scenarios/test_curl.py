"""curl with a large body: no wait for a `100 Continue`, for a delayed acknowledgement or for a second packet."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from tests.support.openai_upstream import OpenAIUpstream
from tests.support.served import served

CURL = shutil.which("curl")
BODY_BYTES = 1_500_000
MORE_SECONDS_MOST = 0.020
BUSY_SECONDS_MOST = 0.035
"""On a machine on which the request alone takes longer than 20 ms; less than a delayed acknowledgement, of 40 ms."""

PAIRS_MOST = 60
"""Any of the waits that this looks for is in every request; other work on the machine is not in sixty of them."""

WITHOUT_EXPECT = ("-H", "Expect:")  # for the upstream, which lets curl wait its whole second for a 100


async def seconds(url: str, body: Path, *options: str) -> float:
    """Time from curl's start to the end of its request, as curl measured it."""
    process = await asyncio.create_subprocess_exec(
        str(CURL), "-s", "-o", "/dev/null", "-w", "%{http_code} %{time_total}", *options,
        "-H", "content-type: application/json", "--data-binary", f"@{body}", f"{url}/chat/completions",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    status, total = out.split()
    assert status == b"200"
    return float(total)


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
async def test_curl_with_a_body_of_1_5_mb_takes_at_most_20_ms_more_than_directly(tmp_path: Path) -> None:
    """With `Expect: 100-continue`, without it, in chunks and in HTTP/1.0; the best of pairs that alternate."""
    body = tmp_path / "body.json"
    text = {"role": "user", "content": "stones " * (BODY_BYTES // 7)}
    body.write_text(json.dumps({"model": "test-model", "messages": [text]}))
    waiting = [(), WITHOUT_EXPECT, ("-H", "Transfer-Encoding: chunked"), ("--http1.0",)]
    async with OpenAIUpstream() as upstream, served(["--upstream", upstream.url], tmp_path) as cairn:
        direct = float("inf")
        best = dict.fromkeys(waiting, float("inf"))
        for _ in range(PAIRS_MOST):
            direct = min(direct, await seconds(upstream.url, body, *WITHOUT_EXPECT))
            for options in waiting:
                best[options] = min(best[options], await seconds(cairn.url, body, *options))
            most = min(max(MORE_SECONDS_MOST, direct), BUSY_SECONDS_MOST)
            waiting = [options for options in waiting if best[options] - direct > most]
            if not waiting:
                break
        if waiting and direct > BUSY_SECONDS_MOST:
            pytest.skip(f"too busy to tell a wait of 40 ms: the request alone takes {direct * 1000:.0f} ms at best")
        assert waiting == [], (direct, best)
