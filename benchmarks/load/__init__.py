"""A load test of one's own endpoint: what is cached, and what that does to the time to first token."""
