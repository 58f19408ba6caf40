"""The planner: which part of a prompt is its key, what is told of it, and which replicas may serve it."""

from __future__ import annotations

import dataclasses
from array import array
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from cache import Content, PrefixIndex
from proxy.errors import Overloaded
from proxy.fleet import Fleet, ReplicaSpec
from proxy.fleet.pools import Pools, ServedPool
from proxy.fleet.served_models import Listing
from proxy.model import CacheStatus, Endpoint, MissReason, RouteReason, TemplateFacts
from proxy.pipeline.exchange import TOOLS, Exchange, StoredUse
from proxy.pipeline.planner import Planner, PlanningRules
from proxy.records import Tenant
from proxy.routing import cost as routing
from proxy.routing.prefill_gate import PrefillGate
from proxy.routing.token_estimate import TokenCounts
from proxy.wire import request as wire_request
from tests.proxy.pipeline.bench import POOL, Bench
from tests.support.clock import FakeClock

SHARED = ServedPool(POOL, ("*",))
ISOLATED = ServedPool(POOL, ("*",), isolated=True)
ONE, OTHER = Tenant("one", salt=b"1" * 16), Tenant("other", salt=b"2" * 16)
SESSION = ((b"x-session-id", b"s"),)
DAY_SECONDS = 86_400.0


class Templates:
    """Renders the prompts of every model alike."""

    def __init__(self) -> None:
        self.facts = TemplateFacts()

    def of(self, pool: str, model: str) -> TemplateFacts:
        return self.facts


class Planning:
    """A planner over `replicas` idle replicas and an empty index."""

    def __init__(self, replicas: int = 2) -> None:
        self.clock, self.fleet, self.index = FakeClock(), Fleet(lambda: 0.5), PrefixIndex()
        self.pools = Pools([SHARED], None, {})
        self.gate, self.templates, self.tokens = PrefillGate(), Templates(), TokenCounts()
        for number in range(replicas):
            self.fleet.add(ReplicaSpec(f"r{number}", POOL, prefill_tokens_per_second=10_000.0))
        self.planner = Planner(
            self.fleet,
            self.index,
            self.tokens,
            self.gate,
            cast("Any", self.templates),
            self.clock,
            PlanningRules(min_shareable_bytes=4_096),
            self.pools,
        )

    def read(
        self,
        prompt: str = "x" * 9_000,
        *,
        tenant: Tenant = ONE,
        pool: ServedPool = SHARED,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        endpoint: Endpoint = Endpoint.CHAT,
    ) -> Exchange:
        """A request that was read and is not planned yet."""
        made = Bench().exchange(prompt=prompt)
        made.call = dataclasses.replace(made.call, tenant=tenant, headers=headers, endpoint=endpoint)
        made.pool, made.fingerprint, made.plan = pool, None, None
        return made

    def planned(self, exchange: Exchange) -> Exchange:
        """Run it through all phases of the planner."""
        self.planner.fingerprint(exchange)
        self.planner.look_up(exchange)
        self.planner.plan(exchange)
        return exchange

    def key(self, prompt: str = "x" * 9_000, **more: Any) -> list[int]:
        """The hashes of a prompt, none if it has no key."""
        exchange = self.read(prompt, **more)
        self.planner.fingerprint(exchange)
        return [] if exchange.fingerprint is None else list(exchange.fingerprint.hashes)

    def serve(self, exchange: Exchange, replica: int, tokens: int = 2_000) -> None:
        """Let `replica` compute a prompt and report its tokens."""
        assert exchange.fingerprint is not None
        placement = self.index.place(replica, exchange.fingerprint, tokens, self.clock.monotonic())
        self.index.answered(placement, tokens, 0, 10, self.clock.monotonic())


def order(exchange: Exchange) -> list[int]:
    """The replicas of a plan, in the order in which to try them."""
    assert exchange.plan is not None
    return [candidate.replica.id for candidate in exchange.plan.candidates]


