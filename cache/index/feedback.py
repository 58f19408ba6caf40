"""Compare a response's usage with the prediction of the index, and explain the difference.

Most shortfalls are due to neither an eviction nor a restart. Each reason is recognised by its own sign:

- the engine reuses whole blocks only, and nothing of a prompt that is shorter (`cache.index.granularity`);
- the prompt forks off where the engine does not share, or the fork's count was interpolated wrongly: the count of the
  fork is corrected, after a second such response if the error is large;
- the prompt was rendered differently from before (for example by a template that drops old reasoning): only its own
  length is corrected;
- the engine evicted it: only if the entries fill the budget, and the prompt is older than everything that was shown
  to be cached; several such responses shrink the budget;
- the engine restarted: only if nothing was cached of two whole earlier prompts in a row, of two tenants if it serves
  several, and of more if it has lost prompts without a restart.

These are functions on the tree and on one replica's state. They may recount entries but never drop any; they only
propose a new epoch or budget, which the index applies.
"""

from __future__ import annotations

from typing import Final

from cache.index.fingerprint import Fingerprint
from cache.index.nodes import Node, ReplicaEntries, Step
from cache.index.placement import FeedbackKind, Placement
from cache.index.replica_state import MAX_RESTART_MISSES, UNLIMITED_TOKENS, ReplicaState
from cache.index.token_counts import learn_tokens, recount

MIN_TOLERANCE_TOKENS: Final = 128
"""Engines and providers report in steps of 16 to 128 tokens, so a smaller difference is ignored."""

SHRINK: Final = 0.95
SHRINK_AT_LEAST: Final = 0.99
"""Bounds of the factor by which a stated budget shrinks. A learned one becomes what the evicted prompts needed."""

GROW: Final = 1.025
GROW_FULL_AND_RIGHT: Final = 1.001
PROOF_SHARE: Final = 0.9
"""A correct prediction makes a full budget grow if the prompt was in the oldest tenth of the budget."""

SHRINK_AFTER: Final = 1.0 / 12.0
"""Share of the cache that must be placed anew between two shrinks, since several simultaneous shortfalls often
have one cause. With a whole turnover, which takes minutes if sessions need more cache than there is, the budget
would stay a third too high, and a fifth of the turns would be lost to prefixes that are gone.
"""

FULL: Final = 0.95
"""Share of the budget from which an index counts as full; only then can a wrong budget be the cause."""

NEARLY_FULL: Final = 0.85
"""Share of the budget from which an engine may have evicted something: it also holds outputs and running prompts."""

RECOUNT_SHARE: Final = 0.3
"""Up to this share, one response corrects the interpolated count of a fork; a larger error needs a second one."""

FORK_MISSES: Final = 2
"""Responses in a row that found far less than predicted at a fork before its count is corrected to their result."""

FORK_MISSES_UNPROVED: Final = 3
"""The same, including prompts that were sent before their shared part was known to be computed. It usually has
been by the time they are computed, and waiting for later prompts would let all herd on one replica.
"""

EVICTIONS_KNOWN: Final = 3
EVICTIONS_UNKNOWN: Final = 4
"""Evictions of different prompts before the budget shrinks, if the capacity is known and if it is not."""

PROVEN_DECAY: Final = 0.98
"""Factor of `proven_tokens` at each eviction: running requests and outputs take a varying part of the room."""

GROWTH: Final = 1.125
"""With an unknown capacity, a prompt counts as evicted only if it is older by this factor than all that was shown
to be cached: all conversations have grown a little since it was last used.
"""

SHARED_SHARE: Final = 0.5
"""With an unknown capacity a prompt counts as evicted only if at most this share of it was cached."""

RECENT_PROMPTS: Final = 4
"""With an unknown capacity a prompt is recent if no more than this many of its length were placed since."""

MAX_EVICTIONS: Final = 16
"""Evictions of one replica that are remembered until its budget changes; a few, of several tenants, suffice."""

MAX_SUSPECTS: Final = MAX_RESTART_MISSES + 1
"""Suspects of one replica that are remembered: one more than needed, since they may all be of one tenant."""

# constants: the member of an enum is looked up in Python
_NOTHING: Final = FeedbackKind.NOTHING
_RIGHT: Final = FeedbackKind.RIGHT
_LESS: Final = FeedbackKind.LESS
_MORE: Final = FeedbackKind.MORE
_RECOUNTED: Final = FeedbackKind.RECOUNTED
_FORK: Final = FeedbackKind.FORK
_TAIL: Final = FeedbackKind.TAIL
_EVICTED: Final = FeedbackKind.EVICTED
_SUSPECT: Final = FeedbackKind.SUSPECT
_RESTARTED: Final = FeedbackKind.RESTARTED


