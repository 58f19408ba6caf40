"""The reader finds model, pool and objects of a request, and refuses what the client may not use."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from array import array
from typing import Any, cast

import pytest

from cache import Content, ObjectLocations
from proxy.errors import BadRequest, CairnError, Forbidden, NotFound, UnknownObject
from proxy.fleet.pools import Pools, ReplicaEndpoint, ServedPool
from proxy.pipeline.exchange import Exchange, StoredUse, TakesLong
from proxy.pipeline.inserted_names import LONG_IF_DECODED_BYTES
from proxy.pipeline.reader import LONG_BYTES, RequestReader, object_key
from proxy.pipeline.routes import Routes
from proxy.records import Call, Tenant
from proxy.upstream import Origin

MINE, OTHERS, LIMITED = Tenant("mine"), Tenant("others"), Tenant("limited", models=("cheap",))
SHARED = ServedPool("shared", ("cheap", "dear"), shares_key=True)
OWN_KEYS = ServedPool("own", ("free-*",), isolated=True, sends_cache_salt=True)
NUMBERS = {"a": 0, "b": 1, "c": 2}
POOL_OF = {"a": "shared", "b": "shared", "c": "own"}


def endpoint(name: str) -> ReplicaEndpoint:
    """How to reach a replica."""
    url = f"http://{name}"
    return ReplicaEndpoint(name, POOL_OF[name], url, Origin.parse(url))


def pools(*served: ServedPool, default: str | None = "shared") -> Pools:
    """Pools with the replicas of NUMBERS."""
    return Pools(served or (SHARED, OWN_KEYS), default, {number: endpoint(name) for name, number in NUMBERS.items()})


def lists(pool: str, model: str) -> bool:
    """Return whether a replica lists a model."""
    return (pool, model) == ("any", "org/name")


def reader(locations: ObjectLocations | None = None, *allowed: str, of: Pools | None = None) -> RequestReader:
    """A reader that knows these objects."""
    return RequestReader(of or pools(), NUMBERS.get, lists, locations or ObjectLocations(), allowed)


def exchange(
    method: str, target: str, body: Any = b"", tenant: Tenant = MINE, allowed: tuple[str, ...] = ()
) -> Exchange:
    """A request as the server would hand it on."""
    route = Routes(("/openai/deployments/*",), allowed).route(method, target)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Exchange(
        Call(
            request_id="r",
            tenant=tenant,
            endpoint=route.endpoint,
            method=method,
            target=route.target,
            headers=((b"content-type", b"application/json"),),
            body=data,
            received_seconds=0.0,
            read_seconds=0.0,
            access=route.access,
            path_model=route.model,
            object_id=route.object_id,
        )
    )


def made(**owners: str) -> ObjectLocations:
    """Objects on replica b, each with its owner; with `c` as owner, objects of the pool with clients' own keys."""
    locations = ObjectLocations()
    for object_id, owner in owners.items():
        locations.learn(object_id if owner == "c" else f"{owner}/{object_id}", "c" if owner == "c" else "b")
    return locations


CHAT = {"model": "dear", "messages": [{"role": "user", "content": "x"}]}


def test_a_prompt_goes_to_the_pool_of_its_model() -> None:
    """The first pool whose patterns fit; another model is unknown."""
    asked = exchange("POST", "/v1/chat/completions", CHAT)
    reader().read(asked)
    assert (asked.model, asked.pool) == ("dear", SHARED)
    with pytest.raises(NotFound):
        reader().read(exchange("POST", "/v1/chat/completions", CHAT | {"model": "unknown"}))


def test_an_isolated_pool_whose_engine_knows_the_field_gets_a_salt() -> None:
    """The tenant's id is inserted into the body."""
    asked = exchange("POST", "/v1/chat/completions", CHAT | {"model": "free-1"})
    reader().read(asked)
    assert [edit.insert for edit in asked.edits] == [b'"cache_salt":"mine",']


def long_chat(nbytes: int, model: str = "dear", more: str = "") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "x" * nbytes}], "more": more}


