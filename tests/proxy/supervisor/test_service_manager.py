"""Readiness as systemd is told of it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from proxy.supervisor.service_manager import READY, notify
from tests.support.serving import serving


def listening(address: str) -> socket.socket:
    """Return a datagram socket bound to `address`, as a service manager has it."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(address)
    manager.settimeout(60)
    return manager


@pytest.mark.parametrize("abstract", [False, True])
def test_the_state_reaches_the_service_manager(tmp_path: Path, abstract: bool) -> None:
    """One datagram, to a path or to a name in the abstract namespace."""
    address = f"@cairn-test-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with listening(address.replace("@", "\0", 1)) as manager:
        notify(address, READY)
        assert manager.recv(100) == b"READY=1"


def test_no_service_manager_or_a_dead_one_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without an address nothing is sent; a socket that is gone is a warning."""
    notify(None, READY)
    assert caplog.messages == []
    notify(str(tmp_path / "gone"), READY)
    assert "cannot notify the service manager" in caplog.text


async def test_cairn_is_reported_as_ready_once_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command, started as systemd starts it."""
    address = str(tmp_path / "notify")
    with listening(address) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        pools = [{"name": "local", "replicas": [{"url": "http://127.0.0.1:9"}]}]
        async with serving(tmp_path, {"pools": pools}):
            assert manager.recv(100) == b"READY=1"
