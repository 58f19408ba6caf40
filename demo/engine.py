"""One replica: llama.cpp's server with the local model, as a separate process (`python -m demo.engine`).

Prints its base URL on one line once it serves. Ends cleanly on SIGINT, on SIGTERM and when its parent ends.
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

LAST_BATCH_SECONDS = 2  # an engine stops between batches of a prefill; one that takes longer is killed
PARENT_CHECK_SECONDS = 1.0  # how often to check for the parent, for kernels that do not signal its end


def parameters(model: Path, host: str, port: int, slots: int, slot_tokens: int) -> xllamacpp.CommonParams:
    """Return llama.cpp's settings: one thread, `slots` prompts of `slot_tokens` each, every monitoring endpoint on.

    The prompt cache in host memory is off, so that only slots keep prompts.
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
    """Load the model, print the base URL, and serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 chooses a free one")
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
