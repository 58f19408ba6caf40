"""Refuse requests that pages of other sites make a browser send, if no key keeps strangers out.

Without listed clients, whoever reaches the port may use it, and so may every page in a browser that reaches it. A
page can send a prompt to another site without asking first, as long as it sends no key with it (a "simple request" of
the Fetch standard). It reaches a port on loopback by a host name that it made to point there (DNS rebinding).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from proxy.config.checks import host_of, is_loopback
from proxy.errors import Forbidden

_HARMLESS_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})  # they cost nothing, and the page cannot read the response
_FROM_HERE = frozenset({b"none", b"same-origin"})
_CODE: Final = "cross_site_request"


class PageGuard:
    """Decides whether a page in a browser may have caused a request.

    Args:
        origins: the origins whose pages may send requests, or `*` for any.
        local_only: also refuse host names other than those of loopback. It is for replicas whose keys may be used
            without a client's key only because no other machine reaches the port.
    """

    def __init__(self, origins: Sequence[str] = (), *, local_only: bool = False) -> None:
        self._origins = frozenset(origin.rstrip("/").lower().encode() for origin in origins)
        self._allows_all = b"*" in self._origins
        self._local_only = local_only

    def check(self, method: str, headers: Iterable[tuple[bytes, bytes]], *, has_key: bool) -> None:
        """Raise Forbidden if another site's page may have sent the request.

        Args:
            method: of the request.
            headers: with names in lower case.
            has_key: the request has a key, any key. A browser sends one to another site only after it was allowed to.
        """
        is_harmless = has_key or self._allows_all or method in _HARMLESS_METHODS
        if is_harmless and not self._local_only:
            return
        host = origin = site = b""
        for name, value in headers:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
        if self._local_only and host and not is_loopback(host_of(host.decode("latin-1"))):
            raise Forbidden(
                "Without a list of clients, the replicas' keys can be used through localhost only. The operator "
                "can list clients, or allow every host name with server.open.",
                code=_CODE,
            )
        if is_harmless:
            return
        is_foreign = origin and origin.partition(b"://")[2].lower() != host.lower()
        if (is_foreign or (site and site not in _FROM_HERE)) and origin.lower() not in self._origins:
            raise Forbidden(
                "Pages of other sites may not send requests without a key. The operator can allow this page's origin "
                "in server.cors_origins.",
                code=_CODE,
            )
