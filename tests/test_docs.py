"""The documentation builds without a warning and without network, has everything public in it, and its links lead
somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import fastflow as ff

pytest.importorskip("mkdocs", reason="needs the extra docs: mkdocs")
pytest.importorskip("mkdocstrings", reason="needs the extra docs: mkdocstrings")

ROOT = Path(__file__).parents[1]


class References(HTMLParser):
    """What a page names, loads and links to."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := given.get(key))}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag != "a":
            loads = {given.get("src"), given.get("srcset"), given.get("href"), given.get("data")}
            self.loads += [address for address in loads if address] if given.get("rel") != "canonical" else []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, every page by its path: the command of `make docs`, where a connection would fail."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **nowhere},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {}
    for path in folder.rglob("*.html"):
        pages[path] = References()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return folder, pages


def test_nothing_is_loaded_from_elsewhere(site):
    folder, pages = site
    assert len(pages) > 10
    loaded = {address for page in pages.values() for address in page.loads}
    assert [address for address in loaded if re.match(r"(\w+:)?//", address)] == []
    for style in folder.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_public_name_has_its_place(site):
    _, pages = site
    anchors = {name for path, page in pages.items() if path.parent.name == "api" for name in page.ids}
    assert [name for name in ff.__all__ if name != "__version__" and f"fastflow.{name}" not in anchors] == []
    assert {"fastflow.VelocityField.from_sequential", "fastflow.FlowCritic.loss"} <= anchors


def test_links_and_pictures_lead_somewhere(site):
    _, pages = site
    lost = []
    for path, page in pages.items():
        for address in page.links + page.loads:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            there = target.is_file() and (
                not parts.fragment or target not in pages or parts.fragment in pages[target].ids
            )
            lost += [] if there else [(path.name, address)]
    assert lost == []


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
