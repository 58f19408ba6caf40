"""The facts that probes find about a template, with realistic renderers."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.engines.templates import Template, decode_chat, render
from proxy.config.schema import Config, Pool, PoolKind, Replica
from proxy.errors import ConnectFailed
from proxy.fleet import template_probe
from proxy.fleet.pools import Pools, ReplicaEndpoint, ServedPool
from proxy.fleet.template_probe import TemplateProber
from proxy.fleet.templates import Templates
from proxy.model import TemplateFacts, ToolOrder
from proxy.upstream import Limits, Origin
from tests.support.clock import FakeClock


async def facts_of(render, dates=()) -> TemplateFacts:
    """The facts of an engine that answers."""
    facts = await template_probe.facts_of(render, dates)
    assert facts is not None
    return facts


ALL_HEADLESS = frozenset({"enable_thinking", "thinking", "documents"})


def renderer(template: Template, tokens: bool = False):
    """The answers of an engine with `template`: text, or token ids of four characters each."""

    async def rendered(request):
        text = (
            render(decode_chat(msgspec.json.encode({"model": "m", **request})), template).decode() + "<|assistant|>"
        )
        return [hash(text[at : at + 1]) for at in range(len(text))] if tokens else text

    return rendered


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (Template(), TemplateFacts(none_drops_tools=False)),
        (Template(system_first=True), TemplateFacts(order=ToolOrder.SYSTEM_FIRST, none_drops_tools=False)),
        (
            Template(drops_reasoning=True),
            TemplateFacts(drops_reasoning=True, drops_thoughts=True, none_drops_tools=False),
        ),
        (Template(ignores_reasoning=True), TemplateFacts(ignores_reasoning=True, none_drops_tools=False)),
        (Template(moves_system=True), TemplateFacts(moves_system=True, none_drops_tools=False)),
        (Template(drops_tools_for_none=True), TemplateFacts(none_drops_tools=True)),
        (Template(drops_billing=True), TemplateFacts(none_drops_tools=False, keeps_billing=False)),
    ],
)
async def test_a_template_shows_its_order_and_what_it_leaves_out(template, expected, tokens):
    """Whether the engine renders text or token ids."""
    facts = await facts_of(renderer(template, tokens))
    expected = msgspec.structs.replace(expected, headless=ALL_HEADLESS, keeps_billing=not template.drops_billing)
    assert facts == expected


async def test_an_engine_that_knows_reasoning_by_one_of_its_names_shows_what_it_drops():
    """vLLM's /tokenize reads `reasoning`, llama.cpp and SGLang read `reasoning_content`."""
    plain = renderer(Template(drops_reasoning=True))

    async def renamed(request):
        messages = [dict(message) for message in request["messages"]]
        for message in messages:
            message.pop("reasoning_content", None)
            if "reasoning" in message:
                message["reasoning_content"] = message.pop("reasoning")
        return await plain({**request, "messages": messages})

    for render_it in (plain, renamed):
        facts = await facts_of(render_it)
        assert facts.drops_reasoning
        assert not facts.ignores_reasoning


async def test_a_date_in_the_text_is_found():
    template = Template(date="Today is 31 Jan 2026. ")
    assert (await facts_of(renderer(template), ["31 Jan 2026"])).dated
    assert not (await facts_of(renderer(template), ["01 Feb 2026"])).dated


async def test_an_argument_that_is_rendered_at_the_head_counts():
    facts = await facts_of(renderer(Template()))
    assert "reasoning_effort" not in facts.headless


async def test_a_switch_that_is_written_into_every_message_of_the_user_changes_turns_and_not_the_head():
    facts = await facts_of(renderer(Template(marks_users=True)))
    assert (facts.headless, facts.late_arguments) == (
        frozenset({"thinking", "documents"}),
        frozenset({"enable_thinking"}),
    )


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("head", (False, False)),
        ("behind the head", (False, True)),
        ("question", (False, True)),
        ("nowhere", (True, False)),
    ],
)
async def test_documents_are_seen_wherever_they_are_rendered(place, expected):
    """Before the system message, after it, with each question, or not at all: most templates do not know them."""
    whole = renderer(Template())

    async def rendered(request):
        text, documents = await whole(request), str(request.get("documents", ""))
        if place == "head":
            return documents + text
        if place == "behind the head":
            return text.replace("<|user|>", f"{documents}<|user|>", 1)
        return text.replace("<|user|>", f"<|user|>{documents}") if place == "question" else text

    facts = await facts_of(rendered)
    assert ("documents" in facts.headless, "documents" in facts.late_arguments) == expected


