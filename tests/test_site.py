"""The documentation as a site: every page is in it, and its links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.browser import Tab

ROOT = Path(__file__).resolve().parents[1]
# Attributes that name what a page loads, and those that name where a link leads.
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
LEADS = {"a": "href", **LOADED}


class Page(HTMLParser):
    """The anchors of a page, and (tag, address) of what it loads and links to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag in LEADS and LEADS[tag] in values:
            self.links.append((tag, values[LEADS[tag]]))


def build(folder: Path, *edits: tuple[str, str, str]) -> subprocess.CompletedProcess[str]:
    """Build the site of docs/ in a folder, with some texts of its files replaced."""
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    for name, old, new in edits:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def dead_links(site: Path) -> list[str]:
    """The links of all pages to files that are not in the site, or to anchors of no page."""
    pages = {file: Page(file) for file in sorted(site.glob("**/*.html"))}
    dead = []
    for file, page in pages.items():
        # Served for every address that is not there, so its links start at the site's root.
        for tag, link in page.links if file.name != "404.html" else []:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            found = target.is_file() and target.is_relative_to(site)
            if found and parts.fragment and target in pages:
                found = unquote(parts.fragment) in pages[target].ids
            if not found:
                dead.append(f"{file.name}: {tag} {link}")
    return dead


def test_links_of_the_site(site: Path) -> None:
    assert dead_links(site) == []
    page = Page(site / "recipes.html")
    assert ("a", "extending.html#a-loss") in [
        (tag, link.removeprefix("./")) for tag, link in page.links
    ]


def test_a_dead_link_is_found(site: Path, tmp_path: Path) -> None:
    broken = tmp_path / "site"
    shutil.copytree(site, broken)
    page = broken / "tour.html"
    links = '<a href="none.html">x</a><a href="data.html#none">x</a><img src="../x.png">'
    page.write_text(page.read_text(encoding="utf-8") + links, encoding="utf-8")
    assert dead_links(broken) == [
        "tour.html: a none.html",
        "tour.html: a data.html#none",
        "tour.html: img ../x.png",
    ]


@pytest.mark.parametrize("link", ["none.md", "data.md#none"])
def test_the_build_refuses_a_dead_link(link: str, tmp_path: Path) -> None:
    done = build(tmp_path, ("docs/tour.md", "(recipes.md)", f"({link})"))
    assert done.returncode != 0
    assert "tour.md" in done.stdout + done.stderr


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    """No fonts, scripts or pictures of other servers: the site works without a network."""
    loaded = [
        f"{file.name}: {link}"
        for file in site.glob("**/*.html")
        for tag, link in Page(file).links
        if tag in LOADED and urlsplit(link).scheme not in ("", "data")
    ]
    assert loaded == []
    styles = "".join(file.read_text(encoding="utf-8") for file in site.glob("**/*.css"))
    assert "url(http" not in styles and "@import" not in styles


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r'"([\w/]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(file.name for file in (ROOT / "docs").glob("*.md"))


TOO_WIDE = "document.documentElement.scrollWidth > innerWidth"
COLOUR = "getComputedStyle(document.body).backgroundColor"


@pytest.mark.parametrize("page", ["index", "recipes", "config", "performance"])
def test_a_page_in_a_browser(site: Path, page: str) -> None:
    """From disk, on a screen and on a phone, light and dark: nothing is missed or too wide."""
    for width in (1280, 390):
        colours = set()
        for dark in (False, True):
            with Tab((site / f"{page}.html").as_uri(), width, dark) as tab:
                assert tab.console == []
                assert not tab.run(TOO_WIDE)
                missing = "[...document.images].filter(image => !image.naturalWidth).length"
                assert tab.run(missing) == 0
                colours.add(tab.run(COLOUR))
        assert len(colours) == 2


def test_the_search_works_from_disk(site: Path) -> None:
    """Its box and results are in a shadow root."""
    box = "[...document.querySelectorAll('*')].find(part => part.shadowRoot)?.shadowRoot"
    with Tab((site / "index.html").as_uri(), 1280) as tab:
        tab.run("document.querySelector('.md-search__button').click()")
        tab.until(f"{box}?.activeElement?.tagName === 'INPUT'")
        tab.call("Input.insertText", text="gamma_beta_ratio")
        tab.until(f"{box}.querySelector('a[href*=\"losses.html\"]') !== null")
        assert tab.console == []
