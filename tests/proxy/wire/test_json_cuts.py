"""Long strings are cut out of JSON before it is decoded, and nothing that is read of a body shows it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import pytest
from msgspec import Raw

from proxy.errors import BadRequest
from proxy.model import Endpoint
from proxy.records import Prompt
from proxy.wire import json_cuts
from proxy.wire.references import Reference, may_refer, references
from proxy.wire.request import MODEL_NAME_BYTES_MOST, first_file_id, read
from proxy.wire.spans import span_of

cuts = pytest.importorskip("cairn_json_cuts", reason="it is compiled with the data path")

PIECES = (
    "plain text, ",
    'a "quote" ',
    "two\nlines ",
    "a back\\slash ",
    '\\" ',
    "é漢😀 ",
    "\t",
    "/",
    "\x01",
    "{[]}:, ",
)
LONG = "x" * 40_000
WELL_FORMED = re.compile(
    rb'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*"
)
DENSE = (
    b"\\",
    b"\\",
    b"\\\\",
    b'"',
    b'\\"',
    b"\\n",
    b"u",
    b"\\u00e9",
    b"\\ud83d\\ude00",
    b"\xc3\xa9",
    b"/",
    b"\x1f",
    b"b",
)
"""Pieces of strings that are all escapes; each run of backslashes may cross the border of 64 bytes."""


def a_text(rng: random.Random, size: int) -> str:
    text = "".join(rng.choices(PIECES, k=size // 4))
    return text[:size]


def a_body(rng: random.Random, endpoint: Endpoint) -> bytes:
    """A body with short and long strings at every depth; its sizes surround the limits of what is cut."""

    def text() -> str:
        return a_text(rng, rng.choice((0, 3, 255, 256, 257, 1020, 2047, 2048, 2049, 9_000, 30_000)))

    message = {"role": "user", "content": text()}
    parts = {"role": "user", "content": [{"type": "text", "text": text()}, {"type": "text", "text": text()}]}
    messages = rng.choices([message, parts, {"role": "assistant", "content": text()}], k=4)
    members: dict[str, object] = {
        "model": rng.choice(("m", "m" * MODEL_NAME_BYTES_MOST)),
        "stream": rng.choice((True, False, None)),
        "stream_options": rng.choice((None, {}, {"include_usage": False}, {"note": text()})),
        "tools": rng.choice((None, [], [{"type": "function", "function": {"description": text()}}])),
        "metadata": {"unread": [text(), {"deeper": text()}]},
        "chat_template_kwargs": {"note": text()},
        "prompt_cache_key": text(),
        "max_tokens": 5,
        "messages": messages,
        "input": rng.choice((messages, text())),
        "prompt": text(),
        "system": text(),
        "instructions": text(),
    }
    if endpoint is not Endpoint.RESPONSES:
        del members["prompt"]
    if endpoint is Endpoint.COMPLETIONS:
        members["prompt"] = text()
    names = list(members)
    rng.shuffle(names)
    return json.dumps({name: members[name] for name in names}, ensure_ascii=rng.random() < 0.5).encode()


def outcome(body: bytes | bytearray, endpoint: Endpoint) -> Prompt | str:
    """The prompt that is read, or the error's text."""
    try:
        return read(body, endpoint)
    except BadRequest as error:
        return str(error)


def offsets(body: bytes, prompt: Prompt) -> list[tuple[int, int]]:
    """Where each span is in the body."""
    return [span_of(body, memoryview(span)) for span in prompt.spans]


def without_long_strings(body: bytes) -> bytes | None:
    """Cut the strings of an array in an array by a pattern; None if one is odd, or none is long."""
    made, at = b"", 0
    while (begin := body.find(b'"', at) + 1) > 0:
        match = WELL_FORMED.match(body, begin)
        assert match is not None
        if body[match.end() : match.end() + 1] != b'"':
            return None
        made += body[at:begin] + (match[0] if len(match[0]) < 256 else b"") + b'"'
        at = match.end() + 1
    short = made + body[at:]
    return None if short == body else short


@pytest.fixture
def whole_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, Endpoint], Prompt | str]:
    """Read a body without any cuts."""

    def read_whole(body: bytes, endpoint: Endpoint) -> Prompt | str:
        with monkeypatch.context() as patch:
            patch.setattr(json_cuts, "_shorten", None)
            return outcome(body, endpoint)

    return read_whole


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES])
def test_a_prompt_is_read_the_same_with_and_without_cuts(endpoint: Endpoint, whole_only) -> None:
    """The same members, spans and offsets are found, or the same error."""
    rng = random.Random(7)
    shortened = 0
    for _ in range(60):
        body = a_body(rng, endpoint)
        shortened += json_cuts.shortened(body) is not None
        found, expected = outcome(body, endpoint), whole_only(body, endpoint)
        assert found == expected
        if isinstance(found, Prompt) and isinstance(expected, Prompt):
            assert offsets(body, found) == offsets(body, expected)
    assert shortened > 30


def test_a_damaged_body_is_read_the_same_with_and_without_cuts(whole_only) -> None:
    """A body that is cut off, or has a byte that is wrong, has the same outcome; errors name the same offset."""
    rng = random.Random(11)
    body = a_body(rng, Endpoint.CHAT)
    for _ in range(300):
        damaged = bytearray(body)
        for _ in range(rng.choice((1, 1, 2, 5))):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'"\\{}[]:,u0\x00\x1f\x7f\xff ')
        del damaged[rng.choice((len(damaged), rng.randrange(len(damaged)))) :]
        assert outcome(bytes(damaged), Endpoint.CHAT) == whole_only(bytes(damaged), Endpoint.CHAT)


