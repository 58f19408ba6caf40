"""How a request names a context, and the splice: exactly the bytes that a client would have sent."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.model import Endpoint
from proxy.wire import contexts, request, splice

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
messages = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": texts}), max_size=4)
separators = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")])
NAMING = {"role": "cache", "content": "tag=book"}


def made(body: bytes, spliced: contexts.Spliced) -> bytes:
    return b"".join(splice.apply(body, spliced.edits)[0])


@given(messages, messages.filter(bool), separators, st.booleans(), st.sampled_from(["absent", "null", "last"]))
def test_a_named_context_is_spliced_in_as_if_it_had_been_sent(
    rest: list[Any], stored: list[Any], between: tuple[str, str], has_tools: bool, tools_are: str
) -> None:
    """This holds for any surroundings; the rest keeps its bytes, and the views are those of the rest."""
    tools = [{"type": "function"}] if has_tools else None
    fields: dict[str, Any] = {"model": "m", "messages": [NAMING, *rest], "n": 1}
    if tools_are == "null":
        fields["tools"] = None
    body = json.dumps(fields, separators=between, ensure_ascii=False).encode()
    inner = json.dumps(stored, separators=between, ensure_ascii=False).encode()[1:-1]
    prompt = request.read(body, Endpoint.CHAT)
    named = contexts.named_in(prompt)
    assert named is not None
    assert (named.reference.tag, named.reference.id) == ("book", None)
    spliced = contexts.splice_named(prompt, named, json.dumps(tools).encode() if tools else b"", inner)
    result = made(body, spliced)
    expected = {**fields, "messages": [*stored, *rest]} | ({"tools": tools} if tools else {})
    assert json.loads(result) == expected
    assert [bytes(view) for view in spliced.rest] == [
        json.dumps(message, separators=between, ensure_ascii=False).encode() for message in rest
    ]
    assert inner in result


@given(messages.filter(bool), messages, separators, separators, st.booleans())
def test_a_repeated_context_is_found_by_meaning(
    stored: list[Any], rest: list[Any], here: tuple[str, str], there: tuple[str, str], ascii_only: bool
) -> None:
    """Other white space, escapes and order of keys; the stored bytes take the place of the sent ones."""
    views = [json.dumps(message, separators=there).encode() for message in stored]
    turned = [dict(reversed(message.items())) for message in stored]
    body = json.dumps({"model": "m", "messages": [*turned, *rest]}, separators=here, ensure_ascii=ascii_only).encode()
    prompt = request.read(body, Endpoint.CHAT)
    spliced = contexts.splice_repeated(prompt, b"", b",".join(views), [memoryview(view) for view in views])
    assert isinstance(spliced, contexts.Spliced)
    result = made(body, spliced)
    assert json.loads(result)["messages"] == [*stored, *rest]
    assert b",".join(views) in result
    assert len(spliced.rest) == len(rest)


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        (b"1", b"1.0"),
        (b"1", b"true"),
        (b"0", b"false"),
        (b"null", b'""'),
        (b'"a"', b'"b"'),
        (b"[1,2]", b"[2,1]"),
        (b'{"a":null}', b"{}"),
        (b"123456789012345678901", b"123456789012345678902"),
    ],
)
def test_what_only_python_takes_for_equal_is_not(sent: bytes, stored: bytes) -> None:
    """Another value is another prompt."""
    body = b'{"model":"m","messages":[{"role":"user","content":%b}]}' % sent
    mine = memoryview(b'{"role":"user","content":%b}' % stored)
    prompt = request.read(body, Endpoint.CHAT)
    assert contexts.splice_repeated(prompt, b"", bytes(mine), [mine]) == "messages[0]"


@pytest.mark.parametrize("word", ["cache", "cached", "role", '"cache"'])
def test_a_message_that_only_speaks_of_caches_is_no_reference(word: str) -> None:
    """A message that has the word as a value is none either."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": word, "name": "cache"}]}).encode()
    assert contexts.named_in(request.read(body, Endpoint.CHAT)) is None


def test_a_second_naming_is_found_in_a_long_body_too() -> None:
    """There the short messages alone are searched."""
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 50_000}, NAMING]}
    prompt = request.read(json.dumps(body).encode(), Endpoint.CHAT)
    assert prompt.may_name_context
    with pytest.raises(BadRequest) as refused:
        contexts.named_in(prompt)
    assert refused.value.param == "messages[1].role"


