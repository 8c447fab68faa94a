"""Pipes that close, streams that are closed, packages that are missing: one line or none, and no training ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import slow_except
from neuralcollapse.cli import _LAB

COMMAND = f"{sys.executable} -m neuralcollapse.cli"
TINY = "train --epochs 1 --train_samples 60 --test_samples 40 --backbone mlp --width 12 --depth 1 --out run"


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    "arguments", ["recipes", "--help", "study", "train --print_config", "recipes papyan2020-cifar10"]
)
@pytest.mark.parametrize("reader", slow_except(["head -1 > /dev/null", "true"], ["head -1 > /dev/null"]))
def test_a_reader_that_goes_is_not_mentioned(arguments, reader, tmp_path):
    done = shell(f"{COMMAND} {arguments} | {reader}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "streams", slow_except([">&- 2>&- <&-", "2>/dev/full", "2>&1 | true", "2> >(true)"], [">&- 2>&- <&-"])
)
def test_no_stream_that_is_lost_ends_a_training(streams, tmp_path):
    done = shell(f"{COMMAND} {TINY} {streams}", tmp_path)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "summary.md").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_a_closed_stream_is_not_replaced_by_a_file_of_the_run(tmp_path):
    """A file that took the number of stderr would hold what libraries write there."""
    assert shell(f"{COMMAND} train --epochs few 2>&-", tmp_path).returncode == 2
    code = "import sys, os; from neuralcollapse.lab.process import lasting_streams\n"
    code += "with lasting_streams(alone=True): print(os.open('file', os.O_CREAT | os.O_WRONLY) > 2)"
    done = shell(f'{sys.executable} -c "{code}" 2>&- <&-', tmp_path)
    assert done.stdout == "True\n"


def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    done = shell(f"{COMMAND} recipes > /dev/full", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "neuralcollapse: error: [Errno 28] No space left on device\n"


def test_stdout_into_a_file_is_written_line_by_line(tmp_path):
    code = "import sys; from neuralcollapse.lab.process import lasting_streams\n"
    code += "with lasting_streams(alone=True): print('a line'); print(open('file').read(), file=sys.stderr)"
    assert shell(f'{sys.executable} -c "{code}" > file', tmp_path).stderr == "a line\n\n"


def test_stdout_in_another_encoding_ends_nothing(tmp_path):
    done = shell(f"{COMMAND} recipes papyan2020-cifar10", tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")


NO_HOME = {"HOME": "/nowhere/at/all", "XDG_CACHE_HOME": "/proc/none"}


@pytest.mark.parametrize("environment", slow_except([{"TERM": "dumb"}, {"COLUMNS": "0"}, NO_HOME], [NO_HOME]))
def test_a_poor_environment_ends_nothing(environment, tmp_path):
    done = shell(f"{COMMAND} {TINY}", tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.md").exists()


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {missing!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocker())
from neuralcollapse.cli import main
sys.argv = ['neuralcollapse', *{arguments!r}]
sys.exit(main())
"""


def without(missing: set[str], arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "blocked.py"
    script.write_text(BLOCKER.format(missing=missing, arguments=arguments.split()))
    return shell(f"{sys.executable} {script}", folder)


@pytest.mark.parametrize("arguments", ["recipes", "--version", "train --help", TINY, "no-command"])
def test_a_base_install_names_the_extra(arguments, tmp_path):
    done = without(set(_LAB), arguments, tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"neuralcollapse: error: the package {done.stderr.split()[4]} of the extra lab is not installed: "
        "pip install 'neuralcollapse[lab]'\n"
    )


@pytest.mark.parametrize(
    "missing", slow_except(["lightning", "pandas", "PIL", "sklearn", "yaml", "jsonargparse"], ["lightning", "yaml"])
)
def test_one_package_that_is_missing_is_named(missing, tmp_path):
    done = without({missing}, TINY, tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr.strip().split("\n")[-1].startswith(f"neuralcollapse: error: the package {missing} of the extra lab")
    )
    assert "Traceback" not in done.stderr
