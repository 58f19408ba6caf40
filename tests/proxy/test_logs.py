"""The redaction of the process log."""

from __future__ import annotations

import logging

import pytest

from proxy.config.load import Admin, Config, Pool, Redis, Replica, Secret, SecretUrl, secrets_of
from proxy.logs import RedactingFormatter


def record(message: str, *args: object, error: BaseException | None = None) -> logging.LogRecord:
    """A record of that text."""
    info = (type(error), error, None) if error is not None else None
    return logging.LogRecord("cairn.x", logging.INFO, "f", 1, message, args, info)


@pytest.mark.parametrize(
    "text",
    [
        "key hunter22 was refused",
        "redis://:hunter22@h failed",
        "postgres://u:hunter22@h failed",
        "Authorization: Bearer hunter22",
        "{'x-api-key': 'hunter22'}",
    ],
)
def test_known_secrets_and_what_looks_like_one_are_not_written(text: str) -> None:
    """Whether it is the message, an argument or an exception's text."""
    formatter = RedactingFormatter(["hunter22"])
    blind = RedactingFormatter()
    assert "hunter22" not in formatter.format(record(text))
    assert "hunter22" not in formatter.format(record("%s", text))
    assert "hunter22" not in formatter.format(record("x", error=ValueError(text)))
    assert "***" in formatter.format(record(text))
    if not text.startswith("key"):
        assert "hunter22" not in blind.format(record(text))


def test_a_providers_key_is_known_by_its_form() -> None:
    """Even one that the configuration never had."""
    assert "abcdef" not in RedactingFormatter().format(record("upstream said: bad key sk-proj-abcdef123456"))


def test_harmless_text_stays_as_it_is() -> None:
    """Redaction takes nothing from a line without secrets, and a short secret does not blot out the log."""
    text = "worker 0 (pid 12) ended with -9; http://127.0.0.1:8080/v1 basics"
    assert RedactingFormatter(["", "a"]).format(record(text)).endswith(text)


def test_secrets_that_become_known_later_are_not_written_either() -> None:
    """Those of a configuration that was reloaded; the former ones remain secret."""
    formatter = RedactingFormatter(["first-key"])
    text = "bad keys: first-key, second-key, second-key-and-more"
    assert formatter.format(record(text)).endswith("bad keys: ***, second-key, second-key-and-more")
    formatter.add(["second-key", "second-key-and-more", "bad"])
    assert formatter.format(record(text)).endswith("bad keys: ***, ***, ***")


def test_every_secret_of_a_configuration_is_known() -> None:
    """Tokens, the Redis URL and the keys of replicas."""
    config = Config(
        admin=Admin(token=Secret("t")),
        redis=Redis(url=SecretUrl("redis://:p@h")),
        pools=(Pool("p", (Replica("http://h", key=Secret("k")), Replica("http://i"))),),
    )
    assert secrets_of(config) == {"t", "redis://:p@h", "k"}


@pytest.mark.parametrize(
    "odd", ["\n2026-11-27 00:00:00 INFO forged", "\r", "\x1b[2J", "\x9b2J", "\u2028", "\u202egnol"]
)
def test_a_message_is_one_line_and_controls_no_terminal(odd: str) -> None:
    """An upstream chooses the names of its models; a traceback keeps its lines."""
    line = RedactingFormatter().format(record("models %s", f"a{odd}b"))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert "ValueError" in RedactingFormatter().format(record("x", error=ValueError("y"))).splitlines()[-1]
