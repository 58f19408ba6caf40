"""Fixtures that all tests share; those of a session exist once however many files use them."""

from importlib.machinery import EXTENSION_SUFFIXES

import pytest

import proxy.pipeline.pipeline

pytest_plugins = ["tests.support.engine"]

IS_COMPILED = proxy.pipeline.pipeline.__file__.endswith(tuple(EXTENSION_SUFFIXES))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--installed`: what is tested is the installed Cairn, which may be compiled, and not the sources beside it."""
    parser.addoption("--installed", action="store_true", help="test the installed, compiled Cairn (see `make test`)")


def pytest_report_header() -> str:
    """Which Cairn this is."""
    return f"cairn: {'compiled' if IS_COMPILED else 'interpreted'}, {proxy.pipeline.pipeline.__file__}"


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test one Cairn and to call it the other."""
    is_installed = "site-packages" in proxy.pipeline.pipeline.__file__
    if config.getoption("--installed") is not is_installed:
        raise pytest.UsageError(f"these would be tests of {proxy.pipeline.pipeline.__file__}: see `make test`")