@pytest.mark.parametrize("has_tools", [False, True])
async def test_a_switch_that_changes_earlier_answers_only_with_tools_or_only_without_is_seen(has_tools):
    whole = renderer(Template())

    async def rendered(request):
        text = await whole(request)
        if request.get("thinking") and ("tools" in request) == has_tools:
            text = text.replace("<|assistant|>an", "<|assistant|><think>an")
        return text

    assert (await facts_of(rendered)).late_arguments == frozenset({"thinking"})


async def test_an_engine_that_refuses_an_argument_has_it_at_the_head():
    whole = renderer(Template())

    async def rendered(request):
        return None if "enable_thinking" in request else await whole(request)

    facts = await facts_of(rendered)
    assert (facts.headless, facts.late_arguments) == (frozenset({"thinking", "documents"}), frozenset())


@pytest.mark.parametrize(("drops", "expected"), [(True, (True, False)), (False, (False, False))])
async def test_reasoning_that_is_rendered_only_where_a_tool_is_called_is_not_ignored(drops, expected):
    """It is dropped with the next question or kept."""
    facts = await facts_of(renderer(Template(reasons_in_calls=True, drops_reasoning=drops)))
    assert (facts.drops_reasoning, facts.ignores_reasoning) == expected


async def test_an_engine_that_refuses_shows_nothing():
    async def refuse(request):
        return None

    assert await template_probe.facts_of(refuse) is None


async def test_an_engine_that_refuses_tools_shows_the_rest():
    whole = renderer(Template(drops_reasoning=True))

    async def without_tools(request):
        return None if "tools" in request else await whole(request)

    facts = await facts_of(without_tools)
    assert facts.drops_reasoning
    assert facts.order is ToolOrder.TOOLS_FIRST


async def test_tools_before_the_last_question_are_seen():
    async def rendered(request):
        parts = [f"[{message['role']}]{message['content']}" for message in request["messages"]]
        tools = str(request.get("tools", ""))
        return "".join([*parts[:-1], tools, parts[-1]])

    assert (await facts_of(rendered)).order is ToolOrder.TOOLS_LAST


def in_order(place):
    """A renderer of the parts of a prompt in the order that `place` gives, by role; tools have the role "tools"."""

    async def rendered(request):
        parts = [(message["role"], str(message["content"])) for message in request["messages"]]
        if "tools" in request:
            parts.append(("tools", str(request["tools"])))
        last = max(number for number, (role, _) in enumerate(parts) if role == "user")
        placed = [(place(role, number, last), number, text) for number, (role, text) in enumerate(parts)]
        return "".join(f"[{text}]" for _, _, text in sorted(each for each in placed if each[0] is not None))

    return rendered


async def test_a_system_message_with_the_last_question_is_seen_with_the_tools_before_it():
    """As Mistral's older templates render it: it is not taken for one that follows the tools at the beginning."""
    places = {"tools": 0.3, "system": 0.2}
    late = in_order(lambda role, number, last: last - places[role] if role in places else number)
    facts = await facts_of(late)
    assert (facts.order, facts.system_last) == (ToolOrder.TOOLS_LAST, True)
    plain = await facts_of(renderer(Template()))
    assert not plain.system_last


async def test_tools_that_are_never_rendered_do_not_come_last():
    """They would take the turns before the last question out of what prompts share."""
    facts = await facts_of(in_order(lambda role, number, last: None if role == "tools" else number))
    assert (facts.order, facts.splits_systems) == (ToolOrder.SYSTEM_FIRST, False)
    assert not facts.none_drops_tools, "`tool_choice: none` changes nothing"


