"""`make run`: start Cairn in front of two local engines and ask ten questions, or in front of upstreams given by URL.

Starts every process, shows progress, and stops every process at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType

from rich.console import Group
from rich.live import Live
from rich.spinner import Spinner

from demo import cairn
from demo.asking import Answer, AskFailed, ask
from demo.processes import Child, StartFailed, python, start_replica
from demo.questions import ten_questions
from demo.report import summarise, table, verdict
from demo.screen import Screen
from demo.shapes import DEMO, MODEL_NAME, model_path
from demo.tether import end_with_parent
from proxy.clock import SystemClock

STATE = Path(__file__).resolve().parent.parent / ".cairn"
MODELS = STATE / "model"
LOGS = STATE / "logs"
REPLICAS = 2
LOAD_SECONDS = 60.0  # for a cold disk on a busy machine; usually one second
STEP_SECONDS = 300.0  # limit for one step of making the model; the longest takes two seconds on two cores
WATCH_SECONDS = 0.5  # interval at which children are checked for an unexpected end


class Stopped(BaseException):
    """Raised by a stop signal. A BaseException, so that no error handler catches it."""


class Demo:
    """One run: its options, its screen, and the child processes to stop at the end."""

    def __init__(self, options: argparse.Namespace, screen: Screen, children: contextlib.ExitStack) -> None:
        self.options = options
        self.screen = screen
        self._children = children
        self._clock = SystemClock()

    def run(self) -> None:
        """Start everything, ask the questions if the engines are local, then serve until stopped. Always raises."""
        for flag, port in (("PORT", self.options.port), ("ADMIN_PORT", self.options.admin_port)):
            _refuse_taken_port(self.options.host, port, flag)
        if self.options.upstream:
            upstreams = [url.strip() for url in self.options.upstream.split(",") if url.strip()]
            served = [self._start_cairn(upstreams=upstreams)]
            self.screen.say(cairn.upstream_hint(self._address(), upstreams))
        else:
            engines = self._start_engines()
            served = [*engines.values(), self._start_cairn(engines=list(engines))]
            self._ask_all()
            self.screen.say(cairn.local_hint(self._address(), MODEL_NAME))
        self.screen.say(cairn.addresses(self._address(), self._address(admin=True), LOGS))
        self._watch(served)

    def _start_engines(self) -> dict[str, Child]:
        """Start the replicas, which load at the same time, and return them by base URL."""
        model = self._make_model()
        with self.screen.step(f"Starting {REPLICAS} llama.cpp replicas with it, one thread each"):
            engines = [
                self._keep(start_replica(f"replica {number}", model, LOGS / f"replica-{number}.log"))
                for number in range(1, REPLICAS + 1)
            ]
            return {engine.served_at(LOAD_SECONDS): engine for engine in engines}

    def _make_model(self) -> Path:
        """Return the model file; a child process makes it if it is missing, so that it can be stopped at any time."""
        path = model_path(MODELS, DEMO)
        if path.exists():
            self.screen.say(f"✓ Using the local model {path.relative_to(STATE.parent)}")
            return path
        maker = self._keep(
            Child("the model maker", python("demo.local_model", str(MODELS)), LOGS / "model.log", piped=True)
        )
        step = maker.next_line(STEP_SECONDS)
        while step:
            with self.screen.step(step):
                step = maker.next_line(STEP_SECONDS)
        if maker.process.wait() != 0 or not path.exists():
            raise StartFailed(maker.report("failed"))
        return path

    def _start_cairn(self, engines: list[str] | None = None, upstreams: list[str] | None = None) -> Child:
        with self.screen.step(f"Starting Valkey, and Cairn on {self._address()}"):
            child = self._keep(cairn.start(self.options, STATE, LOGS, engines or [], upstreams or []))
            cairn.wait_until_ready(child, self._address(admin=True), self._clock)
            return child

    def _ask_all(self) -> None:
        questions = ten_questions()
        answers: list[Answer] = []
        self.screen.say()
        with Live(console=self.screen.console) as live:
            try:
                for number, question in enumerate(questions, start=1):
                    asking = Spinner("dots", f"Question {number} of {len(questions)}, about {question.document} ...")
                    live.update(Group(table(answers), asking))
                    answers.append(ask(self._address(), MODEL_NAME, question, self._clock))
            finally:
                live.update(table(answers))
        self.screen.say(f"\n{verdict(summarise(answers))}\n")

    def _address(self, *, admin: bool = False) -> str:
        return f"http://{self.options.host}:{self.options.admin_port if admin else self.options.port}"

    def _keep(self, child: Child) -> Child:
        """Stop `child` at the end of the run; the last one started is stopped first, so Cairn before its engines."""
        self._children.callback(child.stop)
        return child

    def _watch(self, children: list[Child]) -> None:
        """Wait until stopped. Raises `StartFailed` with the end of the log if a child ends by itself."""
        pause = threading.Event()
        while True:
            pause.wait(WATCH_SECONDS)
            for child in children:
                if not child.running:
                    raise StartFailed(child.report("ended by itself"))


def _refuse_taken_port(host: str, port: int, flag: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartFailed(
                f"Port {port} of {host} is not available ({os.strerror(error.errno or 0)}). "
                f"Choose another one: make run {flag}={port + 1_000}"
            ) from error


def _stop_once(*_: int | FrameType | None) -> None:
    """Raise `Stopped` for the first signal, and ignore further ones."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make run", description=__doc__)
    parser.add_argument("--upstream", default="", help="base URLs, separated by commas, instead of the local engines")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--admin-port", type=int, default=8090)
    parser.add_argument("--end-with-parent", action="store_true", help="stop when the parent process ends")
    return parser.parse_args()


def main() -> int:
    """Run the demo; return 0 if a signal stopped it and 1 if something failed."""
    options = _options()
    screen = Screen(SystemClock())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop_once)
    if options.end_with_parent:
        end_with_parent(signal.SIGTERM)
    code = 0
    try:
        with contextlib.ExitStack() as children:
            try:
                Demo(options, screen, children).run()
            except Stopped:
                screen.say("\nStopping ...")
            except (StartFailed, AskFailed) as failure:
                code = 1
                screen.say(f"\n{failure}", style="red")
    except Stopped:  # the signal came while a failed run was being cleaned up
        pass
    return code


if __name__ == "__main__":
    sys.exit(main())
