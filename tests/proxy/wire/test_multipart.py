"""Forms are read without copying, and one that parsers could read differently is not read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.multipart import PARTS_MOST, FormReader, UnreadableForm, fields, is_form

TYPE = b"multipart/form-data; boundary=b"
HEAD = b"--b\r\ncontent-disposition: form-data"
MODEL = HEAD + b'; name="model"\r\n\r\nm\r\n'
END = b"--b--\r\n"
LONE = b'content-disposition: form-data; name="model"\n\nm\r\n'
"""A field behind lone line feeds, which Werkzeug finds even within the value of another one."""


def values(body: bytes, content_type: bytes = TYPE) -> list[tuple[str, bytes]]:
    """The fields as bytes."""
    return [(field.name, bytes(field.value)) for field in fields(body, content_type)]


def test_fields_are_found_with_their_bytes() -> None:
    """Files, empty values, line ends and boundaries' beginnings inside them, and heads in any letter case."""
    head = b'--b\r\nContent-Disposition: Form-Data; name="file"; filename="a \xff.wav"\r\nContent-Type: audio/wav'
    file = head + b"\r\n\r\n\x00--b\r\n-\r\n--\r\n"
    empty = HEAD + b"; filename*=utf-8''x; name=\"n\"\r\n\r\n\r\n"
    assert values(MODEL + file + empty + END) == [("model", b"m"), ("file", b"\x00--b\r\n-\r\n--"), ("n", b"")]
    assert values(MODEL + END, b'Multipart/Form-Data; charset=utf-8; boundary="b"') == [("model", b"m")]
    for name in (rb"a\"b.wav", rb"C:\a.wav", rb"C:\a\\", "\u00e4".encode()):
        named = HEAD + b'; name="file"; filename="' + name + b'"\r\n\r\nx\r\n'
        assert values(named + MODEL + END) == [("file", b"x"), ("model", b"m")], name
    body = MODEL + END
    assert next(iter(fields(body, TYPE))).value.obj is body


def test_names_of_fields_may_be_without_quotes() -> None:
    """As .NET sends them."""
    file = HEAD + b"; name=file; filename=a.jsonl; filename*=utf-8''a.jsonl\r\n\r\nx\r\n"
    granularity = HEAD + b"; name=timestamp_granularities[]\r\n\r\nword\r\n"
    body = HEAD + b"; name=model\r\n\r\nm\r\n" + file + granularity + END
    expected = [("model", b"m"), ("file", b"x"), ("timestamp_granularities[]", b"word")]
    assert values(body, b'multipart/form-data; boundary="b"') == expected


