"""Completion in a shell, as docs/installing.md describes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_a_shell_gets_the_commands_and_flags() -> None:
    """By click's own protocol, under the name `cairn`."""
    code = "import sys; sys.argv = ['cairn']; from proxy.cli.main import cli; cli(prog_name='cairn')"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"_CAIRN_COMPLETE": "bash_complete", "COMP_WORDS": "cairn serve --up", "COMP_CWORD": "2", "PATH": "/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert found.stdout.split() == ["plain,--upstream"], found.stderr
