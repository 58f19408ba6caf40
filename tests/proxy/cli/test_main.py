"""The command line: exit codes, one-line errors, and the check that the packages are Cairn's own."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import yaml
from click.testing import CliRunner

from proxy import __main__
from proxy.cli import main
from proxy.cli.main import cli
from proxy.config.load import Config
from proxy.supervisor import supervisor
from proxy.supervisor.supervisor import Parts
from tests.support.process_logging import logging_restored

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, in this process."""
    result = CliRunner().invoke(cli, arguments, env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_version_and_help() -> None:
    """Help shows how to begin, and not the command that is nobody's."""
    assert re.fullmatch(r"cairn (\d+\.\d+\.\d+|unreleased) \((compiled|interpreted)\)\n", run("--version")[1])
    code, text, _ = run("--help")
    assert code == 0
    assert "cairn serve --upstream http://" in text
    assert "worker " not in text.split("Commands:")[1]
    assert "--admin-port" in run("serve", "--help")[1]


def test_check_config_prints_the_whole_effective_configuration(tmp_path: Path) -> None:
    """Environment included, secrets as stars."""
    file = tmp_path / "cairn.yaml"
    file.write_text("pools: [{name: p, replicas: [{url: 'http://h', key_env: ENGINE_KEY}]}]")
    code, text, _ = run("check-config", str(file), env={"ENGINE_KEY": "hunter2", "CAIRN_PORT": "1234"})
    shown = yaml.safe_load(text)
    assert code == 0
    assert shown["server"]["port"] == 1234
    assert shown["pools"][0]["replicas"][0]["key"] == "***"
    assert "hunter2" not in text


@pytest.mark.parametrize("command", [("check-config",), ("serve", "--config")])
def test_a_bad_file_is_exit_2_and_one_line_with_file_and_path(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Nothing is started."""
    file = tmp_path / "cairn.yaml"
    file.write_text("pools: [{name: p, replicas: [{url: 'http://h'}, {url: 5}]}]")
    code, out, error = run(*command, str(file))
    assert (code, out) == (2, "")
    problem = "$.pools[0].replicas[1].url: expected text, got a whole number; put it in quotes"
    assert error == f"cairn: {file}: {problem}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "cairn: nothing to serve: give --upstream URL"),
        (("--upstream", "ftp://h"), "cairn: $.pools[0].replicas[0].url: expected http"),
        (("--upstream", "http://h", "--redis", "mysql://h"), "cairn: $.redis.url: expected redis://"),
        (("--config", "/no/such/file"), "cairn: cannot read /no/such/file: No such file"),
        (("--port", "high"), "Invalid value for '--port'"),
        (("--prot", "1"), "No such option"),
    ],
)
def test_a_wrong_command_line_is_exit_2(arguments: tuple[str, ...], message: str) -> None:
    """In words, without a traceback."""
    code, _, error = run("serve", *arguments)
    assert code == 2
    assert message in error
    assert "Traceback" not in error


def test_a_taken_port_is_exit_1_and_one_line(tmp_path: Path) -> None:
    """It says which port, and how to choose another."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "proxy", "serve", "--upstream", "http://127.0.0.1:9", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"cairn: cannot listen on 127.0.0.1 port {port}: the port is in use; "
        "choose another with --port or --admin-port\n"
    )


def test_the_packages_are_cairns_own() -> None:
    """Both are marked and beside each other."""
    assert __main__.foreign_package(Path(__main__.__file__).parents[1]) is None


@pytest.mark.parametrize("name", ["proxy", "cache"])
@pytest.mark.parametrize("content", ["", "raise RuntimeError('never run')"])
def test_a_foreign_package_is_told_in_one_line(tmp_path: Path, name: str, content: str) -> None:
    """Whether another distribution overwrote ours or shadows it from elsewhere; its code is not run."""
    for own in ("proxy", "cache"):
        (tmp_path / own).mkdir()
        (tmp_path / own / "__init__.py").write_bytes((ROOT / own / "__init__.py").read_bytes())
    (tmp_path / "cache" / "__init__.py").write_bytes(b'DISTRIBUTION = "cairn-proxy"\n')
    (tmp_path / "proxy" / "__main__.py").write_bytes((ROOT / "proxy" / "__main__.py").read_bytes())
    (tmp_path / name / "__init__.py").write_text(content if name == "cache" else "")
    command = [sys.executable, "-P", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
               "from proxy.__main__ import main; main()"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rf"cairn: the package `{name}` \(.*\) is not Cairn's: .*\n", done.stderr), done.stderr


def test_no_process_loads_the_metrics_of_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py would, if they are installed; nothing of Cairn's uses them."""
    monkeypatch.setattr(sys, "argv", ["cairn", "--version"])
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.metrics", sys)  # to be put back as it was
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 0
    with pytest.raises(ImportError):
        importlib.import_module("opentelemetry.sdk.metrics")


def test_a_missing_package_is_told_in_one_line() -> None:
    """Not a traceback of imports."""
    command = [sys.executable, "-P", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
               "from proxy.__main__ import main; main()"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"cairn: No module named '\w+'; install cairn-proxy again.*\n", done.stderr), done.stderr


def test_a_mistake_is_told_with_its_file_or_its_variable(tmp_path: Path) -> None:
    """The file may be named by a variable, and no mistake of a variable is one of the file."""
    file = tmp_path / "cairn.yaml"
    file.write_text("queue: {max_waiting: 0}")
    status, _, err = run("serve", env={"CAIRN_CONFIG": str(file), "CAIRN_WORKERS": "0"})
    assert status == 2
    assert re.fullmatch(
        rf"cairn: {file}: \$\.queue\.max_waiting: \S.*\ncairn: CAIRN_WORKERS: \S.*\n", re.sub(r"\n +", " ", err)
    ), err


def test_keys_of_a_reloaded_file_are_not_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The supervisor's log redacts them from the moment in which they are read."""
    file = tmp_path / "cairn.yaml"

    def write(key: str) -> None:
        file.write_text(f"pools: [{{name: p, replicas: [{{url: 'http://127.0.0.1:9', key: {key}}}]}}]")

    class Reloading:
        """In place of the supervisor: reloads once, and logs a key of each file."""

        def __init__(self, config: Config, parts: Parts) -> None:
            self._reload = parts.reload

        async def run(self) -> int:
            write("second-key")
            self._reload()
            logging.getLogger("cairn.x").warning("bad keys first-key and second-key")
            return 0

    monkeypatch.setattr(supervisor, "Supervisor", Reloading)
    write("first-key")
    with logging_restored():
        assert run("serve", "--config", str(file))[0] == 0
    assert capfd.readouterr().err.endswith("bad keys *** and ***\n")


def test_closed_standard_streams_are_opened_before_a_socket_takes_their_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Log lines are written to descriptors 1 and 2, which must not be those of a client."""
    opened: list[str] = []

    def status_of(descriptor: int) -> None:
        if descriptor:
            raise OSError(errno.EBADF, "closed")

    system = SimpleNamespace(
        fstat=status_of, open=lambda path, _: opened.append(path), devnull=os.devnull, O_RDWR=os.O_RDWR
    )
    monkeypatch.setattr(__main__, "os", system)
    __main__.open_standard_streams()
    assert opened == [os.devnull] * 2


def test_the_start_is_reported_to_nobody_if_nobody_can_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error on a full disk once cost the first worker its life."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(click, "echo", full)
    main._report_started({}, "http://a", "http://b")  # noqa: SLF001 - what the supervisor is given to call


def test_signals_wait_for_the_end_of_the_start() -> None:
    """They end a process that does not handle them yet; other commands still end at once."""
    held = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        __main__.hold_signals(["top"])
        assert not held & signal.pthread_sigmask(signal.SIG_BLOCK, ())
        __main__.hold_signals(["serve", "--config", "x"])
        assert held <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_command_interrupted_while_it_loads_ends_without_a_traceback(tmp_path: Path) -> None:
    """Loading takes a third of a second, in which Ctrl-C may come."""
    interrupted = (
        "import sys; from proxy.__main__ import main\n"
        "class Loading:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'proxy.cli.main': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Loading()); sys.argv[1:] = ['top']; main()"
    )
    ended = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr.strip()) == (1, "Aborted!")
