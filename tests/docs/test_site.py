"""The docs site builds, its links lead somewhere, and its pages load nothing from elsewhere."""

import html.parser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]


class Page(NamedTuple):
    ids: set[str]
    links: list[tuple[str, str]]
    """What leads or loads elsewhere: the tag and its target."""


class _Parser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page(set(), [])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.page.ids.add(value)
            if name in ("href", "src", "data", "poster") and value:
                self.page.links.append((tag, value))


def parse(path: Path) -> Page:
    parser = _Parser()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once as `make docs` builds it, from a copy, because the builder writes beside its sources."""
    pytest.importorskip("zensical", reason="needs the extra docs")
    root = tmp_path_factory.mktemp("docs")
    shutil.copy(ROOT / "mkdocs.yml", root)
    shutil.copytree(ROOT / "docs", root / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    variables = {**os.environ, "QFLEET_DOCS_THEME": "zensical"}
    built = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return root / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: parse(path) for path in site.rglob("*.html")}


def test_every_page_is_built_and_is_in_the_navigation(site: Path) -> None:
    yaml = pytest.importorskip("yaml")
    sources = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")} - {"404.md"} == sources
    in_navigation = re.findall(r"[\w/-]+\.md", str(yaml.load((ROOT / "mkdocs.yml").read_text(), _LoaderWithEnv)["nav"]))
    assert sorted(in_navigation) == sorted(sources)


def test_every_link_leads_to_a_page_and_a_section_that_exist(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the server's root
            continue
        for _, target in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            found = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = found / "index.html" if found.is_dir() else found
            is_there = found.is_file() and found.is_relative_to(site)
            fragment = unquote(parts.fragment)
            if is_there and fragment and found.suffix == ".html" and not fragment.startswith("__"):
                is_there = fragment in pages[found].ids
            if not is_there:
                broken.append(f"{path.relative_to(site)}: {target}")
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 500


def test_pages_load_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    loaded = {(tag, target) for page in pages.values() for tag, target in page.links if tag != "a"}
    assert {target for _, target in loaded if urlsplit(target).netloc} == set()
    assert any(tag == "script" for tag, _ in loaded) and any(tag == "link" for tag, _ in loaded)
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", text) == [], style
    for picture in (ROOT / "docs").rglob("*.svg"):
        drawing = picture.read_text(encoding="utf-8")
        assert re.findall(r"(?:href|src)=\"(?!#)[^\"]*\"|url\((?!#)", drawing) == [], picture


def _make_loader() -> type:
    yaml = pytest.importorskip("yaml")
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node)[-1])
    return loader


_LoaderWithEnv = _make_loader()
