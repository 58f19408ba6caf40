"""What Cairn does with a request. Uses `cache`, which is what it remembers; never the other way round."""

DISTRIBUTION = "cairn-proxy"  # `cairn` looks for this, since other distributions have packages of this name
