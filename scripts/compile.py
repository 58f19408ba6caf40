"""Compile the data path: modules with mypyc, and libraries in C, as pyproject.toml lists them under [tool.cairn].

    python scripts/compile.py FOLDER              # leaves cairn_cache.<abi>.so and the like in FOLDER
    python scripts/compile.py FOLDER --profiled   # twice, the second time by the counts of a training run

The sources are plain typed Python and run without this. It needs a C compiler, Python's headers and the build group,
and runs from the root of the repository, whose pyproject.toml configures mypy.

`--profiled` is for a release and needs gcc: the code is compiled so that it counts which branches it takes, is driven
by `benchmarks.path` for a few seconds, and is compiled again by those counts, which places the parts that run often
side by side. CPython itself is built this way.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any, cast

from mypyc.build import mypycify
from setuptools import Extension, setup

TRAINING = ("--sizes", "1k,16k,64k,512k", "--chunks", "200", "--seconds", "1")  # whole requests of these sizes
TRAINING_LIMIT_SECONDS = 120
COUNTING = ["-fprofile-generate", "-fprofile-update=prefer-atomic"]  # atomic: the log has its own thread
BY_COUNTS = ["-fprofile-use", "-fprofile-correction", "-fprofile-partial-training", "-Wno-missing-profile"]
# Modules that are not compiled only lend their types. Their own errors are for `make checks`; without them mypy reads
# no bodies of functions and takes half the time. The packages that they import need not be installed.
MYPY_OPTIONS = ["--follow-imports=silent", "--ignore-missing-imports", "--no-warn-unused-ignores"]
NO_ERROR = "-Wno-error"  # mypyc turns warnings into errors, and these options cause some
# Calls within a library are direct, since no other library can see its functions; and the handling of exceptions lies
# apart from the path of a request. This saves 15 % of a 1 KB request's CPU and takes no longer to compile.
LAYOUT = ["-fvisibility=hidden", "-include", "scripts/rare_calls.h", "-freorder-blocks-and-partition"]


def groups() -> list[tuple[list[str], str | None]]:
    """Return the modules of each library with its name. Calls within one library are C calls."""
    return [(modules, f"cairn_{name}") for name, modules in _listed()["compile"].items()]


def c_libraries() -> list[Extension]:
    """Return the libraries that are written in C."""
    return [Extension(name, [source], extra_compile_args=["-O2"]) for name, source in _listed()["c"].items()]


def _listed() -> dict[str, dict[str, Any]]:
    listed: dict[str, dict[str, Any]] = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "cairn"
    ]
    return listed


def main(folder: Path, *, profiled: bool) -> None:
    """Compile into the absolute path `folder`.

    Raises:
        SystemExit: mypy or the C compiler reports an error, or the training run fails.
    """
    separate = groups()
    modules = [module for members, _ in separate for module in members]
    # a cache from elsewhere would keep mypyc from writing again the C files that it wrote into another folder
    os.environ["MYPY_CACHE_DIR"] = str(folder / "mypy")  # noqa: TID251 - read by mypy in this process
    level = "3" if profiled else "1"  # without counts, -O2 takes 40 % longer than -O1 and gains less than 5 %
    made = mypycify(
        [*MYPY_OPTIONS, *modules], opt_level=level, debug_level="0", separate=separate, target_dir=str(folder / "c")
    )
    extensions = cast(list[Extension], made)  # setuptools is imported, so they are its own and not distutils'
    for extension in extensions:
        extension.extra_compile_args = [*extension.extra_compile_args, *LAYOUT]
    extensions += c_libraries()
    if profiled:
        train(extensions, folder)
    build(extensions, folder, folder, BY_COUNTS if profiled else [])


def train(extensions: list[Extension], folder: Path) -> None:
    """Write a file of counts next to each object file in `folder`."""
    if not compiler_is_gcc():
        sys.exit("--profiled needs gcc; set CC to it, or leave --profiled out")
    place = folder / "counted"
    build(extensions, folder, place, COUNTING)
    for package in ("proxy", "cache"):
        copytree(package, place / package, dirs_exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.path", *TRAINING]
    paths = os.pathsep.join((str(place), os.getcwd()))  # the counting libraries before the sources
    environ = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": paths}  # noqa: TID251 - passed on to a command
    try:
        subprocess.run(command, env=environ, check=True, timeout=TRAINING_LIMIT_SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        sys.exit(f"the training run failed: {error}")
    finally:
        rmtree(place)


def build(extensions: list[Extension], folder: Path, libraries: Path, options: list[str]) -> None:
    """Compile all of `extensions` into `libraries` with the compiler's `options` after mypyc's own.

    Object files always go to the same place in `folder`: the compiler looks for the counts next to them.
    """
    own_options = [extension.extra_compile_args for extension in extensions]
    largest_first = sorted(extensions, key=source_bytes, reverse=True)  # so that no core is idle at the end
    for extension in extensions:
        extension.extra_compile_args = [*extension.extra_compile_args, *options, NO_ERROR]
        extension.extra_link_args = [option for option in options if option.startswith("-fprofile-generate")]
    places = ["--build-lib", str(libraries), "--build-temp", str(folder / "o")]
    setup(
        name="cairn-compiled",
        packages=[],
        ext_modules=largest_first,
        script_args=["--quiet", "build_ext", "--force", *places, "--parallel", str(os.cpu_count() or 1)],
    )
    for extension, own in zip(extensions, own_options, strict=True):
        extension.extra_compile_args = own


def source_bytes(extension: Extension) -> int:
    """Return the size of the extension's C files."""
    return sum(os.path.getsize(source) for source in extension.sources)


def compiler_is_gcc() -> bool:
    """Return True if the C compiler takes gcc's options. On macOS the command gcc is clang, which does not."""
    command = [(sysconfig.get_config_var("CC") or "cc").split()[0], "--version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return "Free Software Foundation" in answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--profiled", action="store_true", help="compile by the counts of a training run")
    arguments = parser.parse_args()
    main(arguments.folder.absolute(), profiled=arguments.profiled)
