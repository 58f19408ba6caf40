"""The demo's two documents and ten questions about them, as chat requests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DOCUMENTS = Path(__file__).parent / "documents"
ANSWER_TOKENS = 24  # enough to see it stream; its text makes no sense
INSTRUCTION = "Answer questions about the document below, briefly and from the document alone."

QUESTIONS = {
    "cairns.md": (
        "What sets a cairn apart from rubble?",
        "Which rules keep a cairn standing?",
        "What is a Bates cairn made of?",
        "How did cairns guide ships in Norway?",
        "Why do rangers ask for no new cairns?",
    ),
    "tide_mill.md": (
        "Why do a tide mill's hours shift every day?",
        "How do the sea gates work by themselves?",
        "What is the head, and why wait for it?",
        "How much power is in a four-hectare pond?",
        "Why are the cogs made of apple wood?",
    ),
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one of the documents."""

    document: str
    text: str


def ten_questions() -> list[Question]:
    """Return all questions, alternating between the documents."""
    return [
        Question(document, text)
        for turn in zip(*QUESTIONS.values(), strict=True)
        for document, text in zip(QUESTIONS, turn, strict=True)
    ]


@cache
def document_text(name: str) -> str:
    """Return the text of a document."""
    return (DOCUMENTS / name).read_text(encoding="utf-8")


def chat_request(question: Question, model: str) -> dict[str, Any]:
    """Return the body of a streamed chat completion with the whole document before the question."""
    return {
        "model": model,
        "messages": [
            {"role": "system", "content": f"{INSTRUCTION}\n\n{document_text(question.document)}"},
            {"role": "user", "content": question.text},
        ],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
