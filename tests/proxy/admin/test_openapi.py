"""The OpenAPI documents: valid, complete, and served."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from openapi_spec_validator import validate

from proxy.admin.openapi import OPENAPI_PATHS, document
from proxy.admin.port import AdminPort
from proxy.errors import CairnError
from proxy.model import Endpoint
from proxy.pipeline.routes import COLLECTIONS, KNOWN_PATHS, LIVENESS, Routes, is_liveness
from tests.proxy.admin.test_port import FakeOverview

CLIENT, ADMIN = "/openapi/client.json", "/openapi/admin.json"
DOCUMENTS = {path: document(path) for path in OPENAPI_PATHS}


def operations(path: str) -> set[tuple[str, str]]:
    """Method and path of each operation of a document."""
    return {
        (method.upper(), route)
        for route, item in DOCUMENTS[path]["paths"].items()
        for method in item
        if method != "parameters"
    }


def places(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Each value within a document, with its place."""
    yield at, value
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in members:
        yield from places(member, f"{at}/{name}")


@pytest.mark.parametrize("path", OPENAPI_PATHS)
def test_a_document_is_valid_and_says_what_each_part_is(path: str) -> None:
    """OpenAPI 3.1; each operation has a summary and an id of its own, and no text was cut by YAML's punctuation."""
    found = DOCUMENTS[path]
    validate(found)
    ids = [
        item[method]["operationId"] for item in found["paths"].values() for method in item if method != "parameters"
    ]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9]+", each) for each in ids)
    assert [at for at, value in places(found) if value is None] == []
    assert all(
        "summary" in item[method] for item in found["paths"].values() for method in item if method != "parameters"
    )


async def test_each_route_of_the_admin_port_is_described_and_no_other() -> None:
    """aiohttp's router serves exactly the routes of the document."""
    router = AdminPort(FakeOverview()).application().router
    served = {
        (route.method, route.resource.canonical)
        for route in router.routes()
        if route.resource is not None and route.method not in ("HEAD", "*")
    }
    assert served == operations(ADMIN)


def test_each_known_path_of_the_client_port_is_described() -> None:
    """Those with a prompt, those that run a model, collections with their objects, and what needs no key."""
    described = {route for _, route in operations(CLIENT)}
    assert set(KNOWN_PATHS) - described == set()
    assert {f"/v1/{name}/{{id}}" for name in COLLECTIONS if name != "uploads"} - described == set()
    assert described >= LIVENESS
    assert described >= {"/v1/models/{model}", "/v1/caching/{context}"}
    creating = {("POST", f"/v1/{name}") for name in COLLECTIONS}
    assert creating - operations(CLIENT) == set()


@pytest.mark.parametrize(("method", "route"), sorted(operations(CLIENT)))
def test_each_described_operation_of_the_client_port_is_routed(method: str, route: str) -> None:
    """As what its tag says."""
    tag = DOCUMENTS[CLIENT]["paths"][route][method.lower()]["tags"][0]
    if tag == "liveness":
        assert is_liveness(method, route)
        return
    found = Routes().route(method, re.sub(r"\{\w+\}", "x", route))
    assert (tag == "generation") == (found.endpoint.is_generation or found.endpoint is Endpoint.EMBEDDINGS)
    assert (tag == "inference") == (found.endpoint is Endpoint.INFERENCE)
    assert (tag == "stored contexts") == (found.endpoint is Endpoint.CACHING)
    assert (found.object_id == "x") == (tag == "objects" and "{id}" in route)


def test_an_undescribed_path_is_unknown() -> None:
    """The router of the client port refuses what is neither described nor under /v1."""
    with pytest.raises(CairnError):
        Routes().route("POST", "/tokenize")


async def test_documents_are_served_as_json() -> None:
    """They are the ones that the package reads."""
    async with TestClient(TestServer(AdminPort(FakeOverview()).application())) as client:
        for path in OPENAPI_PATHS:
            for _ in range(2):
                answer = await client.get(path)
                assert answer.status == 200
                assert answer.content_type == "application/json"
                assert await answer.json() == json.loads(json.dumps(DOCUMENTS[path]))