async def test_tools_between_two_system_messages_are_seen_and_a_developers_message_after_them():
    facts = await facts_of(in_order(lambda role, number, last: 0.5 if role == "tools" and number > 1 else number))
    assert (facts.order, facts.splits_systems, facts.developer_in_place) == (ToolOrder.SYSTEM_FIRST, True, False)
    after = in_order(lambda role, number, last: {"system": -2, "tools": -1}.get(role, number))
    assert (await facts_of(after)).developer_in_place
    assert not (await facts_of(renderer(Template(system_first=True)))).splits_systems


async def test_answers_that_are_rendered_otherwise_once_a_question_follows_are_seen():
    """Some templates put an empty block of thoughts into those after the last question, even if there are none."""

    async def rendered(request):
        messages = request["messages"]
        last = max(place for place, each in enumerate(messages) if each["role"] == "user")
        marked = [place > last and each["role"] == "assistant" for place, each in enumerate(messages)]
        return "".join(
            f"[{'<think></think>' * mark}{each['content']}]" for mark, each in zip(marked, messages, strict=True)
        )

    assert (await facts_of(rendered)).rewrites_turns
    assert not (await facts_of(renderer(Template(drops_reasoning=True)))).rewrites_turns
    ignoring = in_order(lambda role, number, last: None if role == "tool" else number)
    assert not (await facts_of(ignoring)).rewrites_turns
    late = in_order(lambda role, number, last: last - 0.5 if role == "tools" else number)
    assert not (await facts_of(late)).rewrites_turns


async def test_an_engine_that_refuses_system_messages_shows_the_rest():
    whole = renderer(Template(drops_reasoning=True))

    async def without_system(request):
        return None if any(each["role"] == "system" for each in request["messages"]) else await whole(request)

    facts = await facts_of(without_system)
    assert facts.drops_reasoning
    assert not facts.moves_system


@pytest.mark.parametrize(
    ("text", "family", "dated"), [("on 31 Jan 2026", False, True), ("", True, True), ("", False, False)]
)
async def test_a_date_in_token_ids_is_found_in_their_text_or_else_known_by_the_family(text, family, dated):
    async def text_of(tokens):
        assert all(isinstance(token, int) for token in tokens)
        return text

    tokens = renderer(Template(), tokens=True)
    facts = await template_probe.facts_of(tokens, ["31 Jan 2026"], text_of, may_be_dated=family)
    assert facts is not None
    assert facts.dated is dated


class FakeResponse:
    def __init__(self, status: int, content: object) -> None:
        self.status = status
        self._page = msgspec.json.encode(content)

    async def read(self, most_bytes: int) -> bytes:
        return self._page[:most_bytes]

    def abort(self) -> None:
        pass


class FakeEngine:
    """A client whose only upstream renders at `path` and lists two names of one model and an adapter."""

    def __init__(self, path: bytes, template: Template) -> None:
        self._path = path
        self.serves(template)
        self.asked: list[bytes] = []
        self.headers: list[tuple[tuple[bytes, bytes], ...]] = []
        self.fails = False
        self.counts_billing: bool | None = None

    def serves(self, template: Template, root: str = "/m") -> None:
        """Answer by another template from now on, with another model if `root` differs."""
        self._render = renderer(template)
        self._root = root

    async def request(self, origin, method, target, headers=(), body=b"", **more) -> FakeResponse:
        if self.fails:
            raise ConnectFailed("nobody there")
        self.asked.append(target)
        self.headers.append(tuple(headers))
        if body:
            assert (b"content-type", b"application/json") in headers
            assert msgspec.json.decode(body)["model"] in ("chat", "code", "sql")
        if target == b"/v1/models":
            names = [{"id": name, "root": self._root} for name in ("chat", "code")]
            models = [*names, {"id": "sql", "parent": "chat"}]
            return FakeResponse(200, {"data": models})
        if target == b"/v1/messages/count_tokens" and self.counts_billing is not None:
            billed = b"x-anthropic-billing-header" in body and self.counts_billing
            return FakeResponse(200, {"input_tokens": 20 if billed else 10})
        if target == b"/detokenize" and self._path == b"/tokenize":
            return FakeResponse(200, {"prompt": "".join(map(chr, msgspec.json.decode(body)["tokens"]))})
        if target != self._path:
            return FakeResponse(404, {})
        text = await self._render(msgspec.json.decode(body))
        return FakeResponse(200, {"prompt": text} if target == b"/apply-template" else {"tokens": [*map(ord, text)]})


