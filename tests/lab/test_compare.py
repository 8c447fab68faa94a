from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from helpers import error_of
from neuralcollapse.cli import main
from neuralcollapse.lab.results.folder import RunFolder

COMMAND = [sys.executable, "-c", "import sys; from neuralcollapse.cli import main; sys.exit(main())", "compare"]
SMALL = ["--backbone=mlp", "--width=24", "--depth=1", "--train_samples=200", "--test_samples=60", "--batch_size=50"]


def compare(out: Path, *arguments: str) -> int:
    return main(["compare", *SMALL, "--out", str(out), *arguments])


def read(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "metrics.csv", converters={"value": float})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert compare(out, "--seeds", "2", "--epochs", "3") == 0
    return out


def test_metrics_are_tidy_and_complete(finished):
    metrics = read(finished)
    assert list(metrics.columns) == ["method", "seed", "epoch", "split", "metric", "value"]
    assert not metrics.duplicated(["method", "seed", "epoch", "split", "metric"]).any()
    runs = metrics.groupby(["method", "seed", "epoch", "split"])["metric"].agg(set)
    assert len(runs) == 3 * 2 * 3 * 2
    assert all({"accuracy", "nc1_quotient", "nc3_duality", "nc4_ncc_mismatch"} <= names for names in runs)
    assert not metrics["metric"].str.startswith("batch").any()


@pytest.mark.usefixtures("with_figures")
def test_the_table_is_printed_and_in_the_summary(tmp_path, capsys):
    assert compare(tmp_path / "out", "--seeds", "2", "--epochs", "2", "--methods", "fixed,implicit") == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.split("\n") if line.startswith("|")]
    headings = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert headings[0] == "method"
    assert {"epochs to 99% train acc", "train acc", "test acc", "s/epoch", "nc1_quotient", "nc3_duality"} < set(
        headings
    )
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["fixed", "implicit"]
    assert len({len(row) for row in rows}) == 1
    assert "\n".join(rows) in (tmp_path / "out" / "summary.md").read_text()
    figures = ("figures/accuracy.png", *(f"figures/nc{n}.png" for n in (1, 2, 3, 4)))
    for name in ("summary.md", "report.html", *figures, "metrics.csv"):
        assert str(tmp_path / "out" / name) in printed


def test_the_table_says_mean_and_deviation_of_the_last_epoch(finished):
    last = read(finished).query("method == 'fixed' and epoch == 3 and split == 'test' and metric == 'accuracy'")[
        "value"
    ]
    row = next(line for line in (finished / "summary.md").read_text().split("\n") if line.startswith("| fixed"))
    assert f"| {last.mean():.2%} ± {last.std():.2%} " in row


def test_figures_are_pictures(finished):
    for name in ("accuracy", "nc1", "nc2", "nc3", "nc4", "all_metrics"):
        with Image.open(finished / "figures" / f"{name}.png") as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(10**6)) > 10


