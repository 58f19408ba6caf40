"""A real engine for tests: llama.cpp on the small local model, in processes of their own, one set for a session.

The model is made once per checkout. Tests that use these fixtures carry the mark `engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from demo.processes import Child, start_replica
from demo.shapes import SMALL

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODELS = Path(__file__).resolve().parents[2] / ".cairn" / "model"
LOAD_SECONDS = 60.0
STOP_SECONDS = 5.0


class Engine:
    """A running engine. `url` is its base without /v1; `restart` gives one with empty caches at the same address."""

    def __init__(self, name: str, model: Path, log: Path) -> None:
        self._start: Callable[[str], Child] = lambda port: start_replica(name, model, log, "--port", port)
        self._child = self._start("0")
        self.url = ""

    def wait(self) -> None:
        """Return when it serves."""
        self.url = self._child.served_at(LOAD_SECONDS)

    def restart(self) -> None:
        """End it and start it again at its address: all that it had cached is gone."""
        self.stop()
        self._child = self._start(self.url.rpartition(":")[2])
        self.wait()

    def stop(self) -> None:
        """End it."""
        self._child.stop(STOP_SECONDS)


@pytest.fixture(scope="session")
def two_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """Two replicas of the small model, one thread and three slots each, shared by all tests of the session."""
    from demo.local_model import make_model  # here, since its libraries take half a second to load

    model = make_model(MODELS, SMALL)
    logs = tmp_path_factory.mktemp("engines")
    with ExitStack() as stack:
        engines = (Engine("engine one", model, logs / "one.log"), Engine("engine two", model, logs / "two.log"))
        for engine in engines:
            stack.callback(engine.stop)
        for engine in engines:
            engine.wait()
        yield engines


@pytest.fixture(scope="session")
def engine(two_engines: tuple[Engine, Engine]) -> Engine:
    """One replica of the small model: the first of `two_engines`."""
    return two_engines[0]


@pytest.fixture(scope="session")
def vocabulary() -> Tokenizer:
    """The vocabulary of the local model, to count tokens as the engine does."""
    from demo.local_model import load_vocabulary

    return load_vocabulary(MODELS)
