"""Stored contexts over HTTP: the API under /v1/caching, their use in chat requests, and their warming.

Storing them is the cache's part.
"""

from proxy.contexts.facade import StoredContexts

__all__ = ["StoredContexts"]
