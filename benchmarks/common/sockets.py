"""The TCP sockets of a process, from /proc (Linux only)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import cpu

LISTENING = 10  # TCP_LISTEN of the kernel's include/net/tcp_states.h


@dataclass(frozen=True, slots=True)
class Socket:
    """One end of a connection, or a listening socket."""

    local_port: int
    remote_port: int
    state: int


def parse_table(text: str) -> dict[str, Socket]:
    """Return the sockets of /proc/net/tcp by inode."""
    found = {}
    for line in text.splitlines()[1:]:
        fields = line.split()
        local, remote, state, inode = fields[1], fields[2], fields[3], fields[9]
        local_port, remote_port = (int(address.rpartition(":")[2], 16) for address in (local, remote))
        found[inode] = Socket(local_port, remote_port, int(state, 16))
    return found


def tcp_sockets(pid: int) -> list[Socket]:
    """Return all TCP sockets that a process has open."""
    table = {}
    for name in ("tcp", "tcp6"):
        path = Path(f"/proc/{pid}/net/{name}")
        if path.exists():
            table.update(parse_table(path.read_text()))
    inodes = (link[8:-1] for link in (cpu.descriptors(pid) or {}).values() if link.startswith("socket:["))
    return [table[inode] for inode in inodes if inode in table]
