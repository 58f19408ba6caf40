"""Refusals as real servers write them: which of them are about the server, and which about the request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.wire.refusals import Refusal, read_refusal


def openai(message: str, **more: Any) -> Any:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}}


MODEL = [
    (
        "OpenAI",
        404,
        openai("The model `m-1` does not exist or you do not have access to it.", code="model_not_found"),
    ),
    ("OpenAI, project", 403, openai("Project `p` does not have access to model `m-1`", code="model_not_found")),
    ("vLLM", 404, openai("The model `m-1` does not exist.", type="NotFoundError", param="model", code=404)),
    (
        "older vLLM",
        404,
        {"object": "error", "message": "The model `m-1` does not exist.", "type": "NotFoundError", "code": 404},
    ),
    ("vLLM's router", 404, {"error": "Model m-1 not found or vLLM engine is sleeping."}),
    ("SGLang", 400, {"object": "error", "message": "The following requested LoRA adapters are not loaded: {'m-1'}"}),
    ("llama.cpp", 400, {"error": {"code": 400, "message": "model 'm-1' not found", "type": "invalid_request_error"}}),
    ("Ollama", 404, openai('model "m-1" not found, try pulling it first', type="api_error")),
    ("Ollama, its own", 404, {"error": "model 'm-1' not found"}),
    (
        "LiteLLM",
        400,
        openai(
            "{'error': '/chat/completions: Invalid model name passed in model=m-1. Call `/v1/models` to view "
            "available models for your key.'}",
            type="None",
            code="400",
        ),
    ),
    ("LiteLLM, nested", 400, {"error": {"message": {"error": "Invalid model name passed in model=m-1"}}}),
    (
        "LiteLLM, router",
        400,
        openai("litellm.BadRequestError: You passed in model=m-1. There is no 'model_name' with this string"),
    ),
    ("LM Studio", 400, openai('Failed to load model "m-1". Error: Model does not exist.')),
    ("Anthropic", 404, {"type": "error", "error": {"type": "not_found_error", "message": "model: m-1"}}),
    ("Groq", 400, openai("The model `m-1` has been decommissioned", code="model_decommissioned")),
    ("Mistral", 400, {"object": "error", "message": "Invalid model: m-1", "type": "invalid_model", "code": "1500"}),
    ("Azure", 404, {"error": {"code": "DeploymentNotFound", "message": "The API deployment does not exist."}}),
    ("OpenRouter", 400, {"error": {"message": "m-1 is not a valid model ID", "code": 400}}),
    ("DeepSeek", 400, openai("Model Not Exist")),
    ("Gemini", 404, [{"error": {"code": 404, "message": "models/m-1 is not found for API version v1beta"}}]),
    ("Ray Serve", 404, {"detail": 'Could not find model with id "m-1"'}),
    ("Triton", 400, {"detail": "Unknown model: m-1"}),
    ("Xinference", 400, {"detail": "Model not found in the model list, uid: m-1"}),
    ("FastChat", 400, {"object": "error", "message": "Only a&&b allowed now, your model m-1", "code": 40301}),
]


@pytest.mark.parametrize(("server", "status", "body"), MODEL, ids=[each[0] for each in MODEL])
def test_a_server_says_that_it_does_not_have_the_model(server: str, status: int, body: Any) -> None:
    """A name that is a word of the message, or has other letters than usual, is read as well."""
    assert server
    for model in ("m-1", "model", "org/Model-7B:q4 (x)", "a"):
        text = json.dumps(body).replace("m-1", model)
        assert read_refusal(status, text.encode(), model) is Refusal.MODEL, model


OTHER = [
    ("no embeddings in vLLM", 400, openai("The model does not support Embeddings API"), Refusal.ENDPOINT),
    (
        "no embeddings in llama.cpp",
        501,
        {
            "error": {
                "code": 501,
                "message": "This server does not support embeddings.",
                "type": "not_supported_error",
            }
        },
        Refusal.ENDPOINT,
    ),
    ("no such path in FastAPI", 404, {"detail": "Not Found"}, Refusal.ENDPOINT),
    (
        "no such path in llama.cpp",
        404,
        {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}},
        Refusal.ENDPOINT,
    ),
    ("another method in FastAPI", 405, {"detail": "Method Not Allowed"}, Refusal.ENDPOINT),
    (
        "no tools in vLLM",
        400,
        openai('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
        Refusal.TOOLS,
    ),
    ("no tools in Ollama", 400, openai("registry.ollama.ai/library/m-1 does not support tools"), Refusal.TOOLS),
    ("no tools in llama.cpp", 500, openai("tools param requires --jinja flag", code=500), Refusal.TOOLS),
    ("no tools in OpenRouter", 404, openai("No endpoints found that support tool use."), Refusal.TOOLS),
    ("no images in vLLM", 400, openai("m-1 is not a multimodal model"), Refusal.MEDIA),
    ("no images in vLLM any more", 400, openai("At most 0 image(s) may be provided in one prompt."), Refusal.MEDIA),
    (
        "no images in llama.cpp",
        500,
        openai("image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"),
        Refusal.MEDIA,
    ),
    (
        "too long for OpenAI",
        400,
        openai("This model's maximum context length is 128000 tokens.", code="context_length_exceeded"),
        Refusal.CONTEXT,
    ),
    (
        "too long for vLLM",
        400,
        openai("This model's maximum context length is 4096 tokens. However, you requested 5000 tokens", code=400),
        Refusal.CONTEXT,
    ),
    (
        "too long for vLLM's decoder",
        400,
        openai("The decoder prompt (length 5000) is longer than the maximum model length of 4096."),
        Refusal.CONTEXT,
    ),
    (
        "too long for SGLang",
        400,
        {"message": "The input (5000 tokens) is longer than the model's context length (4096 tokens)."},
        Refusal.CONTEXT,
    ),
    (
        "too long for llama.cpp",
        400,
        {"error": {"message": "the request exceeds the available context size", "type": "exceed_context_size_error"}},
        Refusal.CONTEXT,
    ),
    (
        "too long for Anthropic",
        400,
        {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 8 maximum"}},
        Refusal.CONTEXT,
    ),
    (
        "too long for TGI",
        422,
        {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 9"},
        Refusal.CONTEXT,
    ),
    ("a wrong key", 401, openai("Incorrect API key provided", code="invalid_api_key"), Refusal.KEY),
    ("a key without rights", 403, {"error": {"type": "permission_error", "message": "no"}}, Refusal.KEY),
    ("no quota", 429, openai("You exceeded your current quota", code="insufficient_quota"), Refusal.QUOTA),
    ("no credit at Anthropic", 400, openai("Your credit balance is too low to access the API."), Refusal.QUOTA),
    ("no balance at DeepSeek", 402, openai("Insufficient Balance"), Refusal.QUOTA),
    ("no memory", 400, openai("CUDA out of memory. Tried to allocate 2.00 GiB"), Refusal.MEMORY),
]


@pytest.mark.parametrize(("case", "status", "body", "refusal"), OTHER, ids=[each[0] for each in OTHER])
def test_a_server_says_what_else_it_lacks(case: str, status: int, body: Any, refusal: Refusal) -> None:
    """The path, a kind of input, room, an account, memory."""
    assert case
    assert read_refusal(status, json.dumps(body).encode(), "m-1") is refusal


def test_a_path_that_a_framework_does_not_have_is_told_without_json() -> None:
    """As Go and nginx do."""
    for body in (b"404 page not found", b"", b"<html><head><title>404 Not Found</title></head></html>", b"{}"):
        assert read_refusal(404, body, "m-1") is Refusal.ENDPOINT


ABOUT_THE_REQUEST = [
    (400, openai("The response was filtered: Azure OpenAI's content management policy.", code="content_filter")),
    (
        400,
        {
            "error": {
                "code": "400",
                "innererror": {"code": "ResponsibleAIPolicyViolation"},
                "message": "The model m-1",
            }
        },
    ),
    (403, {"error": {"code": 403, "message": "Your input was flagged by moderation."}}),
    (404, openai("Response with id 'resp_1' not found.", param="previous_response_id")),
    (404, {"error": {"message": "No such File object: file-1", "type": "not_found_error"}}),
    (404, openai("The model `another` does not exist.")),
    (400, openai("Invalid value for 'temperature': the model m-1 takes 0 to 2.")),
    (400, openai("'messages' is a required property")),
    (422, {"detail": [{"msg": "Field required", "input": "The model `m-1` does not exist."}]}),
    (429, openai("Rate limit reached for m-1", code="rate_limit_exceeded")),
    (429, openai("Too many requests with tools: the model does not support tools in parallel")),
    (500, openai("Internal Server Error")),
    (413, openai("Request Entity Too Large")),
]


@pytest.mark.parametrize(("status", "body"), ABOUT_THE_REQUEST)
def test_what_every_replica_would_say_is_no_reason_to_ask_another(status: int, body: Any) -> None:
    """Filters, objects, other models, malformed requests, and what a message repeats of the request."""
    assert read_refusal(status, json.dumps(body).encode(), "m-1") is None


def test_without_a_model_nothing_is_said_about_one() -> None:
    """The upstream may have a default."""
    assert read_refusal(404, json.dumps(openai("The model `` does not exist.")).encode(), None) is None
    for code, refusal in (("model_not_found", None), ("insufficient_quota", Refusal.QUOTA)):
        assert read_refusal(400, json.dumps(openai("no", code=code)).encode(), None) is refusal


def test_the_name_of_the_model_may_be_in_another_letter_case() -> None:
    """As some servers compare it."""
    body = json.dumps(openai("The model `M-1` does not exist.")).encode()
    assert read_refusal(404, body, "m-1") is Refusal.MODEL
    assert read_refusal(404, body, "m-2") is None


def test_the_message_of_a_framework_may_end_with_a_full_stop() -> None:
    for text in ("Not Found.", " not found\n", "Route not found"):
        assert read_refusal(404, json.dumps({"detail": text}).encode(), "m-1") is Refusal.ENDPOINT
    assert read_refusal(404, json.dumps({"detail": ".Not Found"}).encode(), "m-1") is None


@pytest.mark.parametrize(
    "body", [b"[]", b"7", b'"x"', b"{" * 5_000, b'{"error": [1]}', b"\xff\xfe", b'{"error": null}']
)
def test_any_body_is_read(body: bytes) -> None:
    """An error can have any shape."""
    assert read_refusal(400, body, "m-1") is None
