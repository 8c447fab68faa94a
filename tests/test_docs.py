"""The documentation: its code runs, its commands are valid, and the reference is complete."""

from __future__ import annotations

import ast
import base64
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from neuralcollapse._checks import check_at_least
from neuralcollapse.cli import _name, _parse

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RUN = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
RUN += [ROOT / "docs" / "layers.md"]
COMING_FROM = sorted((ROOT / "docs" / "coming-from").glob("*.md"))
LONGEST = ("language-model", "reproduce", "trainer")
DISTRIBUTIONS = packages_distributions()
PACKAGES = ["geometry", "heads", "losses", "metrics", "ood", "ufm", "lightning", "lab"]


def code_of(page: Path) -> tuple[str, dict[str, str]]:
    """Return the Python code of a page as one script, and its titled blocks as files by name."""
    script, files = "", {}
    for title, block in re.findall(r"^```python(?: title=\"(.*?)\")?\n(.*?)^```", page.read_text(), re.M | re.S):
        if title:
            files[title] = block
        else:
            script += block
    return script, files


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.stem in LONGEST else (), id=page.stem)
        for page in [*RUN, *COMING_FROM]
    ],
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    script, files = code_of(page)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def imported(script: str) -> set[str]:
    """Return the imported packages outside the standard library; for the laboratory, a package of its extra."""
    nodes = list(ast.walk(ast.parse(script)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    needing_lab = [name for name in names if re.match(r"neuralcollapse\.(lab|lightning)\b", name)]
    laboratory = {"lightning"} if needing_lab else set()
    tops = {name.split(".")[0] for name in names}
    return tops - sys.stdlib_module_names - {"neuralcollapse"} | laboratory


def extras_of(page: Path) -> set[str]:
    """Return the extras that the code of a page needs beyond the library's dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = [re.match(r"[\w-]+", one)[0] for one in project["dependencies"]]
    extras = {
        re.match(r"[\w-]+", one)[0]: extra
        for extra in ("lab", "huggingface")
        for one in project["optional-dependencies"][extra]
    }
    script, files = code_of(page)
    packages = set.union(*map(imported, [script, *files.values()]))
    distributions = {DISTRIBUTIONS[package][0].lower() for package in packages}
    return {extras[name] for name in distributions.difference(own)}


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_guide_says_first_which_extra_it_needs(page):
    needed = extras_of(page)
    start = page.read_text().split("```")[0]
    named = re.search(r"pip install 'neuralcollapse\[([\w,]+)\]'", start)
    assert set(named[1].split(",") if named else []) == needed


def test_some_guides_need_more_than_the_library():
    assert set.union(*map(extras_of, RUN)) == {"lab", "huggingface"}


def commands_of(page: Path) -> list[str]:
    """Return the commands in blocks without a language and in running text, without usage lines (with brackets)."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.M | re.S))
    blocks = re.sub(r" *\\\n *", " ", blocks)
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
    assert _name(arguments) is not None
    if "--help" not in arguments:
        _parse(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_table_has_its_head(page):
    """A blank line ends a table, so that the rows after it are not rendered as one."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.M)
    assert [table for table in tables if not re.match(r".*\n\|[ :-]+\|", table)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_has_at_most_88_columns(page):
    blocks = re.findall(r"^```.*?\n(.*?)^```", page.read_text(), re.M | re.S)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 88] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_table_of_more_than_five_columns_is_folded(page):
    text = re.sub(r"^```.*?^```|^<details class=\"table\".*?^</details>", "", page.read_text(), flags=re.M | re.S)
    heads = re.findall(r"^(\|.*)\n\|[ :|-]+\|$", text, re.M)
    assert [head for head in heads if len(re.findall(r"(?<!\\)\|", head)) > 6] == []


def test_readme_links_to_what_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package):
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").rglob("*.md"))
    named = set(re.findall(r"^::: (\S+)$", pages, re.M))
    names = import_module(f"neuralcollapse.{package}").__all__
    paths = {name: f"neuralcollapse.{package}.{name}" for name in names}
    # In a lazy package, a function with the name of its module is documented under its full path.
    assert [name for name, path in paths.items() if not {path, f"{path}.{name}"} & named] == []


def public() -> list[tuple[str, object]]:
    found = {}
    for package in PACKAGES:
        module = import_module(f"neuralcollapse.{package}")
        found |= {f"{package}.{name}": getattr(module, name) for name in module.__all__}
    return [(name, thing) for name, thing in found.items() if callable(thing)]


def shared_docstring(thing: object) -> str:
    """Docstring of the module that documents the arguments and errors of its functions once, if the thing says so."""
    module = re.search(r"^Arguments, result and errors: see `(.*?)`\.$", inspect.getdoc(thing), re.M)
    return import_module(module[1]).__doc__ if module else ""


def documented_parameters(thing: object) -> set[str]:
    """Names of the parameters that a function describes, or its module for it."""
    text, shared = inspect.getdoc(thing), shared_docstring(thing)
    names = inspect.signature(thing).parameters
    described = {name for name in names if re.search(rf"^ +.*\b{name}(, .*)?(?: \(.*\))?:", text, re.M)}
    if shared:
        described |= set(re.findall(r"^- ``(\w+)``: ", shared, re.M)) | set(re.findall(r"^With ``(\w+)``", text, re.M))
    return described


REFUSAL = re.compile(r"\braise (Value|Type)Error\(|\b_?check_\w+\(")


def undocumented_errors(thing: object) -> list[str]:
    """Return the public functions that reject arguments, also by a check of the package, without documenting it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    functions = [node for node in [tree, *tree.body] if isinstance(node, ast.FunctionDef)]
    public = [node for node in functions if not node.name.startswith("_") or node.name in ("__init__", "__post_init__")]
    rejecting = [node for node in public if REFUSAL.search(ast.unparse(node))]
    documented = "Raises:" in inspect.getdoc(thing) or "raises ``ValueError`` if" in shared_docstring(thing)
    return [node.name for node in rejecting if not documented and "Raises:" not in (ast.get_docstring(node) or "")]


def test_an_undocumented_error_is_found():
    class Silent:
        """Nothing said."""

        def __init__(self, size):
            check_at_least("size", size, 1)

        def put(self, size):
            """Raises:
            ValueError: Said.
            """
            raise ValueError(size)

        def take(self, size):
            """Nothing said."""
            raise TypeError(size)

    assert undocumented_errors(Silent) == ["__init__", "take"]


@pytest.mark.parametrize(("name", "thing"), public(), ids=[name for name, _ in public()])
def test_a_public_docstring_is_complete(name, thing):
    """Every parameter, the errors, and an example that runs."""
    text = inspect.getdoc(thing)
    assert text is not None
    assert undocumented_errors(thing) == []
    if inspect.isfunction(thing):
        assert inspect.signature(thing).parameters.keys() - documented_parameters(thing) == set()
        assert "Examples:" in text
    elif inspect.isclass(thing) and not issubclass(thing, tuple):
        assert re.search(r"^(Args|Attributes|Examples):", text, re.M) or len(text.splitlines()) < 5


def test_the_table_of_detection_marks_the_best_head_of_each_row(tmp_path, monkeypatch):
    table = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["detection_table"]
    rows = [
        {"run": "linear", "accuracy": [0.9, 0.1], "nc1_quotient": [0.25, 0.1], "held-out ncm": [0.7, 0.02]},
        {"run": "nearest", "accuracy": [0.8, 0.1], "nc1_quotient": [0.05, 0.1], "held-out ncm": [0.75, 0.01]},
    ]
    (tmp_path / "ood-x.yaml").write_text(yaml.safe_dump({"detection": rows}))
    monkeypatch.setitem(table.__globals__, "CLAIMS", tmp_path)
    assert [line for line in table("ood-x").splitlines() if line.startswith("|")] == [
        "| AUROC | linear | nearest |",
        "|---|---|---|",
        "| held-out: ncm | 0.700 ± 0.020 | **0.750 ± 0.010** |",
        "| train NC1 (`nc1_quotient`) | 0.25 | 0.05 |",
        "| test accuracy | 0.900 | 0.800 |",
    ]


def test_differences_of_several_studies_have_a_figure_and_a_table(tmp_path, monkeypatch):
    made = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["differences"]
    for study, runs in (("a", {"linear": 0.012, "standard": 0.0}), ("b", {"standard-average": 0.0, "nearest": -0.03})):
        rows = [{"run": run, "difference": [mean, 0.004], "nc1_quotient": [0.25, 0.1]} for run, mean in runs.items()]
        (tmp_path / f"{study}.yaml").write_text(yaml.safe_dump({"trade_off": rows}))
    monkeypatch.setitem(made.__globals__, "CLAIMS", tmp_path)
    picture, *lines = made(["a", "b"]).splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        "| run | a | b |",
        "|---|---|---|",
        "| linear | +1.2 ± 0.4; 0.25 | – |",
        "| standard | +0.0 ± 0.4; 0.25 | +0.0 ± 0.4; 0.25 |",
        "| nearest | – | −3.0 ± 0.4; 0.25 |",
    ]
    svg = base64.b64decode(picture.split("base64,")[1].rstrip('">')).decode()
    assert svg.count('id="axes_') == 2
    assert all(f"<!-- {run} -->" in svg for run in ("linear", "standard", "nearest"))
