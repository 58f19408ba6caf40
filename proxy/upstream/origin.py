"""The address of an upstream, and the limits of an exchange with it. Pure: no sockets."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec

_DEFAULT_PORTS = {"http": 80, "https": 443}
_VERSION_SEGMENT = re.compile(r"v\d+\w*")
_PATH = re.compile(r"[!-~]*")


class Limits(msgspec.Struct, frozen=True):
    """Bounds of one exchange and of the pool of each origin; times in seconds."""

    connect_seconds: float = 5.0  # name, TCP and TLS together; a reachable replica answers in milliseconds
    first_byte_seconds: float = 600.0  # a plain response comes only after its last token
    idle_seconds: float = 300.0  # between two pieces of a body
    pool_wait_seconds: float = 10.0
    max_connections: int = 1024  # per origin: above what one engine serves at once, below the usual file limit
    max_waiting: int = 4096  # requests that wait for a connection, per origin
    max_idle: int = 256
    idle_expiry_seconds: float = 4.0  # uvicorn, the server of vLLM and SGLang, closes after 5
    max_head_bytes: int = 65_536  # of a response, with interim responses, trailers and chunk extensions
    buffer_bytes: int = 131_072  # unread body above which reading pauses; one more read of the loop may be added


class Origin(msgspec.Struct, frozen=True, cache_hash=True):
    """Scheme, host and port of an upstream, and the path at which its API starts.

    `api_path` replaces a leading `/v1` of a target; any other target is appended to `root_path`.
    """

    scheme: str
    host: str
    port: int
    root_path: bytes = b""
    api_path: bytes = b"/v1"

    @classmethod
    def parse(cls, url: str) -> Origin:
        """Parse a base URL, with or without `/v1` at its end.

        A path with a version segment (`/openai/v1`, `/api/v3`, `/v1beta/openai`) is where the API starts; any other
        path is a prefix before `/v1`. Raises ValueError if the scheme is neither http nor https, or if the URL has
        credentials, a query or a fragment.
        """
        parts = urlsplit(url)
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
            raise ValueError("an upstream's URL must be http://host[:port][/path] or https://host[:port][/path]")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("an upstream's URL must have no credentials, query or fragment")
        if not (_PATH.fullmatch(parts.path) and _PATH.fullmatch(parts.hostname)):
            raise ValueError("an upstream's URL must be ASCII without spaces")
        root_path, api_path = _split_path(parts.path)
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
        return cls(parts.scheme, parts.hostname, port, root_path.encode(), api_path.encode())

    @property
    def host_header(self) -> bytes:
        """Value of the `host` header, without the scheme's default port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}").encode()

    def target(self, target: bytes) -> bytes:
        """Map a request target such as `/v1/models?x=1` to this upstream's."""
        if target.startswith(b"/v1") and target[3:4] in (b"", b"/", b"?"):
            return self.api_path + target[3:]
        return self.root_path + target

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_header.decode()}"


def _split_path(path: str) -> tuple[str, str]:
    """Return the prefix before the API's version, and the path at which the API starts."""
    segments = [segment for segment in path.split("/") if segment]
    for position, segment in enumerate(segments):
        if _VERSION_SEGMENT.fullmatch(segment):
            return _joined(segments[:position]), _joined(segments)
    return _joined(segments), _joined([*segments, "v1"])


def _joined(segments: list[str]) -> str:
    return "".join(f"/{segment}" for segment in segments)
