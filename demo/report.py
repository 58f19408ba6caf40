"""Summarise the ten responses and format them as a table. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from demo.asking import Answer

WARM_SHARE = 0.5  # of the prompt; a shared document is more than that, a shared instruction much less


@dataclass(frozen=True, slots=True)
class Summary:
    """Cold against warm. A mean over no questions is None, and so is what depends on it."""

    cold: int
    warm: int
    cold_ttft_seconds: float | None
    warm_ttft_seconds: float | None
    prompt_tokens: int
    cached_tokens: int
    saved_seconds: float | None


def is_warm(answer: Answer) -> bool:
    """Return whether the engine reported at least half of the prompt as cached."""
    return (answer.cached_tokens or 0) >= WARM_SHARE * max(1, answer.prompt_tokens)


def summarise(answers: Sequence[Answer]) -> Summary:
    """Return means, sums and the prefill time saved: all cached tokens at the rate of the cold prompts."""
    cold = [answer for answer in answers if not is_warm(answer)]
    warm = [answer for answer in answers if is_warm(answer)]
    cached_tokens = sum(answer.cached_tokens or 0 for answer in answers)
    computed_tokens = sum(answer.prompt_tokens - (answer.cached_tokens or 0) for answer in cold)
    cold_seconds = sum(answer.ttft_seconds for answer in cold)
    return Summary(
        cold=len(cold),
        warm=len(warm),
        cold_ttft_seconds=fmean(answer.ttft_seconds for answer in cold) if cold else None,
        warm_ttft_seconds=fmean(answer.ttft_seconds for answer in warm) if warm else None,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        cached_tokens=cached_tokens,
        saved_seconds=cached_tokens * cold_seconds / computed_tokens if computed_tokens else None,
    )


def table(answers: Sequence[Answer]) -> Table:
    """Return a table with one row per question, in the order in which they were asked."""
    grid = Table(title="Ten questions about two documents, streamed through Cairn", title_justify="left")
    grid.add_column("document", no_wrap=True)
    grid.add_column("question", ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column("replica", no_wrap=True)
    for name in ("prompt\ntokens", "cached\ntokens", "time to\nfirst token"):
        grid.add_column(name, justify="right", no_wrap=True)
    for answer in answers:
        grid.add_row(
            answer.question.document.removesuffix(".md"),
            answer.question.text,
            answer.replica or "-",
            f"{answer.prompt_tokens:,}",
            "unknown" if answer.cached_tokens is None else f"{answer.cached_tokens:,}",
            shown_seconds(answer.ttft_seconds),
            style="green" if is_warm(answer) else "",
        )
    return grid


def verdict(summary: Summary) -> str:
    """Return the summary in three sentences."""
    if summary.cold_ttft_seconds is None or summary.warm_ttft_seconds is None or summary.saved_seconds is None:
        return f"{summary.cold} cold and {summary.warm} warm: there is nothing to compare."
    return (
        f"Cold: {summary.cold} questions, first token after {shown_seconds(summary.cold_ttft_seconds)} on average.\n"
        f"Warm: {summary.warm} questions, first token after {shown_seconds(summary.warm_ttft_seconds)} on average, "
        f"{summary.cold_ttft_seconds / summary.warm_ttft_seconds:.0f} times sooner.\n"
        f"{summary.cached_tokens:,} of {summary.prompt_tokens:,} prompt tokens came from the engines' caches, "
        f"which saved about {summary.saved_seconds:.1f} s of prefill."
    )


def shown_seconds(seconds: float) -> str:
    """Format a duration: in milliseconds below one second."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1_000:.0f} ms"
