"""Client libraries with only a base URL changed: two turns of a conversation, streamed by those that can.

Each program is what a user writes. It gets its base URL and key from the environment if the library reads them there.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.trial import KEY, MODEL, WORD, Trial, installed, recognised, trial

pytestmark = pytest.mark.timeout(300)  # a client takes seconds to start, more on a busy machine

PYTHON = "libraries/bin/python"
NODE_MODULES = "npm/node_modules"

LITELLM_OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}

PYTHON_PROGRAMS = {
    "openai-chat": """
import openai
client = openai.OpenAI()
messages = [{"role": "system", "content": NOTES}]
for question in QUESTIONS:
    messages.append({"role": "user", "content": question})
    stream = client.chat.completions.create(model=MODEL, messages=messages, stream=True)
    answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    messages.append({"role": "assistant", "content": answer})
    print(answer)
""",
    "openai-responses": """
import openai
client = openai.OpenAI()
items = []
for question in QUESTIONS:
    items.append({"role": "user", "content": question})
    answer = client.responses.create(model=MODEL, instructions=NOTES, input=items)
    items += [item.model_dump() for item in answer.output]
    print(answer.output_text)
""",
    "anthropic": """
import anthropic
client = anthropic.Anthropic()
messages, mark = [], {"type": "ephemeral"}
for question in QUESTIONS:
    part = {"type": "text", "text": question, "cache_control": mark}
    system = [{"type": "text", "text": NOTES, "cache_control": mark}]
    asked = [*messages, {"role": "user", "content": [part]}]
    print(client.messages.count_tokens(model=MODEL, system=system, messages=asked).input_tokens, "tokens")
    with client.messages.stream(model=MODEL, max_tokens=99, system=system, messages=asked) as stream:
        answer = stream.get_final_text()
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    print(answer)
""",
    "langchain": """
from langchain_openai import ChatOpenAI
model = ChatOpenAI(model=MODEL)
messages = [("system", NOTES)]
for question in QUESTIONS:
    messages.append(("user", question))
    answer = "".join(chunk.text for chunk in model.stream(messages))
    messages.append(("assistant", answer))
    print(answer)
""",
    "litellm": """
import os, litellm
messages = [{"role": "system", "content": NOTES}]
for question in QUESTIONS:
    messages.append({"role": "user", "content": question})
    answer = litellm.completion(
        model="openai/" + MODEL, messages=messages, api_base=os.environ["OPENAI_BASE_URL"]
    ).choices[0].message.content
    messages.append({"role": "assistant", "content": answer})
    print(answer)
""",
}

NODE_PROGRAMS = {
    "openai": """
import OpenAI from "openai";
const client = new OpenAI();
const messages = [{ role: "system", content: NOTES }];
for (const question of QUESTIONS) {
  messages.push({ role: "user", content: question });
  let answer = "";
  for await (const chunk of await client.chat.completions.create({ model: MODEL, messages, stream: true }))
    answer += chunk.choices[0]?.delta?.content ?? "";
  messages.push({ role: "assistant", content: answer });
  console.log(answer);
}
""",
    "anthropic": """
import Anthropic from "@anthropic-ai/sdk";
const client = new Anthropic();
const messages = [];
for (const question of QUESTIONS) {
  messages.push({ role: "user", content: question });
  const answer = await client.messages.create({ model: MODEL, max_tokens: 99, system: NOTES, messages });
  messages.push({ role: "assistant", content: answer.content });
  console.log(answer.content[0].text);
}
""",
    "vercel-ai": """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";
const cairn = createOpenAICompatible({
  name: "cairn", baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY, includeUsage: true,
});
const messages = [];
for (const question of QUESTIONS) {
  messages.push({ role: "user", content: question });
  const answer = await streamText({ model: cairn(MODEL), system: NOTES, messages }).text;
  messages.push({ role: "assistant", content: answer });
  console.log(answer);
}
""",
}

QUESTIONS = ["Which word is in the notes?", "Say it again."]


@pytest.mark.parametrize("name", PYTHON_PROGRAMS)
async def test_a_python_library(name: str, tmp_path: Path) -> None:
    """Both turns are answered and counted, and the second goes where the first is cached."""
    python = installed(PYTHON)
    async with trial(tmp_path) as stage:
        head = f"MODEL, QUESTIONS, NOTES = {MODEL!r}, {QUESTIONS!r}, open({str(stage.notes)!r}).read() * 3\n"
        output = await stage.run(python, "-c", head + PYTHON_PROGRAMS[name], env=_environment(stage))
        assert output.count(WORD) == 2
        recognised(await stage.is_counted(requests=2))
        assert stage.hosts == []


@pytest.mark.parametrize("name", NODE_PROGRAMS)
async def test_a_node_library(name: str, tmp_path: Path) -> None:
    """As the Python libraries."""
    modules = installed(NODE_MODULES)
    async with trial(tmp_path) as stage:
        (stage.work / "node_modules").symlink_to(modules)
        head = (
            'import { readFileSync } from "node:fs";\n'
            f"const MODEL = {MODEL!r}, QUESTIONS = {QUESTIONS!r};\n"
            f"const NOTES = readFileSync({str(stage.notes)!r}, 'utf8').repeat(3);\n"
        )
        program = stage.work / "program.mjs"
        program.write_text(head + NODE_PROGRAMS[name])
        output = await stage.run("node", program, env=_environment(stage))
        assert output.count(WORD) == 2
        recognised(await stage.is_counted(requests=2))


async def test_the_llm_command(tmp_path: Path) -> None:
    """A model of its list for other servers, in two runs."""
    llm = installed("libraries/bin/llm")
    async with trial(tmp_path) as stage:
        (stage.home / "llm").mkdir()
        listed = f"- model_id: cairn\n  model_name: {MODEL}\n  api_base: {stage.url}\n"
        (stage.home / "llm" / "extra-openai-models.yaml").write_text(listed)
        env = {"OPENAI_API_KEY": KEY, "LLM_USER_PATH": str(stage.home / "llm")}
        notes = stage.notes.read_text() * 3
        assert WORD in await stage.run(llm, "-m", "cairn", "-s", notes, QUESTIONS[0], env=env)
        assert WORD in await stage.run(llm, "-m", "cairn", "-c", QUESTIONS[1], env=env)
        recognised(await stage.is_counted(requests=2))


def _environment(stage: Trial) -> dict[str, str]:
    return {
        "OPENAI_BASE_URL": stage.url,
        "OPENAI_API_KEY": KEY,
        "ANTHROPIC_BASE_URL": stage.origin,
        "ANTHROPIC_API_KEY": KEY,
        **LITELLM_OFFLINE,
    }