def judge(
    state: ReplicaState, placement: Placement, prompt_tokens: int, cached_tokens: int | None, steps: list[Step]
) -> FeedbackKind:
    """Explain a response by comparing it with its placement, and recount the fork if its count was wrong.

    `steps` is the placement's path in the tree. None for `cached_tokens` means that the upstream did not report them,
    or that the request asked not to use the cache.
    """
    if cached_tokens is None or state.ttl_seconds is not None:
        return _NOTHING
    granularity = state.granularity
    granularity.observe(cached_tokens)
    if placement.whole and placement.confident:
        _observe_whole(state, placement, cached_tokens)
    error = cached_tokens - min(placement.predicted_tokens, prompt_tokens)
    tolerance = _tolerance_tokens(state, placement, cached_tokens)
    if error > tolerance + placement.allowance_tokens:
        return _more(state, placement, cached_tokens, steps, error)
    if not placement.confident:
        # at a fork other prompts are mostly in flight, so it is enough that it was computed once
        if error < -tolerance and placement.forks and not placement.whole:
            if placement.proved:
                return _fork_shortfall(placement, steps, error)
            if _is_proved_now(state.entries, placement, steps):
                return _fork_shortfall(placement, steps, error, FORK_MISSES_UNPROVED)
        return _NOTHING
    if error >= -tolerance:
        return _right(state, placement, cached_tokens, steps, error)
    if not placement.whole:
        return _fork_shortfall(placement, steps, error)
    return _whole_shortfall(state, placement, prompt_tokens, cached_tokens, steps)


def _tolerance_tokens(state: ReplicaState, placement: Placement, cached_tokens: int) -> int:
    """Return the largest difference between prediction and report that is due to whole blocks and rounding alone."""
    granularity = state.granularity
    if placement.whole and not cached_tokens and granularity.knows_end(placement.held_tokens):
        return MIN_TOLERANCE_TOKENS  # not even a single block was found
    return max(MIN_TOLERANCE_TOKENS, placement.tolerance_tokens, granularity.tolerance_tokens())


def confirm(
    entries: ReplicaEntries, fingerprint: Fingerprint, steps: list[Step], prompt_tokens: int, output_tokens: int
) -> None:
    """Note that the replica has computed the chain, which is `prompt_tokens` long, and then generated its output."""
    for step in steps:
        residency = step.node.held.get(entries)
        if residency is None:
            break
        residency.confirmed = max(residency.confirmed, step.blocks)
    if not steps or steps[-1].depth != len(fingerprint.hashes):
        return
    last = steps[-1]
    learn_tokens(steps, prompt_tokens, fingerprint.media)
    residency = last.node.held.get(entries)
    if residency is not None:
        if not residency.ends or residency.ends[-1] < last.blocks:
            residency.ends = (*residency.ends, last.blocks)
        if last.blocks == len(last.node.hashes):
            residency.output_tokens = output_tokens


def new_budget(state: ReplicaState, placement: Placement, learnt: FeedbackKind, resident_tokens: int) -> int | None:
    """Return the budget in tokens that follows from a response, or None; `resident_tokens` were held before it."""
    budget = state.budget_tokens
    if learnt is _LESS:
        least = min([each.reuse_tokens for each in state.evictions], default=budget)
        state.evictions = []
        least = min(least, int(SHRINK_AT_LEAST * budget))
        if state.capacity_tokens is not None:
            least = max(least, int(SHRINK * budget))
        return max(1, min(state.bound_tokens, max(least, state.proven_tokens)))
    if resident_tokens < FULL * budget:
        return None
    grown = budget
    if learnt is _MORE:
        grown = int(GROW * budget) + 1
    elif learnt is _RIGHT and placement.reuse_tokens >= PROOF_SHARE * budget:
        grown = int(GROW_FULL_AND_RIGHT * budget) + 1
    grown = min(state.bound_tokens, grown)
    return grown if grown > budget else None


