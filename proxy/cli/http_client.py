"""A small HTTP client for the commands that talk to a running Cairn."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

SEND_BYTES = 256 * 1024  # passed to the socket at once, so that progress can be shown
RESPONSE_BYTES_AT_MOST = 64 * 1024 * 1024


class BadUrl(Exception):
    """The URL is not one that Cairn can have: not http or https, or malformed."""


class BadKey(Exception):
    """The key cannot be sent in a header: it contains a control character, such as a line end."""


class NoAnswer(Exception):
    """Nothing answers at the URL; the message says why."""


class TokenNeeded(NoAnswer):
    """The admin port refuses the request for want of its token."""


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    body: bytes


class HttpClient:
    """Sends requests to one base URL. `headers` are sent with each of them.

    `ca_file` has certificate authorities to trust beside the system's.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str], timeout_seconds: float, ca_file: str | None = None
    ) -> None:
        """Split the URL. Raises BadUrl, and BadKey if a header cannot be sent."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._port = parts.port
            (parts.hostname or "").encode("idna")
        except ValueError:  # includes the UnicodeError for a label of a host name that is empty or too long
            raise BadUrl(url) from None
        if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
            raise BadUrl(url)
        if not all(value.isprintable() for value in headers.values()):
            raise BadKey
        self._is_secure = parts.scheme == "https"
        self._host = parts.hostname
        self._headers = {name: value.encode() for name, value in headers.items()}
        self._timeout_seconds = timeout_seconds
        self._ca_file = ca_file
        self.path = parts.path.rstrip("/")

    def request(
        self, method: str, target: str, body: bytes = b"", on_sent: Callable[[int], object] = lambda _: None
    ) -> Answer:
        """Send a request and return the response; `on_sent` is called with the bytes sent each time.

        Raises:
            NoAnswer: nothing answers, or not in HTTP.
        """
        try:
            connection = self._connection()
        except OSError:
            raise NoAnswer(f"the certificate authorities in {self._ca_file} cannot be read") from None
        try:
            self._send(connection, method, target, body, on_sent)
            response = connection.getresponse()
            return Answer(response.status, response.read(RESPONSE_BYTES_AT_MOST))
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(_in_words(error)) from None
        finally:
            connection.close()

    def events(self, target: str) -> Iterator[tuple[str, bytes]]:
        """Yield the events of a stream, as (event, data), until it ends.

        Raises:
            NoAnswer: nothing answers, the status is not 200, or the stream is broken off.
        """
        connection = self._connection()
        try:
            self._send(connection, "GET", target, b"", lambda _: None)
            response = connection.getresponse()
            if response.status == 401:
                raise TokenNeeded
            if response.status != 200:
                raise NoAnswer(f"status {response.status}")
            name = ""
            while line := response.readline():
                field, _, value = line.rstrip(b"\n").partition(b": ")
                if field == b"event":
                    name = value.decode(errors="replace")
                elif field == b"data":
                    yield name, value
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(_in_words(error)) from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._is_secure:
            context = ssl.create_default_context()
            if self._ca_file is not None:
                context.load_verify_locations(self._ca_file)
            return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_seconds, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_seconds)

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        body: bytes,
        on_sent: Callable[[int], object],
    ) -> None:
        connection.putrequest(method, self.path + target)
        for name, value in self._headers.items():
            connection.putheader(name, value)
        connection.putheader("content-length", str(len(body)))
        connection.endheaders()
        try:
            for start in range(0, len(body), SEND_BYTES):
                piece = body[start : start + SEND_BYTES]
                connection.send(piece)
                on_sent(len(piece))
        except ConnectionError:
            pass  # the request was refused before it was all sent; the response gives the reason


def _in_words(error: OSError | http.client.HTTPException) -> str:
    """Return why a request got no response."""
    if isinstance(error, socket.gaierror):
        return "its host name does not resolve"
    if isinstance(error, ssl.SSLCertVerificationError):  # see upstream.ca_file for those of an own authority
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return "the TLS handshake failed; does it speak http rather than https?"
    if isinstance(error, TimeoutError):
        return "no response came in time"
    if isinstance(error, http.client.RemoteDisconnected | ConnectionResetError | http.client.IncompleteRead):
        return "it closed the connection"
    if isinstance(error, http.client.HTTPException):
        return "its response is not HTTP"
    return (error.strerror or type(error).__name__).lower()
