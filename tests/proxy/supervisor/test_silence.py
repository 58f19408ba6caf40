"""When a worker that sends nothing is frozen."""

from __future__ import annotations

import os
from pathlib import Path

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


def test_the_kernel_tells_how_long_a_process_waited_for_a_processor() -> None:
    """Never less than before; nothing about a process that is gone."""
    before = cpu_wait_seconds(os.getpid())
    assert 0 <= before <= cpu_wait_seconds(os.getpid())
    assert before > 0 or not Path("/proc/self/schedstat").exists()
    assert cpu_wait_seconds(2**30) == 0.0