def _more(
    state: ReplicaState, placement: Placement, cached_tokens: int, steps: list[Step], error: int
) -> FeedbackKind:
    """Explain that more was cached than predicted: a fork was counted too short, or evicted here but not there.

    A count that responses have confirmed, or whose error would be large, is not corrected: otherwise every prompt
    that forks off there would be expected to be cached much further than it can be.
    """
    state.suspects = []
    if placement.proved and placement.forks and not placement.whole:
        node = _fork_node(placement, steps)
        if node is not None:
            node.fork_misses = 0
            if node.fork_tokens >= 0:
                node.fork_tokens = cached_tokens if cached_tokens < placement.held_tokens else -1
                return _RECOUNTED
        if not placement.exact and error <= RECOUNT_SHARE * placement.predicted_tokens:
            recount(steps, placement.held_blocks, error)
            return _RECOUNTED
    if cached_tokens > state.proven_tokens:
        state.proven_tokens = cached_tokens
    if state.slots is not None and not placement.forks:
        state.slots += 1  # the engine also keeps prompts outside its slots, in the host's memory
        state.capacity_tokens = None
    return _MORE


def _right(
    state: ReplicaState, placement: Placement, cached_tokens: int, steps: list[Step], error: int
) -> FeedbackKind:
    if placement.whole:
        if cached_tokens:
            state.granularity.observe_end(placement.held_tokens, cached_tokens)
            _prove(state, placement)
            if placement.held_tokens < state.shortest_hit_tokens:
                state.shortest_hit_tokens = placement.held_tokens
    else:
        node = _fork_node(placement, steps)
        if node is not None:
            node.fork_misses = 0
            if cached_tokens and not placement.exact and node.fork_tokens < 0:
                recount(steps, placement.held_blocks, error)  # even by 0: the count is known from then on
    if cached_tokens and not _explained(state, placement, cached_tokens, steps):
        state.saw_hit()
    return _RIGHT


def _prove(state: ReplicaState, placement: Placement) -> None:
    """Note that a whole earlier prompt was cached, and so was everything newer."""
    reuse = placement.reuse_tokens
    if reuse > state.proven_tokens:
        state.proven_tokens = reuse
    if state.evictions:
        state.evictions = [each for each in state.evictions if each.reuse_tokens > reuse]


def _fork_shortfall(placement: Placement, steps: list[Step], error: int, misses: int = FORK_MISSES) -> FeedbackKind:
    """Explain a shortfall at a fork, where no earlier prompt ended: counted wrongly, or not shared by the engine.

    A large error is corrected after `misses` such responses in a row.
    """
    small = not placement.exact and -error <= RECOUNT_SHARE * placement.predicted_tokens
    node = _fork_node(placement, steps)
    if node is None:
        return _FORK
    if not small:
        node.fork_misses += 1
        if node.fork_misses < misses or not placement.forks:
            return _FORK
        node.fork_tokens = max(placement.predicted_tokens + error, 0)
        return _RECOUNTED
    if node.fork_tokens < 0:
        recount(steps, placement.held_blocks, error)
    return _RECOUNTED


def _whole_shortfall(
    state: ReplicaState, placement: Placement, prompt_tokens: int, cached_tokens: int, steps: list[Step]
) -> FeedbackKind:
    """Explain a shortfall of a whole earlier prompt, whose count was reported."""
    is_old = placement.reuse_tokens > state.proven_tokens  # older than everything that was shown to be cached
    is_full = state.entries.stored_tokens >= NEARLY_FULL * state.budget_tokens
    if state.capacity_tokens is None and not is_full:  # of its room, only what was shown is known
        is_full = 0 < GROWTH * state.proven_tokens < placement.reuse_tokens > state.entries.stored_tokens // 2
    if _explained(state, placement, cached_tokens, steps) and not (is_old and is_full):
        if placement.held_tokens >= state.shortest_hit_tokens:
            return _suspect(state, placement)
        state.saw_loss()  # nothing else: an engine that never reused a prompt this short may not
        return _TAIL
    if not is_old or _is_shorter(placement, prompt_tokens, steps):
        return _TAIL
    if state.granularity.may_explain(placement.held_tokens - cached_tokens):
        return _TAIL
    if state.budget_tokens >= UNLIMITED_TOKENS:
        is_shared = cached_tokens > SHARED_SHARE * placement.predicted_tokens
        return _TAIL if is_shared or state.granularity.is_repeated(cached_tokens) else _evicted(state, placement)
    return _evicted(state, placement) if is_full else _TAIL


