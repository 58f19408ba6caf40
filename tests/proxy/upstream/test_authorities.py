"""The authorities that are trusted: one context for all servers, and a file that is replaced while Cairn runs."""

from __future__ import annotations

import asyncio
import errno
import logging
import ssl
import threading
from pathlib import Path

import pytest
import trustme

from proxy.errors import TlsFailed
from proxy.tasks import Tasks
from proxy.upstream import Authorities, Limits, UpstreamClient
from proxy.upstream.authorities import LOOK_SECONDS
from tests.proxy.upstream.conftest import fetch
from tests.proxy.upstream.test_client import SERVE_ONE, server_context
from tests.support.clock import FakeClock
from tests.support.upstream import ScriptedUpstream


def written(path: Path, *authorities: trustme.CA) -> str:
    """Replace the file by one with these authorities, as a rotation of certificates does; return its path."""
    new = path.with_suffix(".new")
    new.write_bytes(b"".join(each.cert_pem.bytes() for each in authorities))
    new.replace(path)
    return str(path)


async def test_all_connections_share_one_context_which_offers_http_1_1_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise an upstream could choose HTTP/2, which is not spoken here."""
    offered: list[list[str]] = []
    monkeypatch.setattr(ssl.SSLContext, "set_alpn_protocols", lambda _, names: offered.append(names))
    clock = FakeClock()
    authorities = Authorities(clock, written(tmp_path / "ca.pem", trustme.CA()))
    first, second = await asyncio.gather(authorities.tls_context(), authorities.tls_context())
    clock.advance(LOOK_SECONDS)
    assert first is second is await authorities.tls_context()
    assert offered == [["http/1.1"]]
    assert (first.check_hostname, first.verify_mode) == (True, ssl.CERT_REQUIRED)


@pytest.mark.parametrize("only_file", [False, True])
async def test_a_file_that_was_replaced_is_trusted_after_some_seconds(tmp_path: Path, *, only_file: bool) -> None:
    """Also by a client that has had connections with the old ones."""
    old, new, clock = trustme.CA(), trustme.CA(), FakeClock()
    authorities = Authorities(clock, written(tmp_path / "ca.pem", old), only_file=only_file)
    client = UpstreamClient(Limits(), clock, authorities.tls_context)
    async with (
        ScriptedUpstream(SERVE_ONE, tls=server_context(old, "127.0.0.1")) as before,
        ScriptedUpstream(SERVE_ONE, tls=server_context(new, "127.0.0.1")) as after,
    ):
        assert await fetch(client, before) == b"hello"
        with pytest.raises(TlsFailed):
            await fetch(client, after)
        written(tmp_path / "ca.pem", new)
        clock.advance(LOOK_SECONDS - 0.1)
        with pytest.raises(TlsFailed):
            await fetch(client, after)
        clock.advance(0.1)
        assert await fetch(client, after) == b"hello"
    await client.close()


async def test_the_machine_s_authorities_are_trusted_unless_the_file_s_are_the_only_ones(tmp_path: Path) -> None:
    clock, file = FakeClock(), written(tmp_path / "ca.pem", trustme.CA())
    machine = len(ssl.create_default_context().get_ca_certs())
    counts = [
        len((await Authorities(clock, *given, only_file=only_file).tls_context()).get_ca_certs())
        for given, only_file in (((), False), ((), True), ((file,), False), ((file,), True))
    ]
    assert counts == [machine, machine, machine + 1, 1]


async def test_a_file_that_cannot_be_used_changes_nothing_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be half written, or be replaced just now."""
    clock, path = FakeClock(), tmp_path / "ca.pem"
    authorities = Authorities(clock, written(path, trustme.CA()), only_file=True)
    first = await authorities.tls_context()
    content = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        for lines, spoil in ((1, lambda: path.write_bytes(b"half")), (2, path.unlink)):
            spoil()
            for _ in range(2):
                clock.advance(LOOK_SECONDS)
                assert await authorities.tls_context() is first
            assert len(caplog.messages) == lines
    path.write_bytes(content)
    clock.advance(LOOK_SECONDS)
    assert await authorities.tls_context() is not first


async def test_a_request_that_is_cancelled_while_the_file_is_read_leaves_it_to_the_next_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise the new authorities would not be trusted until the file changes again."""
    clock, path, make, tasks = FakeClock(), tmp_path / "ca.pem", ssl.create_default_context, Tasks()
    authorities = Authorities(clock, written(path, trustme.CA()), only_file=True)
    first = await authorities.tls_context()
    written(path, trustme.CA())
    clock.advance(LOOK_SECONDS)
    loop, reading, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def slow(cafile: str) -> ssl.SSLContext:
        loop.call_soon_threadsafe(reading.set)
        go_on.wait()
        return make(cafile=cafile)

    monkeypatch.setattr(ssl, "create_default_context", slow)
    leaves = tasks.start(authorities.tls_context(), "context")
    await reading.wait()
    leaves.cancel()
    go_on.set()
    await asyncio.wait({leaves})
    assert leaves.cancelled()
    assert await authorities.tls_context() is not first


async def test_a_file_that_could_not_be_read_for_want_of_a_descriptor_is_read_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Though it does not change again. The log says it once."""
    clock, path, make = FakeClock(), tmp_path / "ca.pem", ssl.create_default_context
    authorities = Authorities(clock, written(path, trustme.CA()), only_file=True)
    first = await authorities.tls_context()
    written(path, trustme.CA())

    def no_descriptor(cafile: str) -> ssl.SSLContext:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(ssl, "create_default_context", no_descriptor)
    for _ in range(2):
        clock.advance(LOOK_SECONDS)
        assert await authorities.tls_context() is first
    assert caplog.messages == [f"{path} has changed and cannot be used: Too many open files"]
    monkeypatch.setattr(ssl, "create_default_context", make)
    clock.advance(LOOK_SECONDS)
    assert await authorities.tls_context() is not first


async def test_without_any_file_yet_each_connection_fails_until_there_is_one(tmp_path: Path) -> None:
    """Its place in the pool is free again."""
    authority, clock = trustme.CA(), FakeClock()
    authorities = Authorities(clock, str(tmp_path / "ca.pem"))
    client = UpstreamClient(Limits(max_connections=1), clock, authorities.tls_context)
    async with ScriptedUpstream(SERVE_ONE, tls=server_context(authority, "127.0.0.1")) as upstream:
        for _ in range(2):
            with pytest.raises(TlsFailed, match=r"^the certificate authorities for the upstream cannot be read$"):
                await fetch(client, upstream)
        written(tmp_path / "ca.pem", authority)
        assert await fetch(client, upstream) == b"hello"
    await client.close()
