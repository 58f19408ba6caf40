"""Services followed through a scripted API server, over real connections."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trustme

from cache import PrefixIndex
from proxy.clock import SystemClock
from proxy.config.schema import Config, Kubernetes, Pool, Replica
from proxy.fleet import Fleet
from proxy.fleet.discovery import Discovery
from proxy.fleet.endpoint_slices import Endpoint
from proxy.fleet.kubernetes import LIST_LIMITS, ApiError, KubernetesApi, KubernetesEndpoints, Service, ServiceWatch
from proxy.tasks import Tasks
from proxy.upstream import Authorities, Origin, UpstreamClient
from tests.support.clock import FakeClock
from tests.support.kubernetes import ApiServer, slice_of
from tests.support.valkey import eventually

VLLM = Service("vllm", "models", "http")


class Following:
    """A watch on a server, with the pauses that it asked for; they end at once, unless `holds_pauses`."""

    def __init__(self, server: ApiServer, service: Service, token_file: Path | None, ca_file: Path | None) -> None:
        self.reports: list[tuple[Endpoint, ...]] = []
        self.pauses: list[float] = []
        authorities = Authorities(SystemClock(), None if ca_file is None else str(ca_file), only_file=True)
        self.client = UpstreamClient(LIST_LIMITS, SystemClock(), authorities.tls_context)
        self.api = KubernetesApi(self.client, Origin.parse(server.url), token_file, namespace="own")
        self.watch = ServiceWatch(self.api, service, self.reports.append, lambda: 0.5, self._pause)

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)

    @property
    def addresses(self) -> list[str]:
        """The addresses that were reported last."""
        return [endpoint.address for endpoint in self.reports[-1]] if self.reports else []


@asynccontextmanager
async def following(
    server: ApiServer, service: Service = VLLM, token_file: Path | None = None, ca_file: Path | None = None
) -> AsyncIterator[Following]:
    """Follow `service` until the block ends."""
    running, tasks = Following(server, service, token_file, ca_file), Tasks()
    tasks.start(running.watch.run(), "watch")
    try:
        yield running
    finally:
        await tasks.close()
        await running.client.close()


async def test_a_service_is_listed_once_and_then_watched_from_that_version() -> None:
    """Each change of its ready endpoints is reported, and no other event is."""
    async with ApiServer(slice_of("a", "10.0.0.1")) as server, following(server) as found:
        await asyncio.wait_for(server.watching.wait(), 30)
        assert found.addresses == ["10.0.0.1"]
        server.send("ADDED", slice_of("b", "10.0.0.2", version="11"))
        await eventually(lambda: found.addresses == ["10.0.0.1", "10.0.0.2"])
        server.send("BOOKMARK", {"metadata": {"resourceVersion": "12"}})
        server.send("MODIFIED", slice_of("a", "10.0.0.1", version="13", ready=False))
        await eventually(lambda: found.addresses == ["10.0.0.2"])
        server.send("DELETED", slice_of("b", version="14"))
        await eventually(lambda: found.addresses == [])
        assert len(found.reports) == 4
        assert len(server.lists) == 1
        (listed, watched) = server.asked
        assert listed.path == "/apis/discovery.k8s.io/v1/namespaces/models/endpointslices"
        assert listed.query["labelSelector"] == "kubernetes.io/service-name=vllm"
        assert (watched.query["resourceVersion"], watched.query["allowWatchBookmarks"]) == ("10", "true")


async def test_services_are_found_by_labels_in_the_own_namespace() -> None:
    """`*` leaves the name out; the selector reaches the API as it was written."""
    service = Service("*", "", "http", "app=vllm,tier in (gpu, big)")
    async with ApiServer(slice_of("a", "10.0.0.1")) as server, following(server, service):
        await asyncio.wait_for(server.watching.wait(), 30)
        assert server.lists[0].path.endswith("/namespaces/own/endpointslices")
        assert server.lists[0].query["labelSelector"] == "app=vllm,tier in (gpu, big)"


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_a_watch_that_ends_goes_on_from_the_last_version(how: str) -> None:
    """Nothing is listed again, and the endpoints stay meanwhile."""
    async with ApiServer(slice_of("a", "10.0.0.1")) as server, following(server) as found:
        await asyncio.wait_for(server.watching.wait(), 30)
        server.send("BOOKMARK", {"metadata": {"resourceVersion": "42"}})
        getattr(server, how)()
        await eventually(lambda: len(server.watches) == 2)
        assert server.watches[1].query["resourceVersion"] == "42"
        assert len(server.lists) == 1
        assert found.addresses == ["10.0.0.1"]
        assert len(found.reports) == 1


@pytest.mark.parametrize("where", ["event", "status"])
async def test_an_expired_version_is_followed_by_a_new_list(where: str) -> None:
    """410 comes as an event within a watch or as the status of one."""
    async with ApiServer(slice_of("a", "10.0.0.1")) as server, following(server) as found:
        await asyncio.wait_for(server.watching.wait(), 30)
        server.slices, server.version = [slice_of("a", "10.0.0.9")], "900"
        if where == "event":
            server.send("ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})
        else:
            server.statuses = [410]
            server.end()
        await eventually(lambda: found.addresses == ["10.0.0.9"])
        await eventually(lambda: server.watches[-1].query["resourceVersion"] == "900")
        assert len(server.lists) == 2


async def test_long_lists_come_in_pages() -> None:
    """The token of each page is asked for, and the slices of all count."""
    async with ApiServer(*(slice_of(f"s{n}", f"10.0.0.{n}") for n in range(1, 6))) as server:
        server.page_size = 2
        async with following(server) as found:
            await eventually(lambda: len(found.addresses) == 5)
        assert [asked.query.get("continue") for asked in server.lists] == [None, "2", "4"]


@pytest.mark.parametrize("line", [b"not json", b'{"type":"\xff"}', b'{"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}"])
async def test_events_may_come_in_pieces_and_nonsense_is_followed_by_a_new_list(line: bytes) -> None:
    """A line split over two chunks is one event; what is none costs a list, since something was missed."""
    async with ApiServer(slice_of("a", "10.0.0.1")) as server, following(server) as found:
        await asyncio.wait_for(server.watching.wait(), 30)
        server.send_raw(b'{"type":"DELETED","object":{"meta')
        server.send_raw(b'data":{"name":"a","resourceVersion":"11"}}}\n')
        await eventually(lambda: found.addresses == [])
        server.send_raw(line + b"\n")
        await eventually(lambda: found.addresses == ["10.0.0.1"])
        assert len(server.lists) == 2


async def test_failures_are_retried_with_growing_pauses_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The log says what to allow, and again when it works; the endpoints stay meanwhile."""
    caplog.set_level(logging.INFO, "cairn.discovery")
    async with ApiServer(slice_of("a", "10.0.0.1")) as server:
        server.statuses = [403, 403, 403, None, 503, 503]
        async with following(server) as found:
            await asyncio.wait_for(server.watching.wait(), 30)
            await eventually(lambda: len(caplog.records) == 3)
        assert found.pauses == [0.5, 1.0, 2.0, 4.0, 8.0]
    messages = [record.message for record in caplog.records]
    assert len(messages) == 3
    assert (
        "allow the service account to list and watch endpointslices (discovery.k8s.io) in the namespace models"
        in (messages[0])
    )
    assert messages[1].endswith("the API server answers 503")
    assert messages[2] == "following the Service vllm.models again"


