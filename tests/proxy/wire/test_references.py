"""Objects that a body names are found wherever the upstream would find them."""

from __future__ import annotations

import json
from collections.abc import Set

import pytest

from proxy.wire.references import (
    CONTINUING,
    FURTHER,
    ITEMS,
    Reference,
    form_references,
    item_references,
    listed_items,
    references,
)

FILE = Reference("files", "file-1")
SCHEMA = {"properties": {"container": {"type": "string"}}, "examples": [{"container": "nginx", "file_id": "a"}]}


def found(body: object, *members: str) -> Set[Reference] | None:
    """The references of a body, of which these members may name objects."""
    text = json.dumps(body).encode()
    values = [json.dumps(body[name]).encode() for name in members] if isinstance(body, dict) else []
    return references(text, values)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"messages": [{"content": [{"type": "file", "file": {"file_id": "file-1"}}]}]}, {FILE}),
        ({"messages": [{"content": [{"source": {"type": "file", "file_id": "file-1"}}]}]}, {FILE}),
        ({"input": [{"content": [{"file_ids": ["file-1", "file-2", 7]}]}]}, {FILE, Reference("files", "file-2")}),
        ({"input_file_id": "file-1"}, {FILE._replace(is_input=True)}),
        ({"data_source": {"source": {"type": "file_id", "id": "file-1"}}}, {FILE}),
        ({"data_source": {"source": {"type": "file_content", "id": "file-1"}, "file_id": 7}}, set()),
        (
            {"input": [{"image_url": "ms://file-2"}, {"file_id": "file-3"}, {"type": "file_id", "id": "file-1"}]},
            {FILE, Reference("files", "file-2"), Reference("files", "file-3")},
        ),
        (
            {"input": [{"type": "file_id", "id": "file-1"}, {"image_url": "ms://file-2"}, {"file_id": "file-3"}]},
            {FILE, Reference("files", "file-2"), Reference("files", "file-3")},
        ),
        ({"messages": [{"content": 'the text "file_id": "file-1" is no key'}]}, set()),
        ({"messages": [{"content": "file_id"}], "file_id": 7}, set()),
        ({"messages": [{"content": "plain \u00e9"}]}, set()),
    ],
)
def test_files_are_found_in_content(body, expected) -> None:
    """By every key that providers use; text is no key."""
    assert found(body) == expected


def test_objects_of_other_kinds_are_found_in_the_members_that_may_name_them() -> None:
    """Tools, containers and conversations."""
    tools = [{"type": "file_search", "vector_store_ids": ["vs-1"]}, {"type": "code_interpreter", "container": "c-1"}]
    assert found({"tools": tools}, "tools") == {Reference("vector_stores", "vs-1"), Reference("containers", "c-1")}
    assert found({"conversation": {"id": "conv-1"}}, "conversation") == set()
    whole = {"conversation": {"id": "conv-1"}, "previous_response_id": "resp-1"}
    text = json.dumps(whole).encode()
    assert references(text, (text,)) == frozenset(
        {Reference("conversations", "conv-1"), Reference("responses", "resp-1")}
    )


def test_a_key_cannot_be_hidden_in_an_escape() -> None:
    """Letters and underscores as escapes are a reason to decode; escapes of other characters are none."""
    plain = b'{"messages":[{"content":[{"file_id":"file-1"}]}]}'
    for hidden in (b"file\\u005fid", b"\\u0066ile_id", b"\\u0046ile_id".replace(b"46", b"66")):
        assert references(plain.replace(b"file_id", hidden)) == frozenset({FILE})
    assert references(b'{"messages":[{"content":"\\u00e9\\u0022"}], broken') == frozenset()


def test_a_body_that_may_name_objects_and_cannot_be_read_has_unknown_ones() -> None:
    """It must not pass for one that names none."""
    assert references(b'{"file_id":"file-1"') is None
    assert references(b'{"file_id":"\xff"}') is None


def test_deep_nesting_is_walked_without_recursion() -> None:
    """A body nested as deeply as the decoder allows."""
    depth = 500
    body = b'{"a":' * depth + b'{"file_id":"file-1"}' + b"}" * depth
    assert references(body) == frozenset({FILE})


