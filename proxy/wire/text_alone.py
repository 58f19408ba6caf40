"""Decide whether the reported tokens of a prompt are those of its text alone. Pure.

They are not if the upstream adds something that the body does not contain: an earlier conversation, a stored prompt,
a file or picture that is only referred to, or the description and the results of a hosted tool.
"""

from __future__ import annotations

from typing import Final

from proxy.model import Body
from proxy.records import Prompt
from proxy.wire.media import SHORT_BODY_BYTES, is_plain_text
from proxy.wire.schemas import DECODE_ERRORS, decode_tool_types

SEARCHED_BYTES_MOST: Final = 64 * 1024
"""Longest content that is searched, if it is not plain text and has no media; longer content counts as mixed."""

TOOLS_BYTES_MOST: Final = 1024 * 1024
"""Longest list of tools that is decoded; a longer one counts as if some of them were hosted."""

_KEY_END: Final = b'url"'  # of url, image_url, file_url, audio_url and video_url
_FILE: Final = b"file_id"
_AFTER_KEY_BYTES: Final = 64  # colon, white space and the beginning of the value
_TOOLS_REMEMBERED: Final = 256
_CLIENTS_TOOLS = frozenset({None, "", "function", "custom"})


class TextAlone:
    """Remembers whether all tools of a list are the client's own: the same few lists come with every request."""

    def __init__(self) -> None:
        self._tools: dict[tuple[int, bytes, bytes], bool] = {}

    def holds_for(self, prompt: Prompt) -> bool:
        """Return True if the body contains all that the upstream reads for this prompt."""
        if prompt.names or prompt.has_hidden_parts:
            return False
        if len(prompt.body) <= SHORT_BODY_BYTES and not prompt.referring and not _may_name_content(prompt.body):
            return True  # one search of the whole body is faster than examining each message
        for tools in prompt.referring:
            if not self._are_clients(tools):
                return False
        if prompt.is_plain_text:
            return True
        most = None if prompt.media else SEARCHED_BYTES_MOST
        for span in prompt.spans:
            if is_plain_text(span) or any(span == tools for tools in prompt.referring):
                continue
            if most is not None and len(span) > most:
                return False
            if _names_content(bytes(span)):
                return False
            most = None if most is None else most - len(span)
        return True

    def _are_clients(self, tools: memoryview) -> bool:
        key = (len(tools), bytes(tools[:128]), bytes(tools[-64:]))
        known = self._tools.get(key)
        if known is None:
            known = _all_clients(tools)
            if len(self._tools) >= _TOOLS_REMEMBERED:
                self._tools.clear()
            self._tools[key] = known
        return known


def _all_clients(tools: memoryview) -> bool:
    if len(tools) > TOOLS_BYTES_MOST:
        return False  # unknown: millions of tools would take seconds
    try:
        types = [each.type for each in decode_tool_types(tools) or ()]
    except DECODE_ERRORS:
        return False
    return all((each is None or isinstance(each, str)) and each in _CLIENTS_TOOLS for each in types)


def _may_name_content(body: Body) -> bool:
    return body.find(_KEY_END) >= 0 or body.find(_FILE) >= 0


def _names_content(text: bytes) -> bool:
    """Return True if `text` names media by an address, or a file by its id. Data URLs are content themselves."""
    at = text.find(_KEY_END)
    while at >= 0:
        value = text[at + len(_KEY_END) : at + _AFTER_KEY_BYTES].lstrip()
        if value[:1] == b":" and (address := value[1:].lstrip())[:1] == b'"' and not address.startswith(b'"data:'):
            return True
        at = text.find(_KEY_END, at + 1)
    return text.find(_FILE) >= 0
