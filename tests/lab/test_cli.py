from __future__ import annotations

import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from PIL import Image

from helpers import error_of
from neuralcollapse.cli import main


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--methods standard,explicit",
            "methods must be a list, each item one of standard, fixed, implicit, linear, means",
        ),
        ("--methods fixed,fixed", "methods must be distinct, at least one"),
        (
            "--backbone vgg",
            "backbone must be one of convnet, mlp, resnet18, resnet34, resnet50, resnet101, resnet152, resnext50-32x4d",
        ),
        ("--optimizer lion", "optimizer must be one of sgd, adam, adamw, lbfgs, agd, got 'lion'"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--epochs few", "epochs must be an integer, got 'few'"),
        ("--seeds 0", "seeds must be at least 1, got 0"),
        ("--seeds 3,3", "seeds must be distinct, got [3, 3]"),
        ("--recipe markou2024-mnits", "recipe must name a published comparison"),
        ("--recipe markou2024-mnits", "nearest: markou2024-mnist"),
        ("--methods standard,fixed --proximal_weight 1", "proximal_weight belongs to method implicit"),
        ("--lr -0.1", "lr must be above 0, got -0.1"),
        ("--lr .nan", "lr must be finite, got nan"),
        ("--batch_size 1", "batch_size must be at least 2, got 1"),
        ("--feature_norm big", "feature_norm must be one of auto, none or a number, got 'big'"),
        ("--feature_norm 0", "feature_norm must be above 0, got 0"),
        ("--means_momentum 2", "means_momentum must be at most 1, got 2"),
        ("--width 4 --backbone mlp", "must be at least num_classes - 1 = 9, got 4"),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("--method standard", "unrecognized arguments: --method standard"),
        ("--weight_decay .inf", "weight_decay must be finite, got inf"),
        (
            '--schedule step --schedule_options {"step_at":[0,3]}',
            "schedule_options.step_at must be at least 1, got [0, 3]",
        ),
        ("--keep_at [-1]", "keep_at must be at least 1, got [-1]"),
        ("--pixel_mean [.nan]", "pixel_mean must be finite, got [nan]"),
        ("--digits_per_image 5000", "digits_per_image must be at most 20, got 5000"),
        ("--test_samples 1", "data must have test images of at least 2 classes, 'digits' has 1"),
        ("--config missing.yaml", "--config: File does not exist: "),
        (
            "--data ./missing",
            "data must be 'digits', a folder, or a data set's id on the hub; './missing' is not a folder",
        ),
        ("--resume --overwrite", "resume and overwrite must not both be given"),
    ],
)
def test_a_mistake_in_a_flag_is_one_line_and_writes_nothing(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(capsys, "compare", *arguments.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- 1\n", "Unexpected config: a file of settings must consist of lines NAME: VALUE (settings.yaml)"),
        ("lr: [0.1\n", "Problems parsing config: while parsing a flow sequence in line 1, column 5"),
        (None, "--config: File does not exist: "),
    ],
)
def test_messages_of_jsonargparse_on_a_file_of_settings(content, expected, tmp_path, monkeypatch, capsys):
    """The command line rewords messages of the version of jsonargparse that is pinned."""
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert f"jsonargparse=={version('jsonargparse')}" in constraints
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("settings.yaml").write_text(content)
    assert error_of(capsys, "train", "--config", "settings.yaml").startswith(expected)


def test_no_command_and_an_unknown_one(capsys):
    assert "compare" in error_of(capsys)
    assert "'tain'" in error_of(capsys, "tain")


def test_a_folder_without_images(tmp_path, capsys):
    folder, out = tmp_path / "data", str(tmp_path / "out")
    folder.mkdir()
    assert "must have images, but the folder" in error_of(capsys, "compare", "--data", str(folder), "--out", out)
    (folder / "notes.txt").write_text("no image\n")
    assert "data must have images, but" in error_of(capsys, "compare", "--data", str(folder), "--out", out)


def test_a_folder_with_an_unreadable_image(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("L", (4, 4)).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "data" / "b" / "2.png").write_bytes(b"broken")
    message = error_of(capsys, "compare", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    assert "b/2.png" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("answers", ["never", "refused", "offline"])
def test_a_hub_that_cannot_be_reached_is_one_line(answers, tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if answers == "refused":
            silent.close()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", answers == "offline")
        monkeypatch.setattr("neuralcollapse.lab.data.sources._HUB_SECONDS", 0.2)
        assert main(["compare", "--data", "nobody/nothing", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "neuralcollapse: error: data set 'nobody/nothing' could not be fetched from the hub (it does not answer); "
        "without a network, give data a folder that holds it: --data FOLDER\n"
    )


@pytest.mark.parametrize("command", ["compare", "train"])
def test_help_needs_no_lightning(command):
    code = (
        "import sys; from neuralcollapse.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'lightning', 'datasets', 'matplotlib', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = {"compare": ("--methods", "--seeds"), "train": ("--method", "--seed", "--recipe")}[command]
    for flag in (*own, "--data", "--backbone", "--epochs", "--out", "--resume", "--overwrite", "--loggers"):
        assert flag in done.stdout


def test_flags_go_over_the_config_file_and_print_config_shows_it(tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("lr: 0.2\nepochs: 7\n")
    assert main(["compare", "--config", str(file), "--epochs", "9", "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["lr"], shown["epochs"], shown["data"]) == (0.2, 9, "digits")
