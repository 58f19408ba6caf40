"""The content of spans."""

from __future__ import annotations

from dataclasses import replace

from proxy.model import Ending, Endpoint
from proxy.telemetry.attributes import error_type, inference_attributes, inference_span_name, server_attributes
from proxy.telemetry.export import spans_url
from tests.proxy.pipeline.bench import Bench


def test_the_relays_span_is_named_by_operation_and_model() -> None:
    """A path that runs no model in the conventions' sense has neither."""
    call = Bench().exchange().call
    assert inference_span_name(call, "m") == "chat m"
    assert inference_span_name(replace(call, endpoint=Endpoint.EMBEDDINGS), "m") == "embeddings m"
    assert inference_span_name(replace(call, endpoint=Endpoint.COMPLETIONS), None) == "text_completion"
    assert inference_span_name(replace(call, endpoint=Endpoint.OTHER), "m") == "relay"
    assert len(inference_span_name(call, "m" * 10_000)) < 200


def test_a_path_under_caching_shows_no_id() -> None:
    """Ids and tags are the tenant's own."""
    call = replace(Bench().exchange().call, endpoint=Endpoint.CACHING, target="/v1/caching/cache-abc?tag=mine")
    found = server_attributes(call, Bench().exchange().outcome(1.0))
    assert found["http.route"] == found["url.path"] == "/v1/caching"


def test_a_status_of_the_client_is_an_error_of_the_relay_only() -> None:
    """By the conventions a server's span is in error from 500 on, and a client's from 400."""
    exchange = Bench().exchange()
    exchange.status, exchange.ending = 404, Ending.UPSTREAM_STATUS
    outcome = exchange.outcome(1.0)
    assert error_type(outcome) is None
    assert error_type(outcome, client_errors=True) == "404"


def test_a_stream_that_broke_is_an_error_although_its_status_is_200() -> None:
    """The ending says what the status cannot; a client that left is no error."""
    exchange = Bench().exchange()
    exchange.status, exchange.ending = 200, Ending.UPSTREAM_BROKE
    assert error_type(exchange.outcome(1.0)) == "upstream_broke"
    exchange.ending = Ending.CLIENT_LEFT
    assert error_type(exchange.outcome(1.0)) is None


def test_what_is_not_known_has_no_attribute() -> None:
    """A request that was never sent has no replica, no usage and no status."""
    exchange = Bench().exchange()
    found = inference_attributes(exchange.call, exchange.outcome(1.0), None, 0.0, None)
    assert not [name for name in found if name.startswith(("gen_ai.usage", "server.", "http.", "cairn.replica"))]


def test_a_collectors_base_url_gets_the_standard_path() -> None:
    """A path that is given stays."""
    assert spans_url("http://c:4318") == spans_url("http://c:4318/") == "http://c:4318/v1/traces"
    assert spans_url("https://c/otlp/v1/traces") == "https://c/otlp/v1/traces"
