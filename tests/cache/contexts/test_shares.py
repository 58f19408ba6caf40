"""Clients that the configuration does not list: what made-up keys can take, together, and what they cannot touch."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cache import keys
from cache.contexts import scripts
from cache.contexts.access import Trust
from cache.errors import CacheError, PinRefused, QuotaFull
from cache.store.store import Script
from tests.support.context_store import draft, opened
from tests.support.valkey import Valkey, eventually

HONEST = "f" * 32
MADE_UP = [f"{number:032x}" for number in range(8)]


async def test_made_up_keys_can_pin_nothing_and_store_no_more_than_their_share(nodes: list[Valkey]) -> None:
    """Eight of them push each other out; the context of a client whose key was accepted stays."""
    async with opened(nodes, unchecked_bytes=200_000, total_bytes=400_000) as one:
        kept = await one.contexts.create(HONEST, draft(90_000, metadata={"pin": "1"}), Trust.ACCEPTED)
        for tenant in MADE_UP:
            with pytest.raises(PinRefused):
                await one.contexts.create(tenant, draft(metadata={"pin": "1"}), Trust.UNCHECKED)
            row = await one.contexts.create(tenant, draft(60_000), Trust.UNCHECKED)
            with pytest.raises(PinRefused):
                await one.contexts.update(tenant, row.id, metadata={"pin": "1"}, trust=Trust.UNCHECKED)
        sizes = [row.size_bytes for tenant in MADE_UP for row in await one.contexts.rows(tenant)]
        assert 120_000 < sum(sizes) <= 200_000
        assert (await one.contexts.row(HONEST, kept.id)).pinned
        with pytest.raises(QuotaFull, match=r"contexts\.unchecked_bytes"):
            await one.contexts.create(MADE_UP[0], draft(250_000), Trust.UNCHECKED)


async def test_requests_at_once_cannot_exceed_the_share_together(nodes: list[Valkey]) -> None:
    """Room is reserved before it is taken."""
    async with opened(nodes, unchecked_bytes=150_000) as one, opened(nodes, unchecked_bytes=150_000) as two:
        creations = [
            (one, two)[number % 2].contexts.create(tenant, draft(60_000), Trust.UNCHECKED)
            for number, tenant in enumerate(MADE_UP)
        ]
        await asyncio.gather(*creations, return_exceptions=True)
        sizes = [row.size_bytes for tenant in MADE_UP for row in await one.contexts.rows(tenant)]
        assert 0 < sum(sizes) <= 150_000


async def test_a_sweep_keeps_totals_that_are_newer_than_its_own(nodes: list[Valkey]) -> None:
    """A pin between the two steps of a sweep counts in the shares."""
    async with opened(nodes, started=False, unlisted_pinned_bytes=100_000) as one:
        plain = await one.contexts.create(MADE_UP[0], draft(70_000), Trust.ACCEPTED)
        run_script = one.store.run_script

        async def pin_before_totals_are_written(script: Script, *args: Any, **options: Any) -> Any:
            if script is scripts.NOTE and "sweep" in args[1]:
                one.store.run_script = run_script  # type: ignore[method-assign]
                await one.contexts.update(MADE_UP[0], plain.id, metadata={"pin": "1"}, trust=Trust.ACCEPTED)
            return await run_script(script, *args, **options)

        one.store.run_script = pin_before_totals_are_written  # type: ignore[method-assign]
        await one.contexts.sweep()
        with pytest.raises(QuotaFull, match=r"contexts\.unlisted_pinned_bytes"):
            await one.contexts.create(MADE_UP[1], draft(70_000, metadata={"pin": "1"}), Trust.ACCEPTED)


async def test_accepted_keys_share_a_bound_on_pins(nodes: list[Valkey]) -> None:
    """An upstream without keys accepts them all; unpinning makes room for another's pin."""
    async with opened(nodes, unlisted_pinned_bytes=100_000) as one:
        first = await one.contexts.create(MADE_UP[0], draft(70_000, metadata={"pin": "1"}), Trust.ACCEPTED)
        with pytest.raises(QuotaFull, match=r"contexts\.unlisted_pinned_bytes"):
            await one.contexts.create(MADE_UP[1], draft(70_000, metadata={"pin": "1"}), Trust.ACCEPTED)
        plain = await one.contexts.create(MADE_UP[1], draft(70_000), Trust.ACCEPTED)
        with pytest.raises(QuotaFull):
            await one.contexts.update(MADE_UP[1], plain.id, metadata={"pin": "1"}, trust=Trust.ACCEPTED)
        await one.contexts.update(MADE_UP[0], first.id, metadata={}, trust=Trust.ACCEPTED)
        pinned = await one.contexts.update(MADE_UP[1], plain.id, metadata={"pin": "1"}, trust=Trust.ACCEPTED)
        assert pinned.pinned


async def test_a_listed_client_is_outside_both_shares(nodes: list[Valkey]) -> None:
    """Only its own quotas bind it."""
    async with opened(nodes, unchecked_bytes=0, unlisted_pinned_bytes=0) as one:
        row = await one.contexts.create(HONEST, draft(metadata={"pin": "1"}))
        assert row.pinned


