"""The documentation: its code runs, its commands are the command line's, its reference is complete."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from neuralcollapse.cli import _chosen, _parse, _parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RUN = [ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
PACKAGES = ["geometry", "heads", "losses", "metrics", "ufm", "lab"]


def code_of(page: Path) -> tuple[str, dict[str, str]]:
    """All Python of a page as one script, and the files that its titled blocks are."""
    script, files = "", {}
    for title, block in re.findall(r"^```python(?: title=\"(.*?)\")?\n(.*?)^```", page.read_text(), re.M | re.S):
        if title:
            files[title] = block
        else:
            script += block
    return script, files


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    script, files = code_of(page)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def commands_of(page: Path) -> list[str]:
    """The commands in blocks without a language and in running text; not the usage lines, which have brackets."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    lines = [line.split("  #")[0] for line in blocks.splitlines()] + re.findall(r"`(neuralcollapse [^`]+)`", text)
    launcher = r"^.*\b(?:srun|torchrun)\b.*? neuralcollapse(?:\.cli)? "
    lines = [re.sub(launcher, "neuralcollapse ", line).replace(" $resume", "") for line in lines]
    commands = [line.split(" >")[0].strip() for line in lines if re.match(r" *neuralcollapse \w+ \S", line)]
    return [command for command in commands if not re.search(r"\[|\b[A-Z]{3,}\b|…|\.\.\.|  ", command)]


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})


def test_commands_are_found():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_docs_is_one(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)[1:]
    for argument in arguments:
        if argument.endswith(".yaml"):
            Path(argument).write_text("{}\n")
    name, module = _chosen(arguments)
    assert name is not None
    if "--help" not in arguments:
        _parse(_parser(name), module, arguments)


def test_readme_links_to_what_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_stands_in_the_reference(package):
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    named = set(re.findall(r"^::: (\S+)$", pages, re.M))
    names = import_module(f"neuralcollapse.{package}").__all__
    assert [name for name in names if f"neuralcollapse.{package}.{name}" not in named] == []


def public() -> list[tuple[str, object]]:
    found = {}
    for package in PACKAGES:
        module = import_module(f"neuralcollapse.{package}")
        found |= {f"{package}.{name}": getattr(module, name) for name in module.__all__}
    return [(name, thing) for name, thing in found.items() if callable(thing)]


@pytest.mark.parametrize(("name", "thing"), public(), ids=[name for name, _ in public()])
def test_a_public_docstring_is_complete(name, thing):
    """What it takes, what it gives, and an example that runs."""
    text = inspect.getdoc(thing)
    assert text is not None
    if inspect.isfunction(thing):
        takes = [one for one in inspect.signature(thing).parameters if one not in ("self", "cls")]
        assert [one for one in takes if not re.search(rf"^ +.*\b{one}(, .*)?(?: \(.*\))?:", text, re.M)] == []
        assert "Examples:" in text
    elif inspect.isclass(thing) and not issubclass(thing, tuple):
        assert re.search(r"^(Args|Attributes|Examples):", text, re.M) or len(text.splitlines()) < 4
