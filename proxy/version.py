"""The version of this Cairn."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Return the version of the distribution, or `unreleased` in a checkout that is not installed."""
    try:
        return version("cairn-proxy")
    except PackageNotFoundError:
        return "unreleased"
