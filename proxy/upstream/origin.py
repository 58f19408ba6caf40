"""Where an upstream is and what is allowed to last how long there. Pure: no sockets."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec

_DEFAULT_PORTS = {"http": 80, "https": 443}
_VERSION_SEGMENT = re.compile(r"v\d+\w*")
_PATH = re.compile(r"[!-~]*")


class Limits(msgspec.Struct, frozen=True):
    """Bounds of one exchange and of the pool of each origin; times in seconds."""

    connect_seconds: float = 5.0  # name, TCP and TLS together; a replica in reach answers in milliseconds
    first_byte_seconds: float = 600.0  # a plain answer comes only after its last token
    idle_seconds: float = 300.0  # between two pieces of a body
    pool_wait_seconds: float = 10.0
    max_connections: int = 1024  # per origin: above what one engine serves at once, below the usual file limit
    max_waiting: int = 4096  # requests in line for a connection, per origin
    max_idle: int = 256
    idle_expiry_seconds: float = 4.0  # uvicorn, which vLLM and SGLang stand on, closes after 5
    max_head_bytes: int = 65_536  # of an answer, interim answers, trailers and chunk extensions included
    buffer_bytes: int = 131_072  # unread body above which reading stops; the loop's last read may come on top


class Origin(msgspec.Struct, frozen=True, cache_hash=True):
    """Scheme, host and port of an upstream, and where its API starts.

    `api_path` takes the place of a leading `/v1` in a target; any other target is put behind `root_path`.
    """

    scheme: str
    host: str
    port: int
    root_path: bytes = b""
    api_path: bytes = b"/v1"

    @classmethod
    def parse(cls, url: str) -> Origin:
        """An origin from a base URL, which may end in `/v1` or not.

        A path with a version in it (`/openai/v1`, `/api/v3`, `/v1beta/openai`) is where the API starts; any other
        path is a prefix before `/v1`. Raises ValueError where the URL is not one of http or https, or carries
        credentials, a query or a fragment.
        """
        parts = urlsplit(url)
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
            raise ValueError("an upstream's URL is http://host[:port][/path] or https://host[:port][/path]")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("an upstream's URL has no credentials, query or fragment")
        if not (_PATH.fullmatch(parts.path) and _PATH.fullmatch(parts.hostname)):
            raise ValueError("an upstream's URL is ASCII without spaces")
        root_path, api_path = _split_path(parts.path)
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
        return cls(parts.scheme, parts.hostname, port, root_path.encode(), api_path.encode())

    @property
    def host_header(self) -> bytes:
        """The `host` header's value: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}").encode()

    def target(self, target: bytes) -> bytes:
        """A request target such as `/v1/models?x=1` as this upstream wants it."""
        if target.startswith(b"/v1") and target[3:4] in (b"", b"/", b"?"):
            return self.api_path + target[3:]
        return self.root_path + target

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_header.decode()}"


def _split_path(path: str) -> tuple[str, str]:
    """What precedes the API's version, and where the API starts."""
    segments = [segment for segment in path.split("/") if segment]
    for position, segment in enumerate(segments):
        if _VERSION_SEGMENT.fullmatch(segment):
            return _joined(segments[:position]), _joined(segments)
    return _joined(segments), _joined([*segments, "v1"])


def _joined(segments: list[str]) -> str:
    return "".join(f"/{segment}" for segment in segments)
