"""Write the process log from a thread, one line per record, with credentials redacted."""

from __future__ import annotations

import logging
import logging.handlers
import queue
import re
from collections.abc import Callable, Iterable

REPLICAS = "cairn.replicas"
"""Name of the logger of findings at replicas and of their changes."""

_CREDENTIALS = re.compile(
    r"(?i)(?:(?P<head>\b(?:bearer|basic)\s+|\bx-api-key['\":\s=b]+)[^\s'\",]+"
    r"|(?P<url>://[^/\s:@]*:)[^\s@]+(?=@)"
    r"|\bsk-[a-z0-9_-]{8,})"
)

_SECRET_CHARACTERS_LEAST = 4

_CONTROLS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069]")


class RedactingFormatter(logging.Formatter):
    """Replaces known secrets, and what looks like a credential, by `***`, in tracebacks too."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self._secrets: frozenset[str] = frozenset()
        self._known: re.Pattern[str] | None = None
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Replace these secrets too. Secrets of fewer than four characters are ignored: they are parts of words."""
        self._secrets |= {secret for secret in secrets if len(secret) >= _SECRET_CHARACTERS_LEAST}
        longest_first = sorted(self._secrets, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """Return the line of `record`, in which nothing ends the line or controls a terminal.

        Names of models and errors come from upstreams. A traceback, which follows the line, has lines of its own.
        """
        record.message = _CONTROLS.sub(" ", record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of `record` without secrets."""
        text, known = super().format(record), self._known
        if known is not None:
            text = known.sub("***", text)
        return _CREDENTIALS.sub(lambda match: (match["head"] or match["url"] or "") + "***", text)


class _BoundedQueueHandler(logging.handlers.QueueHandler):
    """Drops records while the queue is full: if nobody reads standard error, the event loop must not stop."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        pass


class _Forwarding(logging.Handler):
    """Passes records on instead of writing them."""

    def __init__(self, pass_on: Callable[[int, str], None]) -> None:
        super().__init__()
        self._pass_on = pass_on

    def emit(self, record: logging.LogRecord) -> None:
        self._pass_on(record.levelno, record.getMessage())


def forward(name: str, pass_on: Callable[[int, str], None]) -> None:
    """Call `pass_on` with level and text of each record of the logger `name`, in place of writing it here."""
    logger = logging.getLogger(name)
    logger.handlers[:] = [_Forwarding(pass_on)]
    logger.propagate = False


class ProcessLog:
    """The log of the process, written by a thread."""

    def __init__(self, listener: logging.handlers.QueueListener, formatter: RedactingFormatter) -> None:
        self._listener = listener
        self._formatter = formatter

    def redact(self, secrets: Iterable[str]) -> None:
        """Replace these secrets as well from now on, for example those of a configuration that was reloaded."""
        self._formatter.add(secrets)

    def stop(self) -> None:
        """Write what is in the queue, and end the thread."""
        self._listener.stop()


def set_up(level_name: str, secrets: Iterable[str] = (), stream: int = 2) -> ProcessLog:
    """Write the log of the whole process to the descriptor `stream` from a thread.

    aiohttp's messages about malformed requests are left out: they are the client's fault, and are counted.
    """
    handler = logging.StreamHandler(open(stream, "w", closefd=False, errors="backslashreplace"))  # noqa: SIM115
    formatter = RedactingFormatter(secrets)
    handler.setFormatter(formatter)
    records: queue.Queue[logging.LogRecord] = queue.Queue(maxsize=10_000)
    listener = logging.handlers.QueueListener(records, handler)
    root = logging.getLogger()
    root.handlers[:] = [_BoundedQueueHandler(records)]
    root.setLevel(level_name.upper())
    for noisy in ("aiohttp.server", "aiohttp.access", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    listener.start()
    return ProcessLog(listener, formatter)
