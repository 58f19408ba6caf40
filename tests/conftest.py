"""Fixtures that all tests share; those of a session exist once however many files use them."""

from importlib.machinery import EXTENSION_SUFFIXES

import hypothesis
import pytest

import proxy.pipeline.pipeline

# what holds for all inputs does not depend on how busy the machine is
hypothesis.settings.register_profile("cairn", deadline=None)
hypothesis.settings.load_profile("cairn")

pytest_plugins = ["tests.support.engine"]

IS_COMPILED = proxy.pipeline.pipeline.__file__.endswith(tuple(EXTENSION_SUFFIXES))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--compiled`: test the compiled modules in .build/compiled, not the sources."""
    parser.addoption("--compiled", action="store_true", help="test the compiled modules (see `make test`)")


def pytest_report_header() -> str:
    """Return a line that says which modules are tested."""
    return f"cairn: {'compiled' if IS_COMPILED else 'interpreted'}, {proxy.pipeline.pipeline.__file__}"


def pytest_configure(config: pytest.Config) -> None:
    """Stop if the modules found are not the ones that `--compiled`, or its absence, asks for."""
    if config.getoption("--compiled") is not IS_COMPILED:
        raise pytest.UsageError(f"this would test {proxy.pipeline.pipeline.__file__}; see `make test`")
