"""The wheel, installed where the checkout is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    run(sys.executable, "-m", "venv", tmp_path / "empty")
    binaries = tmp_path / "empty" / "bin"
    run(binaries / "python", "-m", "pip", "install", "-c", ROOT / "constraints.txt", f"{wheel}[lab]")
    assert run(binaries / "neuralcollapse", "--version").strip() == f"neuralcollapse {neuralcollapse.__version__}"
    assert "markou2024-mnist-implicit" in run(binaries / "neuralcollapse", "recipes")
    where = run(binaries / "python", "-c", "import neuralcollapse; print(neuralcollapse.__file__)")
    assert str(tmp_path) in where
    small = ["--backbone", "mlp", "--width", "16", "--epochs", "1", "--seeds", "1", "--out", "out"]
    assert "| implicit" in run(binaries / "neuralcollapse", "compare", *small)
