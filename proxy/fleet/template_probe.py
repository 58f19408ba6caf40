"""Find out how an engine renders prompts, by asking it to render or tokenise small ones.

llama.cpp renders at `/apply-template`; vLLM and SGLang tokenise at `/tokenize`. Nothing is generated. Two prompts
that differ in one place are compared by the length of the common beginning of their renderings: this shows what
precedes what, and what is left out, for any template. Of an engine that answers neither, nothing is learned.

An engine may come back at its address with another model or template. So one prompt is rendered again in each round,
and a rendering or a list of models that has changed has all questions asked anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import msgspec

from proxy.clock import Clock
from proxy.errors import UpstreamError
from proxy.fleet.model_list import fetch_models
from proxy.fleet.pools import Pools, ReplicaEndpoint
from proxy.fleet.template_families import family_facts
from proxy.fleet.templates import Templates
from proxy.model import TemplateFacts, ToolOrder
from proxy.upstream import Limits, UpstreamClient
from proxy.wire.schemas import DECODE_ERRORS
from proxy.wire.template import BILLING_MARK

log = logging.getLogger("cairn.templates")

PROBE_SECONDS: Final = 30.0
"""Interval of the rounds: engines may start late, and their models may change."""

MAX_MODELS_PROBED: Final = 32
"""Models of one engine that are asked about in a round."""

_PAGE_AT_MOST_BYTES: Final = 1024 * 1024
_NO_SUCH_PAGE: Final = frozenset({404, 405, 501})
_ARGUMENTS: Final[dict[str, tuple[Any, Any]]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning_effort": ("low", "high"),
    "documents": ([{"title": "one", "text": "some words"}], [{"title": "two", "text": "other words"}]),
}
"""Arguments that templates render, with two values each."""

_DAY_SECONDS: Final = 86_400.0
_DATE_FORMATS: Final = ("%Y-%m-%d", "%d %b %Y", "%d %B %Y", "%B %d, %Y")

Rendering = Sequence[object]
"""Characters or token ids."""

Render = Callable[[dict[str, Any]], Awaitable[Rendering | None]]
"""Renders the messages, tools and arguments of a request; None if the engine refuses them."""

TextOf = Callable[[Rendering], Awaitable[str]]
"""Returns the text of token ids; empty if the engine does not."""


async def facts_of(
    render: Render, dates: Sequence[str] = (), text_of: TextOf | None = None, *, may_be_dated: bool = False
) -> TemplateFacts | None:
    """Return the facts that the renderings of small prompts show; None if the simplest one is refused.

    Args:
        render: renders the messages, tools and arguments of a request.
        dates: ways to write today's date; one of them in the text means that the template puts it there.
        text_of: returns the text of token ids.
        may_be_dated: whether a template whose text is unknown counts as dated.
    """
    base = await render(_request())
    if base is None:
        render = _without_system(render)
        base = await render(_request())
    if base is None:
        return None
    order, none_drops = await _tools(render)
    headless, late = await _arguments(render)
    drops, ignores = await _reasoning(render)
    text = base if isinstance(base, str) else "" if text_of is None else await text_of(base)
    is_dated = any(date in text for date in dates) if text else may_be_dated
    moves = await _moves_system(render)
    is_system_first = order is ToolOrder.SYSTEM_FIRST
    return TemplateFacts(
        order=order,
        drops_reasoning=drops,
        drops_thoughts=await _drops_thoughts(render),
        ignores_reasoning=ignores,
        keeps_billing=await _keeps_billing(render),
        moves_system=moves,
        dated=is_dated,
        none_drops_tools=none_drops,
        headless=headless,
        late_arguments=late,
        splits_systems=is_system_first and not moves and await _splits_systems(render),
        system_last=await _follows_a_turn(render, "system"),
        developer_in_place=is_system_first and await _developer_is_in_place(render),
        rewrites_turns=await _rewrites_turns(render),
    )


def _without_system(render: Render) -> Render:
    """Return a renderer that leaves out system messages, for templates that refuse them."""

    async def rendered(request: dict[str, Any]) -> Rendering | None:
        messages = [message for message in request["messages"] if message["role"] != "system"]
        return await render({**request, "messages": messages})

    return rendered


def _request(
    system: str = "some words here", user: str = "a question", tool: str | None = None, **more: Any
) -> dict[str, Any]:
    request: dict[str, Any] = {
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        **more,
    }
    if tool is not None:
        request["tools"] = [_tool(tool)]
    return request


def _tool(description: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": "f", "description": description, "parameters": parameters}}


async def _tools(render: Render) -> tuple[ToolOrder, bool]:
    """Return the place of the tools, and whether `tool_choice: none` leaves them out.

    Tools that are never rendered count as if they came after the system message: prompts with other tools then have
    the system message in common, as they have at the engine.
    """
    plain = TemplateFacts()
    one = await render(_request(tool="one tool"))
    if one is None:
        return plain.order, plain.none_drops_tools
    other = await render(_request(tool="other tool"))
    if one == other:
        return ToolOrder.SYSTEM_FIRST, False
    at_tool = _shared(one, other)
    at_system = _shared(one, await render(_request(tool="one tool", system="other words here")))
    none = await render(_request(tool="one tool", tool_choice="none"))
    drops = none is not None and _shared(one, none) < min(at_tool, len(one))
    if await _follows_a_turn(render, "tool"):
        return ToolOrder.TOOLS_LAST, drops
    return (ToolOrder.TOOLS_FIRST if at_tool < at_system else ToolOrder.SYSTEM_FIRST), drops


async def _follows_a_turn(render: Render, part: str) -> bool:
    """Return whether a `part`, "tool" or "system", comes after the first turn of a conversation of two turns."""

    def turns(first: str = "a question", **parts: str) -> dict[str, Any]:
        messages = [("system", parts.get("system", "some words here"))]
        messages += [("user", first), ("assistant", "an answer"), ("user", "a further question")]
        rows = [{"role": role, "content": text} for role, text in messages]
        return {"messages": rows, "tools": [_tool(parts.get("tool", "one tool"))]}

    base = await render(turns())
    changed = await render(turns(**{part: "other words"}))
    if base is None or base == changed:
        return False
    return _shared(base, await render(turns("other words"))) < _shared(base, changed)


async def _splits_systems(render: Render) -> bool:
    """Return whether the tools come before the second of two system messages."""

    def systems(second: str, tool: str = "one tool") -> dict[str, Any]:
        messages = [{"role": "system", "content": text} for text in ("some words", second)]
        return {"messages": [*messages, _QUESTION], "tools": [_tool(tool)]}

    return await _precedes(render, systems("more words"), systems("more words", "other tool"), systems("other words"))


async def _developer_is_in_place(render: Render) -> bool:
    """Return whether the tools, which follow the system message, come before a developer's message."""

    def lead(text: str, tool: str = "one tool") -> dict[str, Any]:
        return {"messages": [{"role": "developer", "content": text}, _QUESTION], "tools": [_tool(tool)]}

    return await _precedes(render, lead("some words"), lead("some words", "other tool"), lead("other words"))