@pytest.mark.parametrize(
    "wrong", ["\\x", "\\u12g4", "\\", "\x00", "\n", "\x1f", "\\ud83d", "\\ude00", "\\ud83d\\u0041", "\\uDE00\\uD83D"]
)
@pytest.mark.parametrize("place", [0, 15, 1023, 39_999, 40_000])
def test_a_text_with_an_odd_string_is_left_to_the_decoder(wrong: str, place: int) -> None:
    """An escape that JSON does not know, or a bare control character, is found wherever it is in a string."""
    odd = LONG[:place] + wrong + LONG[place:]
    assert cuts.shorten(f'[["{odd}"]]'.encode()) is None or wrong == "\\"
    assert cuts.shorten(f'[["{LONG}"],["{odd}'.encode()) is None


@pytest.mark.parametrize("escape", ['\\"', "\\\\", "\\/", "\\n", "\\u00e9", "\\ud83d\\ude00", "\\uDBFF\\uDFFF"])
def test_no_escape_is_cut_in_two(escape: str) -> None:
    """A long member of the outermost object keeps a beginning that is a string by itself."""
    for shift in range(13):
        text = "x" * shift + escape * 4_000
        short, _ = cuts.shorten(f'{{"model":"{text}"}}'.encode())
        kept = json.loads(short)["model"]
        assert json.loads(f'"{text}"').startswith(kept)
        assert 1024 <= len(short) - len('{"model":""}') < 1024 + 12


def test_the_end_of_a_string_is_where_its_escapes_let_it_be() -> None:
    """The quote that is found ends the string, with any escapes around a border of 64 bytes."""
    rng = random.Random(13)
    odd = 0
    for _ in range(4_000):
        dense = b"".join(rng.choices(DENSE, k=rng.randrange(25)))
        text = b"x" * (200 + rng.randrange(140)) + dense + b"x" * rng.randrange(70)
        body = b'[["' + text + b'",1]]'
        expected, found = without_long_strings(body), cuts.shorten(body)
        assert (found and found[0]) == expected
        odd += expected is None
    assert 1_000 < odd < 3_200


def test_a_text_without_long_strings_is_soon_given_up() -> None:
    """A pass over many short strings would cost more than it saves."""
    short = [{"name": "a" * 20} for _ in range(40_000)]
    assert cuts.shorten(json.dumps(short).encode()) is None
    assert cuts.shorten(json.dumps([*short, LONG * 40]).encode()) is None
    assert cuts.shorten(json.dumps([LONG, *short[:100]]).encode()) is not None


@pytest.mark.parametrize("place", ["before", "between", "after", "within"])
def test_a_file_is_found_by_its_key_and_not_by_a_long_text_about_it(place: str) -> None:
    """Only the inside of long strings is not searched, where no key can be."""
    part = '{"type":"file","file":{"file_id":"file-1"}}'
    escaped = part.replace("file_id", "\\u0066ile_id")
    about = json.dumps(LONG + part + escaped + LONG)
    body = {
        "before": f'{{"messages":[{part},"{LONG}"]}}',
        "between": f'{{"input":"{LONG}","messages":["{LONG}",{part},{about}]}}',
        "after": f'{{"messages":[{about},{escaped}]}}',
        "within": f'{{"messages":[{about}]}}',
    }[place].encode()
    assert may_refer(body) == (place != "within")
    assert references(body) == (frozenset() if place == "within" else {Reference("files", "file-1")})
    assert first_file_id(body) == ("file-1" if place in ("before", "between") else None)


@pytest.mark.parametrize(
    "part",
    [
        '{"type":"image_url","image_url":{"url":"ms://file-1?%s"}}',
        '{"type":"image_url","image_url":{"url":"\\u006ds:%s//file-1"}}',
        '{"role":"system","content":"fileid://file-1,%s"}',
        '{"role":"system","content":"\\u0066\\u0069\\u006c\\u0065\\u0069\\u0064\\u003a//file-1,%s"}',
    ],
)
def test_a_long_string_that_names_a_file_at_its_beginning_is_found(part: str) -> None:
    """It may go on for as long as it likes."""
    body = f'{{"messages":["{LONG}",{part % ("/" * 300)}]}}'.encode()
    assert json_cuts.shortened(body) is not None
    assert references(body) == frozenset({Reference("files", "file-1")})


@pytest.mark.parametrize("escape", ['\\"', "\\\\", "\\u00e9", "\\ud83d\\ude00"])
def test_a_string_that_may_name_a_file_keeps_a_beginning_that_is_a_string_by_itself(escape: str) -> None:
    for shift in range(13):
        text = "f" + "x" * shift + escape * 400
        short, _ = cuts.shorten(f'[["{text}"]]'.encode())
        ((kept,),) = json.loads(short)
        assert json.loads(f'"{text}"').startswith(kept)
        assert 48 <= len(short) - len('[[""]]') < 48 + 12


def test_a_part_that_is_no_view_into_the_short_text_is_refused() -> None:
    """An offset that does not lie in the short text is an error and no read beyond the body."""
    body = f'{{"a":"{LONG}"}}'.encode()
    short, packed = cuts.shorten(body)
    for part in (b"elsewhere", Raw(b'"else"'), memoryview(body)):
        with pytest.raises(ValueError, match="does not lie"):
            cuts.whole(memoryview(body), short, packed, part)
    assert bytes(cuts.whole(memoryview(body), short, packed, memoryview(short)[5:-1])) == body[5:-1]
