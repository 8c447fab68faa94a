"""A headless Chromium that looks at pages from a folder, without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_OFFLINE = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
_OFFLINE += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]
_OFFLINE += ["--enable-unsafe-swiftshader", "--window-size=1280,1000"]  # WebGL without a GPU

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver on this machine"
)


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """The browser, with a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in [*_OFFLINE, f"--user-data-dir={profile}"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield browser
    finally:
        browser.quit()


def requested(browser: Any) -> list[str]:
    """The addresses it asked for since the last call, those of its own pages and inside pages apart."""
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith(("data:", "blob:", "chrome"))]


def errors(browser: Any) -> list[dict[str, Any]]:
    """What went wrong in the console since the last call."""
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
