"""The modules that mypyc compiles, and what they must not contain."""

from __future__ import annotations

import ast
import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import IS_COMPILED

ROOT = Path(__file__).parents[1]
LISTED = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cairn"]
MODULES = [module for modules in LISTED["compile"].values() for module in modules]
PURE = {"bytes", "len", "end", "find", "index", "start", "min", "max"}


def test_each_compiled_module_is_listed_once() -> None:
    """mypyc refuses one that is listed twice, and an install would go on without compiling."""
    assert sorted(set(MODULES)) == sorted(MODULES)
    assert [module for module in MODULES if not (ROOT / module).is_file()] == []


def slice_bounds(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
            yield from filter(None, (node.slice.lower, node.slice.upper, node.slice.step))


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)


@pytest.mark.parametrize("module", MODULES)
def test_keyword_arguments_with_a_default_come_last(module: str) -> None:
    """mypyc 2.4 fails to describe a method with a keyword argument that has no default behind one that has."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_default = [default is not None for default in node.args.kw_defaults]
            assert has_default == sorted(has_default), f"{module}:{node.lineno}: {node.name}"


@pytest.mark.parametrize("module", MODULES)
def test_no_bound_of_a_slice_does_anything(module: str) -> None:
    """A slice bound has no side effect: mypyc 2.4 may evaluate it twice."""
    for bound in slice_bounds(ast.parse((ROOT / module).read_text())):
        calls = {called(node) for node in ast.walk(bound) if isinstance(node, ast.Call)}
        assert calls <= PURE, f"{module}:{bound.lineno}: {ast.unparse(bound)}"


@pytest.mark.parametrize("module", MODULES)
def test_no_struct_is_compiled(module: str) -> None:
    """No compiled module defines a msgspec struct: mypyc drops its options, so it would decode differently."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.ClassDef):
            assert not any("Struct" in ast.unparse(base) for base in node.bases), (
                f"{module}:{node.lineno}: {node.name}"
            )


@pytest.mark.parametrize("module", MODULES)
def test_no_exception_is_handled_across_an_await(module: str) -> None:
    """mypyc 2.4 leaves an exception that is being handled set while a coroutine waits.

    Everything that other tasks raise meanwhile would get it as its context, in chains that grow.
    """
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.ExceptHandler):
            waits = [each for each in ast.walk(node) if isinstance(each, (ast.Await, ast.AsyncFor, ast.AsyncWith))]
            assert waits == [], f"{module}:{waits[0].lineno}: wait after the handler, not in it"


@pytest.mark.skipif(not IS_COMPILED, reason="the sources are tested")
@pytest.mark.parametrize("module", MODULES)
def test_all_that_is_listed_is_compiled(module: str) -> None:
    """Each listed module is compiled; one that is not would be slow without notice."""
    name = module.removesuffix(".py").replace("/", ".")
    assert not (importlib.import_module(name).__file__ or "").endswith(".py")


@pytest.mark.skipif(not IS_COMPILED, reason="the sources are tested")
@pytest.mark.parametrize("library", LISTED["c"])
def test_each_library_in_c_is_there(library: str) -> None:
    """Each listed library is compiled; without one, Cairn would be slow without notice."""
    importlib.import_module(library)
