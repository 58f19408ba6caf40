"""The engine's prefix cache is salted by tenant, whatever the client writes into the field."""

from __future__ import annotations

import json

import pytest

from proxy.wire.cache_salt import salted_by
from proxy.wire.splice import apply


@pytest.mark.parametrize(
    ("body", "salt"),
    [
        (b'{"model":"m"}', "tenant"),
        (b' {"model":"m","cache_salt":"user-1"}', "tenant-user-1"),
        (b'{"cache_salt" : "us\\u00e9r","model":"m"}', "tenant-us\u00e9r"),
        (b'{"cache_salt":"a","cache_salt":"b"}', "tenant-b"),
        (b'{"cache\\u005fsalt":"b"}', "tenant-b"),
        (b'{"cache_salt":""}', "tenant-"),
        (b'{"cache_salt":null}', "tenant"),
        (b'{"cache_salt":7,"model":"m"}', "tenant"),
        (b'{"messages":[{"cache_salt":"a"}],"text":"cache_salt"}', "tenant"),
    ],
)
def test_the_tenants_salt_comes_before_the_clients_own(body: bytes, salt: str) -> None:
    """Of two members the engine would use the last, which is the client's and may be another tenant's too."""
    sent, _ = apply(body, [salted_by(body, b"tenant")])
    assert json.loads(b"".join(sent))["cache_salt"] == salt
