"""What the site needs beyond the theme: formulas as MathML while it is built, and no request to any host."""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

from neuralcollapse.cli import COMMANDS, main

# Material asks this host for a script when pages are opened as files; without it, there is no search there.
_ELSEWHERE = re.compile(r"https://unpkg\.com/[\w./@-]+")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What every command says of itself, in its place."""
    return (
        markdown.replace("<!-- commands -->", "\n".join(map(_help, COMMANDS)))
        if "<!-- commands" in markdown
        else markdown
    )


def _help(command: str) -> str:
    os.environ["COLUMNS"] = "100"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return f"## {command}\n\n```text\n{text.getvalue()}```\n"


def on_page_content(content: str, **_: Any) -> str:
    """Replace each formula that the Markdown extension marked."""
    return _FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    return convert(html.unescape(match[3]), display="block" if match[2] == "[" else "inline")


def on_post_build(config: Any, **_: Any) -> None:
    """Leave no address of another host in the scripts."""
    for script in Path(config.site_dir).glob("assets/javascripts/bundle.*.js"):
        script.write_text(_ELSEWHERE.sub("data:text/javascript,", script.read_text()))