@pytest.mark.parametrize(
    ("item", "refers"),
    [
        ({"type": "item_reference", "id": "msg_1"}, True),
        ({"id": "msg_1"}, True),
        ({"id": "msg_1", "type": None}, True),
        ({"ID": "msg_1"}, True),
        ({"Type": "item_reference", "Id": "msg_1"}, True),
        ({"ID": "msg_1", "Role": "user", "content": "x"}, False),
        ({"id": "msg_1", "pad": "x" * 9000}, True),
        ({"pad": "x" * 9000, "type": "item_reference", "id": "msg_1"}, True),
        ({"type": "item_reference", "pad": "x" * 9000, "id": "msg_1"}, True),
        ({"role": "user", "content": "x"}, False),
        ({"id": "msg_1", "role": "assistant", "content": "x"}, False),
        ({"type": "function_call", "id": "fc_1", "call_id": "c"}, False),
        ({"type": "reasoning", "id": "rs_1", "encrypted_content": "x" * 9000}, False),
        ({"role": "user", "content": "item_reference" * 900}, False),
        ({"type": "image_generation_call", "id": "msg_1"}, True),
        ({"type": "image_generation_call", "id": "msg_1", "status": "completed", "result": None}, True),
        ({"Type": "image_generation_call", "ID": "msg_1", "result": ""}, True),
        ({"type": "image_generation_call", "id": "msg_1", "result": "iVBO"}, False),
        ({"type": "reasoning", "id": "msg_1", "summary": []}, True),
        ({"type": "reasoning", "id": "msg_1", "summary": [], "content": [], "encrypted_content": None}, True),
        ({"type": "reasoning", "id": "msg_1", "Encrypted_Content": "x", "summary": []}, True),
        ({"type": "reasoning", "id": "rs_1", "content": [{"type": "reasoning_text", "text": "x"}]}, False),
        ("a text", False),
        ({"id": 7}, False),
    ],
)
def test_an_item_that_only_refers_to_an_earlier_one_is_found(item, refers: bool) -> None:
    """Its type may be left out; items that bring their content refer to nothing, whatever their id."""
    found = item_references([memoryview(json.dumps(item).encode())])
    assert found == ([Reference(ITEMS, "msg_1")] if refers else [])


@pytest.mark.parametrize(
    ("url", "refers"),
    [
        ("ms://file-1", True),
        ("MS:\\/\\/file-1", True),
        ("\\u006ds\\u003a//file-1", True),
        ("ms\\u003a//file-1", True),
        ("https://host/ms://file-1", False),
        ("data:image/png;base64,ms", False),
    ],
)
@pytest.mark.parametrize(
    "member", ['"image_url":{"url":"%s"}', '"video_url":"%s"', '"Document_URL":"%s"', '"file_data":{"file_uri":"%s"}']
)
def test_a_url_of_an_uploaded_file_refers_to_it(member: str, url: str, refers: bool) -> None:
    """Moonshot reads pictures and videos by such URLs."""
    body = '{"messages":[{"role":"user","content":[{"type":"x",%s}]}]}' % (member % url)
    assert references(body.encode()) == (frozenset({FILE}) if refers else frozenset())
    own = '{"messages":[],"tools":[{"function":{"parameters":{"url":"ms://file-1"}}}]}'
    assert references(own.encode()) == frozenset()


@pytest.mark.parametrize(
    ("text", "refers"),
    [
        ("fileid://file-1", True),
        ("FileID:\\/\\/file-1,fileid://file-1", True),
        (" fileid\\u003a//file-1", True),
        ("file\\u0069d://file-1", True),
        ("what does fileid://file-1 mean?", False),
        ("fileid", False),
    ],
)
@pytest.mark.parametrize("member", ['"role":"system","content":"%s"', '"content":[{"type":"text","text":"%s"}]'])
def test_a_text_that_stands_for_files_refers_to_them(member: str, text: str, refers: bool) -> None:
    """Qwen reads a system message so if it is nothing else."""
    body = '{"messages":[{%s}]}' % (member % text)
    assert references(body.encode()) == (frozenset({FILE}) if refers else frozenset())


@pytest.mark.parametrize("s", ["s", "S", "\u017f", "\\u017f", "\\u017F"])
def test_no_letter_hides_a_member_within_one_that_the_dialect_does_not_have(s: str) -> None:
    """Go's decoder takes the long s for an s, at any depth."""
    body = '{"messages":[],"extra_body":{"converZation":"conv-1","vector_Ztore_ids":["vs-1"]}}'.replace("Z", s)
    expected = frozenset({Reference("conversations", "conv-1"), Reference("vector_stores", "vs-1")})
    assert references(body.encode(), (), FURTHER | CONTINUING) == expected


def test_an_item_that_a_request_within_another_refers_to_is_found() -> None:
    """As in the requests that are sent to a batch."""
    text = json.dumps({"requests": [{"body": {"input": [{"type": "item_reference", "id": "msg_1"}]}}]}).encode()
    assert references(text, (text,)) == frozenset({Reference(ITEMS, "msg_1")})


