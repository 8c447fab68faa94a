"""The wheel in an empty environment, and the pinned versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import neuralcollapse

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_its_command_runs(tmp_path):
    def run(*command: object) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    for stub in (ROOT / "src").rglob("*.pyi"):
        assert str(stub.relative_to(ROOT / "src")) in shipped
    run(sys.executable, "-m", "venv", tmp_path / "empty")
    binaries = tmp_path / "empty" / "bin"
    run(binaries / "python", "-m", "pip", "install", "-c", ROOT / "constraints.txt", f"{wheel}[lab]")
    assert run(binaries / "neuralcollapse", "--version").strip() == f"neuralcollapse {neuralcollapse.__version__}"
    assert "markou2024-mnist-implicit" in run(binaries / "neuralcollapse", "recipes")
    where = run(binaries / "python", "-c", "import neuralcollapse; print(neuralcollapse.__file__)")
    assert str(tmp_path) in where
    small = ["--backbone", "mlp", "--width", "16", "--epochs", "1", "--seeds", "1", "--out", "out"]
    assert "| implicit" in run(binaries / "neuralcollapse", "compare", *small)


def name_of(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned_versions() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {name_of(name): version for name, version in (line.split("==") for line in lines)}


def test_every_requirement_is_pinned_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = pinned_versions()
    for line in [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]:
        requirement = Requirement(line)
        if name_of(requirement.name) != "neuralcollapse":
            assert Version(pins[name_of(requirement.name)]) in requirement.specifier, line


def test_all_that_the_extras_pull_in_is_pinned():
    pins, seen = pinned_versions(), set()
    waiting = [("neuralcollapse", frozenset(["dev"]))]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        assert name == "neuralcollapse" or name in pins, name
        for requirement in map(Requirement, metadata.requires(name) or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                waiting.append((name_of(requirement.name), frozenset(requirement.extras)))
    assert len(seen) > 50
