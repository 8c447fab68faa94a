"""The documentation site in a real browser: it asks no host for anything, and formulas are there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from browser import chromium, errors, needs_browser, requested

ROOT = Path(__file__).parents[1]


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
