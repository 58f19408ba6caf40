"""Compiles the data path with mypyc: the modules that pyproject.toml lists under [tool.cairn.compile].

    python scripts/compile.py FOLDER        # leaves cache/index.<abi>.so and the like there; a minute on two cores

The sources are plain typed Python and run as they are where nothing is compiled. Needs a C compiler, Python's headers
and the build group; run from the repository's root, whose pyproject.toml configures mypy.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

from mypyc.build import mypycify
from setuptools import setup


def groups() -> list[tuple[list[str], str | None]]:
    """The modules of each library, with its name. Within one calls are C calls."""
    listed = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["cairn"]["compile"]
    return [(modules, f"cairn_{name}") for name, modules in listed.items()]


def main(folder: str) -> None:
    """Compile into `folder`; raises where mypy or the C compiler refuses."""
    separate = groups()
    modules = [module for members, _ in separate for module in members]
    extensions = mypycify(
        modules,
        opt_level="3",
        debug_level="0",
        separate=separate,
        target_dir=str(Path(folder, "c")),
    )
    build = ["build_ext", "--build-lib", folder, "--build-temp", str(Path(folder, "o"))]
    setup(
        name="cairn-compiled",
        packages=[],
        ext_modules=extensions,
        script_args=["--quiet", *build, "--parallel", str(os.cpu_count() or 1)],
    )


if __name__ == "__main__":
    main(sys.argv[1])