# -- the key


def test_only_a_generation_that_is_long_enough_to_share_has_a_key() -> None:
    """Embeddings have none, however long."""
    planning = Planning()
    assert planning.key("x" * 4_200)
    assert not planning.key("x" * 4_000)
    assert not planning.key(endpoint=Endpoint.EMBEDDINGS)


def test_an_image_has_its_place_and_its_tokens_in_the_key() -> None:
    """So that what precedes it is not counted by the bytes of its base64."""
    planning = Planning()
    exchange, url = planning.read(), "data:image/png;base64," + "aGVsbG8h" * 1_000
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    body = msgspec.json.encode({"model": "m", "messages": [{"role": "system", "content": "x" * 9_000}, message]})
    prompt = exchange.prompt = wire_request.read(body, Endpoint.CHAT)
    planning.planner.fingerprint(exchange)
    assert exchange.fingerprint is not None
    ((start, end, tokens),) = exchange.fingerprint.media
    assert url.encode() in b"".join(prompt.spans)[start:end]
    assert (end - start < len(url) + 20, tokens) == (True, 1_000)


def test_tenants_share_keys_except_in_an_isolated_pool() -> None:
    """There the salt of the tenant begins the chain, so that all of its hashes are the tenant's own."""
    planning = Planning()
    assert planning.key(tenant=ONE) == planning.key(tenant=OTHER)
    own, others = planning.key(tenant=ONE, pool=ISOLATED), planning.key(tenant=OTHER, pool=ISOLATED)
    assert own == planning.key(tenant=ONE, pool=ISOLATED)
    assert not set(own) & (set(others) | set(planning.key()))


def test_a_template_that_renders_the_date_gives_a_prompt_another_key_each_day() -> None:
    """Any other template gives it the same for ever."""
    planning = Planning()
    keys = []
    for dated in (False, True):
        planning.templates.facts = TemplateFacts(dated=dated)
        for _ in range(2):
            keys.append(planning.key())
            planning.clock.advance(DAY_SECONDS)
    assert keys[0] == keys[1]
    assert keys[2] != keys[3]


@pytest.mark.parametrize("rest", ["", "user", "system"])
@pytest.mark.parametrize("facts", [TemplateFacts(), TemplateFacts(moves_system=True)])
def test_a_stored_context_has_the_key_of_the_same_messages_sent_whole(facts: TemplateFacts, rest: str) -> None:
    """Alone or with messages after it, even if these are rendered before it: either finds what the other cached."""
    planning = Planning()
    planning.templates.facts = facts
    first, last = (
        msgspec.json.encode({"role": role, "content": text * 9_000}) for role, text in (("user", "a"), (rest, "b"))
    )

    def read(messages: bytes) -> Exchange:
        made = planning.read()
        made.prompt = wire_request.read(b'{"model":"m","messages":[%b]}' % messages, Endpoint.CHAT)
        return made

    whole, stored = read(first + b"," + last if rest else first), read(last if rest else b"")
    content = Content(b"d", b"", first, array("I", (0, len(first))))
    stored.stored = StoredUse(cast("Any", None), content, 0.0)
    assert stored.prompt is not None
    stored.prompt = dataclasses.replace(stored.prompt, size_bytes=stored.prompt.size_bytes + len(first))
    for each in (whole, stored):
        planning.planner.fingerprint(each)
    assert whole.fingerprint is not None
    assert stored.fingerprint is not None
    assert list(stored.fingerprint.hashes) == list(whole.fingerprint.hashes)
    assert list(stored.fingerprint.ends) == list(whole.fingerprint.ends)