def _observe_whole(state: ReplicaState, placement: Placement, cached_tokens: int) -> None:
    """Learn the engine's blocks from what was cached of a whole earlier prompt."""
    granularity, held = state.granularity, placement.held_tokens
    if cached_tokens:
        granularity.observe_whole(held, cached_tokens)
        granularity.observe_hit(held)
    elif state.slots is None:  # a slot that was taken for another prompt keeps nothing, however long it was
        capacity = state.capacity_tokens
        is_recent = placement.reuse_tokens <= (RECENT_PROMPTS * held if capacity is None else capacity // 2)
        granularity.observe_miss(held, is_recent=is_recent)


def _is_shorter(placement: Placement, prompt_tokens: int, steps: list[Step]) -> bool:
    """Return True if the prompt has fewer tokens than its parts had before: it was rendered differently."""
    if not steps or steps[-1].depth != len(placement.fingerprint.hashes):
        return False
    estimated = steps[-1].tokens
    return prompt_tokens < estimated - max(MIN_TOLERANCE_TOKENS, (estimated - placement.held_tokens) // 4)


def _evicted(state: ReplicaState, placement: Placement) -> FeedbackKind:
    """Count an eviction; enough of them since the budget last changed shrink it, at most once per turnover."""
    state.proven_tokens = int(state.proven_tokens * PROVEN_DECAY)
    state.saw_loss()
    if state.slots is not None and state.slots > state.stated_slots:
        state.slots -= 1
    others = [each for each in state.evictions if not same_chain(each, placement)]
    state.evictions = [*others, placement][-MAX_EVICTIONS:]
    needed = EVICTIONS_UNKNOWN if state.budget_tokens >= UNLIMITED_TOKENS else EVICTIONS_KNOWN
    sources = {each.source for each in state.evictions}
    if len(state.evictions) < needed or (state.has_several_sources and len(sources) < 2):
        return _EVICTED
    if state.placed_tokens < SHRINK_AFTER * min(state.entries.stored_tokens, state.budget_tokens):
        return _EVICTED
    return _LESS


def _suspect(state: ReplicaState, placement: Placement) -> FeedbackKind:
    """Note that nothing of a whole earlier prompt was cached.

    The second such prompt in a row means a restart, or a later one if the engine also loses prompts otherwise.
    """
    others = [other for other in state.suspects if not same_chain(other, placement)]
    if state.is_restart(placement.source, [other.source for other in others]):
        return _RESTARTED
    state.suspects = [*others, placement][-MAX_SUSPECTS:]
    return _SUSPECT


def _explained(state: ReplicaState, placement: Placement, cached_tokens: int, steps: list[Step]) -> bool:
    """Return True if no more was cached than the suspects' own responses have computed since."""
    tolerance = max(MIN_TOLERANCE_TOKENS, state.granularity.tolerance_tokens())
    if cached_tokens <= min(tolerance // 2, MIN_TOLERANCE_TOKENS):  # one large block is something
        return True
    for other in state.suspects:
        common = _common_blocks(other, placement)
        tokens = max([step.tokens for step in steps if step.depth <= common], default=0)
        if common and cached_tokens <= tokens + MIN_TOLERANCE_TOKENS:
            return True
    return False


def same_chain(one: Placement, other: Placement) -> bool:
    """Return True if the held part of one placement is a prefix of that of the other."""
    depth = min(one.held_blocks, other.held_blocks) - 1
    return one.fingerprint.hashes[depth] == other.fingerprint.hashes[depth]


def _common_blocks(one: Placement, other: Placement) -> int:
    """Return the number of boundaries that two chains share, found by bisection since hashes are chained."""
    mine, theirs = one.fingerprint.hashes, other.fingerprint.hashes
    low, high = 0, min(len(mine), len(theirs))
    while low < high:
        middle = (low + high + 1) // 2
        if mine[middle - 1] == theirs[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _is_proved_now(entries: ReplicaEntries, placement: Placement, steps: list[Step]) -> bool:
    """Return True if the replica has computed by now what the index said it held when the prompt was placed."""
    node = _fork_node(placement, steps)
    residency = None if node is None else node.held.get(entries)
    return residency is not None and node is not None and residency.confirmed == len(node.hashes)


def _fork_node(placement: Placement, steps: list[Step]) -> Node | None:
    """Return the node at whose end the placement's held part ended, None if it is gone."""
    for step in steps:
        if step.depth == placement.held_blocks and step.blocks == len(step.node.hashes):
            return step.node
    return None
