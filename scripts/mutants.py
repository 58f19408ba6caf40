"""Mutation testing of one package by mutmut: which changes of its code does no test notice?

    python scripts/mutants.py proxy/routing               # every mutant
    python scripts/mutants.py proxy/routing --sample 150  # as many, drawn with a fixed seed (--seed for another)

The tests are those of the package's own folder, tests/proxy/routing. What they do not notice is then checked by mypy,
as `make checks` checks the sources, and counted in a column of its own. Everything happens in a copy of the sources
under .build/mutants, which the next full run continues: results stay until the code of their function changes. A
table by module comes at the end, and the changes that survived are in survivors.diff beside the copy.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("cache", "proxy", "tests", "demo", "benchmarks")
SEED = 1  # of the sample, unless another is given: the same mutants each time, as long as the code is the same
MUTMUT = str(Path(sys.executable).parent / "mutmut")
NO_SUCH_MUTANT = "none"  # mutmut generates mutants before it looks for those that it is to run
TYPES = "types"  # the state of a mutant that no test noticed, but mypy
# One reaches everything and takes half a minute; the other counts calls, of which mutmut adds one to each.
NOT_TRIED = {
    "proxy/wire": (
        "tests/proxy/wire/test_any_bytes.py",
        "tests/proxy/wire/test_sse.py::test_events_that_are_surely_the_clients_are_passed_on_together",
    )
}
# A class of mutants has each method, and so each annotated attribute, many times, and lines of mutmut's own.
NOT_OF_MUTANTS = ("no-redef", "unused-ignore")


def main(package: str, sample: int | None, seed: int) -> int:
    """Run the mutants of `package`, a folder, and print what survived. Return the exit code."""
    folder = ROOT / ".build" / "mutants" / package.replace("/", "-")
    prepare(folder, package)
    if sample is None:
        names = [f"{package.replace('/', '.')}.*"]
    else:
        run(folder, [NO_SUCH_MUTANT], quiet=True)
        every = sorted(states(folder))
        names = random.Random(seed).sample(every, min(sample, len(every)))
    failed = run(folder, names, quiet=False)
    found = states(folder)
    tried = {name: found[name] for name in (found if sample is None else names)}
    for name in ill_typed(folder, package):
        if tried.get(name) in ("survived", "no tests"):
            tried[name] = TYPES
    show(folder, tried)
    return failed


def prepare(folder: Path, package: str) -> None:
    """Bring the copy in `folder` up to date, with a pyproject.toml that names `package` and its tests."""
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "*.meta")
        shutil.rmtree(folder / name, ignore_errors=True)
        # with the time of the copy: mutmut changes a file anew only if it is younger than what it made of it before
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, copy_function=shutil.copy)
    # of the tests that it knows, mutmut would not notice that they reach other code since they were changed
    (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    mutmut = {
        "source_paths": ["cache", "proxy"],
        "only_mutate": [f"{package}/*"],
        "also_copy": ["demo", "benchmarks"],
        "pytest_add_cli_args_test_selection": [f"tests/{package}"],
        "pytest_add_cli_args": [f"--deselect={test}" for test in NOT_TRIED.get(package, ())],
    }
    sections = {"pytest.ini_options": options, "mutmut": mutmut}
    lines = [f"[tool.{name}]\n" + "".join(entries(section)) for name, section in sections.items()]
    (folder / "pyproject.toml").write_text("\n".join(lines), encoding="utf-8")


def entries(section: dict[str, object]) -> list[str]:
    """Return the lines of a section of TOML; a string, a number and a list of them are written as in JSON."""
    return [f"{key} = {json.dumps(value)}\n" for key, value in section.items()]


def run(folder: Path, names: list[str], *, quiet: bool) -> int:
    """Run mutmut on the mutants `names`. Return its exit code."""
    where = subprocess.DEVNULL if quiet else None
    return subprocess.run([MUTMUT, "run", *names], cwd=folder, stdout=where, stderr=where, check=False).returncode


def states(folder: Path) -> dict[str, str]:
    """Return the state of each mutant by its name."""
    command = [MUTMUT, "results", "--all", "true"]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return dict(line.strip().split(": ", 1) for line in output.splitlines() if ": " in line)


def ill_typed(folder: Path, package: str) -> set[str]:
    """Return the names of the mutants in which mypy finds an error, with the options that check the sources."""
    copy = folder / "mutants"
    disabled = [f"--disable-error-code={code}" for code in NOT_OF_MUTANTS]
    options = ["--config-file", str(ROOT / "pyproject.toml"), *disabled, "--output", "json", package]
    command = [sys.executable, "-m", "mypy", *options]
    report = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False).stdout
    errors: dict[str, list[tuple[int, str]]] = {}
    for error in map(json.loads, report.splitlines()):
        if error["severity"] == "error":
            errors.setdefault(error["file"], []).append((error["line"], error["message"]))
    names: set[str] = set()
    for file, found in errors.items():
        module = file.removesuffix(".py").replace("/", ".")
        names |= {f"{module}.{name}" for name in ill_typed_in(copy / file, found)}
    return names


def ill_typed_in(file: Path, errors: list[tuple[int, str]]) -> set[str]:
    """Return the names of the mutants in `file` that have some of the `errors`, each a line and a message.

    An error that the original of a mutant has as well comes from the way in which mutmut writes them.
    """
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "__mutmut_" in node.name:
            end = node.end_lineno or node.lineno
            found[node.name] = {message for line, message in errors if node.lineno <= line <= end}
    original = {name: found.get(f"{name.rpartition('_')[0]}_orig", set()) for name in found}
    return {name for name, messages in found.items() if messages - original[name]}


def show(folder: Path, found: dict[str, str]) -> None:
    """Print the table by module, and write how each survivor differs from the code."""
    modules: dict[str, Counter[str]] = {}
    for name, state in sorted(found.items()):
        modules.setdefault(name.rpartition(".")[0], Counter())[state] += 1
    modules["all"] = Counter(found.values())
    titles = ("killed", "timeout", TYPES, "survived", "no test", "other")
    print(
        f"{'module':<40}{'mutants':>8}"
        + "".join(f"{title:>9}" for title in titles)
        + f"{'by tests':>10}{'noticed':>9}"
    )
    for module, counts in modules.items():
        killed, late, typed = counts["killed"], counts["timeout"], counts[TYPES]
        survived, untested, total = counts["survived"], counts["no tests"], counts.total()
        other = total - killed - late - typed - survived - untested
        figures = "".join(f"{count:>9}" for count in (killed, late, typed, survived, untested, other))
        tests = killed + late
        print(f"{module:<40}{total:>8}{figures}{tests / total:>10.1%}{(tests + typed) / total:>9.1%}")
    survivors = [name for name, state in found.items() if state in ("survived", "no tests")]
    with (folder / "survivors.diff").open("w", encoding="utf-8") as file:
        for name in survivors:
            subprocess.run([MUTMUT, "show", name], cwd=folder, stdout=file, check=False)
    print(f"how the survivors differ: {folder.relative_to(ROOT)}/survivors.diff")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("package", help="a folder, such as proxy/routing")
    parser.add_argument("--sample", type=int, help="run only this many mutants")
    parser.add_argument("--seed", type=int, default=SEED, help="of the sample")
    arguments = parser.parse_args()
    sys.exit(main(arguments.package.rstrip("/"), arguments.sample, arguments.seed))