@pytest.mark.parametrize(
    ("member", "collection", "is_input"),
    [
        ({"input_files": ["x"]}, "files", True),
        ({"training_files": [{"file_id": "x"}]}, "files", False),
        ({"validation_files": ["x"]}, "files", False),
        ({"part_ids": ["x"]}, "parts", False),
    ],
)
def test_lists_of_what_was_uploaded_name_it(member, collection: str, is_input: bool) -> None:
    """For batches, for fine-tuning, and of the parts that make a file."""
    text = json.dumps(member).encode()
    assert references(text, (text,)) == frozenset({Reference(collection, "x", is_input)})


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b'{"input":[{"id":"a"},"b"]}', 2),
        (b'{"items":[{"id":"a"}],"input":"text"}', 1),
        (b'{"input":{"id":"a"}}', 0),
        (b'{"Input":[{"id":"a"}],"ITEMS":[{"id":"b"}],"input":[{"id":"c"}]}', 3),
        (b"[]", 0),
        (b"{", 0),
        (b"{}", 0),
    ],
)
def test_the_items_of_a_body_that_is_no_prompt_are_those_that_it_lists(body: bytes, count: int) -> None:
    assert len(listed_items(body)) == count


@pytest.mark.parametrize(
    "body",
    [
        b'{"file_id":"file-1","file_id":"file-2"}',
        b'{"input":[{"file_id":"file-1","file\\u005fid":"file-2"}]}',
        b'{"input":[{"file\\u005fid":"file-1","file_id":"file-2"}]}',
        b'{"file_id":"x","conversation":"a","Conversation" : "b","conversation":"c"}',
    ],
)
def test_a_key_that_is_given_twice_has_an_unknown_value(body: bytes) -> None:
    """Servers differ in which of the two they use."""
    assert references(body, (body,)) is None


def test_text_that_looks_like_a_second_key_is_none() -> None:
    """Quotation marks in text are escaped."""
    body = json.dumps({"file_id": "file-1", "text": '"file_id": "file-2"'}).encode()
    assert references(body) == frozenset({FILE})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_json_in_another_encoding_has_unknown_references(encoding: str) -> None:
    """Python's own decoder reads it, and so do servers that use it."""
    assert references(json.dumps({"file_id": "file-1"}).encode(encoding)) is None


def test_letter_case_does_not_hide_a_key() -> None:
    """Go's decoder, for one, ignores it."""
    assert found({"file_id": "file-1", "File_IDs": ["file-2"]}) == {FILE, Reference("files", "file-2")}
    assert found({"messages": [{"content": [{"FILE_ID": "file-1"}]}]}) == {FILE}
    tools = [{"type": "code_interpreter", "Container": "c-1"}]
    assert found({"tools": tools}, "tools") == {Reference("containers", "c-1")}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"PREVIOUS_RESPONSE_ID": "r"}, {Reference("responses", "r")}),
        ({"previou\u017f_respon\u017fe_id": "r"}, {Reference("responses", "r")}),
        ({"Conversation": {"id": "c"}}, {Reference("conversations", "c")}),
        ({"conver\u017fation": "c"}, {Reference("conversations", "c")}),
        ({"Container": "c"}, {Reference("containers", "c")}),
        ({"Tools": [{"vector_store_ids": ["v"]}]}, {Reference("vector_stores", "v")}),
        (
            {"previous_response_id": "a", "Previous_Response_Id": "b"},
            {Reference("responses", "a"), Reference("responses", "b")},
        ),
        ({"Model": "m", "MESSAGES": [], "metadata": {"Conversation": "c"}}, set()),
        ({"messages": [{"content": '{"Conversation":"c"}'}]}, set()),
    ],
)  # fmt: skip
def test_letter_case_does_not_hide_a_member_of_the_outermost_object(body, expected) -> None:
    """Go's decoder takes the long s for an s. The keys that a client chooses in its metadata name nothing."""
    assert references(json.dumps(body).encode()) == expected
    assert references(json.dumps(body, ensure_ascii=False).encode()) == expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (b'{"id":"a","ID":"b"}', {"a", "b"}),
        (b'{"id":"a","Role":"user"}', {"a"}),
        (b'{"ID":"a","Role":"user"}', set()),
        (b'{"id":"a","role":"user","Role":null}', {"a"}),
        (b'{"type":"message","id":"a","Type":"item_reference"}', {"a"}),
        (b'{"type":"item_reference","id":"a","Type":"message","Id":"b"}', {"a", "b"}),
        (b'{"type":"message","id":"a","call":{"ID":"b"}}', set()),
        (b'{"type":"reasoning","id":"a","content":[ \n]}', {"a"}),
        (b'{"type":"reasoning","id":"a","content":"X"}', set()),
    ],
)
def test_an_item_refers_to_every_id_that_some_server_would_read_in_it(item: bytes, expected: set[str]) -> None:
    """Whether it knows its keys in one letter case or in all."""
    assert {each.object_id for each in item_references([item])} == expected


