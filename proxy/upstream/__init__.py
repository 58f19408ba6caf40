"""The HTTP/1.1 client for upstreams: a protocol on a C parser, and a connection pool per origin.

It handles connections, framing and time limits, not JSON, the events of a stream or the choice of a replica.
Redirects are never followed, cookies never kept, bodies never decompressed, and no proxy from the environment is
used: the caller gets exactly what the upstream sent.
"""

from proxy.upstream.authorities import Authorities
from proxy.upstream.client import Body, UpstreamClient
from proxy.upstream.origin import Limits, Origin
from proxy.upstream.pool import PoolCounts
from proxy.upstream.response import Framing, UpstreamResponse

__all__ = [
    "Authorities",
    "Body",
    "Framing",
    "Limits",
    "Origin",
    "PoolCounts",
    "UpstreamClient",
    "UpstreamResponse",
]
