"""Follow the EndpointSlices of Services through the Kubernetes API: list once, then watch.

After a watch ends, the next one continues from the last version seen, so that nothing is listed twice; if the API
server no longer knows that version, everything is listed anew. Failures are retried with growing pauses, and until
then the last endpoints stay: a failing API does not mean failing engines.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Set
from pathlib import Path
from typing import Final, NamedTuple, Protocol
from urllib.parse import quote

import msgspec

from proxy.backoff import ExponentialBackoff
from proxy.errors import UpstreamError
from proxy.fleet.endpoint_slices import GONE, Endpoint, Slice, SliceList, SliceTable, WatchError
from proxy.fleet.http_client import HttpClient
from proxy.tasks import Tasks
from proxy.upstream import Limits, Origin, UpstreamResponse
from proxy.wire.schemas import DECODE_ERRORS

log = logging.getLogger("cairn.discovery")

WATCH_SECONDS: Final = 240
"""Length of one watch, after which the API server ends it. The next one continues from there."""

LIST_LIMITS: Final = Limits(connect_seconds=5, first_byte_seconds=15, idle_seconds=15)
WATCH_LIMITS: Final = Limits(connect_seconds=5, first_byte_seconds=15, idle_seconds=WATCH_SECONDS + 30)

RETRY_FIRST_SECONDS: Final = 0.5
RETRY_MOST_SECONDS: Final = 30.0
STEADY_SECONDS: Final = 5.0  # a watch that ended sooner counts as a failure: the next pause is longer
_PAGE_SLICES: Final = 500
_LIST_AT_MOST_BYTES: Final = 32 * 1024 * 1024
_LINE_AT_MOST_BYTES: Final = 4 * 1024 * 1024  # a slice has at most 1,000 endpoints, about 1 MB
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TOKEN: Final = re.compile(rb"[!-~]+")
_DENIED: Final = (401, 403)


class Service(NamedTuple):
    """A Service to follow: `name` is `*` for all Services with the labels of `selector`."""

    name: str
    namespace: str
    port: str
    selector: str = ""


class ApiError(Exception):
    """The API server answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client(HttpClient, Protocol):
    """Sends requests on connections that can be closed: `proxy.upstream.UpstreamClient`."""

    async def close(self) -> None:
        """Close every connection."""
        ...


class KubernetesApi:
    """Asks the API server for EndpointSlices; the token is read from its file for each request."""

    def __init__(
        self,
        client: Client,
        origin: Origin | None,
        token_file: Path | None,
        namespace: str = "",
        namespace_file: Path = _NAMESPACE_FILE,
    ) -> None:
        self._client = client
        self._origin = origin
        self._token_file = token_file
        self._namespace = namespace
        self._namespace_file = namespace_file

    async def get(self, service: Service, query: str, limits: Limits) -> UpstreamResponse:
        """Return a response with status 200. Raises ApiError (another status), UpstreamError and OSError (a file)."""
        if self._origin is None:
            raise ApiError(0, "kubernetes.api_url is not set, and Cairn does not run in a pod")
        namespace = service.namespace or await self._own_namespace()
        labels = [] if service.name == "*" else [f"kubernetes.io/service-name={service.name}"]
        labels += [service.selector] if service.selector else []
        path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        target = f"{path}?labelSelector={quote(','.join(labels), safe='')}&{query}"
        headers = [(b"accept", b"application/json"), *await self._credential()]
        response = await self._client.request(
            self._origin, b"GET", target.encode(), headers, limits=limits, repeatable=True
        )
        if response.status != 200:
            response.abort()
            raise ApiError(response.status, _explained(response.status, namespace))
        return response

    async def _own_namespace(self) -> str:
        if not self._namespace:
            self._namespace = (await asyncio.to_thread(self._namespace_file.read_text)).strip()
        return self._namespace

    async def _credential(self) -> list[tuple[bytes, bytes]]:
        if self._token_file is None:
            return []
        token = (await asyncio.to_thread(self._token_file.read_bytes)).strip()
        if not _TOKEN.fullmatch(token):
            raise ApiError(0, f"{self._token_file} does not contain a token")
        return [(b"authorization", b"Bearer " + token)]

    async def close(self) -> None:
        """Close every connection."""
        await self._client.close()


