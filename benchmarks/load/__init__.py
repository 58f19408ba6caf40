"""A load test of any endpoint: what is cached, and how that changes the time to first token."""
