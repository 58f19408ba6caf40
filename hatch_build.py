"""Puts the compiled data path into the wheel, where this machine can compile; else the wheel is plain Python.

An editable install stays plain: what is edited is what runs.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import rmtree, which
from tempfile import mkdtemp
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileHook(BuildHookInterface[Any]):
    """See the module."""

    _folder: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name what came of it and where in the wheel it belongs."""
        if version != "standard" or not self._can_compile():
            return
        folder = self._folder = Path(mkdtemp(prefix="cairn-compile-"))
        command = [sys.executable, "scripts/compile.py", str(folder)]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            rmtree(folder)
            raise RuntimeError(f"compiling the data path failed:\n{done.stdout}\n{done.stderr}")
        for line in done.stderr.splitlines():
            if line.startswith("compiled without"):
                self.app.display_warning(line)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        libraries = [path for path in folder.rglob(f"*{suffix}") if not path.is_relative_to(folder / "o")]
        build_data["force_include"].update({str(path): str(path.relative_to(folder)) for path in libraries})
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """The wheel is written: what it was made of may go."""
        if self._folder is not None:
            rmtree(self._folder)

    def _can_compile(self) -> bool:
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
        headers = Path(sysconfig.get_path("include"), "Python.h")
        missing = [
            what for what, there in ((compiler, which(compiler)), (str(headers), headers.exists())) if not there
        ]
        if missing:
            self.app.display_warning(
                f"Cairn is not compiled, and costs up to two thirds more CPU: no {' and no '.join(missing)}"
            )
        return not missing
