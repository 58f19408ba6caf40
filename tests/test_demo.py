"""The demo: its documents, its summary, its client against a real engine, and how it stops what it started."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import msgspec
import pytest
from rich.console import Console

from demo import cairn
from demo.asking import Answer, AskFailed, ask, events
from demo.processes import ROOT, Child, StartFailed, python, start_replica
from demo.questions import QUESTIONS, Question, chat_request, document_text, ten_questions
from demo.report import is_warm, shown_seconds, summarise, table, verdict
from demo.shapes import DEMO, MODEL_NAME, SLOT_TOKENS, SMALL, model_path
from proxy.clock import SystemClock
from proxy.config.schema import Config

WAIT_SECONDS = 60.0


def answer(prompt_tokens: int, cached_tokens: int | None, ttft_seconds: float) -> Answer:
    return Answer(ten_questions()[0], "replica-1", prompt_tokens, cached_tokens, ttft_seconds, "")


@pytest.mark.parametrize("document", QUESTIONS)
def test_a_document_is_about_two_thousand_tokens_and_fits_a_slot(document, vocabulary):
    """A cold prefill can be felt, is over soon, and leaves room for the question and the answer."""
    tokens = len(vocabulary.encode(document_text(document)).ids)
    assert 1_800 <= tokens <= 2_400
    assert tokens + 500 < SLOT_TOKENS


def test_ten_questions_take_turns_between_the_documents():
    """No two neighbours are about the same document, so a replica's cache is needed and not only its last prompt."""
    documents = [question.document for question in ten_questions()]
    assert len(documents) == 10
    assert all(one != other for one, other in itertools.pairwise(documents))
    assert {documents.count(document) for document in QUESTIONS} == {5}


def test_questions_about_a_document_share_all_of_their_prompt_but_the_question():
    """Everything before the question is the same to the byte."""
    one, other = (chat_request(Question("cairns.md", text), "m")["messages"] for text in ("a", "b"))
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_the_summary_prices_cached_tokens_at_the_rate_of_the_cold_prompts():
    """2,000 tokens in four seconds are 500 a second, so 3,900 cached ones saved 7.8 seconds."""
    summary = summarise([answer(2_000, 0, 4.0), answer(2_000, 1_950, 0.1), answer(2_000, 1_950, 0.3)])
    assert (summary.cold, summary.warm) == (1, 2)
    assert summary.cold_ttft_seconds == 4.0
    assert summary.warm_ttft_seconds == pytest.approx(0.2)
    assert (summary.prompt_tokens, summary.cached_tokens) == (6_000, 3_900)
    assert summary.saved_seconds == pytest.approx(7.8)
    assert "20 times sooner" in verdict(summary)
    assert "saved about 7.8 s" in verdict(summary)


def test_the_rate_counts_only_what_a_cold_prompt_computed():
    """A cold prompt with a shared head of 500 tokens computed 1,500."""
    summary = summarise([answer(2_000, 500, 3.0), answer(2_000, 2_000, 0.1)])
    assert summary.saved_seconds == pytest.approx(2_500 * 3.0 / 1_500)


@pytest.mark.parametrize("answers", [[], [answer(10, 0, 1.0)], [answer(10, 9, 1.0)], [answer(10, None, 1.0)]])
def test_nothing_to_compare_is_said_and_not_divided_by(answers):
    """Only cold, only warm, none, or an engine that does not report: no figure is made up."""
    assert "nothing to compare" in verdict(summarise(answers))


def test_an_unreported_count_is_shown_as_such():
    """A count that was not reported is shown as unknown, not as zero."""
    shown = Console(file=io.StringIO(), width=120)
    shown.print(table([answer(1_234, None, 0.0123)]))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "unknown" in text
    assert "1,234" in text
    assert "12 ms" in text
    assert shown_seconds(3.456) == "3.46 s"


def test_a_stream_that_stops_before_its_end_mark_is_no_answer():
    """A broken stream is told from a finished one."""
    assert list(events([b'data: {"a": 1}\n', b"\n", b": ping\n", b"data: [DONE]\n"])) == [{"a": 1}]
    with pytest.raises(AskFailed, match="before its end"):
        list(events([b'data: {"a": 1}\n']))
    with pytest.raises(AskFailed, match="no room"):
        list(events([b'data: {"error": {"message": "no room"}}\n']))


@pytest.mark.engine
def test_the_second_question_about_a_document_is_warm_on_a_real_engine(engine):
    """Asked straight, alternating, one engine keeps both documents and reports it."""
    clock = SystemClock()
    answers = [ask(engine.url, MODEL_NAME, question, clock) for question in ten_questions()[:4]]
    assert [is_warm(one) for one in answers] == [False, False, True, True]
    assert all(one.text and one.prompt_tokens > 1_800 for one in answers)
    summary = summarise(answers)
    assert summary.saved_seconds is not None
    assert summary.saved_seconds > 0
    assert summary.warm_ttft_seconds is not None
    assert summary.warm_ttft_seconds < (summary.cold_ttft_seconds or 0)


