"""Decide when a worker that sends nothing is frozen, and not only without a processor to run on."""

from __future__ import annotations

from pathlib import Path

SILENCE_LIMIT_SECONDS = 5.0  # of a worker that could have run
STARVED_LIMIT_SECONDS = 60.0  # of any worker
_NANOSECONDS_PER_SECOND = 1e9


class WorkerSilence:
    """The silence of one process. Pure; all times are in seconds, and those of messages are monotonic."""

    def __init__(self) -> None:
        self._heard_seconds = 0.0
        self._waited_seconds = 0.0

    def is_frozen(self, now_seconds: float, heard_seconds: float, waited_seconds: float) -> bool:
        """Return True if the process is stopped or blocked: ending it is then better than waiting.

        On a machine that is overloaded another process would not run either, and its start costs more.

        Args:
            now_seconds: the time.
            heard_seconds: when the process sent the last message.
            waited_seconds: for how long it has waited for a processor since it started (`cpu_wait_seconds`).
        """
        if heard_seconds != self._heard_seconds:
            self._heard_seconds, self._waited_seconds = heard_seconds, waited_seconds
        silent_seconds = now_seconds - heard_seconds
        could_run_seconds = silent_seconds - (waited_seconds - self._waited_seconds)
        return could_run_seconds >= SILENCE_LIMIT_SECONDS or silent_seconds >= STARVED_LIMIT_SECONDS


def cpu_wait_seconds(pid: int, processes: Path = Path("/proc")) -> float:
    """Return for how long the first thread of a process has been ready to run without a processor.

    This grows on an overloaded machine and while a container's limit is reached, and not while the process is
    stopped, runs, or waits for anything else. 0 if the kernel does not tell.
    """
    try:
        return int((processes / str(pid) / "schedstat").read_text().split()[1]) / _NANOSECONDS_PER_SECOND
    except (OSError, ValueError, IndexError):
        return 0.0
