"""The proxy: handle requests. It uses `cache`, Cairn's memory; `cache` never imports `proxy`."""

DISTRIBUTION = "cairn-proxy"  # `cairn` looks for this, since other distributions have packages of this name
