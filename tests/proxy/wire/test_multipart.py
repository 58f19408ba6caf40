"""Forms are read without copying, and one that parsers could read differently is not read."""

from __future__ import annotations

import pytest

from proxy.wire.multipart import PARTS_MOST, UnreadableForm, fields, is_form

TYPE = b"multipart/form-data; boundary=b"
HEAD = b"--b\r\ncontent-disposition: form-data"
MODEL = HEAD + b'; name="model"\r\n\r\nm\r\n'
END = b"--b--\r\n"


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
        HEAD + b"; name=a\r\n\r\nm\r\n" + END,
        HEAD + b'; filename="a\\"; name="b"; name="c"\r\n\r\nm\r\n' + END,
        HEAD + b'; name="b"; filename="a\\"; name=\\""\r\n\r\nm\r\n' + END,
        b'--b\r\ncontent-disposition: attachment; name="a"\r\n\r\nm\r\n' + END,
        HEAD + b'; name="a"\r\ncontent-disposition: form-data; name="b"\r\n\r\nm\r\n' + END,
        b"--b\r\nx: " + b"y" * 5000 + MODEL[5:] + END,
        MODEL * (PARTS_MOST + 1) + END,
    ],
    ids=range(17),
)
def test_a_form_that_two_parsers_could_read_differently_is_refused(body: bytes) -> None:
    """A missing end, names given twice or encoded, bare line feeds, endless heads and parts."""
    with pytest.raises(UnreadableForm):
        values(body)


def test_a_form_is_told_by_its_type_in_any_letter_case() -> None:
    """Other types are no forms."""
    assert is_form(b"Multipart/Form-Data; boundary=b")
    assert not is_form(b"multipart/mixed; boundary=b")
    assert not is_form(b"application/json")
