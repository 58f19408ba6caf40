"""The reference and the JSON Schema that are generated from the typed settings."""

from __future__ import annotations

import inspect
import json
from typing import Any

import msgspec
import pytest

from proxy.config import reference, schema
from proxy.config.reference import as_json_schema, as_markdown, descriptions, tables
from proxy.config.schema import Config, Section

SECTIONS = [each for each in vars(schema).values() if isinstance(each, type) and issubclass(each, Section)]


@pytest.mark.parametrize(
    "section", [each for each in SECTIONS if each is not Section], ids=lambda each: each.__name__
)
def test_every_setting_has_a_description(section: type[Section]) -> None:
    """One sentence or more, under the field."""
    texts = descriptions(section)
    assert set(texts) == set(section.__struct_fields__)
    assert all(text.endswith((".", "sha256sum`.")) for text in texts.values())


def test_the_reference_names_every_setting_once() -> None:
    """By its section, with type, default, and whether a reload changes it."""
    listed = {(table.path, setting.name): setting for table in tables() for setting in table.settings}
    assert ("pools[].replicas[]", "url") in listed
    assert listed["server", "port"] == reference.Setting(
        name="port", type="whole number", default="8080", live=False, variable="CAIRN_PORT",
        description="Port to listen on.",
    )  # fmt: skip
    assert listed["pools[]", "kind"].type == "`engine`, `provider`"
    assert listed["pools[]", "kind"].live, "pools are reloaded as a whole"
    assert listed["contexts", "pinned_bytes"].type == "size"
    assert listed["pools[].replicas[]", "url"].default is None
    assert listed["log", "level"].variable == "CAIRN_LOG_LEVEL"
    assert listed["upstream", "max_retries"].variable == "CAIRN_UPSTREAM__MAX_RETRIES"
    text = as_markdown()
    assert all(f"| `{name}` |" in text for _, name in listed)
    assert "`server.request_seconds`" in text, "former settings are listed"


@pytest.mark.parametrize(
    "section", [each for each in SECTIONS if each is not Section], ids=lambda each: each.__name__
)
def test_every_section_has_a_table(section: type[Section]) -> None:
    """Also one that may be left out, such as a pool's template."""
    described = [table for table in tables() if table.description == inspect.cleandoc(section.__doc__ or "")]
    assert len(described) == 1
    parts = {field.name for field in msgspec.structs.fields(section) if field.type in SECTIONS}
    assert {setting.name for setting in described[0].settings} == set(section.__struct_fields__) - parts


def test_the_schema_describes_a_file() -> None:
    """Descriptions, limits, defaults, and sizes as numbers or text; unknown keys are refused."""
    made: dict[str, Any] = json.loads(as_json_schema())
    sections = made["$defs"]
    assert made["$ref"] == "#/$defs/Config"
    port = sections["Server"]["properties"]["port"]
    assert (port["maximum"], port["default"], port["description"]) == (65535, 8080, "Port to listen on.")
    body = sections["Server"]["properties"]["max_body_bytes"]
    assert [each["type"] for each in body["anyOf"]] == ["integer", "string"]
    assert sections["Server"]["additionalProperties"] is False
    assert sections["Replica"]["properties"]["key"]["anyOf"] == [{"type": "string"}, {"type": "null"}]
    assert set(sections["Config"]["properties"]) == {field.name for field in msgspec.structs.fields(Config)}


def test_descriptions_in_the_schema_are_not_indented() -> None:
    """This holds for sections and enums, whose descriptions are docstrings, and for settings."""
    indented: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            text = node.get("description")
            if isinstance(text, str) and any(line != line.strip() for line in text.splitlines()):
                indented.append(text)
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(json.loads(as_json_schema()))
    assert not indented