def prober(engine: FakeEngine, kind: PoolKind = PoolKind.ENGINE) -> tuple[TemplateProber, Templates]:
    pool = Pool("pool", (Replica("http://h"),), kind=kind)
    templates = Templates(Config(pools=(pool,)))
    endpoint = ReplicaEndpoint(
        name="h",
        pool="pool",
        url="http://h",
        origin=Origin.parse("http://h"),
        credential=(b"authorization", b"Bearer own"),
        is_provider=kind is PoolKind.PROVIDER,
    )
    pools = Pools((ServedPool("pool", ("*",)),), None, {0: endpoint})
    return TemplateProber(engine, pools, templates, FakeClock(), Limits()), templates  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [b"/apply-template", b"/tokenize"])
async def test_an_engine_is_asked_about_each_of_its_models_once(path):
    """With its own key; what it shows is what counts, and names of one root share it."""
    engine = FakeEngine(path, Template(system_first=True, drops_reasoning=True))
    probing, templates = prober(engine)
    await probing.look()
    facts = templates.of("pool", "chat")
    assert (facts.order, facts.drops_reasoning, facts.root) == (ToolOrder.SYSTEM_FIRST, True, "/m")
    assert templates.of("pool", "code") == facts
    assert all((b"authorization", b"Bearer own") in headers for headers in engine.headers)
    asked = len(engine.asked)
    await probing.look()
    assert engine.asked[asked] == b"/v1/models"
    assert set(engine.asked[asked + 1 :]) <= {b"/apply-template", path}
    assert engine.asked[asked:].count(path) == 1, "one prompt shows that nothing has changed"


@pytest.mark.parametrize("path", [b"/apply-template", b"/tokenize"])
async def test_an_engine_that_comes_back_with_another_template_is_asked_again(path):
    """And so is one with other models; as long as it refuses to answer, what it showed before counts."""
    engine = FakeEngine(path, Template())
    probing, templates = prober(engine)
    await probing.look()
    await probing.look()
    assert templates.of("pool", "chat").order is ToolOrder.TOOLS_FIRST
    engine.serves(Template(system_first=True))
    for _ in range(2):
        await probing.look()
        for name in ("chat", "code"):
            assert templates.of("pool", name).order is ToolOrder.SYSTEM_FIRST
    engine.fails = True
    await probing.look()
    engine.fails = False
    engine.serves(Template(), root="/other")
    await probing.look()
    assert (templates.of("pool", "chat").order, templates.of("pool", "code").root) == (
        ToolOrder.TOOLS_FIRST,
        "/other",
    )


@pytest.mark.parametrize("path", [b"/apply-template", b"/tokenize"])
@pytest.mark.parametrize(("day", "dated"), [("13", True), ("14", True), ("15", True), ("16", False)])
async def test_an_engine_that_puts_the_date_into_prompts_is_known_to(path, day, dated):
    """Also if it is in another time zone, or answers with token ids, whose text is asked for."""
    probing, templates = prober(FakeEngine(path, Template(date=f"Today Date: {day} Nov 2023\n")))
    await probing.look()
    assert templates.of("pool", "chat").dated is dated


@pytest.mark.parametrize(("counts", "drops"), [(None, True), (False, True), (True, False)])
async def test_a_billing_line_in_anthropics_dialect_is_known_by_its_count(counts, drops):
    """vLLM leaves it out of these prompts and renders it in all others; an engine that counts none leaves it out."""
    engine = FakeEngine(b"/tokenize", Template())
    engine.counts_billing = counts
    probing, templates = prober(engine)
    await probing.look()
    facts = templates.of("pool", "chat")
    assert (facts.keeps_billing, facts.messages_drop_billing) == (True, drops)