@pytest.mark.parametrize("padding", [b"x" * 300, b"x" * 9_000])
def test_a_long_item_that_begins_like_content_may_refer_all_the_same(padding: bytes) -> None:
    """The last value of a key counts."""
    for hidden in (
        b'{"role":"user","pad":"%b","type":"item_reference","id":"msg_1"}',
        b'{"type":"message","pad":"%b","type":"item_reference","id":"msg_1"}',
        b'{"role":"user","pad":"%b","role":null,"id":"msg_1"}',
    ):
        assert item_references([hidden % padding]) == [Reference(ITEMS, "msg_1")]


TYPE = b"multipart/form-data; boundary=b"


def form(**fields: str) -> bytes:
    parts = [
        f'--b\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    return "".join(parts).encode() + b"--b--\r\n"


@pytest.mark.parametrize(
    "name", ["file_id", "File_ID", "file_id\u017f", "file_ids[]", "file_ids[0]", "image[file_id]", "input_file_id"]
)
def test_the_fields_of_a_form_refer_as_members_do(name: str) -> None:
    """However servers write structures in their names."""
    expected = FILE._replace(is_input=name == "input_file_id")
    assert form_references(form(**{"purpose": "x", name: "file-1"}), TYPE) == frozenset({expected})


def test_a_form_that_cannot_be_read_may_refer_only_if_it_has_the_names() -> None:
    """A decision is needed, and most forms that a strict reader refuses are honest."""
    assert form_references(b"preamble--b\r\nx", TYPE) == frozenset()
    assert form_references(b'{"file_id":"file-1"}', b"multipart/form-data") is None
    assert form_references(b"preamble" + form(FILE_ID="file-1"), TYPE) is None
    assert form_references(form(file_id="file-1").replace(b"file-1", b"\xff"), TYPE) is None


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"content": [{"type": "tool_use", "input": {"file_id": "a", "x": [{"container": "web-1"}]}}]}]},
        {"messages": [{"content": [{"type": "mcp_tool_use", "input": {"file_id": "drive-1"}}]}]},
        {
            "tools": [
                {"name": "get", "input_schema": {"default": {"file_id": "a"}}, "input_examples": [{"file_id": "b"}]}
            ]
        },
        {
            "tools": [
                {"function": {"parameters": {"properties": {"file_id": {"const": "a"}}, "default": {"file_id": "b"}}}}
            ]
        },
        {"metadata": {"conversation": "42", "file_id": "a"}},
        {"chat_template_kwargs": {"conversation": "short", "file_id": "a"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "deploy", "schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"guided_json": SCHEMA},
        {"attributes": {"conversation": "42"}},
        {"data_source_config": {"type": "custom", "item_schema": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA}},
    ],
)
def test_the_arguments_of_a_tool_and_the_client_s_own_keys_refer_to_nothing(body: dict[str, object]) -> None:
    """Many tools have an argument named file_id, and requests that repeat such a call must not be refused."""
    assert found(body | {"x": [{"user_id": "u"}]}, "x") == set()
    assert references(json.dumps(body).encode(), (), FURTHER | CONTINUING) == frozenset()


def test_what_a_tool_returned_may_refer() -> None:
    """Its content is read by the upstream, like that of any message."""
    result = {"type": "tool_result", "content": [{"type": "image", "source": {"type": "file", "file_id": "file-1"}}]}
    assert found({"messages": [{"content": [result]}]}) == {FILE}
    assert found({"input": {"file_id": "file-1"}}) == {FILE}
    assert found({"prompt": {"variables": {"x": {"type": "input_file", "file_id": "file-1"}}}}) == {FILE}


def test_an_argument_that_looks_like_a_second_key_is_none() -> None:
    """Keys are counted there as well."""
    call = {"type": "tool_use", "input": {"file_id": "a"}}
    assert found({"messages": [{"content": [call, {"file_id": "file-1"}]}]}) == {FILE}


@pytest.mark.parametrize(
    "body",
    [
        b'{"x":"' + b"\\u0061" * 50_000 + b'"}',
        b'{"input":[' + b",".join([b'{"file_id":"f"}'] * 10_001) + b"]}",
        b'{"file_ids":[' + b",".join([b'"f"'] * 10_001) + b"]}",
    ],
)
def test_so_many_escapes_or_references_that_they_take_long_are_unknown(body: bytes) -> None:
    """30 MB of escaped letters took 4 seconds, in which no other request was served."""
    assert references(body, (body,)) is None


def test_a_program_with_escapes_and_a_request_with_many_files_are_read() -> None:
    """Both stay far below the bounds."""
    body = b'{"x":"' + b"\\u0061" * 20_000 + b'","file_ids":[' + b",".join(b'"f%d"' % i for i in range(5_000)) + b"]}"
    assert len(references(body, (body,)) or ()) == 5_000
