"""The documentation agrees with the code, and its links lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from proxy.admin.openapi import document
from proxy.cli.main import cli
from proxy.config.load import load
from proxy.config.reference import tables
from proxy.config.schema import RETIRED
from proxy.metrics.definitions import PREFIX, SPECS
from proxy.model import AccessLine, CacheStatus, Ending, Endpoint, MissReason, RouteReason

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.md"), *ROOT.glob("benchmarks/*.md")]
)
docs_site = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "docs_site.py")))
SITE_TOOLS = ROOT / ".build" / "docs-tools"
QUICK_STARTS = ROOT / "docs" / "quickstart.md"
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def links(page: Path) -> list[str]:
    """Return the targets of the page's links, without those in code."""
    return _LINK.findall(_CODE.sub("", page.read_text("utf-8")))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings, as renderers of Markdown make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_generated_pages_are_up_to_date() -> None:
    """Every setting and metric is in its reference, with the code's own words."""
    command = [sys.executable, "scripts/reference.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    """A link within the repository names an existing file, and an existing heading of it."""
    for link in links(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{link} has no such heading"


def test_every_page_of_docs_is_found_from_the_readme() -> None:
    """Following links from README.md reaches every page of docs/."""
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        local = [link.partition("#")[0] for link in links(page) if "://" not in link]
        waiting += [(page.parent / name).resolve() for name in local if name]
    assert [page.name for page in ROOT.glob("docs/*.md") if page not in seen] == []


@pytest.mark.skipif(not (SITE_TOOLS / ".done").exists(), reason="`make docs` installs the generator")
def test_the_site_builds_without_a_broken_link() -> None:
    """Zensical checks pages and headings; the script, all other files and the menu."""
    run = build_site()
    assert run.returncode == 0, run.stdout + run.stderr
    assert (ROOT / ".build/site/docs/quickstart.html").exists()


def test_the_menu_of_the_site_has_every_page() -> None:
    """A page that is written and not entered there could not be found on the site."""
    assert sorted(docs_site.menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == docs_site.pages()


def test_a_link_to_a_folder_leads_to_its_readme_on_the_site() -> None:
    """A site has no folders; other files are copied, and what does not exist is an error."""
    linked: set[Path] = set()
    text = docs_site.staged(Path("docs/operations.md"), linked)
    assert "](../deploy/README.md)" in text
    assert "](../deploy/prometheus)" not in text
    docs_site.staged(Path("docs/installing.md"), linked)
    assert Path("deploy/gateway/nginx.conf") in linked


def build_site() -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does."""
    return subprocess.run(
        [sys.executable, "scripts/docs_site.py", ".build/site-source"],
        cwd=ROOT,
        env={"PYTHONPATH": str(SITE_TOOLS), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("block", re.findall(r"```(\w+)\n(.*?)```", QUICK_STARTS.read_text(), re.DOTALL))
def test_the_quick_starts_are_short_and_valid(block: tuple[str, str], tmp_path: Path) -> None:
    """Five lines each; every command and flag of Cairn exists, and the configuration loads."""
    kind, text = block
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 5
    if kind == "yaml":
        (tmp_path / "cairn.yaml").write_text(text)
        assert load(tmp_path / "cairn.yaml", {"OPENAI_API_KEY": "sk-1", "HOME": str(tmp_path)}).warnings == ()
    for line in lines:
        if line.startswith("cairn "):
            words = line.split("#")[0].removesuffix("& ").split()[1:]
            help_page = CliRunner().invoke(cli, [*[w for w in words if w.isalpha()][:2], "--help"])
            if help_page.exit_code:  # the second word is an argument
                help_page = CliRunner().invoke(cli, [words[0], "--help"])
            assert help_page.exit_code == 0
            assert [word for word in words if word.startswith("--") and word not in help_page.output] == []


def test_every_alert_is_explained_in_operations() -> None:
    """An operator finds what each alert means and what to do."""
    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    explained = (ROOT / "docs/operations.md").read_text("utf-8")
    assert sorted(alert for alert in alerts if alert not in explained) == []


def test_every_field_and_value_of_the_access_log_is_documented() -> None:
    """In the order of the fields, and each value of an enumeration under its own heading."""
    page = (ROOT / "docs/access-log.md").read_text("utf-8")
    fields, _, values = page.partition("## Values")
    assert re.findall(r"^\| `(\w+)` \|", fields, re.MULTILINE) == list(AccessLine.__struct_fields__)
    sections = dict(section.split("\n", 1) for section in values.split("### ")[1:])
    for heading, kind in {
        "endpoint": Endpoint,
        "ending": Ending,
        "cache": CacheStatus,
        "reason": RouteReason,
        "miss": MissReason,
    }.items():
        listed = [row.split("|")[1] for row in sections[heading].splitlines() if row.startswith("| `")]
        assert sorted(re.findall(r"`(\w+)`", " ".join(listed))) == sorted(member.value for member in kind)


def test_every_route_of_the_admin_port_is_documented() -> None:
    """With each of its parameters, and each field of its answers."""
    page = (ROOT / "docs/admin.md").read_text("utf-8")
    described = document("/openapi/admin.json")
    for path, item in described["paths"].items():
        for method in set(item) - {"parameters"}:
            assert f"`{method.upper()} {path}`" in page
            for parameter in item[method].get("parameters", ()):
                assert f"`{parameter['name']}`" in page
    schemas = described["components"]["schemas"]
    for name in ("Readiness", "Explanation", "Candidate", "SavingsLine"):
        assert [field for field in schemas[name]["properties"] if not re.search(rf'[`"]{field}[`"]', page)] == []


def test_the_versions_of_clients_on_their_page_are_those_that_are_run() -> None:
    """An update of a client must be tried and documented."""
    page = (ROOT / "docs/clients.md").read_text("utf-8")
    pinned = list(json.loads((ROOT / "tests/clients/npm/package.json").read_text())["dependencies"].values())
    for name in ("aider", "libraries"):
        lines = (ROOT / f"tests/clients/python/{name}.in").read_text().split()
        pinned += [line.partition("==")[2] for line in lines]
    assert [version for version in pinned if version not in page] == []


def test_the_messages_that_troubleshooting_quotes_are_the_code_s() -> None:
    """A message is searched for by its words; each part of a quotation between dots is in the sources."""
    sources = "".join(path.read_text("utf-8") for name in ("proxy", "cache") for path in ROOT.glob(f"{name}/**/*.py"))
    text = re.sub(r"\"\s*\n\s*f?\"", "", sources)  # strings that go on in the next line
    quoted = re.findall(r"\"([^\"]+)\"", _CODE.sub("", (ROOT / "docs/troubleshooting.md").read_text("utf-8")))
    parts = [" ".join(part.split()) for quotation in quoted for part in quotation.split("...")]
    assert len(parts) > len(quoted) > 8
    assert [part for part in parts if part not in text] == []


def test_the_error_codes_that_troubleshooting_names_are_the_code_s() -> None:
    """In the tables by status: `invalid_api_key` after 401, and so on."""
    sources = "".join(path.read_text("utf-8") for path in ROOT.glob("proxy/**/*.py"))
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    codes = re.findall(r"\b[45]\d\d `(\w+)`", page)
    assert {"invalid_api_key", "model_not_allowed", "upstream_timeout"} <= set(codes)
    assert [code for code in codes if f'"{code}"' not in sources] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_metrics_and_settings_that_a_page_names_exist(page: Path) -> None:
    """Each of `cairn_workers`, `routing.index_bytes` and `pools[].optional` is one of the code's."""
    text = page.read_text("utf-8")
    series = {spec.name for spec in SPECS}
    named = set(re.findall(rf"`({PREFIX}\w+?)(?:_total|_bucket|_sum|_count)?[`{{]", text))
    assert sorted(named - series - {"cairn_admin_token"}) == []
    settings = {(table.path.removesuffix("[]"), setting.name) for table in tables() for setting in table.settings}
    modules = {"upstream", "contexts", "routing"}  # of the same names; their settings have an underscore
    sections = "|".join({path for path, _ in settings if path and "." not in path} - modules)
    found = set(re.findall(rf"`({sections})(?:\[\])?\.([a-z_]+)[`:]", text))
    found |= set(re.findall(rf"`({'|'.join(modules)})\.([a-z]+_[a-z_]+)[`:]", text))
    others = {("admin", "yaml"), ("server", "address")}  # a file, and an attribute of a span
    assert sorted(found - settings - set(RETIRED) - others) == []