def test_a_stored_context_has_another_key_with_each_argument_that_is_rendered_within_it() -> None:
    """As if the request had sent all of it."""
    planning = Planning()
    planning.templates.facts = TemplateFacts(late_arguments=frozenset({"enable_thinking"}))
    first, last = (msgspec.json.encode({"role": "user", "content": text * 9_000}) for text in "ab")
    content = Content(b"d", b"", first, array("I", (0, len(first))))
    keys = []
    for thinks in (b"true", b"false", b"null"):
        for messages in (first + b"," + last, last):
            made = planning.read()
            body = b'{"model":"m","enable_thinking":%b,"messages":[%b]}' % (thinks, messages)
            made.prompt = wire_request.read(body, Endpoint.CHAT)
            if messages is last:
                made.stored = StoredUse(cast("Any", None), content, 0.0)
            planning.planner.fingerprint(made)
            assert made.fingerprint is not None
            keys.append(made.fingerprint.hashes[-1])
    assert keys[::2] == keys[1::2]
    assert len(set(keys)) == 3


def test_the_chain_of_a_stored_context_is_computed_once_for_all_that_follow_it() -> None:
    """It may be megabytes long."""
    planning, bounds = Planning(), array("I", (0, 9_000))
    content = CountedContent(b"d", b"", b"x" * 9_000, bounds)
    for question in ("a" * 5_000, "b" * 5_000, "c" * 5_000):
        made = planning.read(question)
        made.stored = StoredUse(cast("Any", None), content, 0.0)
        planning.planner.fingerprint(made)
        assert made.fingerprint is not None
        assert made.fingerprint.size_bytes > 14_000
    assert content.read_times == 1


class CountedContent(Content):
    """Counts how often the messages are read."""

    read_times = 0

    def message_views(self) -> list[memoryview]:
        self.read_times += 1
        return super().message_views()


# -- what is told


def test_a_tenant_is_told_of_a_prefix_only_after_it_had_it_answered() -> None:
    """Unless it may see all; the plan is the same either way."""
    planning = Planning()
    planning.serve(planning.planned(planning.read(tenant=OTHER)), replica=1)
    limited = dataclasses.replace(ONE, sees_all=False)
    first = planning.planned(planning.read(tenant=limited))
    assert (first.own_blocks, order(first)[0]) == (0, 1)
    planning.planner.note_answered(first)
    again = planning.planned(planning.read(tenant=limited))
    assert again.fingerprint is not None
    assert again.own_blocks == len(again.fingerprint)
    assert planning.planned(planning.read(tenant=ONE)).own_blocks is None
    assert planning.planned(planning.read(tenant=limited, pool=ISOLATED)).own_blocks is None
    assert planning.planned(planning.read("short", tenant=limited)).own_blocks == 0


def test_an_explanation_is_planned_by_the_tenants_own_prefixes() -> None:
    """Or its order of the replicas would show what others sent."""
    planning = Planning()
    planning.serve(planning.planned(planning.read(tenant=OTHER)), replica=1)
    limited = dataclasses.replace(ONE, sees_all=False)

    def explained() -> CacheStatus:
        made = planning.read(tenant=limited)
        made.only_explained = True
        plan = planning.planned(made).plan
        assert plan is not None
        return plan.cache

    assert explained() is CacheStatus.MISS
    planning.planner.note_answered(planning.planned(planning.read(tenant=limited)))
    assert explained() is CacheStatus.HIT


# -- the plan


def test_the_replica_that_holds_the_prefix_comes_first_and_its_count_of_tokens_is_taken() -> None:
    """Before any was served the tokens are estimated from the bytes, and nothing is held."""
    planning = Planning(3)
    cold = planning.planned(planning.read())
    assert cold.plan is not None
    assert (cold.plan.reason, cold.plan.miss) == (RouteReason.COLD, MissReason.COLD)
    assert cold.plan.prompt_tokens == pytest.approx(9_000 / 4, rel=0.02)
    for replica in (2, 1):
        planning = Planning(3)
        planning.serve(planning.planned(planning.read()), replica, tokens=4_000)
        warm = planning.planned(planning.read())
        assert warm.plan is not None
        assert (order(warm)[0], warm.plan.reason, warm.plan.cache) == (replica, RouteReason.WARM, CacheStatus.HIT)
        assert warm.plan.prompt_tokens == 4_000


