"""Count the work that code does, where a time would depend on the machine."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import Any

_TOOL = 4  # of the six that `sys.monitoring` knows; coverage has the number 1


def operations(function: Callable[[], object]) -> int:
    """Return how many instructions of the interpreter `function` takes; what is compiled takes none.

    No garbage is collected meanwhile: that would count finalizers, and Hypothesis's callback.
    """
    taken, collects = count(), gc.isenabled()
    gc.disable()
    try:
        with _each_instruction(lambda: next(taken)):
            function()
    finally:
        if collects:
            gc.enable()
    return next(taken)


if sys.version_info >= (3, 12):

    @contextmanager
    def _each_instruction(note: Callable[[], object]) -> Iterator[None]:
        """Call `note` for each; a trace function that is set within a call misses some of them since Python 3.12."""
        monitoring = sys.monitoring
        monitoring.use_tool_id(_TOOL, "operations")
        monitoring.register_callback(_TOOL, monitoring.events.INSTRUCTION, lambda code, offset: note())
        monitoring.set_events(_TOOL, monitoring.events.INSTRUCTION)
        try:
            yield
        finally:
            monitoring.set_events(_TOOL, 0)
            monitoring.free_tool_id(_TOOL)

else:

    @contextmanager
    def _each_instruction(note: Callable[[], object]) -> Iterator[None]:
        """Call `note` for each."""

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            if event == "opcode":
                note()
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)