async def test_each_engine_of_a_pool_is_asked_and_its_ranks_are_one():
    """Two engines that render differently, the second with two ranks."""
    engines = {"a": FakeEngine(b"/tokenize", Template()), "b": FakeEngine(b"/tokenize", Template(system_first=True))}

    class BothEngines:
        async def request(self, origin, *arguments, **more):
            return await engines[origin.host].request(origin, *arguments, **more)

    templates = Templates(Config(pools=(Pool("pool", (Replica("http://a"), Replica("http://b"))),)))

    def endpoint(name: str, engine: str) -> ReplicaEndpoint:
        return ReplicaEndpoint(name, "pool", f"http://{engine}", Origin.parse(f"http://{engine}"), engine_name=engine)

    endpoints = {0: endpoint("a", "a"), 1: endpoint("b/rank-0", "b"), 2: endpoint("b/rank-1", "b")}
    pools = Pools((ServedPool("pool", ("*",)),), None, endpoints)
    probing = TemplateProber(BothEngines(), pools, templates, FakeClock(), Limits())  # type: ignore[arg-type]
    await probing.look()
    assert templates.of("pool", "chat").joins_head
    assert engines["b"].asked.count(b"/v1/models") == 1, "its ranks are one engine"


async def test_an_engine_that_cannot_render_or_be_reached_changes_nothing():
    engine = FakeEngine(b"/nowhere", Template())
    probing, templates = prober(engine)
    await probing.look()
    assert templates.of("pool", "chat").order is ToolOrder.TOOLS_FIRST
    assert templates.wants_probe("pool", "chat", "h")
    engine.fails = True
    await probing.look()


async def test_an_engine_that_has_no_page_for_it_is_asked_about_one_model_per_round():
    """It may have many models, and logs each question."""
    engine = FakeEngine(b"/elsewhere", Template())
    probing, _ = prober(engine)
    for _ in range(2):
        await probing.look()
    assert engine.asked == [b"/v1/models", b"/apply-template", b"/tokenize"] * 2


async def test_a_provider_is_never_asked():
    engine = FakeEngine(b"/tokenize", Template())
    probing, _ = prober(engine, PoolKind.PROVIDER)
    await probing.look()
    assert engine.asked == []


DEEP = b'{"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}"


@pytest.mark.parametrize("page", [b"", b"[]", b'{"prompt": 5}', b'{"tokens": "x"}', b"\xff", DEEP])
def test_pages_that_are_no_renderings_are_none(page):
    assert not template_probe.read_applied(page)
    assert not template_probe.read_tokens(page)
    assert not template_probe.read_text(page)
    assert not template_probe.read_count(page)


async def test_an_engine_that_refuses_some_prompts_shows_what_the_others_show():
    """Conversations of several turns, or a system message that comes late: some templates raise an error there."""
    whole = renderer(Template(system_first=True, moves_system=True))

    def refusing(refuse):
        async def rendered(request):
            return None if refuse([message["role"] for message in request["messages"]]) else await whole(request)

        return rendered

    facts = await facts_of(refusing(lambda roles: len(roles) > 2))
    assert (facts.order, facts.moves_system) == (ToolOrder.SYSTEM_FIRST, False)
    facts = await facts_of(refusing(lambda roles: "system" in roles[1:]))
    assert (facts.order, facts.moves_system) == (ToolOrder.SYSTEM_FIRST, False)
    assert (await facts_of(whole)).moves_system


async def test_a_prompt_that_is_refused_after_a_small_change_shows_no_order():
    """What the two would share is not known."""
    whole = renderer(Template(system_first=True))

    async def rendered(request):
        return None if "other tool" in str(request) else await whole(request)

    assert (await facts_of(rendered)).order is ToolOrder.TOOLS_FIRST


async def test_the_prompts_that_are_asked_about_are_such_as_clients_send():
    """Engines check them: roles, and tools as functions with a name, a description and parameters."""
    asked = []

    async def rendered(request):
        asked.append(request)
        return str(request)

    await template_probe.facts_of(rendered)
    assert {message["role"] for request in asked for message in request["messages"]} == {
        "system",
        "user",
        "assistant",
        "tool",
    }
    tools = [tool for request in asked for tool in request.get("tools", ())]
    assert tools
    assert all(tool["type"] == "function" for tool in tools)
    assert {frozenset(tool["function"]) for tool in tools} == {frozenset({"name", "description", "parameters"})}
