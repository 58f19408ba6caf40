"""Compiles the data path with mypyc: the modules that pyproject.toml lists under [tool.cairn.compile].

    python scripts/compile.py FOLDER        # leaves cache/index.<abi>.so and the like there; two minutes on two cores

The sources are plain typed Python and run as they are where nothing is compiled. Needs a C compiler, Python's headers
and the build group; run from the repository's root, whose pyproject.toml configures mypy.

With gcc it is done twice: first so that the code counts which way it goes while `benchmarks.path` drives it for some
seconds, then by what was counted, with what runs often close together. Python itself is built so. Where it cannot be
driven it is compiled once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from shutil import copytree, rmtree

from mypyc.build import mypycify
from setuptools import Extension, setup

TRAINING = ("--sizes", "1k,16k,64k,512k", "--chunks", "200", "--seconds", "1")  # whole runs of the data path
TRAINING_LIMIT_SECONDS = 120
COUNTED = ["-fprofile-generate", "-fprofile-update=prefer-atomic"]  # the log's thread counts, too
BY_COUNTS = ["-fprofile-use", "-fprofile-correction", "-fprofile-partial-training", "-Wno-missing-profile"]
NO_ERROR = "-Wno-error"  # mypyc makes errors of warnings, and these options have some of their own


def groups() -> list[tuple[list[str], str | None]]:
    """The modules of each library, with its name. Within one calls are C calls."""
    listed = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["cairn"]["compile"]
    return [(modules, f"cairn_{name}") for name, modules in listed.items()]


def main(folder: Path) -> None:
    """Compile into `folder`, which is absolute; raises where mypy or the C compiler refuses."""
    separate = groups()
    modules = [module for members, _ in separate for module in members]
    extensions = mypycify(
        modules,
        opt_level="3",
        debug_level="0",
        separate=separate,
        target_dir=str(folder / "c"),
    )
    by_counts = BY_COUNTS if compiler_is_gcc() and trained(extensions, folder) else []
    build(extensions, folder, folder, by_counts)


def trained(extensions: list[Extension], folder: Path) -> bool:
    """Leave beside each object file of `folder` what was counted in it; False where that cannot be."""
    place = folder / "counted"
    build(extensions, folder, place, COUNTED)
    for package in ("proxy", "cache"):
        copytree(package, place / package, dirs_exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.path", *TRAINING]
    paths = os.pathsep.join((str(place), os.getcwd()))  # before the sources that stand here
    environ = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": paths}  # noqa: TID251 - a command is started
    try:
        subprocess.run(command, env=environ, check=True, capture_output=True, timeout=TRAINING_LIMIT_SECONDS)  # noqa: S603
    except (subprocess.SubprocessError, OSError) as error:
        print(f"compiled without counts of what runs often: {error}", file=sys.stderr)  # noqa: T201 - a command's word
        return False
    finally:
        rmtree(place)
    return True


def build(extensions: list[Extension], folder: Path, libraries: Path, options: list[str]) -> None:
    """Compile all of `extensions` with the compiler's `options` beside mypyc's own.

    Object files are always in the same place, where the compiler looks for what was counted in them.
    """
    mypyc_options = [extension.extra_compile_args for extension in extensions]
    for extension in extensions:
        extension.extra_compile_args = [*extension.extra_compile_args, *options, NO_ERROR]
        extension.extra_link_args = options[:1]  # the first wants a library
    parallel = str(os.cpu_count() or 1)
    where = ["--build-lib", str(libraries), "--build-temp", str(folder / "o")]
    setup(
        name="cairn-compiled",
        packages=[],
        ext_modules=extensions,
        script_args=["--quiet", "build_ext", "--force", *where, "--parallel", parallel],
    )
    for extension, its_own in zip(extensions, mypyc_options, strict=True):
        extension.extra_compile_args = its_own


def compiler_is_gcc() -> bool:
    """True where it takes gcc's options; clang has others, and goes by gcc's name on macOS."""
    command = [(sysconfig.get_config_var("CC") or "cc").split()[0], "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603
    return "Free Software Foundation" in said


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