def test_ids_and_tags_that_cannot_be_are_unknown_and_not_looked_up() -> None:
    """They never become part of a key."""
    for content in ("cache_id=cache-../x", "tag=a b", "tag=1st", "cache_id=CACHE-" + "0" * 32):
        reference = contexts.read_reference(content)
        assert (reference.id, reference.tag) == (None, None)


HOSTILE_BODIES = [
    b'{"model":"m","messages":null}',
    b'{"model":"m","messages":null,"x":"cache"}',
    b'{"model":"m","messages":[]}',
    b'{"model":"m","messages":[null]}',
    b'{"model":"m","messages":["cache"]}',
    b'{"model":"m","messages":[{"role":"cache","content":"tag=\xff"}]}',
    b'{"model":"m","messages":[{"role":"cache","content":"tag=a","name":"\xff"}]}',
    b'{"model":"m","messages":[{"role":"cache","content":"tag=a"},{"role":"user","content":"\xff\xfe"}]}',
    b'{"model":"m","messages":[{"role":"cache","content":"tag=a"}],"tools":"\xff"}',
    b'{"model":"m","messages":[{"role":"cache\xff","content":"cache"}]}',
    b'{"model":"m","messages":[{"role":"\\ud800","content":"\\ud800"}],"x":"cache"}',
    b'{"model":"m","messages":[' + b"[" * 3000 + b"]" * 3000 + b',"cache"]}',
]


@pytest.mark.parametrize("body", HOSTILE_BODIES)
def test_null_messages_and_invalid_text_are_refused_or_passed_on(body: bytes) -> None:
    """In or beside a reference, by message and by header: BadRequest or no context, never another exception."""
    with contextlib.suppress(BadRequest):
        prompt = request.read(body, Endpoint.CHAT)
        named = contexts.named_in(prompt)
        if named is not None:
            contexts.splice_named(prompt, named, b"", b"{}")
    with contextlib.suppress(BadRequest):
        prompt = request.read(body, Endpoint.CHAT)
        contexts.splice_repeated(prompt, b"", b'{"a":1}', [memoryview(b'{"a":1}')])


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_any_bytes_around_a_reference_are_refused_or_read(before: bytes, after: bytes) -> None:
    """This holds for anything inside the content and beside it."""
    body = b'{"model":"m","messages":[{"role":"cache","content":"tag=%b"},{"role":"user","content":"%b"}]}'
    with contextlib.suppress(BadRequest):
        contexts.named_in(request.read(body % (before, after), Endpoint.CHAT))


@pytest.mark.parametrize(
    "content",
    [
        7,
        "",
        "tag",
        "tag=",
        "tag=a;tag=b",
        "tag=a;ttl=7",
        "tag=a;cache_id=b",
        "dry_run=1",
        "tag=a;reset_ttl=0",
        "tag=a;reset_ttl=-1",
        "tag=a;reset_ttl=1234567890",
        "tag=a;reset_ttl=\u0661",
        "tag=a;dry_run=yes",
    ],
)
def test_a_malformed_reference_is_refused_with_its_field(content: object) -> None:
    """Each key once, one name, and options that make sense."""
    with pytest.raises(BadRequest) as caught:
        contexts.read_reference(content)
    assert caught.value.param == "messages[0].content"


@pytest.mark.parametrize("content", ["reset_ttl=60", "tag=a;cache_id=cache-1"])
def test_a_reference_to_nothing_or_to_two_contexts_is_refused_with_what_to_write(content: str) -> None:
    """The error names the two keys."""
    with pytest.raises(BadRequest, match=r"^The content must have either cache_id or tag\.$"):
        contexts.read_reference(content)


@pytest.mark.parametrize("content", ["tag=1x", "cache_id=x", "tag=" + "a" * 200])
def test_a_name_that_no_context_can_have_is_a_reference_to_none(content: str) -> None:
    """It is answered like a name that does not exist."""
    found = contexts.read_reference(content)
    assert (found.id, found.tag) == (None, None)