class ServiceWatch:
    """Follows one Service. `changed` is called with its ready endpoints after the list and after each change."""

    def __init__(
        self,
        api: KubernetesApi,
        service: Service,
        changed: Callable[[tuple[Endpoint, ...]], None],
        random: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._api = api
        self._service = service
        self._changed = changed
        self._random = random
        self._sleep = sleep
        self._table = SliceTable()
        self._told: tuple[Endpoint, ...] | None = None
        self._trouble = ""
        self.listed = asyncio.Event()  # the endpoints are known

    async def run(self) -> None:
        """Follow it until cancelled."""
        loop = asyncio.get_running_loop()
        backoff = ExponentialBackoff(RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS)
        while True:
            began_seconds = loop.time()
            trouble = await self._follow()
            was_steady = loop.time() - began_seconds >= STEADY_SECONDS
            if was_steady:
                backoff.reset()
            if trouble is not None:
                self._note(trouble)
            elif was_steady:
                continue
            await self._sleep(backoff.next_seconds(self._random()))

    async def _follow(self) -> str | None:
        """List if nothing is known yet, and watch until the watch ends. Return what went wrong, if anything did."""
        try:
            if not self._table.version:
                await self._list()
            await self._watch()
        except WatchError as error:
            self._table.version = ""
            return None if error.is_expired else f"the watch failed: {error}"
        except ApiError as error:
            if error.status == GONE:
                self._table.version = ""
                return None
            return str(error)
        except DECODE_ERRORS as error:
            self._table.version = ""  # a new list contains what was missed
            return f"cannot read what the API server sent: {error}"
        except UpstreamError as error:
            return error.message
        except OSError as error:
            return f"cannot read {error.filename}: {error.strerror or type(error).__name__}"
        return None

    async def _list(self) -> None:
        slices: list[Slice] = []
        page = ""
        while True:
            query = f"limit={_PAGE_SLICES}" + (f"&continue={quote(page, safe='')}" if page else "")
            response = await self._api.get(self._service, query, LIST_LIMITS)
            found = msgspec.json.decode(await response.read(_LIST_AT_MOST_BYTES), type=SliceList)
            slices += found.items or ()
            page = found.next_page
            if not page:
                break
        self._table.replace(slices, found.version)
        self._tell()

    async def _watch(self) -> None:
        """Apply the events of one watch until the API server ends it."""
        version = quote(self._table.version, safe="")
        query = f"watch=true&allowWatchBookmarks=true&timeoutSeconds={WATCH_SECONDS}&resourceVersion={version}"
        response = await self._api.get(self._service, query, WATCH_LIMITS)
        self._recovered()
        try:
            rest = b""
            while piece := await response.next_chunk():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line:
                        self._table.apply(line)
                if lines:
                    self._tell()
                if len(rest) > _LINE_AT_MOST_BYTES:
                    raise msgspec.DecodeError(f"an event has more than {_LINE_AT_MOST_BYTES} bytes")
        finally:
            response.abort()

    def _tell(self) -> None:
        endpoints = self._table.endpoints(self._service.port)
        if endpoints != self._told:
            self._told = endpoints
            self._changed(endpoints)
        self.listed.set()

    def _note(self, trouble: str) -> None:
        """Log a problem, and again only when it changes."""
        if trouble != self._trouble:
            self._trouble = trouble
            log.warning("cannot follow the Service %s: %s", _shown(self._service), trouble)

    def _recovered(self) -> None:
        if self._trouble:
            self._trouble = ""
            log.info("following the Service %s again", _shown(self._service))


class KubernetesEndpoints:
    """Follows all Services that the configuration names. One per worker."""

    def __init__(self, api: KubernetesApi, loops: Tasks, random: Callable[[], float]) -> None:
        self._api = api
        self._loops = loops
        self._random = random
        self._watches: dict[Service, tuple[ServiceWatch, asyncio.Task[None]]] = {}

    def follow(self, services: Set[Service], found: Callable[[Service, tuple[Endpoint, ...]], None]) -> None:
        """Follow `services` and no others; `found` is called with the endpoints of one whenever they changed."""
        for service in self._watches.keys() - services:
            _, task = self._watches.pop(service)
            task.cancel()
        for service in services - self._watches.keys():
            watch = ServiceWatch(self._api, service, _bound(found, service), self._random)
            self._watches[service] = watch, self._loops.keep(watch.run, "endpoint watch")

    async def close(self) -> None:
        """Close every connection; the watches have been cancelled before."""
        await self._api.close()

    async def listed(self, within_seconds: float) -> None:
        """Return when the endpoints of all Services are known, or after `within_seconds`."""
        try:
            async with asyncio.timeout(within_seconds):
                for watch, _ in tuple(self._watches.values()):
                    await watch.listed.wait()
        except TimeoutError:
            return


def _bound(
    found: Callable[[Service, tuple[Endpoint, ...]], None], service: Service
) -> Callable[[tuple[Endpoint, ...]], None]:
    return lambda endpoints: found(service, endpoints)


def _shown(service: Service) -> str:
    name = f"{service.name}.{service.namespace}" if service.namespace else service.name
    return f"{name} ({service.selector})" if service.selector else name


def _explained(status: int, namespace: str) -> str:
    if status in _DENIED:
        return (
            f"the API server answers {status}: allow the service account to list and watch endpointslices "
            f"(discovery.k8s.io) in the namespace {namespace}"
        )
    return f"the API server answers {status}"
