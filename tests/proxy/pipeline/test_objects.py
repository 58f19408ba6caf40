"""Objects are remembered with their owner, by what the upstream reports and not by what a client could write."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from cache import ObjectLocations
from proxy.fleet.pools import ServedPool
from proxy.model import Access
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.objects import CreatedObjects
from proxy.records import Tenant
from tests.proxy.pipeline.test_reader import exchange

USAGE = {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7}


class Journal:
    """Shares nothing."""

    def __init__(self) -> None:
        self.locations = ObjectLocations()

    def own(self, made_id: str, replica: int) -> None:
        self.locations.learn(made_id, f"replica-{replica}")


class Attempt:
    """An attempt, of which only the replica counts."""

    replica = 1


def asked(method: str, target: str, *, shares_key: bool = True, allowed: tuple[str, ...] = ()) -> Exchange:
    """A request that replica 1 has answered."""
    made = exchange(method, target, {"model": "m", "input": "x"}, allowed=allowed)
    made.pool = ServedPool("p", ("*",), shares_key=shares_key)
    made.attempt = Attempt()  # type: ignore[assignment]
    return made


def noted(method: str, target: str, body: Any, **options: Any) -> tuple[dict[str, str], Exchange]:
    """Return what is remembered after one response."""
    journal, made = Journal(), asked(method, target, **options)
    CreatedObjects(journal).note(made, body if isinstance(body, bytes) else json.dumps(body).encode())
    return {key: name for part in journal.locations.chunks(99) for key, name in part.items()}, made


def test_a_created_object_belongs_to_its_creator_where_the_key_is_shared() -> None:
    """With the client's own key the upstream knows whose it is."""
    assert noted("POST", "/v1/files", {"id": "file-1"})[0] == {"mine/file-1": "replica-1"}
    assert noted("POST", "/v1/files", {"id": "file-1"}, shares_key=False)[0] == {"file-1": "replica-1"}


def test_what_a_path_that_is_open_to_all_names_may_be_anothers() -> None:
    """A file in a vector store keeps its id, so nobody owns a file for having put it into one."""
    for target, allowed, known in (
        ("/v1/vector_stores", "/v1/vector_stores*", {"mine/x": "replica-1"}),
        ("/v1/vector_stores?a=b/c", "/v1/vector_stores*", {"mine/x": "replica-1"}),
        ("/v1/vector_stores/vs/files", "/v1/vector_stores*", {"x": "replica-1"}),
        ("/v1/batches/batch_1/cancel", "/v1/batches/*", {"x": "replica-1"}),
    ):
        assert noted("POST", target, {"id": "x"}, allowed=(allowed,))[0] == known
    assert noted("GET", "/v1/batches/b", {"id": "b", "output_file_id": "x"}, allowed=("/v1/batches/*",))[0] == {
        "x": "replica-1"
    }


def test_ones_own_object_at_a_path_that_is_open_to_all_names_ones_own() -> None:
    """As it does where the path is not open."""
    journal, made = Journal(), asked("GET", "/v1/batches/b", allowed=("/v1/batches/*",))
    journal.own("mine/b", 1)
    assert made.call.access is Access.CONFIGURED
    CreatedObjects(journal).note(made, b'{"id":"b","output_file_id":"x"}')
    assert journal.locations.of("mine/x") == "replica-1"


def test_files_that_the_upstream_made_for_a_batch_or_an_upload_belong_to_its_owner() -> None:
    """They are named when the batch is read, or the upload completed."""
    batch = {"id": "batch-1", "output_file_id": "file-2", "error_file_id": "file-3"}
    assert set(noted("GET", "/v1/batches/batch-1", batch)[0]) == {"mine/file-2", "mine/file-3"}
    upload = {"id": "upload-1", "file": {"id": "file-4"}}
    assert set(noted("POST", "/v1/uploads/upload-1/complete", upload)[0]) == {"mine/upload-1", "mine/file-4"}


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_file_whose_lines_were_checked_is_noted_so_for_its_client_and_its_tenant(is_checked: bool) -> None:
    """Before the file itself, so that another worker which knows the file knows this too."""
    journal, made = Journal(), asked("POST", "/v1/files")
    made.call = dataclasses.replace(made.call, tenant=Tenant("mine", client="team"))
    made.has_checked_lines = is_checked
    CreatedObjects(journal).note(made, b'{"id":"file-1"}')
    marks = ["checked:team:mine/file-1", "checked:mine/file-1"] if is_checked else []
    assert [key for part in journal.locations.chunks(9) for key in part] == [*marks, "mine/file-1"]


@pytest.mark.parametrize(
    "target", ["/v1/files/file-1/content", "/v1/files/file-1", "/v1/batches/b/x", "/v1/responses/r"]
)
def test_reading_an_object_makes_nothing_ones_own(target: str) -> None:
    """Or a client would upload a file that names another's, and read it."""
    stolen = {"id": "file-9", "output_file_id": "file-9", "file": {"id": "file-9"}, "background": True}
    assert noted("GET", target, stolen)[0] == {}


@pytest.mark.parametrize("body", [b"", b"[]", b"x", b'{"id":7}', b'{"id":""}', b"\xff"])
def test_a_response_without_an_id_is_passed_over(body: bytes) -> None:
    """This holds for any response."""
    assert noted("POST", "/v1/files", body)[0] == {}


