"""`cairn config`: the configuration reference and the JSON Schema, generated from the typed settings."""

from __future__ import annotations

import click


@click.group("config", short_help="Print all settings, or their JSON Schema.")
def config() -> None:
    """Print the reference of all settings, or their JSON Schema."""


@config.command()
def reference() -> None:
    """Print the configuration reference as Markdown."""
    from proxy.config.reference import as_markdown

    click.echo(as_markdown(), nl=False)


@config.command(short_help="Print the JSON Schema of a configuration file.")
def schema() -> None:
    """Print the JSON Schema of a configuration file, for editors and validators."""
    from proxy.config.reference import as_json_schema

    click.echo(as_json_schema(), nl=False)
