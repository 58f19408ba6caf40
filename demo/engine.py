"""One replica: llama.cpp's server on the local model, in a process of its own (`python -m demo.engine`).

It prints one line, its base URL, when it serves, and ends cleanly on SIGINT and SIGTERM or when its parent is gone.
It must not know who asks.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path

import xllamacpp

from demo.shapes import MODEL_NAME, SLOT_TOKENS, SLOTS
from demo.tether import end_with_parent

LAST_BATCH_SECONDS = 2  # an engine ends between batches of a prefill; the kernel ends one that is slower than this
PARENT_CHECK_SECONDS = 1.0  # how soon a replica notices, where the kernel does not tell, that its parent is gone


def parameters(model: Path, host: str, port: int, slots: int, slot_tokens: int) -> xllamacpp.CommonParams:
    """llama.cpp's settings for one thread, `slots` prompts held at a time and every observing endpoint open.

    The prompt cache in host memory is off: slots alone hold prompts, so what is cached is what the index can know.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.model_alias = {MODEL_NAME}
    params.hostnames = [host]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * slot_tokens
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.cache_prompt = True
    params.cache_ram_mib = 0
    params.use_jinja = True
    params.warmup = False
    params.ui = False
    params.endpoint_slots = True
    params.endpoint_metrics = True
    params.endpoint_props = True
    return params


def main() -> None:
    """Load the model, print the base URL, and serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument("--slot-tokens", type=int, default=SLOT_TOKENS)
    options = parser.parse_args()

    parent = os.getppid()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    end_with_parent(signal.SIGTERM)
    server = xllamacpp.Server(
        parameters(options.model, options.host, options.port, options.slots, options.slot_tokens)
    )
    print(server.listening_address, flush=True)
    while not stop.wait(PARENT_CHECK_SECONDS) and os.getppid() == parent:
        pass
    signal.alarm(LAST_BATCH_SECONDS)
    del server


if __name__ == "__main__":
    main()
