"""The loop that serves: uvloop reads from a socket until nothing is left, the standard loop once a turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run the tests of this folder on uvloop."""
    return {"uvloop": uvloop.new_event_loop}
