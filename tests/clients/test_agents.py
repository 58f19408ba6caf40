"""Coding agents with only a base URL changed: they call a tool, take a second turn, and every token is counted.

The lines that point each of them at Cairn are those of docs/clients.md.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.clients.trial import CLIENTS, KEY, MODEL, WORD, Trial, installed, recognised, trial
from tests.support.valkey import free_port

pytestmark = pytest.mark.timeout(300)  # a client takes seconds to start, more on a busy machine

FIRST, SECOND = "Which word is in notes.txt?", "Say it again."


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Trial]:
    """A Cairn, its engines, and a place for the client."""
    if not CLIENTS.is_dir():
        pytest.skip("no client is installed; `make clients` installs them")
    async with trial(tmp_path) as running:
        yield running


async def test_claude_code(stage: Trial) -> None:
    """Messages with cache marks, a billing line and a session's header; it contacts nobody else."""
    claude = installed("npm/node_modules/.bin/claude")
    stage.offers("Read", file_path=str(stage.notes))
    env = {
        "ANTHROPIC_BASE_URL": stage.origin,
        "ANTHROPIC_API_KEY": KEY,
        "ANTHROPIC_MODEL": MODEL,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    assert WORD in await stage.run(claude, "-p", FIRST, "--allowedTools", "Read", env=env)
    assert WORD in await stage.run(claude, "-p", SECOND, "--continue", env=env)
    recognised(await stage.is_counted(requests=3))
    assert stage.hosts == []


async def test_claude_code_counts_its_context_compacts_it_and_lists_models(stage: Trial) -> None:
    """Requests beside the conversation: `count_tokens` for each tool and skill, a summary, the list of models."""
    claude = installed("npm/node_modules/.bin/claude")
    stage.offers("Read", file_path=str(stage.notes))
    env = {
        "ANTHROPIC_BASE_URL": stage.origin,
        "ANTHROPIC_AUTH_TOKEN": KEY,
        "ANTHROPIC_MODEL": MODEL,
        "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY": "1",
    }
    await stage.run(claude, "-p", FIRST, "--allowedTools", "Read", env=env)
    assert MODEL in await stage.run(claude, "-p", "/context", "--continue", env=env)
    await stage.run(claude, "-p", "/compact", "--continue", env=env)
    lines = await stage.is_counted(requests=3)
    assert {line["reason"] for line in lines[1:]} == {"warm"}
    routes = Counter(line["route"] for line in stage.cairn.access_lines())
    assert routes["/v1/messages/count_tokens"] > 5
    assert routes["/v1/models"] > 0


async def test_codex_with_a_provider_of_its_own(stage: Trial) -> None:
    """Responses, streamed, with a key for the prompt's cache."""
    codex = installed("npm/node_modules/.bin/codex")
    stage.offers("exec_command", cmd="cat notes.txt")
    _codex_config(
        stage,
        f'model = "{MODEL}"',
        'model_provider = "cairn"',
        "[model_providers.cairn]",
        'name = "Cairn"',
        f'base_url = "{stage.url}"',
        'env_key = "CAIRN_API_KEY"',
        'wire_api = "responses"',
    )
    await _codex_turns(stage, codex, {"CAIRN_API_KEY": KEY})
    recognised(await stage.is_counted(requests=3))
    assert stage.hosts == []


async def test_codex_with_only_the_base_url_of_openai_changed(stage: Trial) -> None:
    """It tries a WebSocket first in each run, and falls back to HTTP at once."""
    codex = installed("npm/node_modules/.bin/codex")
    stage.offers("exec_command", cmd="cat notes.txt")
    _codex_config(stage, f'model = "{MODEL}"', f'openai_base_url = "{stage.url}"')
    await _codex_turns(stage, codex, {"CODEX_API_KEY": KEY})
    recognised(await stage.is_counted(requests=3, refused=2))
    refused = [line for line in stage.cairn.access_lines() if line["status"] == 426]
    assert {line["route"] for line in refused} == {"/v1/responses"}


async def test_codex_that_is_signed_in_compresses_its_bodies(stage: Trial) -> None:
    """As a subscriber's does, with an account that is made up: zstd goes on as it came, and is read all the same."""
    codex = installed("npm/node_modules/.bin/codex")
    stage.offers("exec_command", cmd="cat notes.txt")
    _codex_config(stage, f'model = "{MODEL}"', f'openai_base_url = "{stage.url}"')
    account = {"chatgpt_plan_type": "pro", "chatgpt_user_id": "nobody", "chatgpt_account_id": "none"}
    token = _unsigned_token({"email": "a@example.com", "exp": 4_000_000_000, "https://api.openai.com/auth": account})
    tokens = {"id_token": token, "access_token": token, "refresh_token": "none", "account_id": "none"}
    (stage.home / ".codex" / "auth.json").write_text(
        json.dumps(
            {
                "auth_mode": "chatgpt",
                "tokens": tokens,
                "last_refresh": datetime.now(UTC).isoformat(),
            }
        )
    )
    await _codex_turns(stage, codex, {})
    recognised(await stage.is_counted(requests=3, refused=2))
    sent = [asked.header(b"content-encoding") for engine in stage.engines for asked in engine.generations]
    assert set(sent) == {b"zstd"}


def _unsigned_token(claims: dict[str, object]) -> str:
    """A JSON Web Token that nobody signed."""
    parts = (json.dumps({"alg": "RS256", "typ": "JWT"}), json.dumps(claims), "signature")
    return ".".join(urlsafe_b64encode(part.encode()).rstrip(b"=").decode() for part in parts)


def _codex_config(stage: Trial, *lines: str) -> None:
    quiet = ("[analytics]", "enabled = false", "[features]", "plugins = false", "apps = false")
    (stage.home / ".codex").mkdir()
    (stage.home / ".codex" / "config.toml").write_text("\n".join((*lines, *quiet)))


async def _codex_turns(stage: Trial, codex: Path, env: dict[str, str]) -> None:
    run = (codex, "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
    assert WORD in await stage.run(*run, FIRST, env=env)
    assert WORD in await stage.run(*run, "resume", "--last", SECOND, env=env)


async def test_opencode(stage: Trial) -> None:
    """Chat completions by the AI SDK's provider for compatible servers; the session's title is a request too."""
    opencode = installed("npm/node_modules/.bin/opencode")
    stage.offers("read", filePath=str(stage.notes))
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Cairn",
        "options": {"baseURL": stage.url, "apiKey": KEY},
        "models": {MODEL: {}},
    }
    config = {"provider": {"cairn": provider}, "model": f"cairn/{MODEL}", "autoupdate": False, "share": "disabled"}
    (stage.work / "opencode.json").write_text(json.dumps(config))
    env = {"OPENCODE_DISABLE_MODELS_FETCH": "1"}
    assert WORD in await stage.run(opencode, "run", FIRST, env=env)
    assert WORD in await stage.run(opencode, "run", "--continue", SECOND, env=env)
    lines = await stage.is_counted(requests=4)
    turns = [line for line in lines if line["reason"] != "short"]
    assert len(turns) == 3  # the title has a short prompt
    recognised(turns)


async def test_cline(stage: Trial) -> None:
    """Chat completions with two dozen tools. Without a terminal it continues no session, so the second is new."""
    cline = installed("npm/node_modules/.bin/cline")
    stage.offers("read_files", paths=[str(stage.notes)])
    settings = stage.home / ".cline" / "data" / "settings"
    settings.mkdir(parents=True)
    (settings / "global-settings.json").write_text('{"telemetryOptOut": true, "autoUpdateEnabled": false}')
    env = {"CLINE_HUB_PORT": str(free_port())}  # of the daemon that it leaves behind
    try:
        await stage.run(cline, "auth", "-p", "openai", "-k", KEY, "-m", MODEL, "-b", stage.url, env=env)
        assert WORD in await stage.run(cline, FIRST, env=env)
        assert WORD in await stage.run(cline, "What is the word in notes.txt?", env=env)
    finally:
        await stage.run(cline, "hub", "stop", env=env)
    recognised(await stage.is_counted(requests=4))


async def test_aider(stage: Trial) -> None:
    """Chat completions by LiteLLM, without tools: a file is part of the prompt, and reminders move to its end."""
    aider = installed("aider/bin/aider")
    env = {"OPENAI_API_BASE": stage.url, "OPENAI_API_KEY": KEY}
    options = ("--no-git", "--yes-always", "--no-check-update", "--analytics-disable", "--no-show-model-warnings")
    run = (aider, "--model", f"openai/{MODEL}", *options, "--read", "notes.txt")
    assert WORD in await stage.run(*run, "--message", FIRST, env=env)
    assert WORD in await stage.run(*run, "--restore-chat-history", "--message", SECOND, env=env)
    recognised(await stage.is_counted(requests=2), least_share=0.5)
