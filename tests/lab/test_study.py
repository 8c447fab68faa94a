"""Studies: their files, the verdicts on their claims, and the command."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from scipy import stats

from helpers import slow_except
from neuralcollapse.catalogue import METRICS
from neuralcollapse.cli import main
from neuralcollapse.lab import studies
from neuralcollapse.lab.figures import FIGURES
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.results.verdicts import Finished, against_reference, judge, verdict_record
from neuralcollapse.lab.studies import Claim, Value, load_study, study_names, study_runs

TINY = {
    "title": "two learning rates",
    "source": "this test",
    "figure": "zhu",
    "runs": {"fast": {"lr": 0.1}, "slow": {"lr": 0.01}},
    "claims": [
        {
            "text": "fast learns more",
            "of": "fast",
            "value": {"kind": "last", "of": "accuracy", "split": "test"},
            "above": ["slow"],
        }
    ],
    "small": {
        "cost": "seconds",
        "seeds": [3, 4],
        "settings": {"method": "standard", "backbone": "mlp", "width": 16, "epochs": 2, "train_samples": 200},
        "reduced": "nearly everything",
    },
}


def course(values, metric="nc1_pinv", split="train"):
    return pd.DataFrame({"epoch": range(1, len(values) + 1), "split": split, "metric": metric, "value": values})


def claim(relation, *, than=(), bound=None, **value):
    return Claim(text="", value=Value(**value), of=["a"], relation=relation, than=[*than], bound=bound)


def of_seeds(**runs):
    """Runs whose last test accuracy is given, by seed."""
    return {
        name: {seed: Finished(course([0.0, value], "accuracy", "test"), {}) for seed, value in enumerate(values)}
        for name, values in runs.items()
    }


LAST = {"kind": "last", "of": "accuracy", "split": "test"}


@pytest.mark.parametrize("name", study_names())
def test_a_study_is_of_runs_that_can_be_made_and_of_metrics_that_there_are(name):
    study = load_study(name)
    assert study.title
    assert study.source
    assert study.claims
    assert study.scales
    for scale_name, scale in study.scales.items():
        assert scale.cost
        assert (scale.reduced is None) == (scale_name == "full")
        runs = study_runs(study, scale_name)
        assert len(runs) == len(study.runs) * len(scale.seeds)
        assert len({run.data for run in runs.values()}) <= 1  # --data is of all
        assert set(scale.runs) <= set(study.runs)
    for one in study.claims:
        rates = {f"{score} auroc" for score in study.scores}
        if study.transfer:
            rates |= {"linear_probe", "nearest_class_mean"}
        if study.figure == "groups":
            rates |= {f"{name}_{group}" for name in ("accuracy", "nc1_quotient") for group in ("many", "medium", "few")}
        assert one.value.of in {*METRICS, *rates, "parameters", "peak_memory_mib", "excess_loss"}
        assert one.than_value is None or one.than_value.of in {*METRICS, *rates}
        assert one.of
        assert one.than or one.bound is not None
        if not study.is_ufm:
            assert {*one.of, *one.than} <= set(study.runs)
            assert study.figure in FIGURES


def test_the_full_scale_is_what_is_published():
    for name in study_names():
        study = load_study(name)
        of_a_paper = not study.source.startswith("this project")
        if "full" in study.scales and of_a_paper and not study.is_ufm:
            assert not study.scales["full"].settings
            assert not study.scales["full"].runs


@pytest.mark.parametrize("seeds", slow_except([2, 3, 10], [3]))
def test_a_difference_is_decided_as_a_paired_t_test_decides_it(seeds):
    draw = np.random.default_rng(seeds)
    verdicts = []
    for _ in range(60):
        a, b = draw.normal(0.8, 0.1, seeds), draw.normal(0.7, 0.1, seeds)
        found = judge(claim("above", than=["b"], **LAST), of_seeds(a=a, b=b)).verdict
        test = stats.ttest_rel(a, b)
        expected = "undecided" if test.pvalue > 0.05 else "holds" if test.statistic > 0 else "does not hold"
        assert found == expected
        opposite = {"holds": "does not hold", "does not hold": "holds"}.get(found, found)
        assert judge(claim("below", than=["b"], **LAST), of_seeds(a=a, b=b)).verdict == opposite
        verdicts.append(found)
    assert len(set(verdicts)) > 1


def test_a_bound_is_decided_as_a_t_test_of_one_sample_decides_it():
    draw = np.random.default_rng(0)
    for _ in range(60):
        a = draw.normal(0.8, 0.05, 5)
        test = stats.ttest_1samp(a, 0.78)
        expected = "undecided" if test.pvalue > 0.05 else "holds" if test.statistic > 0 else "does not hold"
        assert judge(claim("at least", bound=0.78, **LAST), of_seeds(a=a)).verdict == expected


def test_like_is_two_one_sided_intervals():
    near = of_seeds(a=[0.900, 0.902, 0.901], b=[0.901, 0.902, 0.900])
    far = of_seeds(a=[0.90, 0.902, 0.901], b=[0.80, 0.802, 0.801])
    wide = of_seeds(a=[0.90, 0.95, 0.85], b=[0.90, 0.85, 0.95])
    found = [judge(claim("like", than=["b"], bound=0.01, **LAST), runs).verdict for runs in (near, far, wide)]
    assert found == ["holds", "does not hold", "undecided"]


def test_a_claim_of_several_holds_only_if_each_comparison_does():
    runs = of_seeds(a=[0.9, 0.901, 0.9], b=[0.8, 0.801, 0.8], c=[0.95, 0.951, 0.95])
    both = claim("above", than=["b", "c"], **LAST)
    judgement = judge(both, runs)
    assert judgement.verdict == "does not hold"
    assert [line.rpartition(": ")[2] for line in judgement.numbers] == ["holds", "does not hold"]


def test_metrics_on_a_logarithmic_scale_are_compared_as_ratios():
    runs = {
        name: {seed: Finished(course([1.0, last * 10.0**seed]), {}) for seed in range(3)}
        for name, last in (("a", 0.5), ("b", 1.0))
    }
    # In every seed half of it, though seeds differ by a hundred.
    judgement = judge(claim("below", than=["b"], kind="last", of="nc1_pinv"), runs)
    assert judgement.verdict == "holds"
    assert "ratio 0.5 [0.5, 0.5]" in judgement.numbers[0]


def test_a_fall_is_from_the_first_epoch_at_the_level():
    def run(values, accuracies):
        return Finished(pd.concat([course(values), course(accuracies, "accuracy")]), {})

    fits = {seed: run([8, 4, 2, 0.1 * (1 + seed / 50)], [0.5, 0.99, 0.98, 1]) for seed in range(3)}
    tenfold = claim("at least", bound=10, kind="fall", of="nc1_pinv", level=0.99)
    judgement = judge(tenfold, {"a": fits})
    assert judgement.verdict == "holds"
    expected = 10 ** np.mean([math.log10(4 / (0.1 * (1 + seed / 50))) for seed in range(3)])
    assert f"a {expected:.3g} [" in judgement.numbers[0]
    never = fits | {3: run([8, 4, 2, 1], [0.5, 0.6, 0.7, 0.8])}
    assert (
        judge(claim("at least", bound=10, kind="fall", of="nc1_pinv", level=0.99), {"a": never}).verdict == "undecided"
    )


def test_runs_are_compared_with_the_reference_seed_by_seed():
    def runs(*courses):
        return {seed: Finished(course(values, "accuracy", "test"), {}) for seed, values in enumerate(courses)}

    groups = {"a": runs([0.5, 0.8, 0.9], [0.3, 0.4, 0.5]), "reference": runs([0.2, 0.4, 0.8], [0.2, 0.5, 0.7])}
    row = against_reference("a", "reference", {"accuracy": "test"}, groups)
    differences = np.array([0.9 - 0.8, 0.5 - 0.7])
    half = stats.t.ppf(0.975, 1) * differences.std(ddof=1) / math.sqrt(2)
    assert row["difference"] == pytest.approx([differences.mean(), half], abs=1e-3)
    assert row["share_accuracy"] == pytest.approx([2 / 3, 1], abs=1e-3)  # seed 0 after 2 of 3 epochs, seed 1 never
    assert against_reference("reference", "reference", {"accuracy": "test"}, groups)["difference"] == [0, 0]


def test_epochs_that_are_not_reached_count_as_more_than_all():
    def runs(*courses):
        return {seed: Finished(course(values, "accuracy"), {}) for seed, values in enumerate(courses)}

    soon, never = runs([0.5, 0.995, 1], [0.5, 0.996, 1]), runs([0.1, 0.2, 0.3], [0.1, 0.2, 0.4])
    asked = claim("below", than=["b"], kind="epochs", of="accuracy", level=0.99)
    judgement = judge(asked, {"a": soon, "b": never})
    assert judgement.verdict == "holds"
    assert "b at least 3" in judgement.numbers[0]
    assert judge(asked, {"a": never, "b": soon}).verdict == "does not hold"
    assert judge(asked, {"a": never, "b": never}).verdict == "undecided"


def test_share_of_the_epochs_until_the_last_value_of_another_run_with_the_same_seed():
    def runs(*courses):
        return {seed: Finished(course(values, "accuracy"), {}) for seed, values in enumerate(courses)}

    reference = runs([0.1, 0.2, 0.3, 0.8], [0.1, 0.2, 0.3, 0.9], [0.1, 0.2, 0.3, 0.7])
    soon = runs([0.1, 0.8, 0.9, 0.9], [0.1, 0.9, 0.9, 0.95])  # reached at the second of four epochs, with both seeds
    asked = claim("at most", bound=0.6, kind="share", of="accuracy", level_of="b")
    judgement = judge(asked, {"a": soon, "b": reference})
    assert judgement.verdict == "holds"
    assert "a 0.5 [0.5, 0.5] over 2 seeds" in judgement.numbers[0]
    later = runs([0.1, 0.2, 0.8, 0.9], [0.1, 0.2, 0.9, 0.9])
    assert judge(asked, {"a": later, "b": reference}).verdict == "does not hold"
    never = runs([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.5])
    assert "a 1 [1, 1]" in judge(asked, {"a": never, "b": reference}).numbers[0]
    assert verdict_record(asked, judgement)["measure"] == "share of the epochs until train accuracy is the last of b"


def test_deviations_are_from_the_mean_over_seeds_of_the_same_epoch():
    calm = {seed: Finished(course([0.5, 0.9 + seed / 1000], "accuracy", "test"), {}) for seed in range(3)}
    wild = {seed: Finished(course([0.1 + seed / 5, 0.5 + seed / 5], "accuracy", "test"), {}) for seed in range(3)}
    judgement = judge(claim("below", than=["b"], kind="deviation", of="accuracy", split="test"), {"a": calm, "b": wild})
    # Of b 0.2, 0, 0.2 in both epochs; of a half of 0.001, 0, 0.001.
    assert "a 0.000333 against b 0.133" in judgement.numbers[0]


def test_a_correlation_with_nc1_is_that_of_scipy_over_the_epochs_that_have_both():
    draw = np.random.default_rng(1)
    runs, expected = {}, []
    for seed in range(4):
        rate, nc1 = draw.random(6), draw.random(6)
        rate[2] = math.nan
        finite = np.isfinite(rate)
        expected.append(stats.spearmanr(rate[finite], nc1[finite]).statistic)
        runs[seed] = Finished(pd.concat([course(rate, "neco auroc", "held-out"), course(nc1, "nc1_quotient")]), {})
    found = judge(claim("at most", bound=0.0, kind="correlation", of="neco auroc", split="held-out"), {"a": runs})
    test = stats.ttest_1samp(expected, 0)
    assert test.pvalue > 0.05
    assert found.verdict == "undecided"
    assert found.numbers[0].startswith(f"a {np.mean(expected):.3g} [")
    falling = {
        seed: Finished(
            pd.concat([course([0.5, 0.6, 0.8], "neco auroc", "held-out"), course([3, 2, last], "nc1_quotient")]), {}
        )
        for seed, last in enumerate([0.1, 0.2])
    }
    assert (
        judge(
            claim("at most", bound=0.0, kind="correlation", of="neco auroc", split="held-out"), {"a": falling}
        ).verdict
        == "holds"
    )


def test_the_other_runs_may_be_compared_by_another_number():
    def of(neco, energy):
        return pd.concat([course([neco], "neco auroc", "held-out"), course([energy], "energy auroc", "held-out")])

    draw = np.random.default_rng(2)
    neco, energy = draw.normal(0.9, 0.01, 5), draw.normal(0.85, 0.01, 5)
    groups = {
        "a": {seed: Finished(of(value, 0.0), {}) for seed, value in enumerate(neco)},
        "b": {seed: Finished(of(1.0, value), {}) for seed, value in enumerate(energy)},
    }
    value = {"kind": "last", "of": "neco auroc", "split": "held-out"}
    one = replace(
        claim("above", than=["b"], **value), than_value=Value(kind="last", of="energy auroc", split="held-out")
    )
    assert stats.ttest_rel(neco, energy).pvalue < 0.05
    assert judge(one, groups).verdict == "holds"
    assert judge(replace(one, than_value=None), groups).verdict == "does not hold"
    assert verdict_record(one, judge(one, groups))["measure"].endswith("against last held-out energy auroc")


def test_one_seed_and_runs_that_are_not_there_are_undecided():
    one = claim("above", than=["b"], **LAST)
    assert "one seed" in judge(one, of_seeds(a=[0.9], b=[0.8])).numbers[0]
    assert "no run" in judge(one, {**of_seeds(a=[0.9, 0.8]), "b": {}}).numbers[0]
    with pytest.raises(ValueError, match="nc1_vci of the train split must be measured"):
        judge(claim("at most", bound=1, kind="last", of="nc1_vci"), of_seeds(a=[0.9, 0.8]))


def test_as_many_seeds_as_are_said_would_decide():
    judgement = judge(claim("above", than=["b"], **LAST), of_seeds(a=[0.9, 0.7, 0.85], b=[0.7, 0.75, 0.8]))
    assert judgement.verdict == "undecided"
    seeds = int(judgement.numbers[0].partition("about ")[2].split()[0])
    differences = np.array([0.2, -0.05, 0.05])
    half = [stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n) for n in (seeds - 1, seeds)]
    assert half[1] < differences.mean() <= half[0]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    folder = tmp_path / "studies"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    monkeypatch.setattr(studies, "_FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    return folder / "tiny.yaml"


def test_a_study_runs_once_and_then_answers_without_its_data(tiny, capsys, monkeypatch):
    assert main(["study", "tiny"]) == 0
    told = capsys.readouterr().out
    folder = RunFolder("runs/studies/tiny-small")
    assert [run.path.name for run in folder.run_folders()] == ["fast-seed3", "slow-seed3", "fast-seed4", "slow-seed4"]
    record = yaml.safe_load(folder.verdict.read_text())
    assert record["claims"][0]["verdict"] in told.lower()
    accuracies = {
        run.path.name: run_table[(run_table["metric"] == "accuracy") & (run_table["split"] == "test")]["value"].iloc[-1]
        for run in folder.run_folders()
        for run_table in [pd.read_csv(run.metrics)]
    }
    mean = np.mean([accuracies[f"fast-seed{seed}"] - accuracies[f"slow-seed{seed}"] for seed in (3, 4)])
    assert f"difference {mean:.3g}" in record["claims"][0]["numbers"][0]
    assert (folder.figures / "zhu.png").exists()

    monkeypatch.setattr("neuralcollapse.lab.training.runs.train_each", None)
    assert main(["study", "tiny"]) == 0
    assert capsys.readouterr().out == told
    assert main(["study"]) == 0
    assert f"small: seconds; {record['claims'][0]['verdict']}" in capsys.readouterr().out


def test_a_study_that_was_stopped_goes_on_with_more_seeds_too(tiny, capsys, monkeypatch):
    from neuralcollapse.lab.training.run import Run

    train, done = Run.train, []

    def stop_in_the_second(*arguments, **options):
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(Run, "train", stop_in_the_second)
    assert main(["study", "tiny"]) == 130
    first = RunFolder("runs/studies/tiny-small").run("fast-seed3").metrics.stat().st_mtime_ns
    assert main(["study", "tiny", "--seeds", "3"]) == 0
    assert len(done) == 2 + 5
    assert RunFolder("runs/studies/tiny-small").run("fast-seed3").metrics.stat().st_mtime_ns == first
    assert yaml.safe_load(RunFolder("runs/studies/tiny-small").verdict.read_text())["seeds"] == [3, 4, 5]
    assert len(RunFolder("runs/studies/tiny-small").run_folders()) == 6
    capsys.readouterr()


def test_a_study_chooses_the_rate_of_each_run_on_validation_images(tiny, capsys, monkeypatch):
    runs = {"plain": {"method": "linear"}, "sphere": {"method": "standard"}}
    small = TINY["small"] | {"lr_candidates": [0.001, 0.1]}
    small["settings"] = {name: value for name, value in small["settings"].items() if name != "method"}
    value = {"kind": "share", "of": "accuracy", "split": "test", "level_of": "sphere"}
    claim = TINY["claims"][0] | {"of": "plain", "above": ["sphere"], "value": value}
    tiny.write_text(yaml.safe_dump(TINY | {"figure": "trade-off", "runs": runs, "claims": [claim], "small": small}))
    assert main(["study", "tiny"]) == 0
    folder = RunFolder("runs/studies/tiny-small")
    accuracies: dict = {}
    for run in RunFolder(folder.tuning).run_folders():
        assert run.settings()["seed"] == 0  # the first seed that is not compared
        table = pd.read_csv(run.metrics)
        chosen = table[(table["split"] == "validation") & (table["metric"] == "accuracy")]
        accuracies[run.path.name.partition("-")[0], run.settings()["lr"]] = chosen["value"].iloc[-1]
    assert len(accuracies) == 4
    record = yaml.safe_load(folder.verdict.read_text())
    rates, rows = record["rates"], {row["run"]: row for row in record["trade_off"]}
    assert rows["sphere"]["difference"] == [0, 0]
    difference = rows["plain"]["accuracy"][0] - rows["sphere"]["accuracy"][0]
    assert rows["plain"]["difference"][0] == pytest.approx(difference, abs=1e-3)
    assert rows["sphere"]["share_accuracy"][1] == 2  # each seed reaches its own last value
    tables = [
        pd.read_csv(run.metrics).query("split == 'train' and metric == 'accuracy'") for run in folder.run_folders()
    ]
    last = [table["value"].iloc[-1] for table in tables]
    assert record["reached"]["accuracy"] == pytest.approx([min(last), max(last)], rel=1e-3)
    assert "At the end, train accuracies are between" in folder.summary.read_text()
    for label, method in (("plain", "linear"), ("sphere", "standard")):
        assert accuracies[label, rates[label]] == max(accuracies[label, rate] for rate in small["lr_candidates"])
        for seed in (3, 4):
            settings = folder.run(f"{label}-seed{seed}").settings()
            assert (settings["method"], settings["lr"]) == (method, rates[label])
            assert settings.get("validation_share") is None
    assert (folder.figures / "trade-off.png").exists()

    with monkeypatch.context() as patch:
        patch.setattr("neuralcollapse.lab.training.runs.Preparation.check", None)
        assert main(["study", "tiny"]) == 0  # from the finished runs alone

    runs |= {"added": {"method": "linear", "loss": "mse"}}
    tiny.write_text(yaml.safe_dump(TINY | {"figure": "trade-off", "runs": runs, "claims": [claim], "small": small}))
    capsys.readouterr()
    assert main(["study", "tiny"]) == 0
    assert {*yaml.safe_load(folder.verdict.read_text())["rates"]} == {"plain", "sphere", "added"}


def test_a_study_may_take_runs_and_claims_of_another(tiny):
    (tiny.parent / "other.yaml").write_text(yaml.safe_dump({"like": "tiny", "title": "other", "full": TINY["small"]}))
    mine, other = load_study("tiny"), load_study("other")
    assert (other.runs, other.claims, other.source) == (mine.runs, mine.claims, mine.source)
    assert (other.title, list(other.scales)) == ("other", ["full"])


DETECTION = TINY | {
    "figure": "detection-scores",
    "ood": ["held-out", "others"],
    "scores": ["energy", "ncm"],
    "claims": [
        {
            "text": "class means detect better with the greater rate",
            "of": "fast",
            "value": {"kind": "last", "of": "ncm auroc", "split": "others"},
            "above": ["slow"],
            "than_value": {"kind": "last", "of": "energy auroc", "split": "others"},
        }
    ],
    "small": TINY["small"]
    | {"settings": {**TINY["small"]["settings"], "hold_out_classes": [8, 9], "image_size": 8, "keep_at": [1, 2]}},
}


def test_a_study_of_detection_evaluates_each_kept_checkpoint_once(tiny, tmp_path, capsys, monkeypatch):
    tiny.write_text(yaml.safe_dump(DETECTION))
    assert main(["study", "tiny"]) == 2
    assert "needs the folder of the unknown inputs others: --ood others=FOLDER" in capsys.readouterr().err
    for name, size in (("images", 8), ("small", 6)):
        (tmp_path / name).mkdir()
        for index in range(20):
            pixels = np.random.default_rng(index).integers(0, 256, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    settings = {name: value for name, value in DETECTION["small"]["settings"].items() if name != "image_size"}
    tiny.write_text(yaml.safe_dump(DETECTION | {"small": DETECTION["small"] | {"settings": settings}}))
    assert main(["study", "tiny", "--ood", f"others={tmp_path / 'small'}"]) == 2
    assert "ood must have images of the run's size, 8x8, and those of" in capsys.readouterr().err
    folder = RunFolder("runs/studies/tiny-small")
    assert not folder.path.exists()  # both are refused before training
    tiny.write_text(yaml.safe_dump(DETECTION))
    assert main(["study", "tiny", "--ood", f"others={tmp_path / 'images'}"]) == 0
    told = capsys.readouterr().out
    record = yaml.safe_load(folder.verdict.read_text())
    assert record["command"].endswith("--ood others=FOLDER")
    auroc = {}
    for run in ("fast", "slow"):
        tables = [read_table(folder.run(f"{run}-seed{seed}").detection) for seed in (3, 4)]
        assert all(set(zip(table["epoch"], table["set"], table["score"], strict=True)) == {
            (epoch, name, score) for epoch in (1, 2) for name in DETECTION["ood"] for score in DETECTION["scores"]
        } for table in tables)  # fmt: skip
        auroc[run] = [
            {
                (row.set, row.score): row.value
                for row in table[table["metric"] == "auroc"].itertuples()
                if row.epoch == 2
            }
            for table in tables
        ]
    (row,) = [row for row in record["detection"] if row["run"] == "slow"]
    values = [of_seed["others", "energy"] for of_seed in auroc["slow"]]
    half = stats.t.ppf(0.975, 1) * np.std(values, ddof=1) / math.sqrt(2)
    assert row["others energy"] == pytest.approx([np.mean(values), half], rel=1e-3)
    ncm = np.mean([of_seed["others", "ncm"] for of_seed in auroc["fast"]])
    assert f"fast {ncm:.3g} against slow {np.mean(values):.3g}" in record["claims"][0]["numbers"][0]
    assert (folder.figures / "detection-scores.png").exists()

    monkeypatch.setattr("neuralcollapse.lab.evaluate.detection.detect_run", None)  # it is not called again
    assert main(["study", "tiny"]) == 0
    assert capsys.readouterr().out == told
    assert main(["study", "tiny", "--ood", f"photographs={tmp_path / 'images'}"]) == 2
    assert "among the sets of the study tiny, held-out, others, got 'photographs'" in capsys.readouterr().err


TRANSFER = DETECTION | {
    "figure": "control",
    "ood": ["held-out"],
    "transfer": True,
    "profile": True,
    "claims": [
        {
            "text": "features of the greater rate transfer better",
            "of": "fast",
            "value": {"kind": "last", "of": "linear_probe", "split": "held-out"},
            "above": ["slow"],
        }
    ],
}


def test_a_study_of_transfer_evaluates_each_kept_checkpoint_once(tiny, capsys, monkeypatch):
    tiny.write_text(yaml.safe_dump(TRANSFER))
    assert main(["study", "tiny"]) == 0
    told = capsys.readouterr().out
    folder = RunFolder("runs/studies/tiny-small")
    record = yaml.safe_load(folder.verdict.read_text())
    last = {}
    for run in ("fast", "slow"):
        tables = [read_table(folder.run(f"{run}-seed{seed}").transfer) for seed in (3, 4)]
        assert all(set(table["epoch"]) == {1, 2} and set(table["layer"]) == {"features"} for table in tables)
        last[run] = [table.query("epoch == 2 and metric == 'linear_probe'")["value"].item() for table in tables]
        (row,) = [row for row in record["detection"] if row["run"] == run]
        assert row["linear_probe"][0] == pytest.approx(np.mean(last[run]), rel=1e-3)
        assert set(row) == {"run", "accuracy", "nc1_quotient", "held-out energy", "held-out ncm", "linear_probe"}
    assert (
        f"fast {np.mean(last['fast']):.3g} against slow {np.mean(last['slow']):.3g}"
        in record["claims"][0]["numbers"][0]
    )
    assert {path.name for path in folder.figures.iterdir()} == {
        "control.png",
        *(f"control-{panel}.png" for panel in ("nc1", "transfer", "held-out-energy", "held-out-ncm")),
    }

    monkeypatch.setattr("neuralcollapse.lab.evaluate.transfer.transfer_run", None)  # it is not called again
    assert main(["study", "tiny"]) == 0
    assert capsys.readouterr().out == told


def test_a_study_of_transfer_needs_held_out_classes(tiny, capsys):
    settings = {name: value for name, value in TRANSFER["small"]["settings"].items() if name != "hold_out_classes"}
    tiny.write_text(yaml.safe_dump(TRANSFER | {"small": TRANSFER["small"] | {"settings": settings}}))
    assert main(["study", "tiny"]) == 2
    assert "hold_out_classes must be given in the runs of tiny.yaml" in capsys.readouterr().err
    assert not RunFolder("runs/studies/tiny-small").runs.exists()


def test_a_study_changed_after_its_runs_says_which(tiny, capsys):
    assert main(["study", "tiny", "--seeds", "3,,"]) == 2
    assert main(["study", "tiny", "--seeds", "1"]) == 0
    tiny.write_text(yaml.safe_dump({**TINY, "runs": {"fast": {"lr": 0.2}, "slow": {"lr": 0.01}}}))
    capsys.readouterr()
    assert main(["study", "tiny", "--seeds", "1"]) == 2
    told = capsys.readouterr().err
    assert "1 of the runs" in told
    assert "fast-seed3: lr must stay 0.1 to resume" in told
    assert main(["study", "tiny", "--seeds", "1", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"claims": [TINY["claims"][0] | {"of": "faster"}]}, "'faster', which is not one of its runs fast, slow"),
        (
            {"claims": [TINY["claims"][0] | {"value": {"kind": "last", "of": "acuracy"}}]},
            "not a metric; nearest: accuracy",
        ),
        ({"claims": [TINY["claims"][0] | {"value": {"kind": "epochs", "of": "accuracy"}}]}, "no level"),
        (
            {"claims": [TINY["claims"][0] | {"value": {"kind": "share", "of": "accuracy"}}]},
            "level_of belongs to claims of kind share, which need it; the kind is share",
        ),
        (
            {"claims": [TINY["claims"][0] | {"value": {"kind": "share", "of": "accuracy", "level_of": "other"}}]},
            "a claim is about 'other', which is not one of its runs",
        ),
        ({"claims": [TINY["claims"][0] | {"below": ["slow"]}]}, "a claim needs one of below, above"),
        ({"claims": [TINY["claims"][0] | {"publshed": "2"}]}, "publshed"),
        ({"small": {"seeds": [1]}}, "cost"),
        ({"like": "papian2020-cifar10"}, "like must be the name of a study, got 'papian2020-cifar10'; nearest: papyan"),
        ({"small": TINY["small"] | {"lr_candidates": [0.1, 0.2]}}, "lr_candidates of scale small must be at least two"),
        ({"ood": ["held-out"]}, "ood and scores must be given together"),
        ({"ood": ["held-out"], "scores": ["nco"]}, "scores must be among msp"),
        (
            {
                "ood": ["held-out"],
                "scores": ["neco"],
                "claims": [TINY["claims"][0] | {"value": {"kind": "last", "of": "neco auroc", "split": "test"}}],
            },
            "must have the split held-out, got 'test'",
        ),
        (
            {"transfer": True, "claims": [TINY["claims"][0] | {"value": {"kind": "last", "of": "linear_probe"}}]},
            "linear_probe must have the split held-out, got 'train'",
        ),
        ({"runs": {"fast": {"rate": 0.1}, "slow": {}}}, "rate"),
    ],
)
def test_a_file_that_is_no_study_is_one_line(change, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TINY | change))
    assert main(["study", "mine.yaml"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["markou2024-mnst"], "nearest: markou2024-mnist"),
        (["markou2024-imagenet", "--scale", "small"], "scale must be full for the study markou2024-imagenet"),
        (["zhu2021-decay", "--seeds", "many"], "seeds must be an integer or a list, each item an integer"),
        (["zhu2021-decay", "--seeds", "0"], "seeds must be at least one"),
        (["markou2024-ufm", "--data", "somewhere"], "data must not be given"),
        (
            ["zhu2021-decay", "--data", "nowhere/at/all"],
            "data must be 'digits', a folder, or a data set's id on the hub",
        ),
    ],
)
def test_what_is_wrong_is_one_line(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
