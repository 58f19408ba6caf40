"""The wheel of plain Python, as pip takes it where no wheel for the platform exists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of plain Python, built from the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    environ = {**os.environ, "CAIRN_COMPILE": "never"}  # noqa: TID251 - passed on to a command
    subprocess.run([*command, str(ROOT)], check=True, env=environ)
    return next(folder.glob("*.whl"))
