"""A trace replayed as text against simulated engines behind HTTP: Cairn, and other routers beside it."""
