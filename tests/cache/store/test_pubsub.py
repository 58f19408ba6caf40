"""A channel is heard over the death of Redis."""

from __future__ import annotations

import asyncio

from cache.store.pubsub import listen
from cache.store.store import open_store
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.valkey import PATIENT_SECONDS, Valkey, eventually


async def test_a_hearing_ends_with_redis_and_another_begins_with_it() -> None:
    """Messages of both subscriptions arrive, and the listener knows that some in between may be lost."""
    own = await asyncio.to_thread(Valkey().start)
    tasks, said, heard = Tasks(), list[str](), list[bytes]()
    store = open_store(own.url, clock=SystemClock(), tasks=tasks, limit_seconds=PATIENT_SECONDS)
    await store.start()
    hearing = tasks.start(
        listen(store, "c", heard.append, begun=lambda: said.append("begun"), ended=lambda: said.append("ended")), "l"
    )
    try:
        await eventually(lambda: said == ["begun"])
        own.ask("PUBLISH", "c", "one")
        await eventually(lambda: heard == [b"one"])
        await asyncio.to_thread(own.kill)
        await eventually(lambda: said == ["begun", "ended"])
        await asyncio.to_thread(own.start)
        await eventually(lambda: said == ["begun", "ended", "begun"])
        own.ask("PUBLISH", "c", "two")
        await eventually(lambda: heard == [b"one", b"two"])
        hearing.cancel()
        await asyncio.wait([hearing])
        assert said == ["begun", "ended", "begun", "ended"]
    finally:
        await store.close()
        await tasks.close()
        await asyncio.to_thread(own.end)
