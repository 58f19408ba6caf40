"""`cairn prices`: the card, its source and its date, and why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from proxy.cli.main import cli

CONFIG = {
    "pools": [
        {"name": "own", "models": ["llama-*"], "replicas": [{"url": "http://10.0.0.7:8000", "name": "east"}]},
        {
            "name": "far",
            "models": ["claude-*"],
            "kind": "provider",
            "replicas": [{"url": "https://api.anthropic.com"}],
        },
    ],
    "prices": [{"model": "llama-*", "upstream": "east", "valid_from": "2026-01-01", "usd_per_gpu_hour": 3.6}],
}


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "cairn.yaml").write_text(yaml.safe_dump(CONFIG))
    return str(tmp_path / "cairn.yaml")


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ("prices", *arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_operators_card_is_shown_with_its_place_and_date(file: str) -> None:
    """At each replica that serves the model."""
    text = shown("llama-3", "--config", file)
    assert "llama-3 at east http://10.0.0.7:8000" in text
    assert "from configuration, prices[0], valid from 2026-01-01" in text
    assert "0.001000" in text


def test_the_built_in_card_is_shown_with_its_tiers(file: str) -> None:
    """Its data has no date, which is said."""
    text = shown("claude-sonnet-4-5", "--config", file)
    assert "from genai-prices" in text
    assert "no date" in text
    assert "3.75" in text
    assert "over 200,000 prompt" in text


def test_rates_of_audio_and_images_are_shown_under_those_of_text() -> None:
    """Where the card has some."""
    lines = [line.split() for line in shown("gpt-realtime").splitlines()]
    assert ["audio", "32", "0.4", "-", "-", "64"] in lines
    assert ["images", "5", "0.5", "-", "-", "16"] in lines


def test_without_a_configuration_the_models_own_provider_is_meant() -> None:
    """A price can therefore be looked up without any set-up."""
    assert "claude-sonnet-4-5 at its own provider" in shown("claude-sonnet-4-5")


def test_an_unpriced_model_is_said_to_be_so_with_the_reason(file: str) -> None:
    """Never shown as zero; a card that is not valid yet does not count."""
    assert "has a price for this model" in shown("nobody-knows", "--upstream", "http://127.0.0.1:1")
    assert "no price" in shown("llama-3", "--config", file, "--on", "2025-12-31")
    assert "No pool of the configuration serves gpt-9." in shown("gpt-9", "--config", file)


def test_a_bad_configuration_is_exit_2(tmp_path: Path) -> None:
    """In one line."""
    (tmp_path / "c.yaml").write_text("prices: [{input: x, output: 1}]")
    result = CliRunner().invoke(cli, ("prices", "m", "--config", str(tmp_path / "c.yaml")))
    assert result.exit_code == 2
    assert "$.prices[0].input" in result.stderr