def test_the_rest_of_a_prompt_is_estimated_by_what_its_own_model_has_shown() -> None:
    """Behind a part whose tokens were reported."""
    planning = Planning(1)
    for _ in range(200):
        planning.tokens.observe("m", 9_000, 9_000, ())
    planning.serve(planning.planned(planning.read()), 0, tokens=9_000)
    longer = planning.planned(planning.read("x" * 18_000))
    assert longer.plan is not None
    assert longer.plan.prompt_tokens == pytest.approx(18_000, rel=0.05)


def test_replicas_to_avoid_and_those_not_asked_for_are_left_out() -> None:
    """If none is left, the client is told so."""
    planning = Planning(3)
    exchange = planning.planned(planning.read())
    planning.planner.plan(exchange, among=frozenset((0, 2)))
    assert sorted(order(exchange)) == [0, 2]
    exchange.avoid = frozenset(("r2",))
    planning.planner.plan(exchange)
    assert sorted(order(exchange)) == [0, 1]
    with pytest.raises(Overloaded):
        planning.planner.plan(exchange, among=frozenset((2,)))


def test_a_replica_that_is_not_the_only_one_is_not_called_so() -> None:
    """If others are left out of a plan although they are available, the reason is what the chosen one holds."""
    planning = Planning(3)
    exchange = planning.planned(planning.read())

    def reason() -> RouteReason:
        planning.planner.look_up(exchange)
        planning.planner.plan(exchange, among=frozenset((1,)))
        assert exchange.plan is not None
        return exchange.plan.reason

    assert reason() is RouteReason.COLD
    planning.serve(exchange, 1)
    assert reason() is RouteReason.WARM
    exchange.avoid = frozenset(("r0", "r2"))
    assert reason() is RouteReason.ONLY


def test_a_rate_limit_takes_a_replica_from_the_plans_of_its_key_alone() -> None:
    """Other tenants' requests still go there."""
    planning = Planning()
    exchange = planning.read(tenant=ONE)
    planning.fleet.rate_limited(0, exchange.throttle_key, planning.clock.monotonic(), 60.0)
    assert order(planning.planned(exchange)) == [1]
    assert sorted(order(planning.planned(planning.read(tenant=OTHER)))) == [0, 1]


def lists(planning: Planning, number: int, *names: str, room: int | None = None) -> None:
    """Let a replica list these models, each with `room` tokens."""
    entry = {"aliases": None, "owned_by": "vllm", "parent": None, "max_model_len": room}
    planning.fleet.listed(number, Listing([SimpleNamespace(id=name, **entry) for name in names]))


def test_a_replica_that_lists_other_models_or_has_refused_this_one_is_left_out() -> None:
    """For as long as the refusal counts; if all have refused it, all are asked again."""
    planning = Planning(3)
    for number, names in enumerate((("base",), ("base", "m"), ("base", "m"))):
        lists(planning, number, *names)
    assert sorted(order(planning.planned(planning.read()))) == [1, 2]
    for number, left in ((1, [2]), (2, [0]), (0, [0, 1, 2])):
        planning.fleet.refused(number, planning.read().need(), planning.clock.monotonic())
        assert sorted(order(planning.planned(planning.read()))) == left
    planning.clock.advance(31.0)
    assert sorted(order(planning.planned(planning.read()))) == [1, 2]


def test_a_replica_that_has_refused_tools_is_left_out_for_prompts_with_tools_alone() -> None:
    """By the path, the tools and the media of a prompt."""
    planning = Planning()
    with_tools = planning.read()
    with_tools.prompt = wire_request.read(b'{"model":"m","tools":[{"type":"function"}],"messages":[]}', Endpoint.CHAT)
    planning.fleet.refused(0, with_tools.need(TOOLS), planning.clock.monotonic())
    assert order(planning.planned(with_tools)) == [1]
    assert sorted(order(planning.planned(planning.read()))) == [0, 1]


