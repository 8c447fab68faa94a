"""The arrows between the folders point one way, and importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import neuralcollapse

ROOT = Path(neuralcollapse.__file__).parent
ALLOWED = {  # folder or module -> what it may import of the package
    "_checks": set(),
    "_distributed": set(),
    "_running": set(),
    "_version": set(),
    "catalogue": set(),
    "geometry": {"_checks"},
    "classifier": {"_checks", "_running"},
    "heads": {"_checks", "_distributed", "_running", "geometry", "classifier"},
    "losses": {"_checks", "_distributed"},
    "metrics": {"_checks", "_running", "_version", "catalogue", "geometry", "classifier"},
    "ufm": {"_checks", "catalogue", "geometry", "classifier", "heads", "metrics"},
    "lab": {"_checks", "_distributed", "geometry", "classifier", "heads", "losses", "metrics", "ufm", "catalogue"},
    "cli": {"lab", "_version"},
    "__init__": {"_version", "geometry", "classifier", "heads", "metrics"},
}
GROUND = {
    "config",
    "conditions",
    "settings",
    "parsing",
    "seeds",
    "recipes",
    "studies",
    "experiments",
    "stopping",
    "ranks",
    "running",
    "untrusted",
    "memory",
}
LAB = {  # room or module of lab -> what it may import of the others
    "config": {"settings", "conditions", "running"},
    "conditions": {"settings"},
    "running": {"settings", "conditions"},
    "settings": set(),
    "parsing": {"settings", "untrusted"},
    "streams": set(),
    "seeds": set(),
    "stopping": set(),
    "ranks": set(),
    "untrusted": set(),
    "memory": set(),
    "recipes": {"settings"},
    "experiments": {"config", "running", "settings", "recipes", "untrusted"},
    "studies": {"config", "experiments", "parsing", "recipes", "settings"},
    "data": GROUND,
    "models": GROUND,
    "results": GROUND,
    "training": GROUND | {"data", "models", "results"},
    "figures": GROUND | {"results"},
    "commands": GROUND | {"data", "models", "results", "training", "figures"},
    "__init__": GROUND | {"data", "models", "results", "training"},
}
LAB_ONLY = {"lightning", "datasets", "matplotlib", "pandas", "kornia", "plotly", "sklearn", "jsonargparse", "yaml"}
HEAVY = (LAB_ONLY | {"torchmetrics", "scipy"}) - {"yaml"}  # torch itself may import yaml


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path):
        package, *inner = name.split(".")
        if package == "neuralcollapse" and room != "cli":
            other = inner[0]
            assert other == room or other in ALLOWED[room], f"{path} imports {name}"
        if room not in ("lab", "cli"):
            assert package not in LAB_ONLY, f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "lab").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_between_the_rooms_of_the_laboratory_point_one_way(path):
    room = path.relative_to(ROOT / "lab").parts[0].removesuffix(".py")
    for name in imports(path):
        if name.startswith("neuralcollapse.lab."):
            other = name.split(".")[2]
            assert other == room or other in LAB[room], f"{path} imports {name}"


def loaded_by(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_the_package_waits_for_nothing():
    assert not (HEAVY | {"torch"}) & loaded_by("import neuralcollapse")


def test_using_a_name_pulls_in_torch_and_no_more():
    loaded = loaded_by("import neuralcollapse; neuralcollapse.nearest_simplex_etf")
    assert "torch" in loaded
    assert not HEAVY & loaded


def test_opening_a_run_folder_imports_neither_lightning_nor_datasets():
    assert not {"torch", "lightning", "datasets"} & loaded_by(
        "from neuralcollapse.lab import RunFolder; RunFolder('nowhere')"
    )


def test_public_names_exist_and_say_what_they_are():
    for name in neuralcollapse.__all__:
        assert getattr(neuralcollapse, name).__doc__, name
