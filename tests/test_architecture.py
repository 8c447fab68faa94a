"""Allowed imports between the folders, and what importing the package loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

import neuralcollapse

ROOT = Path(neuralcollapse.__file__).parent
ALLOWED = {  # folder or module -> what it may import of the package
    "_checks": set(),
    "_distributed": set(),
    "_files": set(),
    "_html": set(),
    "_running": set(),
    "_version": set(),
    "catalogue": set(),
    "geometry": {"_checks"},
    "classifier": {"_checks", "_running"},
    "heads": {"_checks", "_distributed", "_running", "geometry", "classifier"},
    "losses": {"_checks", "_distributed"},
    "metrics": {"_checks", "_files", "_html", "_running", "_version", "catalogue", "geometry", "classifier"},
    "ood": {"_checks", "_running", "classifier", "heads", "metrics"},
    "ufm": {"_checks", "catalogue", "geometry", "classifier", "heads", "metrics"},
    "lightning": {"_checks", "classifier", "metrics", "lab"},  # of lab, `results` only
    "lab": {
        "_checks",
        "_distributed",
        "_files",
        "_html",
        "catalogue",
        "classifier",
        "geometry",
        "heads",
        "lightning",
        "losses",
        "metrics",
        "ood",
        "ufm",
    },
    "cli": {"lab", "_version"},
    "__init__": {"_version", "geometry", "classifier", "heads", "losses", "metrics", "ood", "ufm", "lightning", "lab"},
}
GROUND = {
    "config",
    "settings",
    "recipes",
    "experiments",
    "process",
    "untrusted",
}
LAB = {  # room or module of lab -> what it may import of the others
    "config": {"settings"},
    "settings": {"untrusted"},
    "process": set(),
    "untrusted": set(),
    "recipes": {"config", "settings"},
    "experiments": {"config", "settings", "recipes"},
    "data": GROUND,
    "models": GROUND,
    "results": GROUND,
    "huggingface": {"results"},
    "training": GROUND | {"data", "models", "results"},
    "evaluate": GROUND | {"data", "models", "results", "training"},
    "figures": GROUND | {"results"},
    "ufm": GROUND | {"results", "figures", "training"},  # of training the optimiser AGD
    "studies": GROUND | {"data", "results", "training", "evaluate", "figures", "ufm"},
    "commands": GROUND | {"data", "models", "results", "training", "evaluate", "figures", "ufm", "studies"},
    "__init__": GROUND | {"data", "models", "results", "training"},
}
# Packages of the extra `lab`. Some rooms import some of these: `metrics` and `ood` for figures and data frames.
LAB_ONLY = {"lightning", "datasets", "matplotlib", "pandas", "kornia", "plotly", "sklearn", "jsonargparse", "yaml"}
OPTIONAL = {
    "lightning": {"lightning", "pandas"},
    "metrics": {"matplotlib", "pandas"},
    "ood": {"matplotlib", "pandas"},
}
HEAVY = (LAB_ONLY | {"torchmetrics", "scipy"}) - {"yaml"}  # torch itself may import yaml


# Modules and the stubs that list the public names of a lazy package.
FILES = sorted(path for path in ROOT.rglob("*.py*") if path.suffix in (".py", ".pyi"))


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports, also inside its functions and for type checkers only."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module
            if path.suffix == ".pyi":  # lazy_loader reads relative imports only
                assert node.level == 1, f"{path}: absolute import"
                package = ".".join(["neuralcollapse", *path.parent.relative_to(ROOT).parts])
                module = f"{package}.{module}" if module else package
            else:
                assert node.level == 0, f"{path}: relative import"
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    room = path.relative_to(ROOT).parts[0].split(".")[0]
    for name in imports(path):
        package, *inner = name.split(".")
        if package == "neuralcollapse":
            assert inner, f"{path} imports the root package"
            other = inner[0]
            assert other == room or other in ALLOWED[room], f"{path} imports {name}"
        if room not in ("lab", "cli"):
            assert package not in LAB_ONLY - OPTIONAL.get(room, set()), f"{path} imports {name}"


def test_the_callback_uses_run_folders_and_nothing_else_of_the_laboratory():
    for name in imports(ROOT / "lightning.py"):
        assert not name.startswith("neuralcollapse.lab.") or name.startswith("neuralcollapse.lab.results."), name


def test_only_the_callback_and_the_laboratory_import_the_trainer():
    using = {
        path.relative_to(ROOT).parts[0] for path in FILES for name in imports(path) if name.startswith("lightning.")
    }
    assert using <= {"lab", "lightning.py"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.is_relative_to(ROOT / "lab")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_arrows_between_the_rooms_of_the_laboratory_point_one_way(path):
    room = path.relative_to(ROOT / "lab").parts[0].split(".")[0]
    for name in imports(path):
        if name.startswith("neuralcollapse.lab."):
            other = name.split(".")[2]
            assert other == room or other in LAB[room], f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "lab" / "commands").glob("*.py")), ids=lambda path: path.stem)
def test_no_command_imports_another(path):
    package = "neuralcollapse.lab.commands."
    others = {name.removeprefix(package).split(".")[0] for name in imports(path) if name.startswith(package)}
    assert others <= {"arguments", "common", "Command"}


def loaded_by(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


LAZY = ["neuralcollapse", "neuralcollapse.metrics", "neuralcollapse.lab"]


@pytest.mark.parametrize("package", LAZY)
def test_importing_a_lazy_package_imports_neither_torch_nor_anything_heavy(package):
    assert not (HEAVY | {"torch"}) & loaded_by(f"import {package}")


def test_using_a_name_imports_torch_and_nothing_else_that_is_heavy():
    loaded = loaded_by("import neuralcollapse; neuralcollapse.nearest_simplex_etf")
    assert "torch" in loaded
    assert not HEAVY & loaded


def test_out_of_distribution_scores_import_torch_and_nothing_else_that_is_heavy():
    assert not HEAVY & loaded_by("import neuralcollapse; neuralcollapse.ood.evaluate")


def test_opening_a_run_folder_imports_neither_lightning_nor_datasets():
    assert not {"torch", "lightning", "datasets"} & loaded_by(
        "from neuralcollapse.lab import RunFolder; RunFolder('nowhere')"
    )


@pytest.mark.parametrize("package", LAZY)
def test_public_names_of_a_lazy_package_exist_and_have_docstrings(package):
    module = import_module(package)
    assert module.__all__ == dir(module)
    for name in module.__all__:
        assert getattr(module, name).__doc__, name


@pytest.mark.parametrize("package", LAZY)
def test_a_name_that_does_not_exist_is_an_attribute_error(package):
    assert not hasattr(import_module(package), "simplex_etff")


def test_files_named_in_the_guide_for_contributors_exist():
    guide = (ROOT.parents[1] / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:lab|metrics|heads|geometry|ood|ufm)/[\w/]+\.py)`", guide))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_package_that_is_imported_is_a_dependency():
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][name] for name in ("theory", "lab", "huggingface"))
    declared = {_normalised(re.match(r"[\w-]+", text)[0]) for text in chain(project["dependencies"], *extras)}
    imported = {name.partition(".")[0] for path in ROOT.rglob("*.py") for name in _imported_names(path)}
    others = {"tensorboard", "wandb", "huggingface_hub", "pydantic_core"}  # optional; of datasets; of pydantic
    distributions = packages_distributions()
    for name in sorted(imported - set(sys.stdlib_module_names) - others - {"neuralcollapse"}):
        assert declared & set(map(_normalised, distributions[name])), name


def _normalised(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def _imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            yield node.module
