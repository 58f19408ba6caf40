"""The supervisor with real processes: tiny workers in place of Cairn's own."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from proxy.config.load import Loaded
from proxy.config.schema import Config, Pool, Redis, Replica, Server
from proxy.control.messages import WorkerReport
from proxy.control.readiness import RESPONSIVE_SECONDS, WorkerView
from proxy.metrics import definitions as metrics
from proxy.metrics.agreed_labels import AgreedLabels
from proxy.metrics.definitions import MetricsDelta
from proxy.metrics.exposition import Exposition
from proxy.metrics.recorder import Recorder
from proxy.supervisor import sockets as listen
from proxy.supervisor.sockets import ListenError
from proxy.supervisor.supervisor import Supervisor
from tests.support.clock import FakeClock
from tests.support.supervised import Supervised, wait_gone
from tests.support.valkey import free_port

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends children and shares ports")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration of one engine, free ports and short waits."""
    return write(tmp_path / "cairn.yaml")


def write(file: Path, pool: str = "first", **server: object) -> Path:
    """Write a configuration; `server` is merged into that section."""
    tree = {
        "server": {"port": 0, "drain_accept_seconds": 0, "drain_seconds": 100} | server,
        "admin": {"port": 0},
        "redis": {"folder": str(file.parent / "valkey")},
        "pools": [{"name": pool, "replicas": [{"url": "http://127.0.0.1:9", "key_env": "ENGINE_KEY"}]}],
    }
    file.write_text(yaml.safe_dump(tree))
    return file


def start(file: Path, **kwargs: str) -> Supervised:
    """A supervisor on `file`."""
    return Supervised(file, env={"ENGINE_KEY": "a-secret-key"}, **kwargs)


