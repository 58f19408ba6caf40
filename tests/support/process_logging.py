"""Run what sets up the log of its whole process, in the process of a test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from proxy.logs import REPLICAS

_LOGGERS = (None, REPLICAS, "aiohttp.server", "aiohttp.access", "asyncio")


@contextmanager
def logging_restored() -> Iterator[None]:
    """Undo afterwards what `proxy.logs` changes at the loggers."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate = propagate
