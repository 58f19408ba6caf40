"""Real vLLM servers on the CPU with a tiny model of random weights, and routers before them."""