async def test_what_one_worker_learns_of_a_key_the_others_know(nodes: list[Valkey]) -> None:
    """And the tenant's contexts leave the share of unchecked ones."""
    async with opened(nodes, unchecked_bytes=100_000) as one, opened(nodes, unchecked_bytes=100_000) as two:
        assert await two.contexts.trust_of(HONEST) is Trust.UNCHECKED
        await one.contexts.create(HONEST, draft(70_000), Trust.UNCHECKED)
        one.contexts.accepted(HONEST)
        one.contexts.accepted(HONEST)
        await one.contexts._accepted.flush()  # noqa: SLF001 - internal state that no public name shows
        assert await two.contexts.trust_of(HONEST) is Trust.ACCEPTED
        await one.contexts.create(MADE_UP[0], draft(70_000), Trust.UNCHECKED)
        assert len(await one.contexts.rows(HONEST)) == 1


async def test_a_reservation_that_was_not_used_is_given_back(server: Valkey) -> None:
    """A creation that fails after it reserved room does not fill the share."""
    server.flush()
    async with opened([server], unchecked_bytes=100_000) as one:
        with pytest.raises(CacheError):
            await one.contexts.create(
                HONEST, draft(70_000, ttl_seconds=None, expires_unix_seconds=1.0), Trust.UNCHECKED
            )
        await eventually(lambda: HONEST.encode() not in server.ask("HGETALL", keys.CONTEXTS_UNLISTED))
        await one.contexts.create(MADE_UP[0], draft(70_000), Trust.UNCHECKED)


async def test_damaged_entries_of_the_shares_are_dropped(server: Valkey) -> None:
    """Names that are no tenants, values that are no numbers: the next creation and the sweep go on."""
    server.flush()
    for key in (keys.CONTEXTS_UNLISTED, keys.CONTEXTS_TOTALS):
        server.ask("HSET", key, "{}", "1:2:0", b"\xff", "x", "", "-5:1:0", HONEST, "nan:1:0", MADE_UP[1], "9" * 5000)
    async with opened([server], unchecked_bytes=100_000) as one:
        await one.contexts.create(MADE_UP[0], draft(70_000), Trust.UNCHECKED)
        await one.contexts.sweep()
        await one.contexts.survey()
        assert len(await one.contexts.rows(MADE_UP[0])) == 1
        assert one.contexts._room.dropped_totals > 0  # noqa: SLF001 - internal state that no public name shows


@pytest.mark.parametrize("wrong", [keys.CONTEXTS_TOTALS, keys.CONTEXTS_UNLISTED, keys.CONTEXTS_RESERVED])
async def test_a_key_of_all_tenants_of_the_wrong_type_is_replaced(server: Valkey, wrong: str) -> None:
    """Until then no tenant could store a context."""
    server.flush()
    server.ask("SADD", wrong, "x")
    async with opened([server], unchecked_bytes=100_000) as one:
        for tenant, trust in ((HONEST, Trust.LISTED), (MADE_UP[0], Trust.UNCHECKED)):
            await one.contexts.create(tenant, draft(20_000), trust)
            assert len(await one.contexts.rows(tenant)) == 1
    assert server.ask("TYPE", wrong) in (b"+hash\r\n", b"+none\r\n")


@pytest.mark.parametrize("damage", [("SADD", "x"), ("SET", "1"), ("SET", "1", "EX", "999999999")])
async def test_the_sweep_goes_on_whatever_its_key_is(
    server: Valkey, monkeypatch: pytest.MonkeyPatch, damage: tuple[str, ...]
) -> None:
    """A key of the wrong type, or one that does not end, does not say that another worker sweeps."""
    server.flush()
    monkeypatch.setattr("cache.contexts.room.SWEEP_SECONDS", 0.02)
    server.ask(damage[0], keys.CONTEXTS_SWEEPER, *damage[1:])
    server.ask("SADD", keys.CONTEXTS_TOTALS, "x")
    async with opened([server]):
        await eventually(lambda: server.ask("TYPE", keys.CONTEXTS_TOTALS) == b"+none\r\n")
        await eventually(lambda: int(server.ask("PTTL", keys.CONTEXTS_SWEEPER)[1:]) in range(-2, 11))


async def test_a_tenant_whose_keys_are_damaged_does_not_keep_the_others_from_being_swept(server: Valkey) -> None:
    """Its own keys of the wrong type are replaced."""
    server.flush()
    async with opened([server]) as one:
        for tenant in (HONEST, MADE_UP[0]):
            await one.contexts.create(tenant, draft(1_000))
        for name in ("gone", "sum", "refs"):
            server.ask("DEL", keys.tenant(HONEST, name))
            server.ask("SADD", keys.tenant(HONEST, name), "x")
        server.ask("DEL", keys.CONTEXTS_TOTALS)
        server.ask("HSET", keys.CONTEXTS_TOTALS, HONEST, "1:1", MADE_UP[0], "1:1")
        await one.contexts.sweep()
        assert b"\r\n1:1\r\n" not in server.ask("HGET", keys.CONTEXTS_TOTALS, MADE_UP[0])
        assert server.ask("TYPE", keys.tenant(HONEST, "gone")) == b"+none\r\n"
