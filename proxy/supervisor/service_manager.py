"""Report this process's state to the service manager that started it, by systemd's protocol sd_notify."""

from __future__ import annotations

import logging
import socket

READY = "READY=1"

log = logging.getLogger("cairn.supervisor")


def notify(address: str | None, state: str) -> None:
    """Send `state` to the datagram socket that NOTIFY_SOCKET names; do nothing if there is none.

    An address that begins with `@` is in the abstract namespace. A failure is logged: Cairn serves all the same, and
    systemd ends a service that does not become ready in time.
    """
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.setblocking(False)
            manager.sendto(state.encode(), name)
    except OSError as error:
        log.warning("cannot notify the service manager: %s", error)
