"""The four operations on stored contexts that the pipeline needs."""

from __future__ import annotations

from typing import Protocol

from proxy.downstream.response import Downstream
from proxy.pipeline.exchange import Exchange


class StoredContexts(Protocol):
    """Implemented by `proxy.contexts`."""

    async def answer(self, exchange: Exchange, client: Downstream) -> None:
        """Answer a call to /v1/caching. Raises CairnError."""
        ...

    async def expand(self, exchange: Exchange) -> None:
        """Insert the context that a chat names. Raises CairnError if it cannot be used."""
        ...

    def tell_checked(self, exchange: Exchange, client: Downstream) -> None:
        """Answer a dry run whose context is valid."""
        ...

    def settle(self, exchange: Exchange) -> None:
        """Note the end of any request: whether the upstream accepted the key, and the use of a context it named."""
        ...
