"""Method and path decide the endpoint, whose model is read where, and who may use it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest, CairnError, NotFound
from proxy.model import Access, Endpoint
from proxy.pipeline.routes import Routes, is_liveness

ROUTES = Routes()
CONFIGURED = Routes(("/tokenize", "/rerank", "/openai/deployments/*"), ("/v1/fine_tuning/*", "/v1/files"), 8090)


@pytest.mark.parametrize(
    ("method", "path", "endpoint", "access"),
    [
        ("POST", "/v1/chat/completions", Endpoint.CHAT, Access.INFERENCE),
        ("POST", "/v1/messages", Endpoint.MESSAGES, Access.INFERENCE),
        ("POST", "/v1/images/generations", Endpoint.INFERENCE, Access.INFERENCE),
        ("POST", "/v1/audio/transcriptions", Endpoint.INFERENCE, Access.INFERENCE),
        ("POST", "/v1/messages/count_tokens", Endpoint.INFERENCE, Access.INFERENCE),
        ("POST", "/v1/responses/compact", Endpoint.INFERENCE, Access.INFERENCE),
        ("GET", "/v1/models", Endpoint.MODELS, Access.INFERENCE),
        ("HEAD", "/v1/models", Endpoint.MODELS, Access.INFERENCE),
        ("GET", "/v1/models/a/b", Endpoint.OTHER, Access.INFERENCE),
        ("DELETE", "/v1/models/a", Endpoint.OTHER, Access.ADMINISTRATION),
        ("POST", "/v1/caching/refs/tags", Endpoint.CACHING, Access.INFERENCE),
        ("POST", "/v1/cachingx", Endpoint.OTHER, Access.ADMINISTRATION),
        ("POST", "/v1/files", Endpoint.OTHER, Access.CREATE),
        ("GET", "/v1/files", Endpoint.OTHER, Access.LIST),
        ("DELETE", "/v1/files/file-1", Endpoint.OTHER, Access.OBJECT),
        ("GET", "/v1/chat/completions", Endpoint.OTHER, Access.LIST),
        ("GET", "/v1/responses/resp_1/input_items", Endpoint.OTHER, Access.OBJECT),
        ("POST", "/v1/messages/batches", Endpoint.OTHER, Access.CREATE),
        ("GET", "/v1/organization/api_keys", Endpoint.OTHER, Access.ADMINISTRATION),
        ("POST", "/v1/load_lora_adapter", Endpoint.OTHER, Access.ADMINISTRATION),
        ("POST", "/v1/fine_tuning/jobs", Endpoint.OTHER, Access.ADMINISTRATION),
    ],
)
def test_path_and_method_name_the_endpoint_and_who_may_use_it(method, path, endpoint, access) -> None:
    """Nothing but method and path decides."""
    route = ROUTES.route(method, path)
    assert (route.endpoint, route.access, route.target) == (endpoint, access, path)


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ("/v1/%63hat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1//chat/completions?api-version=1", "/v1/chat/completions?api-version=1"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/x/../chat/./completions", "/v1/chat/completions"),
    ],
)
def test_a_chat_is_a_chat_however_its_path_is_written(sent: str, meant: str) -> None:
    """The upstream gets the path on which the decision was made."""
    route = ROUTES.route("POST", sent)
    assert (route.endpoint, route.target) == (Endpoint.CHAT, meant)


@pytest.mark.parametrize(
    ("path", "likely"),
    [
        ("/v1beta/chat/completions", "/v1/chat/completions"),
        ("/v2/chat/completion", "/v1/chat/completions"),
        ("/api/v1/messages", "/v1/messages"),
        ("/V1/Chat/Completions", "/v1/chat/completions"),
        ("/v2/rerank", "/v1/rerank"),
        ("/openai/v1/responses", "/v1/responses"),
        ("/v1", "/v1/models"),
        ("/v1/", "/v1/models"),
        ("/tokenize", "8090"),
        ("/metrics", "admin port, 8090"),
    ],
)
def test_an_unknown_path_names_the_likely_one_and_the_status_page(path: str, likely: str) -> None:
    """Somebody who mistyped a base URL is told the right one."""
    with pytest.raises(NotFound, match=likely):
        Routes(admin_port=8090).route("POST", path)


def test_the_error_for_an_unknown_path_says_what_may_have_been_meant() -> None:
    """And where the status page is, if there is one."""
    for port, rest in ((8090, " Cairn's status page is on the admin port, 8090."), (0, "")):
        for path, guess in (("/v2/rerank", " Did you mean /v1/rerank?"), ("/x", "")):
            with pytest.raises(NotFound) as caught:
                Routes(admin_port=port).route("POST", path)
            assert caught.value.message == f"Nothing is served at this path for POST.{guess}{rest}"
            assert caught.value.code == "unknown_path"


@pytest.mark.parametrize("path", ["/metrics", "/favicon.ico", "/docs", "/readyz", "/api/tags", "/x"])
def test_no_far_fetched_path_is_guessed(path: str) -> None:
    """A wrong guess is worse than none."""
    with pytest.raises(NotFound) as caught:
        Routes(admin_port=8090).route("GET", path)
    assert "Did you mean" not in caught.value.message


@pytest.mark.parametrize(
    ("path", "endpoint", "model"),
    [
        ("/v1/engines/m/completions", Endpoint.COMPLETIONS, "m"),
        ("/v1/engines/m%3A1/chat/completions", Endpoint.CHAT, "m:1"),
        ("/v1/engines/m/embeddings", Endpoint.EMBEDDINGS, "m"),
        ("/v1/engines/m/rerank", Endpoint.INFERENCE, "m"),
    ],
)
def test_an_old_path_with_an_engine_runs_the_model_that_it_names(path: str, endpoint: Endpoint, model: str) -> None:
    """It is checked, counted and tried elsewhere like any other."""
    route = ROUTES.route("POST", path)
    assert (route.endpoint, route.model, route.access, route.target) == (endpoint, model, Access.INFERENCE, path)
    assert ROUTES.route("GET", path).access is Access.ADMINISTRATION
    assert ROUTES.route("POST", "/v1/engines/m").access is Access.ADMINISTRATION


@pytest.mark.parametrize("path", ["/v1/models/org%2Fname-1.5", "/models/org%2fname-1.5"])
def test_one_model_with_a_slash_in_its_name_is_found_as_sdks_ask_for_it(path: str) -> None:
    """Both ways to read an encoded slash there mean the same model."""
    route = ROUTES.route("GET", path)
    assert (route.endpoint, route.model, route.access) == (Endpoint.OTHER, "org/name-1.5", Access.INFERENCE)
    for bad in (
        "/v1/models/..%2Ffiles",
        "/v1/models/a%2F..%2Ffiles",
        "/v1/models/a%2F",
        "/v1/models/%2Fa",
        "/v1/x%2Fy",
    ):
        with pytest.raises(BadRequest):
            ROUTES.route("GET", bad)
    with pytest.raises(BadRequest):
        ROUTES.route("DELETE", path)


def test_engine_paths_are_served_only_if_they_are_configured_and_are_routed_by_their_model() -> None:
    """Off by default; a deployment's path names the model itself."""
    for path in ("/tokenize", "/rerank", "/openai/deployments/m/chat/completions"):
        with pytest.raises(NotFound):
            ROUTES.route("POST", path)
    assert CONFIGURED.route("POST", "/tokenize/").endpoint is Endpoint.INFERENCE
    assert CONFIGURED.route("POST", "/rerank").target == "/rerank"
    assert CONFIGURED.route("GET", "/tokenize").endpoint is Endpoint.OTHER
    chat = CONFIGURED.route("POST", "/openai/deployments/gpt%2D4o/chat/completions?api-version=1")
    assert (chat.endpoint, chat.model) == (Endpoint.CHAT, "gpt-4o")
    assert chat.target == "/openai/deployments/gpt-4o/chat/completions?api-version=1"
    image = CONFIGURED.route("POST", "/openai/deployments/dall-e/images/generations")
    assert (image.endpoint, image.model) == (Endpoint.INFERENCE, "dall-e")
    documents = CONFIGURED.route("POST", "/openai/deployments/m/extensions/chat/completions")
    assert (documents.endpoint, documents.access) == (Endpoint.CHAT, Access.INFERENCE)