def test_a_prompt_goes_where_the_context_is_long_enough_if_such_a_replica_is_available() -> None:
    """One of unknown length may have room; without any, the best one gives the refusal. A prompt needs an answer."""
    planning = Planning(3)
    exact = planning.planned(planning.read()).plan
    assert exact is not None
    for tokens, fitting in ((exact.prompt_tokens, [1, 2]), (exact.prompt_tokens + 1, [0, 1, 2]), (100, [1, 2])):
        for number, room in enumerate((int(tokens), 100_000, None)):
            lists(planning, number, "m", room=room)
        assert sorted(order(planning.planned(planning.read()))) == fitting
    for number in (1, 2):
        planning.fleet.unreachable(number, planning.clock.monotonic(), "refused")
    assert order(planning.planned(planning.read())) == [0]


def test_if_no_replica_is_left_the_client_is_told_in_which_pool() -> None:
    """And why each one is not available."""
    planning = Planning(1)
    exchange = planning.read()
    exchange.avoid = frozenset(("r0",))
    with pytest.raises(Overloaded) as told:
        planning.planner.plan(exchange)
    assert told.value.message == f"No replica of pool '{POOL}' can take this request now: there is none."


def test_a_named_object_pins_the_plan_to_its_replica() -> None:
    """With a prompt, with one too short to share, and without any."""
    planning = Planning()
    for pinned in (0, 1):
        for prompt in ("x" * 9_000, "short", None):
            exchange = planning.read(prompt or "")
            exchange.prompt = exchange.prompt if prompt else None
            exchange.pinned_replica = pinned
            planning.planned(exchange)
            assert exchange.plan is not None
            assert (order(exchange), exchange.plan.reason) == ([pinned], RouteReason.PINNED)


@pytest.mark.parametrize("why", ["", "object", "model", "room"])
def test_a_request_that_only_some_replicas_can_serve_is_restricted(why: str) -> None:
    """For what it names, for a model that one of them refused, or for want of room; the gate's choice is none."""
    planning = Planning(3)
    exchange = planning.read()
    if why == "object":
        exchange.pinned_replica = 0
    elif why == "model":
        planning.fleet.refused(1, exchange.need(""), planning.clock.monotonic())
    elif why == "room":
        for number, room in enumerate((100_000, 100_000, 1_000)):
            model = SimpleNamespace(id=exchange.model, aliases=None, owned_by="vllm", parent=None, max_model_len=room)
            planning.fleet.listed(number, Listing([model]))
    planning.planned(exchange)
    planning.planner.plan(exchange, among=frozenset((0,)))
    assert exchange.is_restricted is bool(why)


def test_a_failing_replica_is_asked_for_the_objects_that_it_alone_has() -> None:
    """All other requests leave it alone."""
    planning = Planning()
    planning.fleet.proven(0, planning.clock.monotonic(), "500")
    exchange = planning.read()
    assert order(planning.planned(exchange)) == [1]
    exchange.pinned_replica = 0
    assert order(planning.planned(exchange)) == [0]


@pytest.mark.parametrize("served_at", [0, 1])
def test_a_session_returns_to_the_replica_that_served_it_last_where_nothing_else_decides(served_at: int) -> None:
    """Though its new prompt shares nothing with the last; another tenant's session of that name does not."""
    planning = Planning()
    prompts = [letter * 9_000 for letter in "abcdefgh"]
    by_key = [order(planning.planned(planning.read(prompt)))[0] for prompt in prompts]
    assert set(by_key) == {0, 1}  # ties are broken by the key
    first = planning.planned(planning.read(headers=SESSION))
    planning.planner.note_answered(first)  # no replica answered: nothing to remember
    assert [order(planning.planned(planning.read(p, headers=SESSION)))[0] for p in prompts] == by_key
    assert first.plan is not None
    candidate = next(each for each in first.plan.candidates if each.replica.id == served_at)
    first.attempt = cast("Any", Attempted(candidate))
    planning.planner.note_answered(first)
    assert {order(planning.planned(planning.read(p, headers=SESSION)))[0] for p in prompts} == {served_at}
    others = [order(planning.planned(planning.read(p, headers=SESSION, tenant=OTHER)))[0] for p in prompts]
    assert others == by_key


