"""When a worker that sends nothing is frozen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxy.supervisor.silence import SILENCE_LIMIT_SECONDS, STARVED_LIMIT_SECONDS, WorkerSilence, cpu_wait_seconds


def test_a_worker_is_frozen_that_could_run_and_sent_nothing_for_a_while() -> None:
    """From its last message on, whatever it waited for a processor before."""
    silence = WorkerSilence()
    assert not silence.is_frozen(100.0, 100.0, 50.0)
    assert not silence.is_frozen(100.0 + SILENCE_LIMIT_SECONDS - 0.1, 100.0, 50.0)
    assert silence.is_frozen(100.0 + SILENCE_LIMIT_SECONDS, 100.0, 50.0)
    assert not silence.is_frozen(100.0 + SILENCE_LIMIT_SECONDS, 104.0, 50.0)


def test_a_worker_that_has_no_processor_to_run_on_is_not_frozen_until_much_later() -> None:
    """The time for which it waited for one since its last message does not count; a minute is too long for any."""
    silence = WorkerSilence()
    assert not silence.is_frozen(100.0, 100.0, 7.0)
    assert not silence.is_frozen(110.0, 100.0, 7.0 + 5.1)
    assert silence.is_frozen(110.0, 100.0, 7.0 + 4.9)
    assert not silence.is_frozen(100.0 + STARVED_LIMIT_SECONDS - 0.1, 100.0, 7.0 + STARVED_LIMIT_SECONDS)
    assert silence.is_frozen(100.0 + STARVED_LIMIT_SECONDS, 100.0, 7.0 + STARVED_LIMIT_SECONDS)
    silence = WorkerSilence()
    assert not silence.is_frozen(100.0, 100.0, 7.0)
    assert not silence.is_frozen(104.0, 103.0, 10.0)
    assert silence.is_frozen(103.0 + SILENCE_LIMIT_SECONDS, 103.0, 10.0), "what it waited before its message is past"


@pytest.mark.parametrize(
    ("schedstat", "seconds"), [("5000000000 2500000000 7\n", 2.5), ("", 0.0), ("1", 0.0), ("a b c", 0.0), (None, 0.0)]
)
def test_the_second_figure_of_the_kernel_is_the_time_without_a_processor(
    schedstat: str | None, seconds: float, tmp_path: Path
) -> None:
    """In nanoseconds; nothing is known of a process that is gone, or on another system."""
    if schedstat is not None:
        (tmp_path / "12").mkdir()
        (tmp_path / "12" / "schedstat").write_text(schedstat)
    assert cpu_wait_seconds(12, tmp_path) == seconds


def test_the_time_without_a_processor_never_falls() -> None:
    """Of this process."""
    assert 0.0 <= cpu_wait_seconds(os.getpid()) <= cpu_wait_seconds(os.getpid())
