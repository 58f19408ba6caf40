"""The prefix index by itself: what a cut, a lookup, a placement and a block cost, and the longest eviction pause.

`python -m benchmarks.index` builds an index of a million blocks over 64 replicas, shaped as conversations: a few
system prompts that every replica holds, then turns of 8 to 60 blocks, some of them forks. Times are CPU seconds of
this process, the median unless another is named.
"""

from __future__ import annotations

import gc
import random
import statistics
import tracemalloc
from array import array
from collections.abc import Callable
from time import process_time_ns

from cache.index.fingerprint import Fingerprint
from cache.index.hashing import cut
from cache.index.prefix_index import PrefixIndex

BLOCKS = 1_000_000
REPLICAS = 64
BLOCK_BYTES = 2_048
TOKENS_PER_BLOCK = 512
SYSTEM_PROMPTS = 8


def chain(rng: random.Random, base: Fingerprint | None, blocks: int) -> Fingerprint:
    """Return a fingerprint that continues `base` with this many random blocks."""
    hashes = array("Q", base.hashes if base else ())
    hashes.extend(rng.getrandbits(64) for _ in range(blocks))
    return Fingerprint(hashes, array("I", range(BLOCK_BYTES, BLOCK_BYTES * len(hashes) + 1, BLOCK_BYTES)))


def head(base: Fingerprint, blocks: int) -> Fingerprint:
    """Return the first blocks of a fingerprint."""
    return Fingerprint(base.hashes[:blocks], base.ends[:blocks])


def build(rng: random.Random, blocks: int, low: int, high: int) -> tuple[PrefixIndex, list[tuple[int, Fingerprint]]]:
    """Build an index of this many blocks in runs of `low` to `high`, with the last prompt of each conversation."""
    index = PrefixIndex(origin=1)
    systems = [chain(rng, None, 8) for _ in range(SYSTEM_PROMPTS)]
    for replica in range(REPLICAS):
        for system in systems:
            index.place(replica, system, TOKENS_PER_BLOCK * len(system), 0.0)
    talks: list[tuple[int, Fingerprint]] = []
    now = 0.0
    while index.stats().blocks < blocks:
        now += 0.01
        if talks and rng.random() < 0.8:
            number = rng.randrange(len(talks))
            replica, base = talks[number]
            fork = rng.random() < 0.15
            prompt = chain(rng, head(base, rng.randint(4, len(base))) if fork else base, rng.randint(low, high))
            if fork:
                replica = rng.randrange(REPLICAS)
            talks[number] = replica, prompt
        else:
            replica, prompt = rng.randrange(REPLICAS), chain(rng, rng.choice(systems), rng.randint(low, high))
            talks.append((replica, prompt))
        placement = index.place(replica, prompt, TOKENS_PER_BLOCK * len(prompt), now)
        index.answered(placement, TOKENS_PER_BLOCK * len(prompt), placement.predicted_tokens, 200, now)
    return index, talks


def microseconds(work: Callable[[], object], repeat: int) -> float:
    """Return the CPU microseconds of one call, the least of several rounds."""
    rounds = []
    for _ in range(5):
        begun = process_time_ns()
        for _ in range(repeat):
            work()
        rounds.append((process_time_ns() - begun) / repeat / 1_000)
    return min(rounds)


def each(work: Callable[[int], object], count: int) -> list[float]:
    """Return the CPU microseconds of each of `count` calls, sorted."""
    times = []
    for i in range(count):
        begun = process_time_ns()
        work(i)
        times.append((process_time_ns() - begun) / 1_000)
    return sorted(times)


def spread(times: list[float]) -> str:
    """Format the median, the 99th percentile and the maximum."""
    return (
        f"median {statistics.median(times):8.1f}   p99 {times[int(len(times) * 0.99)]:8.1f}   most {times[-1]:8.1f}"
    )


def report_cut() -> None:
    """Print the cost of cutting and hashing by size."""
    print("cut, CPU us")
    for size in (1_024, 65_536, 524_288, 2_097_152):
        spans = [memoryview(random.Random(1).randbytes(size))]
        took = microseconds(lambda spans=spans: cut(1, spans), max(20, 10_000_000 // size))  # type: ignore[misc]
        print(f"  {size:>9,} bytes  {len(cut(1, spans)):>5} blocks  {took:8.1f}")


def report_memory(low: int, high: int) -> None:
    """Print the traced bytes per block of an index of 100,000 blocks, without its fingerprints."""
    rng = random.Random(2)
    tracemalloc.start()
    index, talks = build(rng, 100_000, low, high)
    talks.clear()
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stats = index.stats()
    print(
        f"  runs of {low:>2} to {high:>2} blocks  {used / stats.blocks:7.1f}   ({stats.nodes:,} nodes, "
        f"{stats.residencies:,} residencies; own estimate {stats.size_bytes / stats.blocks:.1f})"
    )


def report_lookups() -> None:
    """Print the cost of lookup, placement, eviction and snapshot on the full index."""
    rng = random.Random(3)
    index, talks = build(rng, BLOCKS, 8, 60)
    stats = index.stats()
    print(f"index of {stats.blocks:,} blocks, {stats.nodes:,} nodes, {REPLICAS} replicas, CPU us")
    prompts = [(replica, chain(rng, base, rng.randint(8, 60))) for replica, base in rng.choices(talks, k=5_000)]
    for _, prompt in prompts[:200]:
        index.match(prompt)
    print("  lookup       ", spread(each(lambda i: index.match(prompts[i][1]), len(prompts))))
    print("  place        ", spread(each(lambda i: place(index, *prompts[i]), 2_000)))
    for replica, held in index.replicas().items():
        index.set_budget(replica, held.tokens)
    print("  place, full  ", spread(each(lambda i: place(index, *prompts[2_000 + i]), 3_000)))
    for replica, held in index.replicas().items():
        index.set_budget(replica, held.tokens // 2)
    pauses = each(lambda _: index.tend(1e6), 400)
    print("  tend, half of all to drop", spread(pauses))
    index.new_epoch(0, 1)
    print(f"  a new epoch  {microseconds(lambda: index.new_epoch(1, index.epoch(1) + 1), 1):8.1f}")
    print("  tend after   ", spread(each(lambda _: index.tend(1e6), 50)))
    chunks = index.snapshot()
    print("  snapshot, a chunk", spread(each(lambda _: next(chunks, None), 400)))


def place(index: PrefixIndex, replica: int, prompt: Fingerprint) -> None:
    """Use the index as one request does, except for the lookup."""
    placement = index.place(replica, prompt, TOKENS_PER_BLOCK * len(prompt), 1e6)
    index.answered(placement, TOKENS_PER_BLOCK * len(prompt), placement.predicted_tokens, 200, 1e6)


def main() -> None:
    """Print all reports."""
    report_cut()
    print("memory, traced bytes a block")
    for low, high in ((1, 1), (2, 4), (8, 60)):
        report_memory(low, high)
    report_lookups()


if __name__ == "__main__":
    main()