def test_a_prompt_that_must_be_computed_anew_goes_where_least_is_to_do_and_is_charged_in_full() -> None:
    """Not to the replica that holds it, which could not reuse it, while others like it wait there."""
    planning = Planning()
    warm = planning.planned(planning.read())
    planning.serve(warm, 0)
    planning.fleet.charge(0, 500.0, planning.clock.monotonic())
    assert order(planning.planned(planning.read()))[0] == 0
    anew = planning.read()
    assert anew.prompt is not None
    anew.prompt = dataclasses.replace(anew.prompt, skips_cache=True)
    planning.planned(anew)
    assert order(anew)[0] == 1
    assert anew.plan is not None
    assert {each.uncached_tokens for each in anew.plan.candidates} == {anew.plan.prompt_tokens}
    assert anew.plan.prompt_tokens == 2_000, "its length is known all the same"


class Attempted:
    """An attempt, of which only the candidate counts."""

    def __init__(self, candidate: Any) -> None:
        self.candidate = candidate


def test_a_replica_that_still_computes_the_prefix_comes_after_one_that_has_computed_it() -> None:
    """Although the other one costs more because it decodes many responses; a moment later, cost decides again."""
    planning = Planning()
    exchange, now = planning.planned(planning.read()), planning.clock.monotonic()
    for replica in (0, 1):
        planning.serve(exchange, replica)
    for _ in range(200):
        planning.fleet.first_token(planning.fleet.charge(0, 1.0, now), now)
    planning.fleet.charge(1, 2_000.0, now)
    assert order(planning.planned(planning.read())) == [1, 0]
    assert exchange.fingerprint is not None
    prefill = planning.gate.lead(1, exchange.fingerprint.hashes, 0, 0.0)
    assert order(planning.planned(planning.read())) == [0, 1]
    prefill.first_token()
    assert order(planning.planned(planning.read())) == [1, 0]


@pytest.mark.parametrize(("prompt", "has_room"), [("x" * 9_000, True), ("x" * 900, False)])
def test_the_room_at_replicas_counts_for_a_prompt_that_is_placed(
    monkeypatch: pytest.MonkeyPatch, prompt: str, has_room: bool
) -> None:
    """A short one takes none."""
    planning, rooms = Planning(), []
    plan = routing.plan

    def noted(*arguments: Any, **about: Any) -> Any:
        rooms.append(about["room"])
        return plan(*arguments, **about)

    monkeypatch.setattr(routing, "plan", noted)
    planning.planned(planning.read(prompt))
    assert rooms == [planning.index if has_room else None]


@pytest.mark.parametrize("treats_alike", [True, False])
def test_a_request_whose_pool_was_removed_moves_to_the_one_that_serves_its_model(treats_alike: bool) -> None:
    """It was read and checked for its pool, so only one that treats requests alike may take it over."""
    planning = Planning(replicas=0)
    number = planning.fleet.add(ReplicaSpec("new", "renamed"))
    exchange = planning.read()
    renamed = ServedPool("renamed", ("*",), optional=True, shares_key=not treats_alike)
    planning.pools.adopt(Pools([renamed], None, {}))
    if treats_alike:
        assert order(planning.planned(exchange)) == [number]
        assert exchange.pool is renamed
    else:
        with pytest.raises(Overloaded, match=POOL):
            planning.planned(exchange)