def value(metrics: str, series: str) -> float:
    """One sample of a metrics page."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", metrics, re.MULTILINE)
    assert found, f"no {series}"
    return float(found[1])


def test_serves_with_its_workers_and_answers_for_them(file: Path) -> None:
    """Two workers share the port; readiness and metrics add them up."""
    write(file, workers=2)
    with start(file) as cairn:
        cairn.started()
        cairn.workers_ready(2)
        assert cairn.get("/pid")[0] == 200
        status, body = cairn.get("/readyz", admin=True)
        while json.loads(body)["status"] != "ready":  # the first report may be on its way
            status, body = cairn.get("/readyz", admin=True)
        assert status == 200
        assert json.loads(body)["workers"] == 2
        page = cairn.get("/metrics", admin=True)[1]
        while 'cairn_rejected_total{reason="tiny"} 2' not in page:  # a ready worker counts before its first report
            page = cairn.get("/metrics", admin=True)[1]
        assert value(page, "cairn_workers") == 2
        assert value(page, 'cairn_build_info{version="9.9.9"}') == 1


def test_an_explanation_comes_from_a_worker(file: Path) -> None:
    """/explain hands path, key and body to a worker and its answer back."""
    with start(file) as cairn:
        cairn.started()
        answer = cairn.ask("POST", "/explain?path=/v1/x", b"{}", admin=True, headers={"X-Cairn-Client-Key": "k"})
        assert answer == (200, "/v1/x k {}")


def test_a_killed_worker_is_replaced_and_no_connection_is_reset(file: Path) -> None:
    """A client that connects while there is no worker is answered by the next one; the pause grows each time."""
    with start(file) as cairn:
        cairn.started()
        for pause in ("0.1", "0.2"):
            old = int(cairn.get("/pid")[1])
            os.kill(old, signal.SIGKILL)
            connection = cairn.connect()
            connection.request("GET", "/pid")
            assert cairn.line(r"ended with -9; starting another in (\S+) s")[1] == pause
            assert int(connection.getresponse().read()) != old
            connection.close()
            cairn.line("is ready")
        page = cairn.get("/metrics", admin=True)[1]
        assert value(page, "cairn_worker_restarts_total") == 2


@linux
def test_the_queue_of_a_dead_worker_is_served_by_another(file: Path) -> None:
    """The kernel gives connections also to one that does not run; they do not wait for its successor."""
    write(file, workers=2)
    with start(file) as cairn:
        cairn.started()
        cairn.workers_ready(2)
        ended = int(cairn.get("/pid")[1])
        os.kill(ended, signal.SIGSTOP)
        connections = [cairn.connect() for _ in range(20)]
        for connection in connections:
            connection.request("GET", "/pid")
        os.kill(ended, signal.SIGKILL)
        served_by = {connection.getresponse().read() for connection in connections}
        assert len(served_by) == 1
        assert served_by != {b"%d" % ended}
        for connection in connections:
            connection.close()


def test_connections_of_a_dead_worker_go_to_the_least_busy_one_that_serves() -> None:
    """Never to itself, to one that starts, or to one that is silent."""
    views = [
        WorkerView(0, True, WorkerReport(MetricsDelta(), in_flight=0)),
        WorkerView(1, True, WorkerReport(MetricsDelta(), in_flight=5)),
        WorkerView(2, True, WorkerReport(MetricsDelta(), in_flight=4)),
        WorkerView(3, False, WorkerReport(MetricsDelta(), in_flight=0)),
        WorkerView(4, True, WorkerReport(MetricsDelta(), in_flight=0), silent_seconds=RESPONSIVE_SECONDS),
    ]
    workers: list[Any] = [SimpleNamespace(number=each.number, view=lambda each=each: each) for each in views]
    supervisor: Any = SimpleNamespace(_workers=workers)
    assert Supervisor.heir_of(supervisor, 0) is workers[2]
    assert Supervisor.heir_of(supervisor, 2) is workers[0]
    supervisor._workers = [workers[0], *workers[3:]]  # noqa: SLF001 - the fake's own
    assert Supervisor.heir_of(supervisor, 0) is None


def test_every_worker_hears_of_a_model_that_one_of_them_counted() -> None:
    """Once, when it is new; the figures are added up by the labels of all."""
    told: list[tuple[str, ...]] = []
    workers = [SimpleNamespace(name_models=told.append) for _ in range(2)]
    board = SimpleNamespace(add_report=lambda number, report: None)
    figures = Exposition()
    supervisor: Any = SimpleNamespace(_labels=AgreedLabels(), _exposition=figures, _workers=workers, board=board)
    recorder = Recorder()
    for number in range(2):
        recorder.inc(metrics.TOKENS, ("m", "one", "output"), 5)
        Supervisor.worker_reported(supervisor, number, WorkerReport(recorder.take()))
    assert told == [("m",), ("m",)]
    assert figures.value(metrics.TOKENS, ("m", "one", "output")) == 10


@contextmanager
def draining(file: Path) -> Iterator[tuple[Supervised, http.client.HTTPConnection]]:
    """A Cairn that was asked to end, and waits for load balancers, while a request runs on the connection."""
    write(file, drain_accept_seconds=100)
    with start(file) as cairn:
        cairn.started()
        held = cairn.hold()
        cairn.signal(signal.SIGTERM)
        cairn.line("still accepting")
        yield cairn, held
        held.close()


def test_sigterm_lets_what_runs_end(file: Path) -> None:
    """Not ready at once, accepting for a moment, the running request is answered, exit 0."""
    with draining(file) as (cairn, held):
        status, body = cairn.get("/readyz", admin=True)
        assert (status, json.loads(body)["reasons"]) == (503, ["draining"])
        assert cairn.get("/release")[0] == 200
        assert held.getresponse().status == 200


def test_a_drain_without_a_moment_ends_when_the_last_request_does(file: Path) -> None:
    """Exit 0 as soon as nothing runs any more, and the port is closed before that."""
    with start(file) as cairn:
        cairn.started()
        held, spare = cairn.hold(), cairn.connect()
        cairn.signal(signal.SIGTERM)
        cairn.line("requests may finish")
        spare.request("GET", "/release")
        assert spare.getresponse().status == 200
        assert held.getresponse().status == 200
        held.close()
        spare.close()
        assert cairn.code() == 0
        with pytest.raises(OSError):
            cairn.connect()


def test_a_drain_ends_at_its_deadline(file: Path) -> None:
    """A request that never ends holds nothing up for longer; that is still exit 0."""
    write(file, drain_seconds=0)
    with start(file) as cairn:
        cairn.started()
        held = cairn.hold()
        cairn.signal(signal.SIGINT)
        assert cairn.code() == 0
        held.close()


def test_a_second_signal_ends_now(file: Path) -> None:
    """Running requests are cut off, and the exit code shows it."""
    with start(file) as cairn:
        cairn.started()
        held = cairn.hold()
        cairn.signal(signal.SIGTERM)
        cairn.line("requests may finish")
        cairn.signal(signal.SIGTERM)
        cairn.line("ending at once: a second signal came")
        assert cairn.code() == 1
        with pytest.raises((http.client.HTTPException, OSError)):
            held.getresponse()
        held.close()


def test_a_second_signal_while_load_balancers_are_waited_for_promises_no_time_to_finish(file: Path) -> None:
    """It ends the wait, and requests are cut off."""
    with draining(file) as (cairn, _):
        cairn.signal(signal.SIGTERM)
        cairn.line("ending at once: a second signal came")
        assert cairn.code() == 1
        assert not any("requests may finish" in line for line in cairn.seen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_early_ends_it_as_a_later_one_does(file: Path, number: signal.Signals) -> None:
    """Without a traceback, and in a container too, whose first process gets no signal that it does not handle."""
    text = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    with start(file) as cairn:
        with file.open("wb") as pipe:  # once the other side reads: it starts, and handles nothing yet
            cairn.signal(number)
            pipe.write(text)
        assert cairn.code() == 0
        cairn.line("draining")
        assert not any("Traceback" in line for line in cairn.seen)


async def test_a_signal_ends_the_wait_for_the_private_store(tmp_path: Path) -> None:
    """It may read a large file for many seconds, in which there is nothing to drain."""
    given_up = threading.Event()

    def start() -> None:
        asyncio.run_coroutine_threadsafe(stop(), loop)
        assert given_up.wait(60), "nobody gave it up"
        raise BlockingIOError

    async def stop() -> None:
        supervisor._handle_stop_signal(signal.SIGTERM)  # noqa: SLF001 - as the loop calls it

    loop = asyncio.get_running_loop()
    store = SimpleNamespace(start=start, give_up=given_up.set, url="unix:///s")
    parts: Any = SimpleNamespace(
        clock=FakeClock(), version="", private_store=lambda *_: store, store_errors=(BlockingIOError,)
    )
    supervisor = Supervisor(Config(redis=Redis(folder=str(tmp_path))), parts)
    await supervisor._start_store()  # noqa: SLF001 - without ports and workers
    assert given_up.is_set()


def test_what_was_told_to_end_while_it_started_does_not_say_that_it_serves() -> None:
    """Its first worker may be ready only then; a service manager would be told so too."""
    addresses: list[tuple[str, ...]] = []
    parts: Any = SimpleNamespace(clock=FakeClock(), version="", started=lambda *both: addresses.append(both))
    for is_told in (True, False):
        supervisor = Supervisor(Config(), parts)
        supervisor._workers = [SimpleNamespace(pid=1)]  # type: ignore[list-item] # noqa: SLF001
        if is_told:
            supervisor._handle_stop_signal(signal.SIGTERM)  # noqa: SLF001 - as the loop calls it
        supervisor.worker_ready(0)
        assert len(addresses) == (not is_told)


async def test_a_signal_that_comes_when_all_is_closed_does_not_change_the_exit_code() -> None:
    """The process lives on for a moment, in which nothing handles signals."""
    parts: Any = SimpleNamespace(clock=FakeClock(), version="")
    elsewhere = Config(server=Server(host="203.0.113.1"))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with pytest.raises(ListenError):
            await Supervisor(elsewhere, parts).run()
        assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@linux
def test_a_terminal_s_signals_reach_the_supervisor_alone(file: Path) -> None:
    """A worker that starts does not ignore them yet: Ctrl-C would kill it with a traceback.

    Being in the background, it ignores the signal by which a terminal may stop what writes to it.
    """
    with start(file, store="store") as cairn:
        cairn.started()
        worker = int(cairn.get("/pid")[1])
        children = {worker} | _children_of_all_threads(cairn.pid)
        assert len(children) == 2
        assert all(os.getpgid(pid) == pid for pid in children)
        status = Path(f"/proc/{worker}/status").read_text()
        ignored = int(re.findall(r"SigIgn:\s*(\w+)", status)[0], 16)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU):
            assert ignored >> (number - 1) & 1, number


def test_sighup_takes_over_a_good_file(file: Path) -> None:
    """Workers go on in the same process with the new configuration."""
    with start(file) as cairn:
        cairn.started()
        before = cairn.get("/pid")
        write(file, pool="second", drain_seconds=5)
        cairn.signal(signal.SIGHUP)
        cairn.line("was reloaded")
        while cairn.get("/pool")[1] != "second":
            pass  # the message is on its way; bounded by the test's limit
        assert cairn.get("/pid") == before


async def test_probes_are_answered_while_the_file_is_read() -> None:
    """A file of a thousand replicas takes half a second, and a probe that waits so long may be one that fails."""
    loop = asyncio.get_running_loop()

    def read() -> Loaded:
        async def answer() -> None:
            pass

        asyncio.run_coroutine_threadsafe(answer(), loop).result(timeout=10)
        return Loaded(config)

    config = Config(pools=(Pool("p", (Replica("http://h"),), models=("a-*", "a-model")),))
    parts: Any = SimpleNamespace(clock=FakeClock(), version="", reload=read)
    supervisor = Supervisor(Config(), parts)
    await supervisor._reload()  # noqa: SLF001 - a signal asks for it, which needs a process
    assert supervisor.board.example_model == "a-model", "one that the status page can name"
    assert b"cairn_config_last_reload_successful 1" in (await supervisor.scrape(""))[0]


def test_sighup_with_a_bad_file_changes_nothing(file: Path) -> None:
    """The old configuration stays, a metric and a line with the path say so."""
    with start(file) as cairn:
        cairn.started()
        file.write_text("server: {port: high}")
        cairn.signal(signal.SIGHUP)
        cairn.line(r"was not reloaded: \S+/cairn\.yaml: \$\.server\.port: expected a whole number")
        assert cairn.get("/pool") == (200, "first")
        assert value(cairn.get("/metrics", admin=True)[1], "cairn_config_reload_failures_total") == 1
        assert value(cairn.get("/metrics", admin=True)[1], "cairn_config_last_reload_successful") == 0
        write(file, pool="unfit")
        cairn.signal(signal.SIGHUP)
        cairn.line("was not reloaded: worker 0: .*unfit")
        assert cairn.get("/pool") == (200, "first")
        assert value(cairn.get("/metrics", admin=True)[1], "cairn_config_reload_failures_total") == 2
        os.kill(int(cairn.get("/pid")[1]), signal.SIGKILL)
        assert cairn.get("/pool") == (200, "first")  # its successor works by the old one too


def test_a_reload_keeps_what_only_a_restart_can_change(file: Path) -> None:
    """A new number of workers is refused with a line that names the setting; the rest is taken."""
    with start(file) as cairn:
        cairn.started()
        write(file, pool="second", workers=3)
        cairn.signal(signal.SIGHUP)
        cairn.line(r"\$\.server\.workers takes effect only after a restart")
        cairn.line("was reloaded")
        assert value(cairn.get("/metrics", admin=True)[1], "cairn_config_last_reload_successful") == 1
        assert json.loads(cairn.get("/readyz", admin=True)[1])["workers"] == 1


@linux
def test_nothing_outlives_a_killed_supervisor(file: Path) -> None:
    """Workers and the private Valkey end with it, even by SIGKILL."""
    with start(file, store="store") as cairn:
        cairn.started()
        worker = int(cairn.get("/pid")[1])
        valkey = int((file.parent / "valkey" / "lock").read_text() or 0)
        assert valkey == cairn.pid
        children = {int(pid) for pid in Path(f"/proc/{cairn.pid}/task/{cairn.pid}/children").read_text().split()}
        everyone = children | {worker} | _children_of_all_threads(cairn.pid)
        assert len(everyone) == 2
        cairn.signal(signal.SIGKILL)
        for pid in everyone:
            wait_gone(pid)


@linux
def test_a_valkey_that_dies_is_started_again(file: Path) -> None:
    """The supervisor looks after its store."""
    with start(file, store="store") as cairn:
        cairn.started()
        (valkey,) = _children_of_all_threads(cairn.pid) - {int(cairn.get("/pid")[1])}
        os.kill(valkey, signal.SIGKILL)
        cairn.line("the private Valkey has ended; starting it again")
        while not _children_of_all_threads(cairn.pid) - {valkey, int(cairn.get("/pid")[1])}:
            pass  # bounded by the test's limit


def test_whoever_looks_first_or_again_sees_the_totals(file: Path) -> None:
    """`cairn top --once` shows one state, and the totals are read only while somebody is looking."""
    with start(file, store="store") as cairn:
        cairn.started()
        for _ in range(2):
            viewer = cairn.connect(admin=True)
            viewer.request("GET", "/events")
            answer = viewer.getresponse()
            while answer.readline() != b"event: state\n":
                pass
            assert json.loads(answer.readline().partition(b"data: ")[2])["saved"]["today"] is not None
            viewer.close()


def test_without_a_store_it_serves_all_the_same(file: Path) -> None:
    """A folder that cannot be made is a warning, not an end."""
    (file.parent / "valkey").write_text("a file where the folder should be")
    with start(file, store="store") as cairn:
        cairn.line("serving without a store")
        cairn.started()
        assert cairn.get("/pid")[0] == 200


@linux
def test_no_secret_stands_in_arguments_or_environment(file: Path) -> None:
    """A worker gets the replica's key by its private socket alone."""
    with start(file) as cairn:
        cairn.started()
        worker = Path("/proc") / cairn.get("/pid")[1]
        assert b"a-secret-key" not in (worker / "cmdline").read_bytes() + (worker / "environ").read_bytes()