@pytest.mark.parametrize(
    ("path", "computes"),
    [
        ("/tokenize", True),
        ("/v2/rerank", True),
        ("/api/chat", True),
        ("/v1beta/models/m:generateContent", True),
        ("/anthropic/v1/messages", True),
        ("/openai/v1/chat/completions", True),
        ("/sleep", False),
        ("/api/pull", False),
        ("/update_weights_from_disk", False),
        ("/openai/v1/responses", False),
        ("/openai/v1/threads/t/messages", False),
        ("/slots/0", False),
    ],
)
def test_an_engine_s_own_path_may_have_effects_unless_it_is_known_to_compute(path: str, computes: bool) -> None:
    """All other paths may have effects, and what is sent there is not sent twice."""
    assert Routes(("/*",)).route("POST", path).may_have_effects is not computes


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/openai/deployments/m"),
        ("GET", "/openai/deployments/m/chat/completions"),
        ("POST", "/openai/deployments/m/files"),
        ("POST", "/openai/deployments/m/v1/files"),
        ("PUT", "/openai/deployments/m/embeddings"),
    ],
)
def test_what_does_not_run_a_deployment_is_administration(method: str, path: str) -> None:
    """A pattern for all deployments opens inference; anything else has to be allowed by name."""
    assert CONFIGURED.route(method, path).access is Access.ADMINISTRATION
    opened = Routes(("/openai/deployments/*",), ("/openai/deployments/*",))
    assert opened.route(method, path).access is Access.CONFIGURED


