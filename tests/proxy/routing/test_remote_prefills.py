"""Another process's long prefill leads here, until it is announced as computed, fails, or takes too long."""

from __future__ import annotations

import asyncio
from array import array

import pytest

from cache import Fingerprint, Placement
from proxy.routing.prefill_gate import Follower, Passage, PrefillGate
from proxy.routing.remote_prefills import RemotePrefills

CHAIN = Fingerprint(array("Q", range(16)), array("I", range(1_024, 17 * 1_024, 1_024)))


def placement(number: int = 1, predicted: int = 0) -> Placement:
    return Placement(number, 0, 0, CHAIN, 0.0, predicted_tokens=predicted)


@pytest.fixture
def gate() -> PrefillGate:
    return PrefillGate()


@pytest.fixture
async def remote(gate) -> RemotePrefills:
    return RemotePrefills(gate, lambda replica, tokens: tokens / 8_000)


def follow(gate: PrefillGate) -> Follower:
    entry = gate.enter(
        0, [*range(16), 99], matched_blocks=16, matched_tokens=4_096.0, prompt_tokens=4_100.0, prefill_seconds=1.0
    )
    assert isinstance(entry, Follower)
    return entry


async def test_a_request_waits_for_the_first_token_of_another_process(gate, remote):
    """Announcing it twice, or its first token twice, changes nothing."""
    remote.placed(placement(), 4_096)
    remote.placed(placement(), 4_096)
    assert (len(remote), len(gate)) == (1, 1)
    waiting = asyncio.get_running_loop().create_task(follow(gate).wait())
    await asyncio.sleep(0)
    remote.computed(1)
    remote.computed(1)
    assert await waiting is Passage.OPENED
    assert (len(remote), len(gate)) == (0, 0)


async def test_a_prefill_that_failed_elsewhere_promotes_the_first_that_waits(gate, remote):
    remote.placed(placement(), 4_096)
    waiting = asyncio.get_running_loop().create_task(follow(gate).wait())
    await asyncio.sleep(0)
    remote.failed(1)
    remote.failed(1)
    assert await waiting is Passage.PROMOTED


async def test_what_another_process_finds_nearly_whole_is_not_waited_for(gate, remote):
    remote.placed(placement(predicted=4_000), 4_096)
    assert (len(remote), gate.is_open) == (0, True)


async def test_one_that_is_never_announced_as_computed_leads_for_as_long_as_it_may_take(gate, remote, monkeypatch):
    """Twice its predicted prefill and a second; the alarm does what an announcement would."""
    alarms = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda delay, call, *args: alarms.append((delay, call, args)))
    remote.placed(placement(), 4_096)
    ((delay, call, args),) = alarms
    assert delay == pytest.approx(2 * 4_096 / 8_000 + 1.0)
    call(*args)
    assert gate.is_open
