"""The proxy: handle requests. Uses `cache`, the memory of Cairn; never the other way round."""

DISTRIBUTION = "cairn-proxy"  # `cairn` looks for this, since other distributions have packages of this name