async def _precedes(
    render: Render, request: dict[str, Any], with_other_tool: dict[str, Any], with_other_text: dict[str, Any]
) -> bool:
    """Return whether the tools are rendered before a text; False if a prompt is refused or has no tools."""
    base, other = await render(request), await render(with_other_tool)
    if base is None or other is None or base == other:
        return False
    at_text = await render(with_other_text)
    return at_text is not None and _shared(base, other) < _shared(base, at_text)


async def _reasoning(render: Render) -> tuple[bool, bool]:
    """Return whether reasoning before the last user message is left out, and whether it is left out everywhere."""

    def turns(reasoning: str, *more: dict[str, str]) -> dict[str, Any]:
        # by both names: vLLM reads only the first at /tokenize, llama.cpp and SGLang only the second
        fields = {"reasoning": reasoning, "reasoning_content": reasoning}
        answer = {"role": "assistant", "content": "an answer", **fields}
        return {"messages": [_QUESTION, answer, *more]}

    def calls(reasoning: str, *more: dict[str, str]) -> dict[str, Any]:
        # some templates render the reasoning before a call of a tool only
        answer = {**turns(reasoning)["messages"][1], "content": "", "tool_calls": [_CALL]}
        return {"messages": [_QUESTION, answer, {**_RESULT, "content": "a result"}, *more]}

    async def differ(form: Callable[..., dict[str, Any]], *more: dict[str, str]) -> bool:
        one, other = await render(form("so I thought", *more)), await render(form("or rather thus", *more))
        return one is not None and one != other

    old = await _are_equal(render, turns("so I thought", _FURTHER), turns("or rather thus", _FURTHER))
    if not old or await differ(calls, _FURTHER):
        return False, False
    is_rendered = await differ(turns) or await differ(calls)
    return is_rendered, not is_rendered