@pytest.mark.engine
def test_a_restarted_engine_has_its_address_and_an_empty_cache(two_engines):
    """Tests of restarts rely on this."""
    engine = two_engines[1]
    question, clock, url = ten_questions()[0], SystemClock(), engine.url
    ask(url, MODEL_NAME, question, clock)
    engine.restart()
    assert engine.url == url
    assert ask(url, MODEL_NAME, question, clock).cached_tokens == 0


@pytest.mark.engine
def test_an_engine_in_the_middle_of_a_long_prefill_ends_soon(two_engines, tmp_path):
    """Ctrl-C does not wait for the end of a long prefill."""
    model = model_path(ROOT / ".cairn" / "model", SMALL)
    child = start_replica("engine", model, tmp_path / "log", "--slots", "1", "--slot-tokens", "16384")
    port = int(child.served_at(WAIT_SECONDS).rpartition(":")[2])
    body = json.dumps(chat_request(Question("cairns.md", "stone " * 6_000), MODEL_NAME)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        while "processing task" not in (tmp_path / "log").read_text():
            time.sleep(0.02)
        started = time.monotonic()  # noqa: TID251
        child.stop(WAIT_SECONDS)
    assert time.monotonic() - started < 5  # noqa: TID251


@pytest.mark.engine
def test_an_error_of_the_server_is_shown_with_its_message(engine):
    """The user sees the server's message, not only its status."""
    too_long = Question("cairns.md", "stone " * 5_000)
    with pytest.raises(AskFailed, match=r"answered 400: .*context"):
        ask(engine.url, MODEL_NAME, too_long, SystemClock())


def test_nobody_at_the_address_is_a_plain_failure():
    """A refused connection is reported in one line."""
    with pytest.raises(AskFailed, match=r"no response from 127\.0\.0\.1:9"):
        ask("http://127.0.0.1:9", MODEL_NAME, ten_questions()[0], SystemClock())


def test_a_child_that_does_not_start_is_shown_with_the_end_of_its_log(tmp_path):
    """The message contains the reason."""
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    child = Child("The engine", command, tmp_path / "log", piped=True)
    with pytest.raises(StartFailed, match=r"(?s)The engine did not start \(exit code 1\).*no such model"):
        child.served_at(WAIT_SECONDS)
    child.stop()


def test_a_child_that_will_not_end_is_killed_with_what_it_started(tmp_path):
    """Nothing is left behind, not even a grandchild that ignores signals."""
    script = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "c = subprocess.Popen(['sleep', '60']); print(c.pid, flush=True); c.wait()"
    )
    child = Child("stubborn", [sys.executable, "-c", script], tmp_path / "log", piped=True)
    grandchild = int(child.served_at(WAIT_SECONDS))
    child.stop(timeout_seconds=0.1)
    assert not child.running
    assert gone(grandchild)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_tied_process_dies_with_a_killed_parent():
    """SIGKILL leaves the parent no time to end its children: the kernel does."""
    script = (
        "import subprocess, sys, time;"
        "c = subprocess.Popen([sys.executable, '-m', 'demo.tether', sys.executable, '-c',"
        " 'import time; print(1, flush=True); time.sleep(60)'], stdout=subprocess.PIPE);"
        "c.stdout.readline(); print(c.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    assert gone(child)


def test_a_taken_port_is_said_with_the_way_out(tmp_path):
    """Nothing is started, and the message names the setting to change."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = subprocess.run(
            python("demo", "--port", str(port)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_SECONDS,
        )
    assert run.returncode == 1
    assert f"Port {port} of 127.0.0.1 is not available" in run.stdout
    assert "make run PORT=" in run.stdout


def test_the_configuration_that_the_demo_writes_is_one_that_cairn_reads(tmp_path):
    """Before engines and before upstreams."""
    ours = msgspec.convert(cairn.configuration(tmp_path, ["http://127.0.0.1:1", "http://127.0.0.1:2"]), Config)
    assert [replica.label for replica in ours.pools[0].replicas] == ["replica-1", "replica-2"]
    assert msgspec.convert(cairn.configuration(tmp_path, []), Config).pools == ()


def test_the_models_of_two_shapes_do_not_share_a_file(tmp_path):
    """The file name depends on the shape."""
    assert model_path(tmp_path, DEMO) != model_path(tmp_path, SMALL)


def gone(pid: int) -> bool:
    """Wait until the process has ended, even if its parent has not collected it yet."""
    deadline = time.monotonic() + WAIT_SECONDS  # noqa: TID251
    while time.monotonic() < deadline:  # noqa: TID251
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            pass
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return False
