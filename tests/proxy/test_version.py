"""The version that `cairn --version`, the status page and the metrics show."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from proxy import version


def not_installed(name: str) -> str:
    """Answer as for a distribution that is not there."""
    raise PackageNotFoundError(name)


def test_an_installed_cairn_has_the_version_of_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "version", lambda name: f"{name} 1.2")
    assert version.own_version() == "cairn-proxy 1.2"


def test_a_checkout_is_called_unreleased(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the changelog; `unknown` looked like a defect."""
    monkeypatch.setattr(version, "version", not_installed)
    assert version.own_version() == "unreleased"
