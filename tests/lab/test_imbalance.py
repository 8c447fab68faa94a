"""Long tails in the laboratory: the SELI code, and values of the classes with many and few training images."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import yaml

from helpers import error_of
from neuralcollapse import FixedFrameClassifier, NearestFrameClassifier
from neuralcollapse.cli import main
from neuralcollapse.geometry import seli_code
from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.models.build import build_head
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import group_table, read_table
from neuralcollapse.metrics import Measurement, group_metrics

COUNTS = torch.tensor([400, 90, 30, 0])
SMALL = ("--backbone=mlp", "--width=32", "--depth=1", "--train_samples=600", "--test_samples=200", "--epochs=3")
TAIL = ("--imbalance={exponential: 0.02}", "--measure_at=[1, last]")


def seli_gram(counts):
    """Return the Gram matrix V Λ Vᵀ of the encoded labels V Λ Uᵀ, which have one column per sample."""
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    encoded = torch.nn.functional.one_hot(labels, len(counts)).double().T - 1 / len(counts)
    left, singular, _ = torch.linalg.svd(encoded, full_matrices=False)
    gram = left @ singular.diag() @ left.T
    return gram / gram.trace()


@pytest.mark.parametrize(("method", "kind"), [("frame", NearestFrameClassifier), ("fixed-frame", FixedFrameClassifier)])
def test_the_frame_is_that_of_the_encoded_labels(method, kind):
    head = build_head(RunConfig(method=method, code="seli"), 16, 4, class_counts=COUNTS)
    assert isinstance(head, kind)
    gram = (head.weight @ head.weight.T).double()
    expected = seli_gram(COUNTS.clamp_min(1))  # a class without images counts as one image
    assert torch.allclose(gram / gram.trace(), expected, atol=1e-5)


def test_equal_numbers_give_the_simplex_etf():
    head = build_head(RunConfig(method="fixed-frame", code="seli"), 16, 5)
    cosines = torch.nn.functional.normalize(head.weight) @ torch.nn.functional.normalize(head.weight).T
    assert torch.allclose(cosines, torch.full((5, 5), -0.25).fill_diagonal_(1), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=implicit", "--code=seli"], "code belongs to method frame or fixed-frame; here method is implicit"),
        (["--method=frame", "--code=attributes"], "code must be means or seli for method frame, got 'attributes'"),
        (["--method=fixed-frame", "--code=means"], "code must be attributes or seli for method fixed-frame, got"),
        (
            ["--method=fixed-frame", "--code=seli", "--class_attributes=digits"],
            "class_attributes belongs to method attribute-frame, or fixed-frame with code attributes",
        ),
        (["--method=frame", "--code=etf"], "code must be one of means, attributes, seli"),
        (["--method=frame", "--code=seli", "--width=8"], "code must have, after centring, a rank of at most"),
    ],
)
def test_codes_that_do_not_fit_are_refused(arguments, message, tmp_path, capsys):
    given = [argument for argument in SMALL if not argument.startswith(arguments[-1].split("=")[0])]
    assert error_of(capsys, "train", *given, f"--out={tmp_path / 'out'}", *arguments).startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("tail") / "out"
    flags = ["--methods=linear,frame", "--code=seli", "--seeds=1", "--loss_options={prior: 1}"]
    assert main(["compare", *SMALL, *TAIL, *flags, f"--out={out}"]) == 0
    return RunFolder(out)


def test_the_code_of_a_run_is_that_of_its_training_images(compared):
    run = compared.run("frame-seed0")
    record = Measurement.load(run.measurement(3, "train"))
    code = seli_code(record.moments.counts, dtype=torch.float64)
    found, expected = record.weight @ record.weight.T, code @ code.T
    assert torch.allclose(found / found.trace(), expected / expected.trace(), atol=1e-5)
    assert torch.allclose(record.options.code @ record.options.code.T, found, atol=1e-4)
    assert record.metrics["nc2_gram_weights"] < 1e-4


def test_groups_of_both_splits_are_by_the_training_images(compared):
    for run in compared.run_folders():
        table = read_table(run.metrics).set_index(["epoch", "split", "metric"])["value"]
        counts = Measurement.load(run.measurement(3, "train")).moments.counts
        for split in ("train", "test"):
            record = Measurement.load(run.measurement(3, split))
            groups = group_metrics(record, counts)
            assert len(groups) == 6
            for name, value in groups.items():
                assert table[3, split, name] == pytest.approx(value, rel=1e-12)
            assert table[1, split, "accuracy_few"] >= 0


def test_checkpoints_that_are_measured_later_have_the_same_rows(compared, capsys):
    run = compared.run("linear-seed0")
    before = read_table(run.metrics)
    last = before[before["epoch"] == 3]
    run.measurement(3, "test").unlink()
    assert main(["measure", str(run.path), "--split=test"]) == 0
    after = read_table(run.metrics)
    found = after[(after["epoch"] == 3) & (after["split"] == "test")].set_index("metric")["value"]
    expected = last[last["split"] == "test"].set_index("metric")["value"]
    assert found.index.sort_values().equals(expected.index.sort_values())
    assert (found - expected).abs().max() < 1e-5


def test_summary_and_report_have_the_groups(compared):
    for text in (compared.summary.read_text(), compared.report.read_text()):
        assert "test acc, few" in text
        assert "train nc1, many" in text
    linear = read_table(compared.run("linear-seed0").metrics)
    few = linear[(linear["epoch"] == 3) & (linear["split"] == "test") & (linear["metric"] == "accuracy_few")]["value"]
    assert f"{float(few.iloc[0]):.2%}" in compared.summary.read_text()


def test_runs_without_imbalance_have_no_groups(tmp_path):
    assert main(["train", *SMALL, "--measure_at=99", f"--out={tmp_path / 'out'}"]) == 0
    table = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert not table["metric"].str.contains("_many").any()
    assert group_table(table.assign(method="a", seed=0)) is None


STUDY = {
    "title": "a prior",
    "source": "this test",
    "figure": "groups",
    "runs": {"plain": {}, "prior": {"loss_options": {"prior": 1.0}}},
    "claims": [
        {
            "text": "a prior helps classes with few images",
            "of": "prior",
            "value": {"kind": "last", "of": "accuracy_few", "split": "test"},
            "above": ["plain"],
        }
    ],
    "small": {
        "cost": "seconds",
        "seeds": [0, 1],
        "settings": {
            "method": "linear",
            "backbone": "mlp",
            "width": 32,
            "depth": 1,
            "epochs": 3,
            "measure_at": ["last"],
            "train_samples": 600,
            "test_samples": 200,
            "imbalance": {"exponential": 0.02},
        },
    },
}


def test_a_study_judges_and_draws_the_groups(tmp_path):
    path, out = tmp_path / "tail.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(STUDY))
    assert main(["study", str(path), f"--out={out}"]) == 0
    record = yaml.safe_load((out / "verdict.yaml").read_text())
    assert record["claims"][0]["measure"] == "last test accuracy_few"
    by_run = {row["run"]: row for row in record["groups"]}
    for run in ("plain", "prior"):
        few = []
        for seed in (0, 1):
            table = read_table(out / "runs" / f"{run}-seed{seed}" / "metrics.csv").set_index(["split", "metric"])
            few.append(table.loc[("test", "accuracy_few"), "value"])
        assert by_run[run]["accuracy_few"][0] == pytest.approx(sum(few) / 2, rel=1e-3)
    assert (out / "figures" / "groups.png").exists()


def test_the_claim_of_an_unknown_group_is_refused(tmp_path, capsys):
    claim = STUDY["claims"][0] | {"value": {"kind": "last", "of": "accuracy_rare", "split": "test"}}
    path = tmp_path / "tail.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"claims": [claim]}))
    assert "a claim is about 'accuracy_rare', which is not a metric" in error_of(capsys, "study", str(path))


def test_rates_are_chosen_by_the_mean_over_classes(tmp_path):
    """The candidates differ in the order of the two criteria: the frequent classes alone give the better accuracy."""
    out = RunFolder(tmp_path / "out")
    flags = ["--imbalance={exponential: 0.1}", "--methods=linear", "--seeds=1", "--lr=auto", "--lr_candidates=0.35,1"]
    assert main(["compare", *SMALL, "--measure_at=[1, last]", *flags, f"--out={out.path}"]) == 0
    by_class, of_all = {}, {}
    for run in RunFolder(out.tuning).run_folders():
        record = Measurement.load(run.measurement(3, "validation"))
        rate = run.settings()["lr"]
        by_class[rate], of_all[rate] = float(record.class_accuracy.nanmean()), record.metrics["accuracy"]
    assert max(by_class, key=by_class.get) != max(of_all, key=of_all.get)
    assert out.run("linear-seed0").settings()["lr"] == max(by_class, key=by_class.get)