@pytest.mark.parametrize(
    ("path", "body", "tenant", "takes_long"),
    [
        ("/v1/chat/completions", long_chat(LONG_BYTES), MINE, True),
        ("/v1/chat/completions", long_chat(LONG_BYTES // 2), MINE, False),
        ("/v1/chat/completions", long_chat(LONG_IF_DECODED_BYTES, more="file_id"), MINE, True),
        ("/v1/chat/completions", long_chat(LONG_IF_DECODED_BYTES // 2, more="file_id"), MINE, False),
        ("/v1/chat/completions", long_chat(LONG_IF_DECODED_BYTES) | {"conversation": "x"}, MINE, True),
        ("/v1/chat/completions", long_chat(LONG_IF_DECODED_BYTES) | {"metadata": {}}, MINE, False),
        ("/v1/chat/completions", long_chat(LONG_IF_DECODED_BYTES, "cheap"), LIMITED, True),
        ("/v1/chat/completions", long_chat(LONG_IF_DECODED_BYTES // 2, "cheap"), LIMITED, False),
        ("/v1/rerank", long_chat(LONG_IF_DECODED_BYTES), MINE, True),
        ("/v1/rerank", long_chat(LONG_IF_DECODED_BYTES // 2), MINE, False),
    ],
)
def test_a_body_whose_reading_could_block_the_loop_is_left_to_a_thread(
    path: str, body: dict[str, Any], tenant: Tenant, takes_long: bool
) -> None:
    """By its length, and earlier if it may have to be decoded whole; there it is read as any other."""
    asked = exchange("POST", path, body, tenant)
    if takes_long:
        with pytest.raises(TakesLong):
            reader().read(asked)
        asked.is_read_aside = True
    with contextlib.suppress(NotFound):
        reader().read(asked)
    assert asked.model == body["model"]


@pytest.mark.parametrize(("isolated", "sends"), [(True, False), (False, True)])
def test_no_salt_is_inserted_for_an_engine_that_does_not_know_it_or_a_pool_that_is_shared(
    isolated: bool, sends: bool
) -> None:
    pool = ServedPool("shared", ("*",), isolated=isolated, sends_cache_salt=sends)
    asked = exchange("POST", "/v1/chat/completions", CHAT)
    reader(of=pools(pool)).read(asked)
    assert asked.edits == ()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/rerank"])
def test_a_model_may_be_missing_with_one_pool_only(path: str) -> None:
    """With several pools, or for a limited client, nothing can be decided without it."""
    body: dict[str, Any] = {"messages": []}
    asked = exchange("POST", path, body)
    reader(of=pools(SHARED)).read(asked)
    assert (asked.model, asked.pool) == (None, SHARED)
    for read, tenant in ((reader(), MINE), (reader(of=pools(SHARED)), LIMITED)):
        with pytest.raises(BadRequest):
            read.read(exchange("POST", path, body, tenant))


def test_a_path_may_name_the_model() -> None:
    """Azure's deployments, and the details of one model, are checked like a body."""
    cheap = CHAT | {"model": "cheap"}
    asked = exchange("POST", "/openai/deployments/cheap/chat/completions", cheap, LIMITED)
    reader().read(asked)
    assert asked.model == "cheap"
    for method, target in (("POST", "/openai/deployments/dear/embeddings"), ("GET", "/v1/models/dear")):
        with pytest.raises(Forbidden):
            reader().read(exchange(method, target, cheap, LIMITED))
    for target, body in (("/openai/deployments/cheap/embeddings", CHAT), ("/v1/embeddings?model=dear", cheap)):
        with pytest.raises(Forbidden):  # which of the two the upstream uses is not known
            reader().read(exchange("POST", target, body, LIMITED))
    shown = exchange("GET", "/v1/models/cheap", b"", LIMITED)
    reader().read(shown)
    assert shown.pool is SHARED


@pytest.mark.parametrize("slash", ["/", "%2F"])
def test_with_a_key_of_the_operator_nothing_below_a_model_is_reached(slash: str) -> None:
    """A name with slashes is that of a model only if a replica lists it or the configuration names it."""
    shared = ServedPool("any", ("own/model", "*"), shares_key=True)
    for path, is_model in (
        (f"org{slash}name", True),
        (f"own{slash}model", True),
        ("dear", True),
        (f"dear{slash}permissions", False),
        (f"org{slash}name{slash}versions", False),
        (f"org{slash}name{slash}versions{slash}v1", False),
    ):
        asked = exchange("GET", f"/v1/models/{path}")
        if is_model:
            reader(of=pools(shared)).read(asked)
            continue
        with pytest.raises(NotFound):
            reader(of=pools(shared)).read(asked)
        reader(of=pools(ServedPool("any", ("*",)))).read(asked)  # the key is the client's own
        opened = reader(None, "/v1/models/*", of=pools(shared))
        opened.read(asked)
        with pytest.raises(NotFound):  # what it does is not known, so not with a key for some models
            opened.read(exchange("GET", f"/v1/models/{path}", tenant=Tenant("limited", models=("dear*", "org*"))))


@pytest.mark.parametrize(("method", "path"), [("DELETE", ""), ("PUT", "/embeddings"), ("POST", "/files")])
def test_what_does_not_run_a_deployment_needs_an_allowed_path(method: str, path: str) -> None:
    """Its model alone opens nothing where the key is not the client's own."""
    target = f"/openai/deployments/cheap{path}"
    with pytest.raises(Forbidden):
        reader().read(exchange(method, target))
    allowed = ("/openai/deployments/*",)
    asked = exchange(method, target, allowed=allowed)
    reader(None, *allowed).read(asked)
    assert (asked.model, asked.pool) == ("cheap", SHARED)
    with pytest.raises(Forbidden):
        reader(None, *allowed).read(exchange(method, target, tenant=LIMITED, allowed=allowed))
    own = exchange(method, target.replace("cheap", "free-1"))
    reader().read(own)
    assert own.pool is OWN_KEYS


def test_further_models_of_a_limited_client_are_checked() -> None:
    """Fallbacks and keys in other letter case could make the upstream use another model."""
    good = CHAT | {"model": "cheap", "models": ["cheap"]}
    reader().read(exchange("POST", "/v1/chat/completions", good, LIMITED))
    for further in ({"models": ["dear"]}, {"Model": "dear"}, {"fallbacks": "x"}):
        with pytest.raises(Forbidden):
            reader().read(exchange("POST", "/v1/chat/completions", CHAT | {"model": "cheap"} | further, LIMITED))


def test_what_continues_a_response_goes_to_its_replica_if_it_is_ones_own() -> None:
    """Another client's response is as unknown as one that does not exist."""
    body = {"model": "dear", "input": "x", "previous_response_id": "resp_1"}
    asked = exchange("POST", "/v1/responses", body)
    reader(made(resp_1="mine")).read(asked)
    assert asked.pinned_replica == 1
    for locations in (made(resp_1="others"), made(resp_2="mine")):
        with pytest.raises(UnknownObject):
            reader(locations).read(exchange("POST", "/v1/responses", body))


@pytest.mark.parametrize(
    "more",
    [
        {"PREVIOUS_RESPONSE_ID": "resp_1"},
        {"previous_response_id": "resp_2", "Previous_Response_Id": "resp_1"},
        {"Conversation": {"id": "resp_1"}},
        {"Container": "resp_1"},
        {"Tools": [{"type": "file_search", "vector_store_ids": ["resp_1"]}]},
        {"Input": [{"type": "item_reference", "id": "resp_1"}]},
        {"File_Id": "resp_1"},
    ],
)
@pytest.mark.parametrize("long", [False, True])
def test_an_object_in_a_member_in_another_letter_case_must_be_ones_own(more: dict[str, Any], long: bool) -> None:
    """Servers written in Go would use it. A long body is read in a thread."""
    body = {"model": "dear", "input": "x" * (LONG_IF_DECODED_BYTES if long else 1)} | more
    for owner in ("mine", "others"):
        asked = exchange("POST", "/v1/responses", body)
        read = reader(made(resp_1=owner, resp_2="mine"))
        if long:
            with pytest.raises(TakesLong):
                read.read(asked)
            asked.is_read_aside = True
        if owner == "mine":
            read.read(asked)
        else:
            with pytest.raises(UnknownObject):
                read.read(asked)


@pytest.mark.parametrize("target", ["/v1/responses", "/v1/rerank", "/v1/conversations"])
@pytest.mark.parametrize(
    ("charset", "passes"), [("utf-7", False), ("UTF-16", False), ("utf-8", True), ("ISO-8859-1", True)]
)
def test_a_body_in_a_charset_that_may_hide_names_is_refused(target: str, charset: str, passes: bool) -> None:
    """Some servers decode JSON by it: this member is a previous_response_id to them."""
    body = {"model": "dear", "input": "x", "+AHAAcgBlAHYAaQBvAHUAcwBfAHIAZQBzAHAAbwBuAHMAZQBfAGkAZA-": "resp_1"}
    asked = exchange("POST", target, body)
    headers = ((b"content-type", f"application/json; charset={charset}".encode()),)
    asked.call = dataclasses.replace(asked.call, headers=headers)
    with (
        contextlib.nullcontext() if passes else pytest.raises(BadRequest, match=r"^The body must be sent in UTF-8\.$")
    ):
        reader(of=pools(SHARED)).read(asked)


def test_items_in_another_letter_case_are_checked_in_a_body_that_is_no_prompt_too() -> None:
    """New items of a conversation are listed under `items`."""
    body = {"Items": [{"type": "item_reference", "id": "msg_1"}]}
    for owner, fails in (("mine", False), ("others", True)):
        asked = exchange("POST", "/v1/conversations/conv_1/items", body)
        read = reader(made(msg_1=owner, conv_1="mine"), of=pools(SHARED))
        if fails:
            with pytest.raises(UnknownObject):
                read.read(asked)
        else:
            read.read(asked)


def test_with_the_clients_own_keys_no_object_is_refused() -> None:
    """The upstream judges; what is known only decides the replica, and only within the pool of the model."""
    body = {"model": "free-1", "input": "x", "previous_response_id": "resp_1"}
    asked = exchange("POST", "/v1/responses", body)
    reader(made(resp_1="c")).read(asked)
    assert asked.pinned_replica == 2
    reader().read(exchange("POST", "/v1/responses", body))
    elsewhere = exchange("POST", "/v1/responses", body)
    reader(made(resp_1="mine")).read(elsewhere)
    assert elsewhere.pinned_replica is None


def test_files_in_a_prompt_must_be_ones_own_unless_the_operator_shares_them() -> None:
    """By id in the content; a body that hides the key in an escape and cannot be read is refused."""
    part = {"type": "file", "file": {"file_id": "file-1"}}
    body = {"model": "dear", "messages": [{"role": "user", "content": [part]}]}
    asked = exchange("POST", "/v1/chat/completions", body)
    reader(made(**{"file-1": "mine"})).read(asked)
    assert asked.pinned_replica == 1
    with pytest.raises(UnknownObject):
        reader().read(exchange("POST", "/v1/chat/completions", body))
    reader(None, "/v1/files/*").read(exchange("POST", "/v1/chat/completions", body))
    broken = json.dumps(body).encode().replace(b'"role"', b'"x":"\xff","role"')
    with pytest.raises(BadRequest):
        reader(made(**{"file-1": "mine"})).read(exchange("POST", "/v1/chat/completions", broken))


def test_a_prompt_goes_to_the_replica_of_the_container_that_it_uses() -> None:
    """The container has the files that its code made."""
    body = {"model": "dear", "messages": [], "container": "container-1"}
    asked = exchange("POST", "/v1/messages", body)
    reader(made(**{"container-1": "mine"})).read(asked)
    assert asked.pinned_replica == 1


@pytest.mark.parametrize("body", [{}, {"prompt": "a hill"}, {"model": None}, b"not json"])
def test_a_video_that_names_no_model_goes_to_the_default_pool(body: Any) -> None:
    """The upstream refuses it, or has a default of its own."""
    asked = exchange("POST", "/v1/videos", body)
    reader(of=pools(SHARED, OWN_KEYS, default="own")).read(asked)
    assert asked.pool == OWN_KEYS


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "/v1/responses/obj"), ("POST", "/v1/responses/obj/cancel"), ("DELETE", "/v1/files/obj")],
)
def test_an_object_is_reached_where_it_lies_in_whatever_pool(method: str, target: str) -> None:
    """The pool is that of the replica and not the default one."""
    for locations, pool, number in ((made(obj="mine"), SHARED, 1), (made(obj="c"), OWN_KEYS, 2)):
        asked = exchange(method, target)
        reader(locations, of=pools(default="own")).read(asked)
        assert (asked.pool, asked.pinned_replica) == (pool, number)
    with pytest.raises(UnknownObject):
        reader(made(obj="others")).read(exchange(method, target))


def test_an_object_on_a_replica_that_is_gone_is_looked_for_in_the_default_pool() -> None:
    """Its name is known and its number is not."""
    locations = ObjectLocations()
    locations.learn("obj", "gone")
    asked = exchange("GET", "/v1/files/obj")
    reader(locations, of=pools(SHARED, OWN_KEYS, default="own")).read(asked)
    assert (asked.pool, asked.pinned_replica) == (OWN_KEYS, None)


def test_without_a_default_pool_a_path_without_a_model_is_not_found() -> None:
    """The operator is told what to configure."""
    with pytest.raises(NotFound, match="default"):
        reader(of=pools(default=None)).read(exchange("GET", "/v1/files"))


def test_administration_and_lists_are_refused_unless_they_are_allowed() -> None:
    """A limited client may not use them even then, since it is unknown what they do."""
    for target in ("/v1/files", "/v1/organization/users", "/v1/fine_tuning/jobs/obj"):
        with pytest.raises(Forbidden):
            reader().read(exchange("GET", target))
        allowed = ("/v1/*",)
        reader(None, *allowed).read(exchange("GET", target, allowed=allowed))
        with pytest.raises(Forbidden):
            reader(None, *allowed).read(exchange("GET", target, tenant=LIMITED, allowed=allowed))
    reader().read(exchange("GET", "/v1/models"))


def test_an_object_below_a_configured_path_is_reached_where_it_was_made() -> None:
    """Any segment that is a known id names the replica."""
    for target in ("/v1/fine_tuning/jobs/obj", "/v1/fine_tuning/jobs/obj?limit=5"):
        asked = exchange("GET", target, allowed=("/v1/fine_tuning/*",))
        reader(made(obj="mine")).read(asked)
        assert asked.pinned_replica == 1


def test_what_a_response_compacts_is_at_the_replica_that_made_it() -> None:
    """The body names it, as in a request that continues it."""
    body = {"model": "free-1", "previous_response_id": "resp_1"}
    asked = exchange("POST", "/v1/responses/compact", body)
    reader(made(resp_1="c")).read(asked)
    assert asked.pinned_replica == 2


def test_a_batch_goes_where_its_file_lies() -> None:
    """And only with a file of one's own, whose lines were checked for the tenant."""
    body = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions"}
    asked = exchange("POST", "/v1/batches", body)
    with pytest.raises(Forbidden, match="not known"):
        reader(made(**{"file-1": "mine"})).read(asked)
    reader(made(**{"file-1": "mine", "checked:mine/file-1": "c"})).read(asked)
    assert asked.pinned_replica == 1
    with pytest.raises(UnknownObject):
        reader(made(**{"file-1": "others"})).read(exchange("POST", "/v1/batches", body))
    with pytest.raises(BadRequest):
        reader().read(exchange("POST", "/v1/batches", b'{"input_file_id":'))


@pytest.mark.parametrize(
    ("target", "good", "bad"),
    [
        ("/v1/videos", {"model": "cheap"}, {"model": "dear"}),
        ("/v1/videos", {"model": "cheap"}, {}),
        ("/v1/messages/batches", {"requests": [{"params": {"model": "cheap"}}]}, {"requests": [{}]}),
        ("/v1/conversations", {}, None),
    ],
)
def test_what_a_limited_client_creates_has_only_its_models(target: str, good: Any, bad: Any) -> None:
    """Bodies that cannot be read are refused."""
    reader().read(exchange("POST", target, good, LIMITED))
    if bad is not None:
        with pytest.raises(Forbidden):
            reader().read(exchange("POST", target, bad, LIMITED))


def test_the_key_of_an_object_names_its_owner_where_the_key_is_shared() -> None:
    """An id alone therefore finds nothing."""
    assert object_key(MINE, SHARED, "x") == "mine/x"
    assert object_key(MINE, OWN_KEYS, "x") == "x"


def test_a_second_content_type_is_refused_where_the_first_decides() -> None:
    """The upstream might read a form where a JSON body was read here."""
    asked = exchange("POST", "/v1/images/edits", {"model": "cheap"}, LIMITED)
    form = (b"content-type", b"multipart/form-data; boundary=b")
    asked.call = dataclasses.replace(asked.call, headers=(*asked.call.headers, form))
    with pytest.raises(BadRequest, match=r"^content-type is given twice$"):
        reader().read(asked)


def test_a_batch_of_a_limited_client_needs_an_input_whose_models_were_checked_for_it() -> None:
    """Checked for its tenant's other clients, it may name models that this one may not use."""
    limited = Tenant("mine", models=("cheap",), client="team")
    body = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions"}
    for client, accepted in (("team", True), ("other", False)):
        locations = made(**{"file-1": "mine"})
        locations.learn(f"checked:{client}:mine/file-1", "b")
        asked = exchange("POST", "/v1/batches", body, limited)
        if accepted:
            reader(locations).read(asked)
            assert asked.pinned_replica == 1
        else:
            with pytest.raises(Forbidden, match="input file"):
                reader(locations).read(asked)


def test_a_model_of_another_kind_of_inference_is_checked_like_a_prompt_s() -> None:
    """Further models that a limited client may not use are refused there too, and objects of others."""
    reader().read(exchange("POST", "/v1/rerank", {"model": "cheap"}, LIMITED))
    for body in ({"model": "dear"}, {"model": "cheap", "models": ["dear"]}):
        with pytest.raises(Forbidden):
            reader().read(exchange("POST", "/v1/rerank", body, LIMITED))
    asked = exchange("POST", "/v1/rerank", {"model": "free-1", "input": [{"type": "x", "file_id": "file-9"}]})
    reader().read(asked)
    assert asked.pool is OWN_KEYS


FORM = b'--b\r\ncontent-disposition: form-data; name="file_id"\r\n\r\nfile-1\r\n--b--\r\n'
FORM_TYPE = b"multipart/form-data; boundary=b"


def with_type(asked: Exchange, content_type: bytes) -> Exchange:
    asked.call = dataclasses.replace(asked.call, headers=((b"content-type", content_type),))
    return asked


@pytest.mark.parametrize(
    ("target", "body", "content_type"),
    [
        ("/v1/containers/cntr-mine/files", FORM, FORM_TYPE),
        ("/v1/containers/cntr-mine/files", b'{"file_id":"file-1"}', b"multipart/form-data"),
        ("/v1/containers/cntr-mine/files", b"file%5Fid=file-1", b"application/x-www-form-urlencoded"),
        ("/v1/containers/cntr-mine/files", '{"file_id":"file-1"}'.encode("utf-16"), b"application/json"),
        ("/v1/batches", FORM.replace(b"file_id", b"input_file_id"), FORM_TYPE),
        ("/v1/images/edits", FORM, FORM_TYPE),
        ("/v1/messages", {"model": "dear", "messages": [], "container": "cntr-1"}, b"application/json"),
        (
            "/v1/responses",
            {"model": "dear", "input": "x", "previous_response_id": "resp-mine", "conversation": "conv-1"},
            b"application/json",
        ),
        (
            "/v1/responses",
            b'{"model":"dear","input":"x","previous_response_id":"resp-1","previous_response_id":null}',
            b"application/json",
        ),
    ],
)
def test_no_form_of_a_body_names_objects_of_others(target: str, body: Any, content_type: bytes) -> None:
    """Multipart or not, in whatever encoding, once or twice."""
    locations = made(
        **{"cntr-mine": "mine", "resp-mine": "mine"} | dict.fromkeys(("file-1", "cntr-1", "conv-1"), "others")
    )
    with pytest.raises((UnknownObject, BadRequest)):
        reader(locations).read(with_type(exchange("POST", target, body), content_type))


UNREADABLE_BODY = (
    "The body is not valid JSON in UTF-8, has a member twice that names an object, names more than 10,000 objects, "
    "or writes letters as escapes."
)
FORM_OF_NOTHING = b'--b\r\ncontent-disposition: form-data; name="x"\r\n\r\ny\r\n--b--\r\n'


@pytest.mark.parametrize(
    ("asked", "of", "message", "param", "code"),
    [
        (exchange("POST", "/v1/rerank", {}), None, "model is missing", "model", None),
        (
            with_type(exchange("POST", "/v1/audio/transcriptions", FORM_OF_NOTHING), FORM_TYPE),
            None,
            "The form has no field `model` that can be read.",
            "model",
            None,
        ),
        (exchange("POST", "/v1/batches", b'{"input_file_id":'), None, UNREADABLE_BODY, None, None),
        (
            with_type(exchange("POST", "/v1/batches", b"file_id"), FORM_TYPE),
            None,
            "The form cannot be read.",
            None,
            None,
        ),
        (
            with_type(exchange("POST", "/v1/batches", b"a=b"), b"Application/X-WWW-Form-URLEncoded; charset=utf-8"),
            None,
            "Send the body with the content-type application/json or multipart/form-data.",
            None,
            None,
        ),
        (
            exchange("GET", "/v1/files"),
            pools(default=None),
            "This path names no model, and no pool is the default; the operator can mark one with default: true.",
            None,
            "no_default_pool",
        ),
        (
            exchange("GET", "/v1/files"),
            None,
            "GET at this path is not allowed with a key of the operator that clients share; the operator can allow "
            "it in server.allowed_paths.",
            None,
            "path_not_allowed",
        ),
        (
            exchange("GET", "/v1/files", tenant=LIMITED, allowed=("/v1/files",)),
            None,
            "GET at this path is not allowed with a key that may use only some models.",
            None,
            "path_not_allowed",
        ),
        (
            exchange("GET", "/v1/files/obj"),
            None,
            "The request names an object that does not exist.",
            None,
            UnknownObject.code,
        ),
        (
            exchange("POST", "/v1/videos", {}, LIMITED),
            None,
            "This key may use only some models, and those of this request cannot be read.",
            "model",
            "model_not_allowed",
        ),
        (
            exchange("POST", "/v1/embeddings", b'{"model":"cheap","fallbacks":"\xff"}', LIMITED),
            None,
            "This key may use only some models, and those of this request cannot be read.",
            "model",
            "model_not_allowed",
        ),
    ],
)
def test_the_error_for_a_request_says_what_is_wrong_with_it(
    asked: Exchange, of: Pools | None, message: str, param: str | None, code: str | None
) -> None:
    with pytest.raises(CairnError) as refused:
        reader(of=of).read(asked)
    assert (refused.value.message, refused.value.param, refused.value.code) == (message, param, code)


def test_the_error_for_a_batch_whose_models_are_not_known_says_how_to_send_its_file() -> None:
    body = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions"}
    with pytest.raises(Forbidden) as refused:
        reader(made(**{"file-1": "limited"})).read(exchange("POST", "/v1/batches", body, LIMITED))
    assert (refused.value.param, refused.value.code) == ("input_file_id", "model_not_allowed")
    assert refused.value.message == (
        "This key may use only some models, and those of the batch's input file are not known. Send the file to "
        "/v1/files in one request, with purpose batch and this key; files that /v1/uploads assembled from parts "
        "cannot be checked."
    )


def test_a_form_may_name_the_client_s_own_file() -> None:
    """As JSON may."""
    locations = made(**{"cntr-mine": "mine", "file-1": "mine"})
    reader(locations).read(with_type(exchange("POST", "/v1/containers/cntr-mine/files", FORM), FORM_TYPE))


def test_without_a_content_type_a_body_is_read_as_json() -> None:
    """As servers do."""
    asked = exchange("POST", "/v1/rerank", {"model": "cheap"}, LIMITED)
    asked.call = dataclasses.replace(asked.call, headers=())
    reader().read(asked)
    assert asked.model == "cheap"


# -- a stored context that was inserted


def inserting(
    tools: bytes, tenant: Tenant = MINE, pool: ServedPool | None = SHARED, messages: bytes = b""
) -> Exchange:
    """A request whose stored context has these tools and messages."""
    asked = exchange("POST", "/v1/chat/completions", CHAT, tenant)
    asked.pool = pool
    content = Content(tools + messages, tools, messages, array("I", (0, len(messages))))
    asked.stored = StoredUse(cast("Any", None), content, 0.0)
    return asked


WITH_FILE = b'{"role":"user","content":[{"type":"file","file":{"file_id":"file-1"}}]}'
TWICE = b'{"role":"user","content":[{"type":"file","file":{"file_id":"file-1","file_id":"file-2"}}]}'
IMAGES = b'[{"type":"image_generation","model":"%b"}]'


async def test_an_object_in_a_stored_context_must_be_one_s_own_where_the_key_is_shared() -> None:
    """As in a prompt that is sent whole."""
    for owner, refused in (("mine", False), ("others", True)):
        checking = reader(made(**{"file-1": owner}))
        for tools, messages in ((b"", WITH_FILE), (b"", WITH_FILE + b"," + WITH_FILE)):
            with pytest.raises(UnknownObject) if refused else contextlib.nullcontext():
                await checking.check_inserted(inserting(tools, messages=messages))
            await checking.check_inserted(inserting(tools, pool=OWN_KEYS, messages=messages))


async def test_a_model_in_a_stored_context_must_be_one_that_the_client_may_use() -> None:
    """A tool may choose one, or leave the choice to the upstream."""
    checking = reader()
    for pool in (SHARED, OWN_KEYS):
        await checking.check_inserted(inserting(IMAGES % b"cheap", LIMITED, pool))
        with pytest.raises(Forbidden, match=r"^This key may not use this model\.$"):
            await checking.check_inserted(inserting(IMAGES % b"dear", LIMITED, pool))
        await checking.check_inserted(inserting(IMAGES % b"dear", MINE, pool))


async def test_a_stored_context_that_cannot_be_read_is_refused_for_what_it_may_name() -> None:
    """Models of a limited client, and objects where the key is shared; nothing else is looked at."""
    checking = reader(made(**{"file-1": "mine", "file-2": "mine"}))
    with pytest.raises(BadRequest) as told:
        await checking.check_inserted(inserting(b"", messages=TWICE))
    assert told.value.message == (
        "The stored context has a member twice that names an object, names more than 10,000 objects, or writes "
        "letters as escapes."
    )
    await checking.check_inserted(inserting(b"", pool=OWN_KEYS, messages=TWICE))
    for pool in (SHARED, OWN_KEYS):
        with pytest.raises(Forbidden, match="those of this request cannot be read"):
            await checking.check_inserted(inserting(b'[{"model":"cheap"', LIMITED, pool))
        await checking.check_inserted(exchange("POST", "/v1/chat/completions", CHAT, LIMITED))
    await checking.check_inserted(inserting(b"", LIMITED, None, TWICE))
