"""`cairn contexts` against a running Cairn: documents up, shown, tagged and removed; mistakes in one line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner, Result
from pypdf import PdfWriter

from proxy.cli.documents import Unreadable, read_documents
from proxy.cli.main import cli
from proxy.config.schema import Contexts
from tests.support import valkey
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.valkey import Valkey


@pytest.fixture(scope="module")
def redis() -> Iterator[Valkey]:
    with valkey.running() as server:
        yield server


@pytest.fixture
async def cairn(redis: Valkey) -> AsyncIterator[Cairn]:
    redis.flush()
    async with (
        OpenAIUpstream() as upstream,
        running(config_for([upstream.url], redis.url, contexts=Contexts())) as worker,
    ):
        yield worker


def pdf(path: Path, *lines: str) -> Path:
    """A PDF with a line of text on each of its pages."""
    writer = PdfWriter()
    for line in lines:
        from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

        page = writer.add_blank_page(200, 200)
        font = DictionaryObject(
            {
                NameObject("/Type"): NameObject("/Font"),
                NameObject("/Subtype"): NameObject("/Type1"),
                NameObject("/BaseFont"): NameObject("/Helvetica"),
            }
        )
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 10 100 Td ({line}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)  # noqa: SLF001 - internal state that no public name shows
    writer.write(path)
    return path


async def run(cairn: Cairn, *arguments: str) -> Result:
    """The command in a thread, since the Cairn that it asks lives in this loop."""
    command = ["contexts", *arguments, "--url", cairn.url, "--key", "sk-cli"]
    return await asyncio.to_thread(
        CliRunner().invoke, cli, command, None, {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""}
    )


async def shown(cairn: Cairn, name: str) -> Any:
    return json.loads((await run(cairn, "show", name, "--json")).stdout)


async def test_documents_go_up_as_messages_that_begin_with_their_names(cairn: Cairn, tmp_path: Path) -> None:
    """Text, Markdown, PDF and a folder; then ready, tagged, and for a day."""
    (tmp_path / "a.txt").write_text("Päths")
    folder = tmp_path / "book"
    (folder / "deep").mkdir(parents=True)
    (folder / "2.md").write_text("# Two")
    (folder / "deep" / "1.TXT").write_text("One")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("no")
    pdf(folder / "3.pdf", "Page one", "Page two")
    result = await run(cairn, "put", str(tmp_path / "a.txt"), str(folder), "--tag", "book", "--ttl", "1d")
    assert result.exit_code == 0, result.output
    context_id = result.stdout.strip()
    found = await shown(cairn, "book")
    assert (found["id"], found["status"], found["model"]) == (context_id, "ready", "test-model")
    assert found["messages"] == [
        {"role": "system", "content": "a.txt\n\nPäths"},
        {"role": "system", "content": "book/2.md\n\n# Two"},
        {"role": "system", "content": "book/3.pdf\n\nPage one\n\nPage two"},
        {"role": "system", "content": "book/deep/1.TXT\n\nOne"},
    ]
    assert abs(found["expired_at"] - found["created_at"] - 86_400) <= 1
    text = (await run(cairn, "show", context_id)).stdout
    assert "messages[1]: system, " in text
    assert "book/2.md" in text


async def test_lists_tags_and_removals(cairn: Cairn, tmp_path: Path) -> None:
    """A tag moves; a removal by tag or id takes the context. Pinning needs a key that an upstream has accepted."""
    question = {"model": "test-model", "messages": [{"role": "user", "content": "?"}]}
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer sk-cli"}) as client:
        assert (await client.post(f"{cairn.url}/chat/completions", json=question)).status == 200
    (tmp_path / "a.txt").write_text("a")
    one, two = [
        (await run(cairn, "put", str(tmp_path / "a.txt"), "--no-wait", "--pin", "--tag", "t")).stdout.strip()
        for _ in range(2)
    ]
    assert (await run(cairn, "tag", "t")).stdout.strip() == two
    assert (await run(cairn, "tag", "t", one)).stdout.strip() == one
    listed = (await run(cairn, "list")).stdout
    assert one in listed
    assert two in listed
    assert "saves $/h" in listed
    rows = json.loads((await run(cairn, "list", "--json")).stdout)
    assert [row["metadata"] for row in rows] == [{"pin": "true"}] * 2
    assert (await run(cairn, "tag", "t", "--delete")).exit_code == 0
    assert (await run(cairn, "tag", "t")).exit_code == 1
    await run(cairn, "tag", "u", one)
    assert (await run(cairn, "rm", "u", two)).stdout.split() == [one, two]
    assert json.loads((await run(cairn, "list", "--json")).stdout) == []


async def test_mistakes_are_one_line_and_exit_with_one(cairn: Cairn, tmp_path: Path) -> None:
    """Nothing there, nobody there, a tag that is none."""
    (tmp_path / "a.txt").write_text("a")
    for arguments, says in (
        (("show", "none"), "no such"),
        (("rm", "cache-" + "0" * 32), "no such"),
        (("put", str(tmp_path / "a.txt"), "--tag", "1st"), "tags[0]"),
        (("put", str(tmp_path / "a.txt"), "--model", "m", "--url", "http://127.0.0.1:9"), ""),
    ):
        result = await run(cairn, *arguments)
        if "--url" not in arguments:
            assert result.exit_code == 1
            assert says in result.stderr
            assert len(result.stderr.strip().splitlines()) == 1
    refused = await asyncio.to_thread(
        CliRunner().invoke, cli, ["contexts", "list", "--url", "http://127.0.0.1:9", "--key", "x"]
    )
    assert (refused.exit_code, "no Cairn answers" in refused.stderr) == (1, True)
    wrong = CliRunner().invoke(cli, ["contexts", "put", str(tmp_path / "a.txt"), "--ttl", "soon"])
    assert wrong.exit_code == 2


def test_what_is_no_document_is_said(tmp_path: Path) -> None:
    """Bytes, an empty file, a broken and an empty PDF, a folder without any."""
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "n.txt").write_bytes(b"a\0b")
    (tmp_path / "e.txt").write_text(" \n")
    (tmp_path / "x.pdf").write_bytes(b"%PDF-1.4 nothing")
    (tmp_path / "empty").mkdir()
    blank = PdfWriter()
    blank.add_blank_page(10, 10)
    blank.write(tmp_path / "blank.pdf")
    for name in ("b.txt", "n.txt", "e.txt", "x.pdf", "blank.pdf", "empty", "gone.txt"):
        with pytest.raises(Unreadable, match=name):
            list(read_documents([tmp_path / name]))