async def _drops_thoughts(render: Render) -> bool:
    """Return whether reasoning in the text of a message before the last user message is left out."""

    def turns(thought: str) -> dict[str, Any]:
        answer = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\nan answer"}
        return {"messages": [_QUESTION, answer, _FURTHER]}

    return await _are_equal(render, turns("so I thought"), turns("or rather thus"))


async def _rewrites_turns(render: Render) -> bool:
    """Return whether an answer without reasoning is rendered otherwise once a user message follows."""

    def turns(text: str, *more: dict[str, Any]) -> dict[str, Any]:
        answer = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        result = {**_RESULT, "content": text}
        return {"messages": [_QUESTION, answer, result, *more]}  # without tools, which may move to the last question

    base, other = await render(turns("a result")), await render(turns("other words"))
    continued = await render(turns("a result", _FURTHER))
    if base is None or other is None or continued is None or base == other:
        return False
    return _shared(base, continued) < _shared(base, other)


async def _keeps_billing(render: Render) -> bool:
    """Return whether a client's billing block before the system prompt is rendered."""

    def request(nonce: str) -> dict[str, Any]:
        texts = (f"{BILLING_MARK.decode()}: cc_version=1; cch={nonce};", "some words")
        return {"messages": [{"role": "system", "content": [_text(text) for text in texts]}, _QUESTION]}

    one = await render(request("a1b2c"))
    return one is not None and one != await render(request("d3e4f"))