def test_a_repeated_context_must_be_there_to_be_replaced() -> None:
    """Fewer messages than are stored, or a context without messages, differ; a broken body is refused."""
    prompt = request.read(b'{"model":"m","messages":[{"a":1}]}', Endpoint.CHAT)
    view = memoryview(b'{"a":1}')
    assert contexts.splice_repeated(prompt, b"", b'{"a":1},{"a":1}', [view, view]) == "messages"
    assert contexts.splice_repeated(prompt, b"", b"", []) == "messages"
    assert contexts.splice_repeated(prompt, b"[1]", b'{"a":1}', [view]) == "tools"
    broken = request.read(b'{"model":"m","messages":[{"a":1}]}', Endpoint.COMPLETIONS)
    with pytest.raises(BadRequest):
        contexts.splice_repeated(dataclasses.replace(broken, body=b'{"messages":7}'), b"", b"", [view])


def test_repeated_tools_are_replaced_by_the_stored_ones() -> None:
    """Equal by meaning, with the stored bytes."""
    prompt = request.read(b'{"model":"m","tools":[ {"a":1.0} ],"messages":[{"a":1}]}', Endpoint.CHAT)
    spliced = contexts.splice_repeated(prompt, b'[{"a":1.0}]', b'{"a":1}', [memoryview(b'{"a":1}')])
    assert isinstance(spliced, contexts.Spliced)
    assert made(bytes(prompt.body), spliced) == b'{"model":"m","tools":[{"a":1.0}],"messages":[{"a":1}]}'


def test_a_context_may_be_named_in_headers() -> None:
    """By its id, with the same options as in a message; without an id none is named."""
    named = contexts.reference_in(
        [
            (b"accept", b"*/*"),
            (b"x-msh-context-cache", b" cache-0123456789abcdef01234567 "),
            (b"x-msh-context-cache-reset-ttl", b"60"),
            (b"x-msh-context-cache-dryrun", b"1"),
        ]
    )
    assert named is not None
    assert (named.tag, named.reset_ttl_seconds, named.dry_run) == (None, 60, True)
    assert contexts.reference_in([(b"x-msh-context-cache-reset-ttl", b"60")]) is None
    assert contexts.reference_in([]) is None


@pytest.mark.parametrize(
    ("header", "value"),
    [(b"-reset-ttl", b"0"), (b"-reset-ttl", b"-1"), (b"-reset-ttl", b"1e3"), (b"-dryrun", b"yes")],
)
def test_options_that_cannot_be_read_are_refused_and_the_error_names_the_header(header: bytes, value: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        contexts.reference_in([(b"x-msh-context-cache", b"x"), (b"x-msh-context-cache" + header, value)])
    assert caught.value.param == "X-Msh-Context-Cache"


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_beside_a_named_context_are_refused_and_the_error_names_the_field(key: str) -> None:
    """The stored context has its own; null is as good as absent."""
    for value, is_refused in (([], True), (None, False)):
        body = json.dumps({"model": "m", "messages": [NAMING], key: value}).encode()
        prompt = request.read(body, Endpoint.CHAT)
        if is_refused:
            with pytest.raises(BadRequest) as caught:
                contexts.named_in(prompt)
            assert caught.value.param == key
        else:
            assert contexts.named_in(prompt) is not None


def test_every_option_of_a_reference_is_known_and_others_are_refused() -> None:
    read = contexts.read_reference("tag=book;reset_ttl=60;dry_run=1")
    assert (read.tag, read.reset_ttl_seconds, read.dry_run) == ("book", 60, True)
    for content in ("tag=book;other=1", "tag=book;dry_run=2", "tag=book;reset_ttl=x", "tag=a;tag=b"):
        with pytest.raises(BadRequest):
            contexts.read_reference(content)


def test_an_empty_list_of_tools_repeats_a_context_without_tools_and_no_other() -> None:
    """So does null."""
    stored = b'{"role":"user","content":"a"}'
    for sent in ("[]", "null"):
        body = b'{"model":"m","tools":%b,"messages":[%b]}' % (sent.encode(), stored)
        prompt = request.read(body, Endpoint.CHAT)
        assert isinstance(contexts.splice_repeated(prompt, b"", stored, [memoryview(stored)]), contexts.Spliced)
        assert contexts.splice_repeated(prompt, b'[{"a":1}]', stored, [memoryview(stored)]) == "tools"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (7, "The content of a message of the role cache must be a string."),
        ("tag", "The content must be key=value pairs separated by semicolons, each key once."),
        ("tag=a;tag=b", "The content must be key=value pairs separated by semicolons, each key once."),
        ("tag=a;reset_ttl=", "The content must be key=value pairs separated by semicolons, each key once."),
        ("tag=a;ttl=5", "The content may have the keys cache_id, tag, reset_ttl and dry_run only."),
        ("dry_run=1", "The content must have either cache_id or tag."),
        ("tag=a;cache_id=b", "The content must have either cache_id or tag."),
        ("tag=a;reset_ttl=0", "reset_ttl must be a positive number of seconds."),
        ("tag=a;reset_ttl=1.5", "reset_ttl must be a positive number of seconds."),
        ("tag=a;reset_ttl=\u0663", "reset_ttl must be a positive number of seconds."),
        ("tag=a;reset_ttl=1234567890", "reset_ttl must be a positive number of seconds."),
        ("tag=a;dry_run=2", "dry_run must be 0 or 1."),
    ],
)
def test_the_error_for_a_reference_says_how_it_must_be(content: Any, message: str) -> None:
    """It names the content of the first message, and for a header the header."""
    with pytest.raises(BadRequest) as refused:
        contexts.read_reference(content)
    assert (refused.value.message, refused.value.param) == (message, "messages[0].content")