def test_workers_that_never_start_end_it(file: Path) -> None:
    """Three in a row that die before any was ready: exit 1, not a loop."""
    with start(file, mode="crash") as cairn:
        cairn.line("giving up")
        assert cairn.code() == 1


@linux
def test_a_supervisor_killed_and_started_at_the_same_moment_serves(file: Path) -> None:
    """The workers of the old one still hold the port for a moment; the new one waits for them to end."""
    write(file, port=free_port(), workers=2)
    with start(file) as killed:
        killed.started()
        killed.workers_ready(2)
        killed.signal(signal.SIGKILL)
        with start(file) as cairn:
            cairn.started()
            assert cairn.get("/pid")[0] == 200


async def test_a_port_in_use_is_tried_again_for_a_while() -> None:
    """Until it is free, or the time is over; another failure is final at once."""
    in_use, denied = ListenError("in use"), ListenError("permission denied")
    in_use.is_in_use = True
    failures = [in_use, in_use]

    def open_sockets() -> str:
        if failures:
            raise failures.pop()
        return "opened"

    assert await listen.when_free(open_sockets, FakeClock()) == "opened"
    failures[:] = [denied]
    with pytest.raises(ListenError, match="denied"):
        await listen.when_free(open_sockets, FakeClock())
    clock = FakeClock()

    def never() -> str:
        clock.advance(listen.RETRY_SECONDS)
        raise in_use

    with pytest.raises(ListenError, match="in use"):
        await listen.when_free(never, clock)


