"""CPU seconds, memory and descriptors of a process and its descendants, read from the system.

On Linux from /proc and the process's own CPU clock (nanoseconds, all threads, those that ended too); elsewhere from
`ps` (hundredths of a second). It does not depend on what the processes are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_LINUX = sys.platform.startswith("linux")
_CPUCLOCK_SCHED = 2  # clock_getcpuclockid(3) of glibc: user and system time of a whole thread group
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """One living process: `name` is the kernel's short one."""

    pid: int
    parent: int
    name: str


def _linux_processes() -> list[Process]:
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "stat").read_text()
        except OSError:
            continue  # it ended meanwhile
        name = text[text.index("(") + 1 : text.rindex(")")]
        state, parent = text[text.rindex(")") + 2 :].split()[:2]
        if state != "Z":
            found.append(Process(int(folder.name), int(parent), name))
    return found


def _other_processes() -> list[Process]:
    lines = subprocess.check_output(["ps", "-axo", "pid=,ppid=,comm="], text=True).splitlines()
    rows = [line.split(None, 2) for line in lines]
    return [Process(int(pid), int(parent), os.path.basename(name)) for pid, parent, name in rows]


def tree(root_pid: int) -> list[Process]:
    """Return the process and all its descendants, parents before children; empty if it has ended."""
    everyone = _linux_processes() if _LINUX else _other_processes()
    found = [process for process in everyone if process.pid == root_pid]
    for process in found:  # grows while it is walked
        found.extend(child for child in everyone if child.parent == process.pid)
    return found


def parse_ps_time(text: str) -> float:
    """Return the seconds of ps's TIME: [[days-]hours:]minutes:seconds[.hundredths]."""
    days, _, clock = text.strip().rpartition("-")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds + (int(days) * 86_400 if days else 0)


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds (user and system) of one process. Raises ProcessLookupError if it has ended."""
    if _LINUX:
        try:
            return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
        except OSError as error:
            raise ProcessLookupError(f"no process {pid}") from error
    text = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], text=True, capture_output=True, check=False).stdout
    if not text.strip():
        raise ProcessLookupError(f"no process {pid}")
    return parse_ps_time(text)


def resident_bytes(pid: int) -> int:
    """Return the resident memory of one process in bytes."""
    if _LINUX:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)], text=True)) * 1024


def descriptors(pid: int) -> dict[str, str] | None:
    """Return the open descriptors of a process and what each is ("socket:[123]", a path); None without /proc."""
    if not _LINUX:
        return None
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[entry.name] = os.readlink(entry)
        except OSError:
            continue  # closed meanwhile
    return found
