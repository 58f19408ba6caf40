"""The systemd unit and the examples of gateways, each checked by the program that reads it if that is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config.schema import Config
from tests.deploy.queries import DEPLOY

UNIT = DEPLOY / "systemd" / "cairn.service"
GATEWAY = DEPLOY / "gateway"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
DEFAULTS = Config()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
def test_systemd_accepts_the_unit_and_finds_it_well_confined(tmp_path: Path) -> None:
    """No warning, with a program where the unit expects one; an exposure of at most 2 of 10."""
    unit = tmp_path / "cairn.service"
    unit.write_text(UNIT.read_text().replace("/opt/cairn/bin/cairn", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rate = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)]
    assert subprocess.run(rate, capture_output=True, check=False).returncode == 0


def test_the_unit_waits_for_readiness_and_for_the_drain() -> None:
    """Type=notify, as the supervisor reports it, and a stop time longer than the default drain."""
    settings = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and line[0] != "#")
    assert settings["Type"] == "notify"
    drain_seconds = DEFAULTS.server.drain_accept_seconds + DEFAULTS.server.drain_seconds
    assert int(settings["TimeoutStopSec"]) > drain_seconds
    assert settings["Environment"] == "XDG_DATA_HOME=/var/lib"
    assert settings["StateDirectory"] == "cairn"


@pytest.mark.skipif(NGINX is None, reason="nginx is missing: apt-get install nginx-light")
def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    """`nginx -t`, with a certificate of the test's and its pid file."""
    trustme = pytest.importorskip("trustme")
    certificate = trustme.CA().issue_cert("cairn.example.com")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    text = (GATEWAY / "nginx.conf").read_text()
    for name in ("/etc/nginx/cairn.crt", "/etc/nginx/cairn.key"):
        assert name in text
        text = text.replace(name, str(tmp_path / "both.pem"))
    (tmp_path / "nginx.conf").write_text(text.replace("/run/nginx.pid", str(tmp_path / "pid")))
    command = [str(NGINX), "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "stderr"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_gateways_wait_longer_than_a_cold_prefill_and_take_cairns_largest_body() -> None:
    """Their limits fit the defaults of Cairn, whose own limits should be the ones that are met."""
    nginx = (GATEWAY / "nginx.conf").read_text()
    ingress = yaml.safe_load((GATEWAY / "ingress.yaml").read_text())["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io/"
    assert f"proxy_read_timeout {ingress[prefix + 'proxy-read-timeout']}s;" in nginx
    assert int(ingress[prefix + "proxy-read-timeout"]) >= DEFAULTS.upstream.first_byte_seconds
    size = DEFAULTS.server.max_body_bytes // (1024 * 1024)
    assert ingress[prefix + "proxy-body-size"] == f"{size}m"
    assert f"client_max_body_size {size}m;" in nginx
    assert ingress[prefix + "proxy-buffering"] == ingress[prefix + "proxy-request-buffering"] == "off"
    assert "proxy_buffering off;" in nginx


def test_envoy_gets_no_limit_for_a_whole_response_and_a_long_one_for_silence() -> None:
    """Its default of 15 seconds for a response would cut every long one."""
    parsed: dict[str, Any] = yaml.safe_load((GATEWAY / "envoy.yaml").read_text())
    resources = parsed["static_resources"]
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    route = manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
    assert route["timeout"] == "0s"
    assert int(route["idle_timeout"].rstrip("s")) >= DEFAULTS.upstream.first_byte_seconds
    assert int(manager["stream_idle_timeout"].rstrip("s")) >= DEFAULTS.upstream.first_byte_seconds
    assert route["cluster"] in [cluster["name"] for cluster in resources["clusters"]]
