"""The lean HTTP/1.1 client towards upstreams: a protocol on a C parser and a pool per origin.

It knows connections, framing and time limits. It must not know what a request asks for: no JSON, no events of a
stream, no choice of replica. Redirects are never followed, cookies never kept, bodies never decompressed and no proxy
of the environment is used, so what the upstream said is what the caller gets.
"""

from proxy.upstream.client import Body, UpstreamClient, default_ssl_context
from proxy.upstream.origin import Limits, Origin
from proxy.upstream.pool import PoolCounts
from proxy.upstream.response import Framing, UpstreamResponse

__all__ = [
    "Body",
    "Framing",
    "Limits",
    "Origin",
    "PoolCounts",
    "UpstreamClient",
    "UpstreamResponse",
    "default_ssl_context",
]
