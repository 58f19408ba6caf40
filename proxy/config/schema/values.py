"""Types of settings: sizes, durations, names, secrets and the base of all sections. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

MIB = 1024 * 1024

LIVE = Meta(extra={"live": True})
"""Marks a field that a reload changes in a running Cairn."""

SIZE = Meta(extra={"size": True})
"""Marks a number of bytes, which may also be written as `32MB` or `32MiB`."""

_HARMLESS_OPTIONS = frozenset({
    "client_name", "db", "health_check_interval", "max_connections", "protocol", "socket_connect_timeout",
    "socket_keepalive", "socket_timeout", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname",
    "ssl_keyfile",
})  # fmt: skip
"""Options in a URL whose values may be shown."""


NAME_LENGTH_MOST = 128

WHOLE_MOST = 2**53
"""Largest whole number: exact in JSON and in Redis's scripts, and it fits into a message to a worker."""

RATE_MOST = 1e9
"""Largest rate per second. An infinite one would make costs that cannot be compared."""

Port = Annotated[int, Meta(ge=0, le=65535)]  # 0: any free port, for tests and demonstrations
Count = Annotated[int, Meta(ge=1, le=WHOLE_MOST)]
Bytes = Annotated[int, Meta(ge=1, le=WHOLE_MOST), SIZE]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Wait = Annotated[float, Meta(ge=0, le=86_400)]  # seconds; 0 is allowed
Name = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9\[][A-Za-z0-9._:/\[\]-]*$",  # an address of IPv6 begins with a bracket
        max_length=NAME_LENGTH_MOST,
        extra={"form": "letters, digits and . _ : / [ ] -, beginning with a letter or digit"},
    ),
]  # safe in a metric label and in a header
Sha256 = Annotated[
    str, Meta(pattern=r"^[0-9A-Fa-f]{64}$", extra={"form": "64 hexadecimal digits, from: printf %s KEY | sha256sum"})
]
PathPattern = Annotated[
    str, Meta(pattern=r"^/[!-~]*$", max_length=256, extra={"form": "a path that begins with /, without spaces"})
]
PathPatterns = Annotated[tuple[PathPattern, ...], Meta(max_length=256)]
WebOrigin = Annotated[
    str,
    Meta(
        pattern=r"^(\*|[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9.:\[\]_-]+/?)$",
        max_length=256,
        extra={"form": "a scheme and a host, such as https://chat.example.com, or *"},
    ),
]
Patterns = tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...]


class Secret:
    """A text that `str`, `repr` and every encoder show as `***`; only `reveal` returns it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself."""
        return self._text

    def redacted(self) -> str:
        """Return what may be shown."""
        return "***"

    def __str__(self) -> str:
        return self.redacted()

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.reveal() == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> Any:
        raise TypeError("a secret is not pickled")


class SecretUrl(Secret):
    """A URL whose user, password and query may be secret, while its hosts may be shown."""

    __slots__ = ()

    def redacted(self) -> str:
        """Return the URL with `***` in place of what may be secret: of everything, if its parts are not clear."""
        scheme, mark, rest = self._text.partition("://")
        if not mark or not scheme.replace("+", "").isalnum():
            return "***"
        credentials, at, place = rest.rpartition("@")
        if not set("/?#").isdisjoint(credentials):  # a password should have these only encoded
            return f"{scheme}://***"
        address, question, query = place.partition("#")[0].partition("?")
        shown = f"{scheme}://{'***@' if at else ''}{address}"
        return f"{shown}?{'&'.join(map(_redacted_option, query.split('&')))}" if question else shown


def _redacted_option(option: str) -> str:
    name, is_given, _ = option.partition("=")
    if name in _HARMLESS_OPTIONS:
        return option
    return f"{name}=***" if is_given else "***"


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """A mapping of the configuration: frozen, and an unknown key in it is an error."""


def has_mark(section: type[Section], field: str, mark: str) -> bool:
    """Return whether the type of `field` is marked, with "live" (`LIVE`) or "size" (`SIZE`)."""
    return mark in _marks(types_of(section)[field])


@cache
def types_of(section: type[Section]) -> Mapping[str, Any]:
    """Return the annotation of each field. Computing it takes 0.1 ms, which a thousand clients would need each."""
    return get_type_hints(section, include_extras=True)


def _marks(annotation: Any) -> set[str]:
    """Return the names in the `extra` of an annotation, without looking into tuples or other sections."""
    marks: set[str] = set()
    for part in getattr(annotation, "__metadata__", ()):
        marks |= set(getattr(part, "extra", None) or ())
    return marks


def redact(thing: Any) -> Any:
    """Encode a secret as `***`: the hook of encoders whose output a person may see."""
    if isinstance(thing, Secret):
        return thing.redacted()
    raise NotImplementedError(f"no encoding for {type(thing).__name__}")


def reveal(thing: Any) -> Any:
    """Encode a secret as its text: the hook of the encoder that writes to a worker's private socket, and no other."""
    if isinstance(thing, Secret):
        return thing.reveal()
    raise NotImplementedError(f"no encoding for {type(thing).__name__}")


def make_secret(kind: type, value: Any) -> Any:
    """Decode a text to `Secret` or `SecretUrl`: the hook of decoders."""
    if not issubclass(kind, Secret):
        raise NotImplementedError(f"no decoding for {kind.__name__}")
    if not isinstance(value, str):
        raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
    return kind(value)