async def test_the_token_is_read_for_each_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kubernetes replaces it within the hour. A missing or broken file is said, without its content."""
    token = tmp_path / "token"
    token.write_text("first\n")
    async with ApiServer(slice_of("a", "10.0.0.1")) as server, following(server, token_file=token) as found:
        await asyncio.wait_for(server.watching.wait(), 30)
        token.write_text("second")
        server.end()
        await eventually(lambda: len(server.watches) == 2)
        assert [asked.token for asked in server.asked] == ["bearer first", "bearer first", "bearer second"]
        token.write_text("not a\ntoken")
        server.end()
        await eventually(lambda: "does not contain a token" in caplog.text)
        token.unlink()
        await eventually(lambda: f"cannot read {token}" in caplog.text)
        assert "not a" not in caplog.text.replace("not a token", "")
        assert found.addresses == ["10.0.0.1"]


async def test_a_redirect_is_an_error_and_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    """The token goes to the configured host only."""
    async with ApiServer(slice_of("a", "10.6.6.6")) as other, ApiServer(slice_of("a", "10.0.0.1")) as server:
        server.statuses, server.location = [307], f"{other.url}/apis"
        async with following(server) as found:
            await eventually(lambda: found.addresses == ["10.0.0.1"])
        assert other.asked == []
        assert "the API server answers 307" in caplog.text


async def test_the_api_server_must_have_a_certificate_of_the_ca_file(tmp_path: Path) -> None:
    """Another authority is refused; a new one is read from its file at the next try."""
    trusted, wrong = trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trusted.issue_cert("localhost").configure_cert(context)
    ca_file = tmp_path / "ca.crt"
    wrong.cert_pem.write_to_path(str(ca_file))
    server = ApiServer(slice_of("a", "10.0.0.1"), context=context)
    async with server, following(server, ca_file=ca_file) as found:
        await eventually(lambda: len(found.pauses) >= 2)
        assert server.asked == []
        assert found.reports == []
        trusted.cert_pem.write_to_path(str(ca_file))
        await eventually(lambda: found.addresses == ["10.0.0.1"])


class Bench:
    """Discovery on a server."""

    def __init__(self, server: ApiServer, config: Config) -> None:
        self.loops = Tasks()
        self.client = UpstreamClient(LIST_LIMITS, SystemClock())
        api = KubernetesApi(self.client, Origin.parse(server.url), None)
        self.fleet = Fleet(Random(1).random)
        endpoints = KubernetesEndpoints(api, self.loops, Random(1).random)
        self.discovery = Discovery(config, self.fleet, PrefixIndex(), FakeClock(), endpoints=endpoints)

    async def __aenter__(self) -> Bench:
        await self.discovery.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.loops.close()
        await self.discovery.close()

    def views(self) -> dict[str, Any]:
        """The replicas in force by name."""
        return {view.name: view for view in self.fleet.snapshot("engines", 0.0)}


def config(*urls: str, zone: str | None = None) -> Config:
    """A pool that follows these URLs."""
    pool = Pool(name="engines", replicas=tuple(Replica(url) for url in urls))
    return Config(pools=(pool,), kubernetes=Kubernetes(zone=zone))


async def test_the_endpoints_of_a_service_are_the_replicas_of_its_pool() -> None:
    """At the start, after each change, and none if there are none: an empty Service is true."""
    url = "kubernetes+http://vllm.models:http/v1"
    async with ApiServer(slice_of("a", "10.0.0.1", "10.0.0.2")) as server, Bench(server, config(url)) as bench:
        assert sorted(bench.views()) == ["10.0.0.1:8000", "10.0.0.2:8000"]
        server.send("MODIFIED", slice_of("a", "10.0.0.2", "fd00::3", version="11"))
        await eventually(lambda: "[fd00::3]:8000" in bench.views())
        assert "10.0.0.1:8000" not in bench.views()
        server.send("DELETED", slice_of("a", version="12"))
        await eventually(lambda: bench.views() == {})


async def test_a_reload_follows_other_services() -> None:
    """The watch of one that is gone ends, and its replicas with it."""
    url = "kubernetes+http://vllm.models:http"
    async with ApiServer(slice_of("a", "10.0.0.1")) as server, Bench(server, config(url)) as bench:
        bench.discovery.adopt(config("kubernetes+http://sglang.models:8000", "http://10.0.0.7:8000"))
        await eventually(lambda: len(bench.loops) == 1)
        await eventually(lambda: sorted(bench.views()) == ["10.0.0.1:8000", "10.0.0.7:8000"])
        assert server.lists[-1].query["labelSelector"] == "kubernetes.io/service-name=sglang"


async def test_a_reload_to_another_service_is_never_without_replicas() -> None:
    """Its endpoints are known before those of the other are removed."""
    url = "kubernetes+http://vllm.models:http"
    async with ApiServer(slice_of("a", "10.0.0.1")) as server, Bench(server, config(url)) as bench:
        following = config("kubernetes+http://sglang.models:8000")
        found = await bench.discovery.look_ahead(following)
        assert sorted(bench.views()) == ["10.0.0.1:8000"]
        assert len(bench.loops) == 2
        bench.discovery.adopt(following, found)
        assert sorted(bench.views()) == ["10.0.0.1:8000"]
        await eventually(lambda: len(bench.loops) == 1)


async def test_a_replica_of_another_zone_is_far() -> None:
    """One whose zone is unknown is not, and none is if Cairn's own is unknown."""
    slices = [
        slice_of("a", "10.0.0.1", zone="eu-1"),
        slice_of("b", "10.0.0.2", zone="eu-2"),
        slice_of("c", "10.0.0.3"),
    ]
    url = "kubernetes+http://vllm.models:http"
    async with ApiServer(*slices) as server, Bench(server, config(url, zone="eu-1")) as bench:
        assert [view.is_far for _, view in sorted(bench.views().items())] == [False, True, False]
    async with ApiServer(*slices) as server, Bench(server, config(url)) as bench:
        assert not any(view.is_far for view in bench.views().values())


