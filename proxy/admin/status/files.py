"""Load the page's static files: three of Cairn's, and plotly's script from its installed package, not imported.

Each is compressed once and kept compressed.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from importlib.util import find_spec
from pathlib import Path

import msgspec

_OWN = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_PLOTLY_PATH = "/plotly.min.js"
_PLOTLY_FILE = ("package_data", "plotly.min.js")

PATHS = (*_OWN, _PLOTLY_PATH)


class StaticFile(msgspec.Struct, frozen=True):
    """A file, gzipped (at most 1.5 MB). `tag` is its ETag, which changes with the content."""

    packed: bytes
    content_type: str
    tag: str

    @property
    def plain(self) -> bytes:
        """The file uncompressed, for clients that do not accept gzip."""
        return gzip.decompress(self.packed)


def load(path: str) -> StaticFile | None:
    """Load the file served at `path`, one of PATHS; returns None if plotly is not installed.

    Takes a quarter of a second for plotly's 4.8 MB.
    """
    if path == _PLOTLY_PATH:
        file, content_type = _plotly(), "text/javascript; charset=utf-8"
    else:
        name, content_type = _OWN[path]
        file = Path(__file__).with_name(name)
    if file is None or not file.is_file():
        return None
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    return StaticFile(gzip.compress(content, zlib.Z_DEFAULT_COMPRESSION, mtime=0), content_type, tag)


def _plotly() -> Path | None:
    spec = find_spec("plotly")
    folders = spec.submodule_search_locations if spec is not None else None
    return Path(folders[0]).joinpath(*_PLOTLY_FILE) if folders else None