def test_the_options_of_a_reference_are_read_in_any_order() -> None:
    """A reset of 999,999,999 seconds is the longest; a dry run must be asked for."""
    name = "cache-" + "0" * 32
    assert contexts.read_reference("reset_ttl=999999999;tag=book;dry_run=1") == contexts.Reference(
        None, "book", 999_999_999, True
    )
    assert contexts.read_reference(f"dry_run=0;cache_id={name}") == contexts.Reference(name, None, None, False)
    assert contexts.read_reference("tag=a;reset_ttl=1").reset_ttl_seconds == 1


def test_headers_name_a_context_by_its_id_and_have_the_same_options() -> None:
    name = b"cache-" + b"0" * 32
    header = b"x-msh-context-cache"
    named = [(header, b" %b " % name), (header + b"-reset-ttl", b"7"), (header + b"-dryrun", b"1")]
    assert contexts.reference_in(named) == contexts.Reference(name.decode(), None, 7, True)
    assert contexts.reference_in(named[1:]) is None
    assert contexts.reference_in([(header, b"\xe9")]) == contexts.Reference(None, None, None, False)
    for option, value, message in (
        (b"-reset-ttl", b"-1", "reset_ttl must be a positive number of seconds."),
        (b"-dryrun", b"yes", "dry_run must be 0 or 1."),
    ):
        with pytest.raises(BadRequest) as refused:
            contexts.reference_in([(header, name), (header + option, value)])
        assert (refused.value.message, refused.value.param) == (message, "X-Msh-Context-Cache")


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}, NAMING]},
            "Only the first message may have the role cache.",
            "messages[1].role",
        ),
        (
            {"messages": [NAMING], "tools": []},
            "tools must be absent: the stored context has its own.",
            "tools",
        ),
        (
            {"messages": [NAMING], "functions": [{}]},
            "functions must be absent: the stored context has its own.",
            "functions",
        ),
    ],
)
def test_the_error_for_a_request_with_a_reference_says_what_is_wrong_with_it(
    fields: dict[str, Any], message: str, param: str
) -> None:
    prompt = request.read(json.dumps({"model": "m", **fields}).encode(), Endpoint.CHAT)
    with pytest.raises(BadRequest) as refused:
        contexts.named_in(prompt)
    assert (refused.value.message, refused.value.param) == (message, param)


def test_the_error_for_a_body_or_a_message_that_cannot_be_read_says_so() -> None:
    prompt = request.read(b'{"model":"m","messages":[{"role":"cache","content":"tag=a"}]}', Endpoint.CHAT)
    for body, message, param in (
        (b"[]", "The body must be a JSON object with an array of messages, in UTF-8.", None),
        (b'{"messages":[{},["cache"]]}', "A message must be a JSON object in UTF-8.", "messages[1]"),
    ):
        with pytest.raises(BadRequest) as refused:
            contexts.named_in(dataclasses.replace(prompt, body=body))
        assert (refused.value.message, refused.value.param) == (message, param)