def test_the_id_of_a_streamed_response_is_found_in_its_first_event() -> None:
    """As soon as it is there, and not in what the client may have put before it."""
    objects, made = CreatedObjects(journal := Journal()), asked("POST", "/v1/responses")
    opening = b'event: response.created\ndata: {"type":"response.created","response":{"object":"response",'
    assert not objects.note_opening(made, opening)
    assert not objects.note_opening(made, opening + b'"metadata":{"id":"resp_9"},"id":"resp_1"')
    assert objects.note_opening(made, opening + b'"id":"resp_1","background":false')
    assert list(journal.locations.chunks(9)) == [{"mine/resp_1": "replica-1"}]
    assert made.background_id is None


FUNCTION = {"type": "function", "name": "f", "parameters": {"response": {"id": "resp_9"}, "id": "chatcmpl-9"}}


@pytest.mark.parametrize(
    ("path", "event", "made_id"),
    [
        ("/v1/responses", {"response": {"tools": [FUNCTION], "id": "resp_1"}}, "resp_1"),
        ("/v1/responses", {"response": {"tools": [FUNCTION], "id": 7}}, None),
        ("/v1/responses", {"note": {"response": {"id": "resp_9"}}, "response": {"x": [], "id": "resp_1"}}, "resp_1"),
        ("/v1/responses", {"x": [FUNCTION], "type": "error"}, None),
        ("/v1/chat/completions", {"choices": [FUNCTION], "id": "chatcmpl-1"}, "chatcmpl-1"),
    ],
)
def test_the_id_of_a_stream_behind_what_the_client_sent_is_the_upstream_s(path: str, event, made_id) -> None:
    """Servers that sort the members of an event write a client's schemas before it, with ids of its choice."""
    objects, made = CreatedObjects(journal := Journal()), asked("POST", path)
    opening = b"event: x\ndata: [1]\r\ndata: %b\r\n\r\n" % json.dumps(event).encode()
    for end in range(len(opening) - 4):
        assert not objects.note_opening(made, opening[:end])
    assert objects.note_opening(made, opening) is (made_id is not None)
    assert [key for part in journal.locations.chunks(9) for key in part] == [f"mine/{made_id}"] * (
        made_id is not None
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_a_background_response_is_counted_once(streamed: bool) -> None:
    """Not when it is created, nor while it runs; then once, whoever asks and how."""
    objects = CreatedObjects(Journal())
    running = {"id": "resp_1", "status": "queued", "background": True, "usage": None}
    objects.note(asked("POST", "/v1/responses"), json.dumps(running).encode())
    counted = []
    done = json.dumps(running | {"status": "completed", "model": "m", "usage": USAGE}).encode()
    if streamed:
        done = b'data: {"type":"response.completed","response":%b}\n\n' % done
    for body in (json.dumps(running).encode(), done, done):
        made = asked("GET", "/v1/responses/resp_1")
        objects.note(made, body)
        counted.append(None if made.usage is None else (made.usage.prompt_tokens, made.model))
    assert counted == [None, (5, "m"), None]


@pytest.mark.parametrize("before", [b"", b"\r\n"])
def test_items_of_a_stream_that_is_read_as_a_whole_are_ones_own(before: bytes) -> None:
    """Space before its first event makes no difference."""
    journal = Journal()
    item = {"type": "response.output_item.added", "item": {"id": "rs_1", "type": "reasoning"}}
    body = before + b"event: x\ndata: %b\n\n" % json.dumps(item).encode()
    CreatedObjects(journal).note(asked("GET", "/v1/responses/resp_1"), body)
    assert {key for part in journal.locations.chunks(9) for key in part} == {"mine/rs_1"}


def test_a_background_stream_that_brings_its_usage_is_counted_there() -> None:
    """A later GET of it counts nothing."""
    objects, made = CreatedObjects(Journal()), asked("POST", "/v1/responses")
    assert objects.note_opening(made, b'data: {"response":{"id":"resp_1","background":true')
    later = asked("GET", "/v1/responses/resp_1")
    objects.note_end(made)
    body = json.dumps({"id": "resp_1", "usage": USAGE, "model": "m"}).encode()
    objects.note(later, body)
    assert later.usage is not None
    assert later.model == "m"
    made.usage = later.usage
    objects.note_end(made)
    last = asked("GET", "/v1/responses/resp_1")
    objects.note(last, body)
    assert last.usage is None


def test_nothing_is_learned_of_a_request_that_no_replica_answered() -> None:
    """There is no place to remember."""
    journal, made = Journal(), exchange("POST", "/v1/files")
    CreatedObjects(journal).note(made, b'{"id":"file-1"}')
    CreatedObjects(journal).note(exchange("GET", "/v1/responses/resp_1"), b"{}")
    assert len(journal.locations) == 0


def test_only_paths_with_objects_are_looked_at() -> None:
    """A chat has an id too, by which nobody asks."""
    for method, target, expected in (
        ("POST", "/v1/responses", True),
        ("GET", "/v1/responses/resp_1", True),
        ("POST", "/v1/files", True),
        ("DELETE", "/v1/files/file-1", False),
        ("POST", "/v1/chat/completions", False),
        ("GET", "/v1/models/m", False),
    ):
        assert CreatedObjects.may_tell(exchange(method, target, {"model": "m"}).call) is expected
