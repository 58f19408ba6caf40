"""Parse the URLs that name a Redis. Pure.

`redis://[user:password@]host[:port][/db]`, `rediss://` for TLS, `unix:///path?db=0`,
`redis+sentinel://host[:port][,host[:port]...]/master[/db]`, `redis+cluster://host[:port][,host[:port]...]`, the last
two also as `rediss+...`. Options after a `?` are passed to the client (`ssl_ca_certs`, ...). Sentinels that have a
password need `sentinel_username` and `sentinel_password`.
"""

from __future__ import annotations

import enum
import re
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

import msgspec

from cache.errors import StoreUrlError

PORT = 6379
SENTINEL_PORT = 26379
_HOST = re.compile(r"[\w.-]+")


class Topology(enum.StrEnum):
    """Kind of server that the URL names: one server, Sentinels that name the master, or a Cluster."""

    SINGLE = "single"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class StoreUrl(msgspec.Struct, frozen=True):
    """A parsed URL. `node_url` is one node's URL in the form that redis-py expects, with credentials and options."""

    topology: Topology
    node_url: str
    nodes: tuple[tuple[str, int], ...] = ()
    master: str = ""
    sentinel_options: dict[str, str] = {}

    @property
    def shown(self) -> str:
        """The URL without credentials and options, for logs."""
        parts = urlsplit(self.node_url)
        if self.topology is Topology.SINGLE:
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        return f"{self.topology} of " + ",".join(f"{host}:{port}" for host, port in self.nodes)


def parse(url: str) -> StoreUrl:
    """Parse a URL. Raises StoreUrlError, whose message never repeats the URL: it may hold a password."""
    try:
        parts = _split(url)
        scheme, _, topology = parts.scheme.partition("+")
        if scheme == "unix" and not topology:
            return _unix(url, parts)
        if scheme not in ("redis", "rediss") or topology not in ("", "sentinel", "cluster"):
            raise StoreUrlError(
                "the URL of Redis must begin with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
            )
        if not topology:
            return _single(url, parts)
        return _many(scheme, Topology(topology), parts)
    except ValueError:  # its text repeats what stands where the port should be: perhaps a part of the password
        raise StoreUrlError(
            "the URL of Redis cannot be read: check host and port, and write / ? # @ in a password as %2F %3F %23 %40"
        ) from None


def _split(url: str) -> SplitResult:
    """Split a URL that may list several hosts, which `urlsplit` refuses if one is an IPv6 address."""
    scheme, mark, rest = url.partition("://")
    if "+" not in scheme:
        return urlsplit(url)
    hosts = re.match("[^/?#]*", rest)
    netloc = hosts.group() if hosts else ""
    return urlsplit(f"{scheme}{mark}{rest[len(netloc) :]}")._replace(netloc=netloc)


def _unix(url: str, parts: SplitResult) -> StoreUrl:
    if not parts.path:
        raise StoreUrlError("the URL of Redis needs a path after unix://")
    return StoreUrl(Topology.SINGLE, url)


def _single(url: str, parts: SplitResult) -> StoreUrl:
    if not parts.hostname:
        raise StoreUrlError("the URL of Redis names no host")
    if "," in parts.netloc.rpartition("@")[2]:
        raise StoreUrlError("the URL of Redis names several hosts; use redis+sentinel:// or redis+cluster://")
    _check_host(parts.hostname)
    _check_database(parts.path.strip("/"))
    return StoreUrl(Topology.SINGLE, url, ((parts.hostname, parts.port or PORT),))


def _many(scheme: str, topology: Topology, parts: SplitResult) -> StoreUrl:
    credentials, at, hosts = parts.netloc.rpartition("@")
    sentinel = topology is Topology.SENTINEL
    nodes = tuple(_node(text, SENTINEL_PORT if sentinel else PORT) for text in hosts.split(","))
    path = [piece for piece in parts.path.split("/") if piece]
    if sentinel and len(path) not in (1, 2):
        raise StoreUrlError("the URL of Redis names no master: redis+sentinel://host:port/master[/db]")
    if not sentinel and path and path != ["0"]:
        raise StoreUrlError("the URL of Redis names a database, which a Cluster does not have")
    database = path[1] if len(path) > 1 else "0"
    _check_database(database)
    options = dict(parse_qsl(parts.query))
    own = {key.removeprefix("sentinel_"): options.pop(key) for key in tuple(options) if key.startswith("sentinel_")}
    host, port = nodes[0]
    bracketed = f"[{host}]" if ":" in host else host
    node_url = f"{scheme}://{credentials}{at}{bracketed}:{port}/{database}"
    if options:
        node_url += "?" + urlencode(options)
    return StoreUrl(topology, node_url, nodes, path[0] if sentinel else "", own)


def _node(text: str, default_port: int) -> tuple[str, int]:
    node = urlsplit(f"//{text}")
    if not node.hostname:
        raise StoreUrlError("the URL of Redis names an empty host")
    _check_host(node.hostname)
    return node.hostname, node.port or default_port


def _check_host(host: str) -> None:
    if ":" not in host and not _HOST.fullmatch(host):  # the host of an example, such as <host>
        raise StoreUrlError("the host in the URL of Redis is neither a name nor an address")


def _check_database(text: str) -> None:
    if text and not text.isdecimal():
        raise StoreUrlError("the database in the URL of Redis is not a number")
