"""Bad command lines: one line on stderr with the words that matter, exit code 2, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import error_of
from neuralcollapse.cli import main

FILES = {
    "flow.yaml": "epochs: 3\nlr: [0.1\n",
    "indent.yaml": "epochs: 3\n  lr: 0.1\n",
    "type.yaml": "epochs: 3\nlr: fast\n",
    "bound.yaml": "lr: 0.1\nepochs: 0\n",
    "unknown.yaml": "epochs: 3\nwidht: 3\n",
    "effect.yaml": "optimizer: agd\nlr: 0.1\n",
    "list.yaml": "- 1\n- 2\n",
    "notes.txt": "notes\n",
    "weights.pt": "no weights\n",
}
BAD = [
    ("", 'expected "subcommand" to be one of'),
    ("tain", "tain"),
    ("train --out=", "out must name a folder, got ''"),
    ("compare --out=", "out must name a folder, got ''"),
    ("train --resume", "resume needs the folder of a run, but 'runs/train' has none"),
    ("train --resume --out nothing", "resume needs the folder of a run, but 'nothing' has none"),
    ("compare --resume --out .", "resume needs the folder of a run, but '.' has none"),
    ("train --out notes.txt", "out must be a new or empty folder or that of a run"),
    ("train --out .", "'.' has other files"),
    ("train --config flow.yaml", "(flow.yaml)"),
    ("train --config flow.yaml", "line 2, column 5"),
    ("train --config indent.yaml", "(indent.yaml)"),
    ("train --config type.yaml", "lr must be a number, got 'fast' (type.yaml, line 2)"),
    ("train --config bound.yaml", "epochs must be at least 1, got 0 (bound.yaml, line 2)"),
    ("train --config unknown.yaml", "'widht' (unknown.yaml, line 2)"),
    ("train --config effect.yaml", "lr belongs to optimizer sgd, adam, adamw or lbfgs"),
    ("train --config effect.yaml", "(effect.yaml, line 2)"),
    ("train --config list.yaml", "list.yaml"),
    ("train --config missing.yaml", "File does not exist"),
    ("train --keep_at [30]", "keep_at must be at most epochs, which is 20, got 30"),
    ("compare --keep_at 1,30", "keep_at must be at most epochs, which is 20, got 30"),
    ("train --measure_at 1,6,..,31", "measure_at must be at most epochs, which is 20, got 31"),
    ("train --measure_at 1,..,9", "measure_at must have two increasing epochs before .., got [1, '..', 9]"),
    ("train --measure_at 1,6,..,15", "measure_at must continue 1, 6 after .., got [1, 6, '..', 15]"),
    (
        'train --schedule step --schedule_options {"step_at":[30]}',
        "schedule_options.step_at must be at most epochs, which is 20, got 30",
    ),
    ("train --checkpoint_minutes 0", "checkpoint_minutes must be above 0, got 0"),
    ("train --checkpoint_minutes .nan", "checkpoint_minutes must be finite, got nan"),
    ("train --image_size 100000", "take 4768 GiB, but only"),
    ("train --image_size 0", "image_size must be at least 1, got 0"),
    ("train --crop_size 100", "crop_size must be at most 8"),
    ("train --train_samples 5", "must have training images of each of its 10 classes, but has none of"),
    ("train --batch_size 1", "batch_size must be at least 2, got 1"),
    ("train --seed -1", "seed must be at least 0, got -1"),
    ("train --data=", "data must name a data set or a folder, got ''"),
    ("train --data notes.txt", "'notes.txt' is not a folder"),
    ("train --data ./nowhere", "'./nowhere' is not a folder"),
    ("train --recipe papyan", "nearest: papyan2020"),
    ("train --backbone package.Missing", "cannot be imported"),
    (
        'train --backbone_options {"patch_size":4}',
        "backbone_options.patch_size belongs to backbone vit-tiny or vit-small; here backbone is convnet",
    ),
    ("train --device tpu", "device must be one of auto, cpu, cuda, mps, got 'tpu'"),
    ("train --optimizer lbfgs", "optimizer lbfgs cannot train method implicit"),
    ("train --lr 1 --lr fast", "lr must be a number, got 'fast'"),
    ("train --epochs 2.5", "epochs must be an integer, got '2.5'"),
    ("train --no-such", "unrecognized arguments: --no-such"),
    ("train --step_at 30", "unrecognized arguments: --step_at 30; step_at is an option of --schedule_options"),
    ("train --resume --overwrite", "resume and overwrite must not both be given"),
    ("measure", "RUN must be the folder of a run or of several; or give --checkpoint"),
    ("measure nothing", "'nothing' must be the folder of a run, but has no config.yaml"),
    ("measure --every 0 nothing", "every must be at least 1, got 0"),
    ("measure --checkpoint weights.pt", "model must be given with checkpoint"),
    ("measure --checkpoint weights.pt --model resnet18 --out new", "'weights.pt' cannot be read"),
    ("measure --checkpoint gone.pt --model resnet18 --out new", "checkpoint must be a file, but 'gone.pt' is not"),
    ("distance nothing", "must be the folder of a run"),
    ("aggregate nothing --out all.csv", "must be the folder of a run"),
    ("plot nothing", "figure must be one of papyan, zhu, markou"),
    ("plot nothing --figure margins", "must be the folder of a run"),
    ("ufm --classes 1", "classes must be at least 2, got [1]"),
    ("ufm --out=", "out must name a folder, got ''"),
    ("ufm --resume --out nothing", "resume needs the folder of a run, but 'nothing' has none"),
    ("landscape --out=", "out must name a folder, got ''"),
    ("landscape --resume", "resume must not be given"),
]


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize(("arguments", "expected"), BAD)
def test_a_bad_command_line_is_one_line(arguments, expected, somewhere, capsys):
    assert expected in error_of(capsys, *arguments.split())
    assert {path.name for path in somewhere.iterdir()} <= {*FILES}


def test_there_is_nothing_before_the_line(somewhere, capsys):
    assert main(["train", "--data", "notes.txt"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