def test_the_config_says_enough_to_run_it_again(finished, tmp_path):
    stored = yaml.safe_load((finished / "config.yaml").read_text())
    assert (stored["format"], stored["seeds"]) == (4, 2)
    environment = yaml.safe_load((finished / "environment.yaml").read_text())
    assert {"torch", "lightning"} <= set(environment["packages"])
    run = yaml.safe_load((finished / "runs" / "implicit-seed1" / "config.yaml").read_text())
    assert (run["method"], run["seed"]) == ("implicit", 1)
    assert main(["compare", "--config", str(finished / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()


def test_a_seeds_methods_differ_in_nothing_but_the_head(finished):
    logs = {
        method: pd.read_csv(finished / "runs" / f"{method}-seed0" / "training.csv") for method in ("standard", "fixed")
    }
    settings = [yaml.safe_load((finished / "runs" / f"{m}-seed0" / "config.yaml").read_text()) for m in logs]
    different = {name for name in settings[0].keys() | settings[1] if settings[0].get(name) != settings[1].get(name)}
    assert different == {"method", "classifier_bias", "orientation", "unit_weight", "means_momentum"}


def test_a_run_is_never_overwritten_unasked(finished, tmp_path, capsys):
    before = (finished / "metrics.csv").read_bytes()
    assert compare(finished, "--seeds", "1", "--epochs", "1") == 2
    assert "--resume resumes it, --overwrite deletes it" in capsys.readouterr().err
    assert (finished / "metrics.csv").read_bytes() == before


def test_overwrite_starts_again_and_deletes_nothing_else(tmp_path):
    out = tmp_path / "out"
    assert compare(out, "--seeds", "2", "--epochs", "1", "--methods", "fixed") == 0
    (out / "notes.txt").write_text("mine")
    assert compare(out, "--seeds", "1", "--epochs", "2", "--methods", "standard", "--overwrite") == 0
    assert set(read(out)["method"]) == {"standard"}
    assert [path.name for path in (out / "runs").iterdir()] == ["standard-seed0"]
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    for flags, expected in (([], "other files"), (["--overwrite"], "other files"), (["--resume"], "has none")):
        assert compare(tmp_path, *flags) == 2
        assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resuming_with_other_settings_is_refused(finished, capsys):
    assert main(["compare", "--resume", "--out", str(finished), "--lr", "0.2"]) == 2
    assert "lr must stay 0.05 to resume the run in" in capsys.readouterr().err


def test_resuming_a_finished_comparison_is_refused_and_changes_nothing(finished, capsys):
    before = (finished / "metrics.csv").read_bytes()
    assert "is finished: larger --epochs extend" in error_of(capsys, "compare", "--resume", "--out", str(finished))
    assert (finished / "metrics.csv").read_bytes() == before


def test_a_truncated_checkpoint_says_what_to_do(tmp_path, capsys):
    out = tmp_path / "out"
    assert compare(out, "--seeds", "1", "--epochs", "1", "--methods", "fixed", "--schedule", "constant") == 0
    checkpoint = RunFolder(out).run("fixed-seed0").last_checkpoint
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    further = ["compare", "--resume", "--epochs", "2", "--out", str(out)]
    line = error_of(capsys, *further)
    assert "last.ckpt' cannot be read" in line
    assert "delete it to start that run again" in line
    checkpoint.unlink()
    assert main(further) == 0


def test_training_that_diverges_is_one_line_that_names_the_run(tmp_path, capsys):
    flags = ["--feature_norm=none", "--lr=1e30", "--seeds=1", "--epochs=2", "--methods=standard"]
    assert compare(tmp_path / "out", *flags) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith(
        "neuralcollapse: error: standard-seed0: lr must be smaller: training diverged in epoch 1, step "
    )


@pytest.mark.slow  # test_killed.py has more of it; of one stop, test_stopping.py
def test_killed_and_resumed_it_ends_with_the_same_metrics(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ["--seeds=2", "--epochs=12", "--methods=standard,implicit", "--flip", "--schedule=cosine"]
    assert compare(whole, *flags) == 0

    def stop(run: str, epoch: int, with_signal: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Start the command, and send the signal when that run has measured that epoch."""
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            env=one_thread,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Where the tests run as a shell's background job, SIGINT is ignored and would be in the command, too.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        metrics = broken / "runs" / run / "metrics.csv"
        while process.poll() is None and not (metrics.exists() and f"\n{epoch}," in metrics.read_text()):
            time.sleep(0.005)
        process.send_signal(with_signal)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess([], process.returncode, output, errors)

    done = stop("implicit-seed0", 4, signal.SIGKILL, *SMALL, *flags, "--out", str(broken))
    assert done.returncode == -signal.SIGKILL
    assert not (broken / "metrics.csv").exists()
    done = stop("standard-seed1", 5, signal.SIGINT, "--resume", "--out", str(broken))
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().split("\n")[-1] == ("neuralcollapse: interrupted; resume it with --resume")
    assert main(["compare", "--resume", "--out", str(broken)]) == 0
    assert (broken / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    log = pd.read_csv(broken / "training.csv")
    assert log.groupby(["method", "seed"])["epoch"].agg(list).map(lambda epochs: epochs == [*range(1, 13)]).all()
    assert (log["seconds"] < 60).all()


def test_on_labels_that_are_noise_every_method_is_at_chance(noise_folder, tmp_path):
    """At α = 1 the implicit head's training logits give every label away; what is reported must not show it."""
    out = tmp_path / "out"
    model = ["--backbone=mlp", "--width=16", "--depth=1", "--means_momentum=1.0"]
    training = ["--epochs=1", "--seeds=1", "--lr=0.002", "--batch_size=64"]
    assert main(["compare", f"--data={noise_folder}", *model, *training, "--out", str(out)]) == 0
    accuracy = read(out).query("metric == 'accuracy'")
    assert len(accuracy) == 6
    deviation = math.sqrt(0.1 * 0.9 / 3000)
    assert (accuracy["value"] - 0.1).abs().max() < 4.5 * deviation
    log = pd.read_csv(out / "training.csv").set_index("method")["batch_accuracy"]
    assert log["implicit"] > 0.3
    assert log["fixed"] < 0.15


@pytest.mark.slow
def test_resnet18_on_mnist(real_data, tmp_path):
    out = tmp_path / "out"
    flags = f"--data {real_data / 'mnist'} --backbone resnet18 --width 16 --train_samples 300 --test_samples 100"
    assert main(["compare", *flags.split(), "--seeds", "1", "--epochs", "1", "--out", str(out)]) == 0
    assert set(read(out)["method"]) == {"standard", "fixed", "implicit"}


def test_a_published_comparison_goes_on_with_what_its_folder_keeps(real_data, tmp_path):
    out = tmp_path / "out"
    short = ["--train_samples=60", "--test_samples=40", "--epochs=1", "--width=4", "--batch_size=20", "--seeds=1"]
    data = ["--data", str(real_data / "mnist"), "--methods=standard,implicit"]
    assert main(["compare", "--recipe", "markou2024-mnist", *data, *short, "--out", str(out)]) == 0
    before = (out / "metrics.csv").read_bytes()
    (out / "summary.md").unlink()  # as if it had been stopped before
    assert main(["compare", "--resume", "--out", str(out)]) == 0
    assert (out / "metrics.csv").read_bytes() == before
