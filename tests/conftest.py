"""Fixtures that all tests share; those of a session exist once however many files use them."""

pytest_plugins = ["tests.support.engine"]