@pytest.mark.parametrize(
    "parameter",
    [
        b"",
        b'; boundary=""',
        b"; boundary=b; boundary=c",
        b"; boundary=" + b"b" * 71,
        b'; boundary="b b"',
        b"; boundary*=utf-8''b",
        b"; boundary*0=b",
    ],
)
def test_a_boundary_that_is_missing_or_ambiguous_is_refused(parameter: bytes) -> None:
    """Parsers differ in what they make of it."""
    with pytest.raises(UnreadableForm):
        values(MODEL + END, b"multipart/form-data" + parameter)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        MODEL,
        b"preamble\r\n" + MODEL + END,
        MODEL.replace(b"--b\r\n", b"--b \r\n", 1) + END,
        MODEL.replace(b"\r\n", b"\n") + END,
        b"--b\r\n\r\nm\r\n" + END,
        HEAD + b"\r\n\r\nm\r\n" + END,
        HEAD + b'; name="a"; name="b"\r\n\r\nm\r\n' + END,
        HEAD + b'; name="a\\"b"\r\n\r\nm\r\n' + END,
        HEAD + b"; name*=utf-8''a\r\n\r\nm\r\n" + END,
        HEAD + b"; name=a b\r\n\r\nm\r\n" + END,
        HEAD + b'; name=a"b"\r\n\r\nm\r\n' + END,
        HEAD + b"; name=\r\n\r\nm\r\n" + END,
        HEAD + b'; name=a; name="b"\r\n\r\nm\r\n' + END,
        HEAD + b"; name=a; name=b\r\n\r\nm\r\n" + END,
        HEAD + b'; filename="a\\"; name="b"; name="c"\r\n\r\nm\r\n' + END,
        HEAD + b'; name="b"; filename="a\\"; name=\\""\r\n\r\nm\r\n' + END,
        b'--b\r\ncontent-disposition: attachment; name="a"\r\n\r\nm\r\n' + END,
        HEAD + b'; name="a"\r\ncontent-disposition: form-data; name="b"\r\n\r\nm\r\n' + END,
        HEAD + b'; name="a"\r\ncontent-transfer-encoding: base64\r\n\r\nbQ==\r\n' + END,
        HEAD + b'; name="a"\r\nContent-Transfer-Encoding : Quoted-Printable\r\n\r\n=6d\r\n' + END,
        b"--b\r\nx: " + b"y" * 5000 + MODEL[5:] + END,
        MODEL * (PARTS_MOST + 1) + END,
        HEAD + b'; name="a"\r\n\r\nx\n--b\n' + LONE + END,
        HEAD + b'; name="a"\r\n\r\nx\r--b\r' + LONE[:-2].replace(b"\n", b"\r") + b"\r\n" + END,
        HEAD + b'; name="a"\r\n\r\n\n--b\n' + LONE + END,
        HEAD + b'; name="a"\r\nx: y\n\nz\n--b\n' + LONE + b"\r\n\r\ny\r\n" + END,
        HEAD + b'; name="a"\r\nx: y\n' + HEAD[5:] + b'; name="model"\r\n\r\nm\r\n' + END,
        HEAD + b'; name="a"\r\n ; name="model"\r\n\r\nm\r\n' + END,
        HEAD + b'; name="a"\r\n\t; name="model"\r\n\r\nm\r\n' + END,
        HEAD + b'; name="a"\r\ncontent-disposition : form-data; name="model"\r\n\r\nm\r\n' + END,
    ],
    ids=range(31),
)
def test_a_form_that_two_parsers_could_read_differently_is_refused(body: bytes) -> None:
    """No end, names given twice or encoded, coded values, lone line ends, folded lines, endless heads and parts."""
    with pytest.raises(UnreadableForm):
        values(body)
    with pytest.raises(UnreadableForm):
        values_in_pieces([body])


def values_in_pieces(pieces: list[bytes], content_type: bytes = TYPE) -> list[tuple[str, bytes]]:
    """The fields of a form that comes in pieces."""
    reader = FormReader(content_type)
    found: list[tuple[str, bytes]] = []
    value = b""
    for piece in pieces:
        for each in reader.feed(piece):
            value += each.value
            if each.is_last:
                found.append((each.name, value))
                value = b""
    if not reader.is_complete:
        raise UnreadableForm
    return found


PARTS = st.sampled_from(
    (HEAD, b'; name="n"', b"; filename=x", b"\r\n", b"\r\n\r\n", b"--b", b"--", b"\r", b"\n", b"value", END)
)


@given(
    st.lists(PARTS, max_size=12).map(b"".join)
    | st.lists(st.sampled_from((MODEL, MODEL[:-1])), max_size=3).map(lambda parts: b"".join(parts) + END),
    st.lists(st.integers(0, 200), max_size=6).map(sorted),
)
def test_a_form_in_pieces_has_the_fields_of_the_whole_one(body: bytes, cuts: list[int]) -> None:
    """Wherever it is cut, even into single bytes; what is no form to one is none to the other."""
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    try:
        expected = values(body)
    except UnreadableForm:
        expected = None
    for parts in (pieces, [body], [body[at : at + 1] for at in range(len(body))]):
        try:
            found = values_in_pieces(parts)
        except UnreadableForm:
            found = None
        is_followed = expected is not None and found is None and body.rstrip() != body[: body.find(b"--b--") + 5]
        assert found == expected or is_followed


def test_a_reader_of_pieces_holds_little_of_a_value_and_refuses_what_follows_the_form() -> None:
    """A value is passed on but for the bytes that may begin a delimiter."""
    reader = FormReader(TYPE)
    assert reader.feed(HEAD + b'; name="file"\r\n\r\n') == []
    given_bytes = sum(len(each.value) for _ in range(100) for each in reader.feed(b"x" * 1000 + b"\r"))
    assert given_bytes >= 100_100 - 5
    reader.feed(b"\r\n--b--")
    assert reader.is_complete
    reader.feed(b"\r\n")
    with pytest.raises(UnreadableForm):
        reader.feed(b"--b")


def test_a_form_is_told_by_its_type_in_any_letter_case() -> None:
    """Other types are no forms."""
    assert is_form(b"Multipart/Form-Data; boundary=b")
    assert not is_form(b"multipart/mixed; boundary=b")
    assert not is_form(b"application/json")
