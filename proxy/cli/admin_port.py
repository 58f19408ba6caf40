"""Find the admin port of a running Cairn from the command line, the configuration and the defaults."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from proxy.cli import exit_codes as exits
from proxy.cli.http_client import BadKey, BadUrl, HttpClient

if TYPE_CHECKING:
    from proxy.config.schema import Config


TOKEN_NEEDED = "needs its token; set CAIRN_ADMIN_TOKEN, or give the configuration that names it with --config"  # noqa: S105 - a sentence


def admin_url(config: Config) -> str:
    """Return the URL of this configuration's admin port; one that listens on all addresses is reached on loopback."""
    host = config.admin.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{config.admin.port}"
    if address.is_unspecified:
        host = "127.0.0.1"
    return f"http://[{host}]:{config.admin.port}" if ":" in host else f"http://{host}:{config.admin.port}"


def admin_client(url: str, config: Config, timeout_seconds: float) -> HttpClient:
    """Return a client for the admin port at `url`, with the token of the configuration; exits if it is not a URL."""
    token = config.admin.token
    headers = {} if token is None else {"authorization": f"Bearer {token.reveal()}"}
    try:
        return HttpClient(url, headers, timeout_seconds)
    except BadUrl:
        exits.fail(f"{url} is not the address of an admin port, such as http://127.0.0.1:8090", code=exits.MISUSED)
    except BadKey:
        exits.fail("admin.token contains a character that cannot be sent in a header", code=exits.MISUSED)