@pytest.mark.parametrize("path", ["/v1/files/file-1", "/v1/chat/completions", "/tokenize", "/v1/fine_tuning/jobs"])
def test_nothing_is_asked_to_repeat_what_was_sent_to_it(path: str) -> None:
    """An upstream that serves TRACE would show the client the replica's key."""
    with pytest.raises(NotFound):
        Routes(("/tokenize",), ("/v1/fine_tuning/*",)).route("TRACE", path)


def test_a_configured_path_is_open_and_its_neighbours_are_not() -> None:
    """The list of allowed paths is by pattern."""
    assert CONFIGURED.route("GET", "/v1/fine_tuning/jobs").access is Access.CONFIGURED
    assert CONFIGURED.route("GET", "/v1/files").access is Access.CONFIGURED
    assert CONFIGURED.route("GET", "/v1/files/file-1").access is Access.OBJECT
    assert CONFIGURED.route("GET", "/v1/organization/users").access is Access.ADMINISTRATION


def test_bodies_are_read_where_a_rule_depends_on_them() -> None:
    """A file, which may be long, is read as it passes."""
    for path in ("/v1/rerank", "/v1/batches", "/v1/uploads"):
        assert ROUTES.route("POST", path).reads_body
    assert not ROUTES.route("POST", "/v1/files").reads_body
    for path in ("batches/b/requests", "uploads/u/complete", "videos/v/remix", "containers/c/files"):
        for method in ("POST", "PUT", "PATCH"):
            assert ROUTES.route(method, f"/v1/{path}").reads_body
    for path in ("uploads/u/parts", "files/f", "files/f/content"):
        assert not ROUTES.route("POST", f"/v1/{path}").reads_body
    for path in ("/v1/models", "/v1/models/m", "/v1/files/x"):
        assert not ROUTES.route("GET", path).reads_body
    wide = Routes(allowed_paths=("/v1/*",))
    for method, path, reads in (
        ("POST", "/v1/fine_tuning/jobs", True),
        ("GET", "/v1/files", False),
        ("GET", "/v1/files/x", False),
        ("POST", "/v1/containers/x/files", True),
    ):
        opened = wide.route(method, path)
        assert (opened.access, opened.reads_body) == (Access.CONFIGURED, reads), path


def test_liveness_is_asked_by_get_and_head_of_a_few_paths() -> None:
    """Those need no key; nothing else is answered so."""
    assert all(is_liveness(method, path) for method in ("GET", "HEAD") for path in ("/", "/health", "/healthz"))
    assert is_liveness("GET", "/api/hello")
    assert is_liveness("GET", "/health/")
    assert all(is_liveness("GET", f"http://host:1{path}") for path in ("", "/", "/health"))
    assert not is_liveness("GET", "http:///health")
    assert not is_liveness("POST", "/")
    assert not is_liveness("GET", "/v1/models")


@given(st.sampled_from(("GET", "POST", "DELETE", "OPTIONS")), st.text(max_size=50))
def test_any_target_has_a_route_or_is_refused(method: str, target: str) -> None:
    """For any input, nothing else is raised."""
    for routes in (ROUTES, CONFIGURED):
        try:
            routes.route(method, target)
        except CairnError:
            continue


def test_a_creation_stays_one_however_wide_the_allowed_paths_are() -> None:
    """What is created is checked all the same."""
    wide = Routes(allowed_paths=("/v1/*",))
    assert wide.route("POST", "/v1/files").access is Access.CREATE
    assert wide.route("GET", "/v1/files/x").access is Access.CONFIGURED
