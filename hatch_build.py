"""Build hook: adds the compiled data path to the wheel. The environment variable CAIRN_COMPILE says how.

| CAIRN_COMPILE | the wheel |
|---|---|
| auto (default) | compiled once if that is possible; otherwise plain Python, with one line that says why |
| once | compiled once; an error if that is not possible |
| profiled | compiled by the counts of a training run, for a release; an error if that is not possible |
| never | plain Python, for every platform |

An editable install is always plain Python: the sources that are edited are the ones that run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import rmtree, which
from tempfile import mkdtemp
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODES = ("auto", "once", "profiled", "never")


class CompileHook(BuildHookInterface[Any]):
    """Compile before the wheel is written, and remove what was compiled afterwards."""

    _folder: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile as CAIRN_COMPILE says and add the libraries to `build_data`.

        Raises:
            RuntimeError: CAIRN_COMPILE is not one of `MODES`, or compiling was demanded and failed.
        """
        mode = os.environ.get("CAIRN_COMPILE", "auto")  # noqa: TID251 - a build has no configuration file
        if mode not in MODES:
            raise RuntimeError(f"CAIRN_COMPILE is {mode!r}; it must be one of {', '.join(MODES)}")
        if version != "standard" or mode == "never":
            return
        problem = _missing_tool() or self._compile(mode)
        if problem and mode != "auto":
            raise RuntimeError(f"cannot compile the data path: {problem}")
        if problem:
            first_line = problem.partition("\n")[0]
            self.app.display_warning(
                f"Cairn is installed as plain Python, which takes up to 1.7 times the CPU a request: {first_line}"
            )
            return
        self._add_libraries(build_data)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove the build folder: the wheel is written."""
        if self._folder is not None:
            rmtree(self._folder)

    def _compile(self, mode: str) -> str | None:
        """Compile into a new folder; return the compiler's output if it fails and None if it succeeds."""
        folder = self._folder = Path(mkdtemp(prefix="cairn-compile-"))
        command = [sys.executable, "scripts/compile.py", str(folder)]
        command += ["--profiled"] if mode == "profiled" else []
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode == 0:
            return None
        output = f"{done.stdout}\n{done.stderr}".strip()
        reason = next((line for line in output.splitlines() if "error" in line.lower()), output[-200:])
        return f"the compiler failed: {reason}\n{output}"

    def _add_libraries(self, build_data: dict[str, Any]) -> None:
        assert self._folder is not None  # noqa: S101 - after a successful `_compile`
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        objects = self._folder / "o"
        libraries = [path for path in self._folder.rglob(f"*{suffix}") if not path.is_relative_to(objects)]
        build_data["force_include"].update({str(path): str(path.relative_to(self._folder)) for path in libraries})
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def _missing_tool() -> str | None:
    """Return which of the C compiler and Python's headers is missing, or None."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if which(compiler) is None:
        return f"there is no C compiler ({compiler}); on Debian and Ubuntu: apt install gcc python3-dev"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists():
        return f"Python's headers are missing ({headers}); on Debian and Ubuntu: apt install python3-dev"
    return None
