"""A real vLLM server for the tests here, which run only with `--vllm`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.vllm.engines import is_installed, start_engines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests here unless `--vllm` is given; these take minutes, most of them to start the server."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(600))
            if not config.getoption("--vllm"):
                item.add_marker(pytest.mark.skip(reason="needs --vllm, and vLLM (`make .build/vllm/.done`)"))


@pytest.fixture(scope="session")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL, without /v1, of a server with blocks of 32 tokens and room for 48,000."""
    if not is_installed():
        pytest.fail("vLLM is not installed: run `make .build/vllm/.done`")
    options = ["--num-gpu-blocks-override", "1500", "--block-size", "32", "--enable-auto-tool-choice"]
    options += ["--tool-call-parser", "hermes"]
    with ExitStack() as stack:
        (port,) = asyncio.run(start_engines(1, options, tmp_path_factory.mktemp("vllm"), stack))
        yield f"http://127.0.0.1:{port}"