def test_a_port_that_another_cairn_serves_is_taken() -> None:
    """Sockets that would share a port with another Cairn are refused: half of the requests would go there."""
    first = listen.open_for_workers("127.0.0.1", 0, 2, 16)
    try:
        port = first[0][0].getsockname()[1]
        assert [s.getsockname()[1] for sockets in first for s in sockets] == [port, port]
        with pytest.raises(ListenError, match=f"port {port}: the port is in use"):
            listen.open_for_workers("127.0.0.1", port, 2, 16)
    finally:
        listen.close_all(first)


def test_a_host_that_does_not_resolve_is_one_line() -> None:
    """No traceback for a name that means nothing."""
    with pytest.raises(
        ListenError, match=r"cannot listen on no-such-host\.invalid: .*; give an address of this machine"
    ):
        listen.open_for_workers("no-such-host.invalid", 0, 1, 16)


def test_localhost_means_every_address_of_it() -> None:
    """A name with several addresses is served on all of them, on one port."""
    port = free_port()
    opened = listen.open_for_workers("localhost", port, 1, 16)
    try:
        assert {s.getsockname()[1] for s in opened[0]} == {port}
        assert "127.0.0.1" in {s.getsockname()[0] for s in opened[0]}
    finally:
        listen.close_all(opened)


def _children_of_all_threads(pid: int) -> set[int]:
    """Processes started by any thread of `pid`."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return {int(child) for text in texts for child in text.split()}