class Answering:
    """A client that keeps what it is asked and answers with status 200."""

    def __init__(self) -> None:
        self.targets: list[bytes] = []
        self.headers: dict[bytes, bytes] = {}
        self.status = 200

    async def request(self, origin: Origin, method: bytes, target: bytes, headers: Any, **more: Any) -> Answering:
        self.targets.append(target)
        self.headers = dict(headers)
        return self


async def test_outside_a_cluster_the_operator_is_told_which_key_to_set() -> None:
    with pytest.raises(ApiError, match=r"kubernetes\.api_url"):
        await KubernetesApi(Answering(), None, None).get(VLLM, "limit=1", LIST_LIMITS)  # type: ignore[arg-type]


async def test_a_service_without_a_namespace_is_looked_for_in_the_pods_own(tmp_path: Path) -> None:
    """JSON is asked for, since the API server knows other formats, and no token is sent where there is none."""
    file = tmp_path / "namespace"
    file.write_text("mine\n")
    client = Answering()
    api = KubernetesApi(client, Origin.parse("http://api"), None, namespace_file=file)  # type: ignore[arg-type]
    for _ in range(2):
        await api.get(Service("vllm", "", "http"), "limit=1", LIST_LIMITS)
        file.unlink(missing_ok=True)
    path = b"/apis/discovery.k8s.io/v1/namespaces/mine/endpointslices"
    assert [target.partition(b"?")[0] for target in client.targets] == [path] * 2
    assert client.headers == {b"accept": b"application/json"}


async def test_an_event_that_never_ends_is_not_kept_and_everything_is_listed_anew() -> None:
    """Empty lines are passed over."""
    async with ApiServer(slice_of("a", "10.0.0.1")) as server, following(server) as found:
        await asyncio.wait_for(server.watching.wait(), 30)
        server.send_raw(b"\n\n")
        server.send("ADDED", slice_of("b", "10.0.0.2", version="11"))
        await eventually(lambda: found.addresses == ["10.0.0.1", "10.0.0.2"])
        for _ in range(5):
            server.send_raw(b"x" * 1024 * 1024)
        await eventually(lambda: len(server.lists) == 2)


async def test_the_start_waits_no_longer_than_it_may_for_an_api_server_that_is_silent() -> None:
    tasks = Tasks()

    class Silent(Answering):
        async def request(self, *args: Any, **more: Any) -> Answering:
            await asyncio.Event().wait()
            return self

    api = KubernetesApi(Silent(), Origin.parse("http://api"), None)  # type: ignore[arg-type]
    endpoints = KubernetesEndpoints(api, tasks, lambda: 0.5)
    endpoints.follow({VLLM}, lambda service, found: None)
    await endpoints.listed(0.01)
    await tasks.close()
