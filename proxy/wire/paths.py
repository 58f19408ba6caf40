"""Normalise a request target as web servers do, so that a path means the same here and at the upstream.

Servers decode percent-escapes before they look a path up, and many also resolve dot segments and merge slashes. A
decision based on the unnormalised text could therefore be about another path than the one served. Pure.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote, unquote_to_bytes

from proxy.errors import BadRequest, TargetTooLong

TARGET_BYTES_MOST: Final = (
    16 * 1024
)  # of path and query; the longest honest ones, with a list's cursor, have under 1 KB

_ORDINARY = re.compile(r"/[A-Za-z0-9_~-][A-Za-z0-9._~-]*(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*")
"""Paths that are normal already: no escape, no empty segment, no segment that begins with a dot."""

_ABSOLUTE = re.compile(r"(?i)https?://(?:[^/?#]*@)?[^/?#@:][^/?#@]*(?=[/?#]|$)")
"""The beginning of an absolute target. One without a host is invalid (RFC 9110, 4.2.1)."""

_ESCAPE = re.compile(r"%(?P<digits>[0-9A-Fa-f]{2})?")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_AMBIGUOUS = frozenset("/\\%?#")
"""Characters that may not be escaped: whether the upstream decodes them before or after it splits the path is not
known. An escaped `%` is among them, since some servers decode twice."""

_DOTS = frozenset({".", ".."})
_KEY_PARAMETERS = frozenset({"key", "api-key", "api_key", "access_token"})
_KEY_PARAMETER = re.compile(r"(?i)key|token|%")


def split_target(target: str) -> tuple[str, str]:
    """Return the normalised path of a request target, and its query with the leading `?` (empty if there is none).

    The host of an absolute target (`http://host/path`) is dropped. Characters outside ASCII are percent-encoded.

    Raises:
        TargetTooLong: it is a BadRequest, too.
        BadRequest: the target has no path or no host, or is ambiguous: an escaped slash, backslash, percent sign,
            question mark or hash, a backslash, a fragment, a control character, a malformed escape,
            escapes that are not UTF-8, or a dot segment with a parameter or spaces.
    """
    if len(target) > TARGET_BYTES_MOST:
        raise TargetTooLong("The target of the request is too long.")
    if not target.isascii():
        target = _encoded(target)
    path, mark, query = target.partition("?")
    if not _ORDINARY.fullmatch(path):
        path = _normalised(path)
    if mark and ("#" in query or not _is_visible(query)):
        raise _bad("The query contains a fragment, a space or a control character.")
    return path, mark + query


def origin_form(path: str) -> str:
    """Return the path of an absolute target without its query; any other path as it is."""
    absolute = None if path.startswith("/") else _ABSOLUTE.match(path)
    return path if absolute is None else path[absolute.end() :] or "/"


def keys_in_query(target: str) -> list[str]:
    """Return the keys that the query of a request target sends."""
    query = target.partition("?")[2]
    if not query or not _KEY_PARAMETER.search(query):
        return []
    pairs = [each.partition("=") for each in query.split("&")]
    return [unquote(value) for name, _, value in pairs if unquote(name).lower() in _KEY_PARAMETERS]


def without_credentials(target: str) -> str:
    """Return `target` without the parameters of its query in which keys are sent."""
    path, mark, query = target.partition("?")
    if not query or not _KEY_PARAMETER.search(query):
        return target
    kept = [each for each in query.split("&") if unquote(each.partition("=")[0]).lower() not in _KEY_PARAMETERS]
    return path + mark + "&".join(kept) if kept else path


def _normalised(path: str) -> str:
    path = origin_form(path)
    if not path.startswith("/"):
        raise _bad("The target of the request is not a path.")
    if "\\" in path or "#" in path or not _is_visible(path):
        raise _bad("The path contains a backslash, a hash, a space or a control character.")
    kept: list[str] = []
    decoded = _ESCAPE.sub(_decoded, path)
    if "%" in decoded and not _is_utf_8(decoded):
        raise _bad("The escapes of the path are not UTF-8.")  # some servers take %C0%AE for a dot, %C0%AF for a slash
    for segment in decoded.split("/"):
        if segment not in _DOTS and segment.replace("%20", "").replace("%3B", ";").partition(";")[0] in _DOTS:
            raise _bad("The path has a dot segment with a parameter or spaces.")  # which some servers ignore
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment)
    return "/" + "/".join(kept)


def _decoded(escape: re.Match[str]) -> str:
    """Decode an escape of an unreserved character, which needs none; keep any other, in upper case."""
    digits = escape["digits"]
    if digits is None:
        raise _bad("The path has a percent sign that is not followed by two hexadecimal digits.")
    character = chr(int(digits, 16))
    if character in _UNRESERVED:
        return character
    if character in _AMBIGUOUS or character < " " or character == "\x7f":
        raise _bad("The path has an escaped slash, backslash, percent, question mark, hash or control character.")
    return f"%{digits.upper()}"


def _is_utf_8(path: str) -> bool:
    try:
        unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        return False
    return True


def _encoded(target: str) -> str:
    """Percent-encode characters that are not ASCII, and nothing else."""
    raw = target.encode("utf-8", "surrogateescape" if _is_escaped(target) else "surrogatepass")
    return "".join([chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in raw])


def _is_escaped(target: str) -> bool:
    """Return True if every lone surrogate is the escape of one byte that was not UTF-8."""
    return all(not "\ud800" <= character <= "\udfff" or "\udc80" <= character <= "\udcff" for character in target)


def _is_visible(text: str) -> bool:
    return text.isprintable() and " " not in text


def _bad(message: str) -> BadRequest:
    return BadRequest(message, code="bad_path")
