"""What the ten answers add up to, and how they look: arithmetic and tables, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from demo.asking import Answer

WARM_SHARE = 0.5  # of the prompt: a shared instruction alone makes no question warm, a shared document always does


@dataclass(frozen=True, slots=True)
class Summary:
    """Cold against warm. A mean over no questions is None, and so is what cannot be told without it."""

    cold: int
    warm: int
    cold_ttft_seconds: float | None
    warm_ttft_seconds: float | None
    prompt_tokens: int
    cached_tokens: int
    saved_seconds: float | None


def is_warm(answer: Answer) -> bool:
    """True where the engine reported at least half of the prompt as cached."""
    return (answer.cached_tokens or 0) >= WARM_SHARE * max(1, answer.prompt_tokens)


def summarise(answers: Sequence[Answer]) -> Summary:
    """Means, sums, and the prefill seconds saved: all cached tokens at the rate at which the cold prompts went."""
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
    """One row a question, in the order in which they were asked."""
    grid = Table(title="Ten questions about two documents, streamed through Cairn", title_justify="left")
    grid.add_column("document", no_wrap=True)
    grid.add_column("question", ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column("replica", no_wrap=True)
    for name in ("prompt\ntokens", "of them\ncached", "time to\nfirst token"):
        grid.add_column(name, justify="right", no_wrap=True)
    for answer in answers:
        grid.add_row(
            answer.question.document.removesuffix(".md"),
            answer.question.text,
            answer.replica or "-",
            f"{answer.prompt_tokens:,}",
            "not said" if answer.cached_tokens is None else f"{answer.cached_tokens:,}",
            shown_seconds(answer.ttft_seconds),
            style="green" if is_warm(answer) else "",
        )
    return grid


def verdict(summary: Summary) -> str:
    """The summary in a sentence or two of plain English."""
    if summary.cold_ttft_seconds is None or summary.warm_ttft_seconds is None or summary.saved_seconds is None:
        return f"{summary.cold} cold and {summary.warm} warm: there is nothing to compare."
    return (
        f"Cold: {summary.cold} questions, first token after {shown_seconds(summary.cold_ttft_seconds)} in the mean.\n"
        f"Warm: {summary.warm} questions, first token after {shown_seconds(summary.warm_ttft_seconds)} in the mean, "
        f"{summary.cold_ttft_seconds / summary.warm_ttft_seconds:.0f} times sooner.\n"
        f"{summary.cached_tokens:,} of {summary.prompt_tokens:,} prompt tokens came out of the engines' caches, "
        f"which saved some {summary.saved_seconds:.1f} s of prefill."
    )


def shown_seconds(seconds: float) -> str:
    """A duration as a person reads it: milliseconds below one second."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1_000:.0f} ms"
