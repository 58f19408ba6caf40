"""Build the documentation as a static site with Zensical: `make docs`.

    python scripts/docs_site.py SOURCE    # copies the pages to SOURCE, and builds as configured in mkdocs.yml

Zensical fails on links to pages and headings that do not exist; links to other files and pages that are missing in
the menu are found here.

The pages are copied with the folders of the repository, so that their links hold in both places. Files that they link
to are copied too; a link to a folder leads to the nearest README above it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/*.md", "deploy/*.md", "benchmarks/*.md")
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def pages() -> list[Path]:
    """Return the pages of the site, relative to the repository."""
    return sorted(page.relative_to(ROOT) for pattern in PAGES for page in ROOT.glob(pattern))


def staged(page: Path, linked: set[Path]) -> str:
    """Return the text of `page` for the site, and add the files that it links to, other than pages, to `linked`."""

    def replace(link: re.Match[str]) -> str:
        target = link[2]
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = (ROOT / page.parent / target).resolve()
        if path.is_dir():
            path = nearest_readme(path)
            target = relative(path, page)
        elif not path.is_file():
            raise SystemExit(f"{page}: {target} does not exist")
        elif path.relative_to(ROOT) not in known:
            linked.add(path.relative_to(ROOT))
        return f"{link[1]}{target}{link[3] or ''}{link[4]}"

    known = set(pages())
    parts = _CODE.split((ROOT / page).read_text("utf-8"))
    return "".join(part if place % 2 else _LINK.sub(replace, part) for place, part in enumerate(parts))


def nearest_readme(folder: Path) -> Path:
    """Return the README.md of `folder`, or of the nearest folder around it that has one."""
    while not (folder / "README.md").exists():
        folder = folder.parent
    return folder / "README.md"


def relative(path: Path, page: Path) -> str:
    """Return `path` as a link from `page`."""
    up = "../" * len(page.parent.parts)
    return f"{up}{path.relative_to(ROOT)}"


def stage(source: Path) -> None:
    """Copy the pages and what they link to into the empty folder `source`."""
    shutil.rmtree(source, ignore_errors=True)
    linked: set[Path] = set()
    for page in pages():
        target = source / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(staged(page, linked), "utf-8")
    for file in linked:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, source / file)


def menu(entries: Any) -> Iterator[Path]:
    """Yield the pages in the menu of mkdocs.yml."""
    for entry in entries:
        for value in entry.values():
            if isinstance(value, list):
                yield from menu(value)
            else:
                yield Path(value)


def main() -> int:
    """Build. Return 1 for a broken link; exit with a message if the menu does not have exactly the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    stage(parser.parse_args().source)
    shown = set(menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    if wrong := shown ^ set(pages()):
        raise SystemExit(f"mkdocs.yml: the menu and the pages differ: {', '.join(map(str, sorted(wrong)))}")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "mkdocs.yml"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
