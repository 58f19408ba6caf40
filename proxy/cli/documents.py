"""Read documents (text, Markdown, PDF) as the messages of a context: system messages that start with the name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from proxy.errors import CairnError

TEXTS = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".csv", ".json", ".xml", ".html", ".log"})
PDF = ".pdf"


class Unreadable(CairnError):
    """A file that is not a document; the message names it."""


class Document(msgspec.Struct, frozen=True):
    """A file's name and its text."""

    name: str
    text: str

    @property
    def message(self) -> dict[str, str]:
        """The document as a message of a chat."""
        return {"role": "system", "content": f"{self.name}\n\n{self.text}"}


def read_documents(paths: Sequence[Path]) -> Iterator[Document]:
    """Yield each file, and every text, Markdown and PDF file of each folder, sorted by name.

    Raises Unreadable.
    """
    for path in paths:
        if path.is_dir():
            inside = sorted(found for found in path.rglob("*") if _is_document(found, path))
            if not inside:
                raise Unreadable(f"{path}: this folder contains no text, Markdown or PDF file")
            for found in inside:
                yield _read(found, str(found.relative_to(path.parent if path.name else path)))
        else:
            yield _read(path, path.name)


def _is_document(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.is_file() and path.suffix.lower() in TEXTS | {PDF}


def _read(path: Path, name: str) -> Document:
    try:
        text = _pdf_text(path) if path.suffix.lower() == PDF else path.read_text("utf-8-sig")
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror or 'cannot be read'}") from None
    except UnicodeDecodeError:
        raise Unreadable(f"{path}: not UTF-8 text") from None
    if "\0" in text:
        raise Unreadable(f"{path}: not text")
    if not text.strip():
        raise Unreadable(f"{path}: contains no text")
    return Document(name, text)


def _pdf_text(path: Path) -> str:
    """Return the text of every page, separated by empty lines; a scan has none."""
    from pypdf import PdfReader  # half a second to load, and only PDFs need it
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable(f"{path}: is protected by a password")
        pages = [page.extract_text() for page in reader.pages]
    except (PyPdfError, ValueError, KeyError, TypeError, RecursionError, NotImplementedError) as error:
        raise Unreadable(f"{path}: not a readable PDF ({type(error).__name__})") from None
    return "\n\n".join(page.strip().replace("\0", "") for page in pages)
