"""The documentation site in a real browser: it asks no host for anything, and formulas are there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
OFFLINE = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OFFLINE += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]


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


def test_formulas_are_rendered_while_it_is_built(site):
    page = (site / "theory" / "nearest-etf.html").read_text()
    assert page.count("<math") > 40
    assert "arithmatex" not in page


@pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver on this machine")
def test_pages_ask_no_host_for_anything(site, tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in [*OFFLINE, f"--user-data-dir={tmp_path}"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        for name in ("index", "guides/measure", "theory/nearest-etf", "reference/heads", "figures"):
            browser.get((site / f"{name}.html").as_uri())
            assert "neuralcollapse" in browser.title
        entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
        assert len([url for url in asked if url.startswith("file:")]) > 10
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "chrome"))] == []
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        browser.quit()