async def _are_equal(render: Render, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two requests are rendered, and equally."""
    rendered = await render(one)
    return rendered is not None and rendered == await render(other)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


_QUESTION: Final = {"role": "user", "content": "a question"}
_BILLING_LINE: Final = f"{BILLING_MARK.decode()}: cc_version=1; cch=a1b2c;"
_FURTHER: Final = {"role": "user", "content": "a further one"}
_CALL: Final = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_RESULT: Final = {"role": "tool", "tool_call_id": "call00001"}


async def _moves_system(render: Render) -> bool:
    """Return whether a system message after a question is rendered before it."""

    def turns(question: str, late: str) -> dict[str, Any]:
        texts = [("system", "some words"), ("user", question), ("system", late), ("user", "a further one")]
        return {"messages": [{"role": role, "content": text} for role, text in texts]}

    base = await render(turns("a question", "a late rule"))
    if base is None:
        return False
    at_late = _shared(base, await render(turns("a question", "other late words")))
    at_question = _shared(base, await render(turns("other words", "a late rule")))
    return at_late < at_question


async def _arguments(render: Render) -> tuple[frozenset[str], frozenset[str]]:
    """Return the template arguments that change nothing before the last message, and those that change only turns.

    Some are rendered otherwise if there are tools.
    """
    places = [await _places_of_arguments(render, tools) for tools in ({}, {"tools": [_tool("one tool")]})]
    known = [place for place in places if place is not None]
    headless = frozenset([name for name in _ARGUMENTS if known and all(each[name] == "end" for each in known)])
    late = frozenset([name for name in _ARGUMENTS if known and all(each[name] != "head" for each in known)])
    return headless, late - headless


async def _places_of_arguments(render: Render, tools: dict[str, Any]) -> dict[str, str] | None:
    """Return the first place that each argument changes: "head", "turns" or "end"; None if the prompt is refused.

    What follows the tools and the system message belongs to the turns. A conversation of two shows it: some switches
    are written into every message of the user, and some change how all answers are rendered.
    """

    def talk(*changed: str, **more: Any) -> dict[str, Any]:
        texts = {"system": "some words here", "first": "a question", "answer": "an answer", "last": "a further one"}
        texts.update(dict.fromkeys(changed, "other words here"))
        roles = ("system", "user", "assistant", "user")
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts.values(), strict=True)]
        return {"messages": messages, **tools, **more}

    base = await render(talk())
    if base is None:
        return None
    at_first, at_last = _shared(base, await render(talk("first"))), _shared(base, await render(talk("last")))
    at_head = [_shared(base, await render(talk("system")))]
    if tools:
        at_head.append(_shared(base, await render(talk(tools=[_tool("other tool")]))))
    begin = max([at for at in at_head if at < at_first], default=at_first - 1)
    places = {}
    for name, values in _ARGUMENTS.items():
        changed = [await render(talk(**{name: value}, chat_template_kwargs={name: value})) for value in values]
        shared = min([len(base) if each == base else _shared(base, each) for each in changed])
        places[name] = "end" if shared > at_last else "turns" if shared > begin else "head"
    return places


def _shared(one: Rendering, other: Rendering | None) -> int:
    """Return the length of the common prefix; 0 if the other was refused."""
    if other is None:
        return 0
    shared = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        shared += 1
    return shared


_SAMPLE: Final = {
    "messages": [
        {"role": "system", "content": "some words here"},
        _QUESTION,
        {
            "role": "assistant",
            "content": "<think>\nso I thought\n</think>\n\nan answer",
            "reasoning": "so I thought",
            "reasoning_content": "so I thought",
        },
        _FURTHER,
    ],
    "tools": [_tool("one tool")],
}
"""A prompt with a bit of everything, whose rendering changes with nearly every change of a template."""


async def sample(render: Render) -> int:
    """Return a number that stands for an engine's present template; 0 if the engine renders nothing."""
    rendering = await render(_SAMPLE)
    if rendering is None:
        rendering = await render(_request())
    return 0 if rendering is None else hash(tuple(rendering)) or 1


class _NoPage(Exception):
    """An engine has no page that renders or tokenises prompts."""


class _Answers(msgspec.Struct):
    """An engine's answers: its models, and the samples by model."""

    models: list[tuple[str, object]]
    samples: dict[str, int]


class TemplateProber:
    """Asks each engine about each of its models. One per worker."""

    def __init__(
        self, client: UpstreamClient, pools: Pools, templates: Templates, clock: Clock, limits: Limits
    ) -> None:
        self._client = client
        self._pools = pools
        self._templates = templates
        self._clock = clock
        self._limits = limits
        self._answers: dict[tuple[str, str], _Answers] = {}  # by pool and engine
        self._rounds = 0

    async def run(self) -> None:
        """Ask until cancelled; repeat unanswered questions from time to time."""
        while True:
            await self.look()
            await asyncio.sleep(PROBE_SECONDS)

    async def look(self) -> None:
        """Ask every engine about the models that are not known yet or may have changed, once."""
        served = [self._pools.backends[number] for number in sorted(self._pools.served)]
        endpoints = list({(each.pool, _engine_of(each)): each for each in reversed(served)}.values())[::-1]
        in_force: dict[str, set[str]] = {}
        for endpoint in endpoints:
            in_force.setdefault(endpoint.pool, set()).add(_engine_of(endpoint))
        self._templates.keep(in_force)
        self._answers = {key: value for key, value in self._answers.items() if key[1] in in_force.get(key[0], ())}
        self._rounds += 1
        for endpoint in endpoints:
            if endpoint.is_provider:
                continue
            try:
                await self._ask(endpoint)
            except (UpstreamError, _NoPage) as error:
                log.debug("replica %s does not show its template: %s", endpoint.name, error)

    async def _ask(self, endpoint: ReplicaEndpoint) -> None:
        pool, engine = endpoint.pool, _engine_of(endpoint)
        models = await fetch_models(self._client, endpoint)
        self._templates.listed(pool, engine, models)
        names = [str(model.get("id")) for model in models[:MAX_MODELS_PROBED]]
        if await self._has_changed(endpoint, models, names):
            self._templates.doubt(pool, engine)
        samples = self._answers[pool, engine].samples
        for name in names:
            if self._templates.wants_probe(pool, name, engine):
                render = self._renderer(endpoint, name)
                family = family_facts(name)
                facts = await facts_of(
                    render,
                    self._dates(),
                    partial(self._text_of, endpoint, name),
                    may_be_dated=family is not None and family.dated,
                )
                if facts is not None:
                    if facts.keeps_billing and await self._messages_drop_billing(endpoint, name):
                        facts = msgspec.structs.replace(facts, messages_drop_billing=True)
                    self._templates.shown(pool, name, engine, facts)
                    samples[name] = await sample(render)

    async def _has_changed(
        self, endpoint: ReplicaEndpoint, models: Sequence[Mapping[str, Any]], names: Sequence[str]
    ) -> bool:
        """Return whether an engine's models have changed since it was last asked, or the rendering of one of them.

        Each round looks at another model.
        """
        key = (endpoint.pool, _engine_of(endpoint))
        listed = sorted([(str(model.get("id")), model.get("root")) for model in models], key=str)
        known = self._answers.get(key)
        if known is None or known.models != listed:
            self._answers[key] = _Answers(listed, {})
            return known is not None
        sampled = [name for name in names if name in known.samples]
        if not sampled:
            return False
        name = sampled[self._rounds % len(sampled)]
        now = await sample(self._renderer(endpoint, name))
        return now not in (0, known.samples[name])

    def _dates(self) -> list[str]:
        """Return ways to write the date of today, anywhere on earth."""
        now = self._clock.unix()
        days = [datetime.fromtimestamp(now + days * _DAY_SECONDS, UTC) for days in (0, -1, 1)]
        return [day.strftime(form) for day in days for form in _DATE_FORMATS]

    def _renderer(self, endpoint: ReplicaEndpoint, model: str) -> Render:
        async def render(request: dict[str, Any]) -> Rendering | None:
            body = msgspec.json.encode({"model": model, "add_generation_prompt": True, **request})
            return await self._rendered(endpoint, body)

        return render

    async def _rendered(self, endpoint: ReplicaEndpoint, body: bytes) -> Rendering | None:
        """Return what one of the pages renders, None if they refuse. Raises _NoPage if it has none."""
        statuses = []
        for path, read in _PAGES:
            status, page = await self._post(endpoint, path, body)
            if status == 200 and (rendering := read(page)):
                return rendering
            statuses.append(status)
        if _NO_SUCH_PAGE.issuperset(statuses):
            raise _NoPage("it has no path that renders prompts")
        return None

    async def _messages_drop_billing(self, endpoint: ReplicaEndpoint, model: str) -> bool:
        """Return False if a billing block counts as part of a prompt in Anthropic's dialect; True if not, or if that
        is unknown.

        Some engines leave it out when they translate such a prompt, before it is rendered.
        """
        counts = []
        for blocks in ((_text("some words"),), (_text(_BILLING_LINE), _text("some words"))):
            request = {"model": model, "max_tokens": 1, "system": blocks, "messages": [_QUESTION]}
            status, page = await self._post(endpoint, b"/v1/messages/count_tokens", msgspec.json.encode(request))
            counts.append(read_count(page) if status == 200 else 0)
        return not 0 < counts[0] < counts[1]

    async def _text_of(self, endpoint: ReplicaEndpoint, model: str, tokens: Rendering) -> str:
        """Return the text of token ids, as vLLM and SGLang return it; empty if the engine does not."""
        body = msgspec.json.encode({"model": model, "tokens": tokens})
        status, page = await self._post(endpoint, b"/detokenize", body)
        return read_text(page) if status == 200 else ""

    async def _post(self, endpoint: ReplicaEndpoint, path: bytes, body: bytes) -> tuple[int, bytes]:
        headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)
        if endpoint.credential is not None:
            headers += (endpoint.credential,)
        response = await self._client.request(
            endpoint.origin, b"POST", path, headers, body, limits=self._limits, repeatable=True
        )
        try:
            return response.status, await response.read(_PAGE_AT_MOST_BYTES)
        finally:
            response.abort()


