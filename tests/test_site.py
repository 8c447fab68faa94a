"""The documentation site in a real browser: it asks no host for anything, and formulas are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from browser import chromium, errors, needs_browser, requested

ROOT = Path(__file__).parents[1]
MOVED = {"sooner": "convergence-speed", "choosing": "head-and-loss"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a link or a name that leads nowhere is an error."""
    pytest.importorskip("mkdocs", reason="the site needs the extra docs: pip install 'neuralcollapse[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_build_without_the_extra_says_which(tmp_path):
    script = "import sys, runpy; sys.modules['latex2mathml'] = None; runpy.run_path('docs/hooks.py')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("the site needs the extra docs: pip install 'neuralcollapse[docs]'")
    assert len(done.stderr.splitlines()) == 1


def test_formulas_are_rendered_while_it_is_built(site):
    page = (site / "theory" / "nearest-etf.html").read_text()
    assert page.count("<math") > 40
    assert "arithmatex" not in page


@needs_browser
def test_pages_ask_no_host_for_anything(site, tmp_path):
    with chromium(tmp_path) as browser:
        for name in ("index", "guides/measure", "theory/nearest-etf", "reference/heads", "figures"):
            browser.get((site / f"{name}.html").as_uri())
            assert "neuralcollapse" in browser.title
        asked = requested(browser)
        assert len([url for url in asked if url.startswith("file:")]) > 10
        assert [url for url in asked if not url.startswith("file:")] == []
        assert errors(browser) == []


# Elements that scroll sideways or reach beyond the right edge, outside folded tables, with all folded text open.
_OVERFLOWING = """
document.querySelectorAll("details").forEach(folded => { folded.open = true; });
const found = [], root = document.documentElement;
if (root.scrollWidth > root.clientWidth) found.push(`page: ${root.scrollWidth} > ${root.clientWidth}`);
for (const element of document.querySelectorAll(".md-content *")) {
  if (element.closest("details.table, .md-source-file, .md-clipboard, mjx-assistive-mml")) continue;
  const style = getComputedStyle(element), box = element.getBoundingClientRect();
  if (box.width < 2 || box.height < 2) continue;
  const scrolls = ["auto", "scroll"].includes(style.overflowX) && element.scrollWidth > element.clientWidth + 1;
  if (scrolls || box.right > root.clientWidth + 1)
    found.push(`${element.tagName}.${element.className}: ${element.textContent.trim().slice(0, 60)}`);
}
return found;
"""


def shown(browser, path, width):
    """Open a page in a window of a width in pixels."""
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(path.as_uri())


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1400, 400])
def test_no_page_overflows_and_none_has_an_error(site, tmp_path, width):
    pages = [page for page in sorted(site.rglob("*.html")) if page.stem not in ("404", *MOVED)]
    assert len(pages) > 40
    overflowing = {}
    with chromium(tmp_path) as browser:
        for page in pages:
            shown(browser, page, width)
            if found := browser.execute_script(_OVERFLOWING):
                overflowing[str(page.relative_to(site))] = found
        assert errors(browser) == []
    assert overflowing == {}


@needs_browser
def test_an_overflow_is_found(tmp_path):
    page = tmp_path / "wide.html"
    wide = '<div style="width: 900px">wide</div>'
    page.write_text(f'<div class="md-content">{wide}<details class="table">{wide}</details></div>')
    with chromium(tmp_path / "profile") as browser:
        shown(browser, page, 400)
        assert [text.split(":")[0] for text in browser.execute_script(_OVERFLOWING)] == ["page", "DIV."]


@pytest.mark.parametrize("word", ["npy", "notebook", "latex", "install", "incremental"])
def test_search_finds_what_users_look_for(site, word):
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert [one["location"] for one in index["docs"] if word in f"{one['title']} {one['text']}".lower()]


def test_former_addresses_lead_to_the_pages(site):
    for former, name in MOVED.items():
        assert f"url={name}.html" in (site / f"{former}.html").read_text()
        assert (site / f"{name}.html").exists()
