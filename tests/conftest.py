"""Fixtures that all tests share; those of a session exist once however many files use them."""

from importlib.machinery import EXTENSION_SUFFIXES

import hypothesis
import pytest

import proxy.pipeline.pipeline

# what holds for all inputs does not depend on how busy the machine is
hypothesis.settings.register_profile("cairn", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("cairn")

pytest_plugins = ["tests.support.engine"]

# Files whose tests take more than ten seconds, in the order in which they begin.
LONGEST = (
    "tests/benchmarks/agents/test_agents.py",
    "tests/hostile/fuzz/test_fuzz.py",
    "tests/proxy/supervisor/test_supervisor.py",
    "tests/scenarios/test_processes.py",
    "tests/chaos/test_chaos.py",
    "tests/scenarios/test_truth.py",
    "tests/status/test_page.py",
    "tests/scenarios/test_contexts_sdk.py",
    "tests/test_demo.py",
    "tests/benchmarks/engines/test_clients.py",
    "tests/hostile/bounds/test_bounds.py",
    "tests/scenarios/test_cold_turns.py",
    "tests/proxy/wire/test_any_bytes.py",
    "tests/scenarios/test_engine.py",
    "tests/benchmarks/engines/test_beliefs.py",
    "tests/cache/test_hostile_data.py",
    "tests/cache/index/test_hashing.py",
    "tests/scenarios/test_openapi.py",
    "tests/scenarios/test_failover.py",
    "tests/deploy/test_helm.py",
    "tests/deploy/test_rules.py",
    "tests/deploy/test_live.py",
)

IS_COMPILED = proxy.pipeline.pipeline.__file__.endswith(tuple(EXTENSION_SUFFIXES))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--compiled` (test the compiled modules in .build/compiled and not the sources), and further options."""
    parser.addoption("--compiled", action="store_true", help="test the compiled modules (see `make test`)")
    parser.addoption(
        "--openapi-examples",
        type=int,
        default=2,
        help="how many requests tests/scenarios/test_openapi.py makes up for each operation",
    )
    parser.addoption("--truth-requests", type=int, help="how many requests tests/scenarios/test_truth.py sends")
    parser.addoption("--vllm", action="store_true", help="test against a real vLLM server (see tests/vllm)")


def pytest_report_header() -> str:
    """Return a line that says which modules are tested."""
    return f"cairn: {'compiled' if IS_COMPILED else 'interpreted'}, {proxy.pipeline.pipeline.__file__}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: one that began last would keep a process busy while others idle."""
    files = {item: item.nodeid.partition("::")[0] for item in items}
    items.sort(key=lambda item: LONGEST.index(files[item]) if files[item] in LONGEST else len(LONGEST))


def pytest_configure(config: pytest.Config) -> None:
    """Stop if the modules found are not the ones that `--compiled`, or its absence, asks for."""
    if config.getoption("--compiled") is not IS_COMPILED:
        raise pytest.UsageError(f"this would test {proxy.pipeline.pipeline.__file__}; see `make test`")