def _engine_of(endpoint: ReplicaEndpoint) -> str:
    """Return the name of the engine behind an endpoint, which all its ranks share."""
    return endpoint.engine_name or endpoint.name


class _Applied(msgspec.Struct):
    prompt: str = ""


class _Count(msgspec.Struct):
    input_tokens: int = 0


class _Text(msgspec.Struct):
    prompt: str = ""
    text: Any = ""


class _Tokens(msgspec.Struct):
    tokens: list[int] = []


def read_applied(page: bytes) -> Rendering:
    """Return llama.cpp's rendered prompt; empty if `page` does not contain one."""
    try:
        return msgspec.json.decode(page, type=_Applied).prompt
    except DECODE_ERRORS:
        return ""


def read_count(page: bytes) -> int:
    """Return the tokens that an engine counted; 0 if `page` contains no count."""
    try:
        return msgspec.json.decode(page, type=_Count).input_tokens
    except DECODE_ERRORS:
        return 0


def read_text(page: bytes) -> str:
    """Return the text in which vLLM or SGLang turned token ids; empty if `page` contains none."""
    try:
        read = msgspec.json.decode(page, type=_Text)
    except DECODE_ERRORS:
        return ""
    return read.prompt or (read.text if isinstance(read.text, str) else "")


def read_tokens(page: bytes) -> Rendering:
    """Return the token ids that vLLM or SGLang returned; empty if `page` contains none."""
    try:
        return msgspec.json.decode(page, type=_Tokens).tokens
    except DECODE_ERRORS:
        return []


_PAGES: Final = ((b"/apply-template", read_applied), (b"/tokenize", read_tokens))
