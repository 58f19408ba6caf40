"""Stored contexts as clients meet them: the API under /v1/caching, their use in a chat, and their warming.

What they are and where they lie is the cache's business; here is what is said of them over HTTP.
"""

from proxy.contexts.facade import StoredContexts

__all__ = ["StoredContexts"]
