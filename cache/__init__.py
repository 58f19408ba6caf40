"""What Cairn remembers. `proxy` uses the names of this module and none below it; nothing here knows HTTP."""

from cache.embedded import EmbeddedValkey
from cache.errors import CacheError, EmbeddedError

DISTRIBUTION = "cairn-proxy"  # `cairn` looks for this, since other distributions have packages of this name

__all__ = ["CacheError", "EmbeddedError", "EmbeddedValkey"]
