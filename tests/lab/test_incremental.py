"""Class-incremental training: numbers against plain recomputations, resumption to the bit, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from helpers import error_of
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, load_data, single_run
from neuralcollapse.lab.experiments import Incremental
from neuralcollapse.lab.models.build import build_model
from neuralcollapse.lab.results.sessions import session_metrics
from neuralcollapse.lab.results.tables import SESSION_COLUMNS, read_table
from neuralcollapse.lab.training.incremental import Course, SessionData
from neuralcollapse.lab.training.run import Run

SESSIONS = [5, 2, 1]
ENDS = [5, 7, 8]
METHODS = {
    "class-means": "standard",
    "class-means-etf": "implicit",
    "preassigned-etf": "fixed",
    "grown-etf": "implicit",
    "learned": "standard",
}
TRAINED = ["preassigned-etf", "grown-etf", "learned"]
SMALL = ["--backbone=mlp", "--width=24", "--depth=2", "--epochs=2", "--measure_at=2", "--batch_size=64"]
PROTOCOL = ["--sessions=5,2,1", "--shots=7", "--session_epochs=2", "--session_lr=0.01"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunFolder:
    out = tmp_path_factory.mktemp("incremental") / "run"
    assert main(["incremental", *SMALL, *PROTOCOL, "--seeds=2", "--out", str(out)]) == 0
    return RunFolder(out)


@pytest.fixture(scope="module")
def digits():
    return load_data(RunConfig(), progress=False)


def rows_of(table, **values):
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def value_of(table, **values):
    (value,) = rows_of(table, **values)["value"]
    return value


def session_folder(folder, strategy, seed, session):
    base = folder.run(f"{METHODS[strategy]}-seed{seed}")
    return base if session == 1 else RunFolder(base.path / "sessions" / f"{strategy}-lr0.01-{session}")


def stored_state(folder):
    stored = torch.load(folder.last_checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix("model."): value for name, value in stored.items() if name.startswith("model.")}


def stored_model(folder, strategy, seed, session):
    """The model after a session, made of its checkpoint alone."""
    run = session_folder(folder, strategy, seed, session)
    assigned = ENDS[-1] if strategy == "preassigned-etf" else None
    model = build_model(single_run({}, run.settings()), (1, 8, 8), SESSIONS[0], assigned=assigned)
    if session > 1:
        model.grow(ENDS[session - 1] - SESSIONS[0])
    model.load_state_dict(stored_state(run))
    return model.eval()


def standardised(digits):
    """Test images, standardised by all pixels of the training images of the first session."""
    first = digits.train.images[digits.train.labels < SESSIONS[0]].double()
    mean, std = first.mean(), first.std(unbiased=False)
    return [((split.images.double() - mean) / std).float() for split in (digits.train, digits.test)]


def counted(labels, predictions):
    """All metrics after the last session, from the predicted class of each image after each session (−1: unseen)."""
    bounds = list(zip([0, *ENDS[:-1]], ENDS, strict=True))

    def accuracy(session, low, high):
        chosen = (labels >= low) & (labels < high)
        return float((predictions[session][chosen] == labels[chosen]).mean())

    last = len(predictions) - 1
    old = accuracy(last, 0, ENDS[0])
    new = accuracy(last, ENDS[0], ENDS[last])
    best = [max(accuracy(session, *bounds[j]) for session in range(j, last)) for j in range(last)]
    return {
        ("all", "accuracy"): accuracy(last, 0, ENDS[last]),
        ("old", "accuracy"): old,
        ("new", "accuracy"): new,
        ("all", "average_accuracy"): np.mean([accuracy(t, 0, ENDS[t]) for t in range(last + 1)]),
        ("all", "harmonic_mean"): 2 / (1 / old + 1 / new) if old and new else 0.0,
        ("all", "forgetting"): np.mean([best[j] - accuracy(last, *bounds[j]) for j in range(last)]),
        ("session 2", "accuracy"): accuracy(last, *bounds[1]),
    }


def test_metrics_of_sessions_are_those_of_counted_predictions():
    random = np.random.default_rng(0)
    labels = random.integers(8, size=400)
    predictions = [np.where(random.random(400) < 0.6, labels, random.integers(end, size=400)) for end in ENDS]
    bounds = list(zip([0, *ENDS[:-1]], ENDS, strict=True))
    of_sessions = [[(labels >= low) & (labels < high) for low, high in bounds[: t + 1]] for t in range(3)]
    accuracies = [
        [float((predictions[t][chosen] == labels[chosen]).mean()) for chosen in of_sessions[t]] for t in range(3)
    ]
    results = session_metrics(accuracies, [int(chosen.sum()) for chosen in of_sessions[-1]])
    for name, value in counted(labels, predictions).items():
        assert results[name] == pytest.approx(value, abs=1e-12), name


def test_metrics_of_sessions_at_the_edges():
    first = session_metrics([[0.75]], [20])
    assert first["all", "accuracy"] == first["all", "average_accuracy"] == first["old", "accuracy"] == 0.75
    assert all(np.isnan(first[name]) for name in [("new", "accuracy"), ("all", "harmonic_mean"), ("all", "forgetting")])
    lost = session_metrics([[1.0], [0.0, 0.0]], [1, 1])
    assert (lost["all", "harmonic_mean"], lost["all", "forgetting"]) == (0.0, 1.0)
    regained = session_metrics([[0.5], [0.25, 1.0], [0.75, 0.5, 1.0]], [1, 1, 1])
    assert regained["all", "forgetting"] == pytest.approx((-0.25 + 0.5) / 2)
    with pytest.raises(ValueError, match=r"one value more in each row, got rows of \[1, 1\]"):
        session_metrics([[0.5], [0.5]], [1, 1])


@pytest.mark.parametrize("strategy", TRAINED)
def test_the_table_has_what_the_stored_models_predict(strategy, finished, digits):
    table = read_table(finished.sessions)
    assert list(table) == SESSION_COLUMNS
    _, images = standardised(digits)
    labels = digits.test.labels.numpy()
    predictions = []
    for session in (1, 2, 3):
        with torch.no_grad():
            predictions.append(stored_model(finished, strategy, 1, session)(images).argmax(1).numpy())
    test = rows_of(table, strategy=strategy, seed=1, session=3, split="test")
    for (classes, metric), value in counted(labels, predictions).items():
        assert value_of(test, classes=classes, metric=metric) == pytest.approx(value, abs=1e-12), (classes, metric)


def test_class_means_are_the_nearest_centred_means_of_the_frozen_network(finished, digits):
    model = stored_model(finished, "class-means", 0, 1)
    course = Course("class-means", single_run({}, session_folder(finished, "class-means", 0, 1).settings()), None,
                    SessionData(digits, Incremental(sessions=SESSIONS, shots=7), RunConfig()))  # fmt: skip
    train, test = standardised(digits)
    with torch.no_grad():
        train, test = (model.head.features(model.model(images)).double().numpy() for images in (train, test))
    labels, test_labels = digits.train.labels.numpy(), digits.test.labels.numpy()
    used = {label: course.sessions._trained_on(label, 0).numpy() for label in range(8)}
    centre = train[labels < 5].mean(0)
    means = np.stack([train[used[label]].mean(0) - centre for label in range(8)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    scores = (test - centre) @ means.T
    predictions = [scores[:, :end].argmax(1) for end in ENDS]
    rows = rows_of(read_table(finished.sessions), strategy="class-means", seed=0, session=3, split="test")
    for (classes, metric), value in counted(test_labels, predictions).items():
        assert value_of(rows, classes=classes, metric=metric) == pytest.approx(value, abs=1e-12), (classes, metric)


@pytest.mark.parametrize(("classes", "low", "high"), [("old", 0, 5), ("new", 5, 8), ("all", 0, 8)])
def test_collapse_is_that_of_old_new_and_all_classes(classes, low, high, finished, digits):
    model = stored_model(finished, "learned", 0, 3)
    _, images = standardised(digits)
    with torch.no_grad():
        features = model.head.features(model.model(images)).double().numpy()
    labels = digits.test.labels.numpy()
    features, labels = features[(labels >= low) & (labels < high)], labels[(labels >= low) & (labels < high)]
    means = np.stack([features[labels == label].mean(0) for label in range(low, high)])
    within = np.mean(np.sum((features - means[labels - low]) ** 2, axis=1))
    centred = means - features.mean(0)
    weight = model.head.weight.detach().double().numpy()[low:high]
    number = high - low
    simplex = (np.eye(number) - 1 / number) / np.sqrt(number - 1)

    def distance(gram):
        return np.linalg.norm(gram / np.linalg.norm(gram) - simplex)

    expected = {
        "nc1_quotient": within / np.mean(np.sum(centred**2, axis=1)),
        "nc2_etf_means": distance(centred @ centred.T),
        "nc3_duality": distance(weight @ centred.T),
    }
    rows = rows_of(read_table(finished.sessions), strategy="learned", seed=0, session=3, split="test", classes=classes)
    for metric, value in expected.items():
        assert value_of(rows, metric=metric) == pytest.approx(value, rel=1e-5), metric


def test_collapse_of_one_new_class_is_undefined(tmp_path):
    out = tmp_path / "run"
    command = ["incremental", *SMALL, "--sessions=9,1", "--strategies=class-means", "--seeds=1", "--out", str(out)]
    assert main(command) == 0
    last = rows_of(read_table(out / "sessions.csv"), session=2, metric="nc1_quotient", split="train")
    assert np.isnan(value_of(last, classes="new"))
    assert value_of(last, classes="old") > 0


@pytest.mark.parametrize("method", ["standard", "implicit"])
def test_the_first_session_is_an_ordinary_run(method, finished, tmp_path):
    held_out = ["--hold_out_classes=5,6,7,8,9", "--method", method, "--seed=1"]
    assert main(["train", *SMALL, *held_out, "--out", str(tmp_path / "run")]) == 0
    first, ordinary = finished.run(f"{method}-seed1"), RunFolder(tmp_path / "run")
    assert first.settings() == ordinary.settings()
    pd.testing.assert_frame_equal(read_table(first.metrics), read_table(ordinary.metrics), check_exact=True)
    assert main(["measure", str(first.path)]) == 0


def test_preassigned_rows_do_not_move_and_learned_rows_of_sessions_differ(finished):
    first = stored_state(session_folder(finished, "preassigned-etf", 0, 1))
    last = stored_state(session_folder(finished, "preassigned-etf", 0, 3))
    rows = torch.cat([first["head.weight"], first["head.preassigned"]])
    torch.testing.assert_close(last["head.weight"], rows, rtol=0, atol=0)
    expected = torch.eye(8) - (1 - torch.eye(8)) / 7
    torch.testing.assert_close(rows @ rows.T, expected, rtol=0, atol=1e-5)
    learned = stored_state(session_folder(finished, "learned", 0, 3))["head.weight"]
    assert float((learned[5] @ learned[7]).abs()) < 0.99


def test_statistics_of_the_first_session_are_kept_and_frozen_modules_too(tmp_path):
    out = tmp_path / "run"
    few = ["--width=4", "--epochs=1", "--sessions=5,2,1", "--session_epochs=2", "--session_lr=0.01", "--seeds=1"]
    frozen = "model.0.layers.0"
    assert main(["incremental", *few, "--freeze", frozen, "--strategies", ",".join(TRAINED), "--out", str(out)]) == 0
    for strategy in TRAINED:
        first, last = (stored_state(session_folder(RunFolder(out), strategy, 0, session)) for session in (1, 3))
        statistics = [name for name in first if "running_" in name or "global_mean" in name]
        assert len(statistics) > 4
        weights = [name for name in first if name.endswith("weight") and not name.startswith(("head", frozen))]
        for name in [*statistics, *(name for name in first if name.startswith(frozen))]:
            assert torch.equal(first[name], last[name]), name
        assert not any(torch.equal(first[name], last[name]) for name in weights if last[name].ndim > 1)


def test_images_of_a_session(digits):
    protocol = Incremental(sessions=SESSIONS, shots=7, replay=3)
    sessions = SessionData(digits, protocol, RunConfig())
    second, third = (sessions.training_images(session, seed=0) for session in (2, 3))
    assert second.train.labels.bincount().tolist() == [3, 3, 3, 3, 3, 7, 7]
    assert third.train.labels.bincount().tolist() == [3, 3, 3, 3, 3, 3, 3, 7]
    assert (second.num_classes, third.num_classes) == (7, 8)
    assert third.test.labels.bincount().tolist() == digits.test.labels.bincount()[:8].tolist()

    def images(split, label):
        return {tuple(image.flatten().tolist()) for image in split.images[split.labels == label]}

    for label in (5, 6):  # replayed images are among those that the class came with
        assert images(third.train, label) < images(second.train, label)
    other = sessions.training_images(2, seed=1)
    assert images(other.train, 5) != images(second.train, 5)
    seen = sessions.seen_images(3, seed=0)
    assert seen["train"].split.labels.bincount().tolist() == [*digits.train.labels.bincount()[:5].tolist(), 7, 7, 7]
    more = SessionData(digits, Incremental(sessions=SESSIONS, shots=2, replay=9), RunConfig())
    assert more.training_images(3, seed=0).train.labels.bincount().tolist() == [9, 9, 9, 9, 9, 2, 2, 2]
    whole = SessionData(digits, Incremental(sessions=SESSIONS), RunConfig())
    assert whole.training_images(3, 0).train.labels.bincount(minlength=8).tolist() == [
        *[0] * 7,
        int((digits.train.labels == 7).sum()),
    ]


@pytest.mark.parametrize("steps", [3, 26, 43])
def test_a_run_that_was_stopped_resumes_to_the_same_table(steps, finished, tmp_path, monkeypatch, capsys):
    out, taken, step = tmp_path / "run", [0], Run._step

    def stopping(self, *args):
        step(self, *args)
        taken[0] += 1
        if taken[0] == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_step", stopping)
    command = ["incremental", *SMALL, *PROTOCOL, "--seeds=1", "--checkpoint_minutes=1e-9", "--out", str(out)]
    assert main(command) != 0
    assert taken[0] == steps
    monkeypatch.undo()
    assert main(["incremental", "--resume", "--out", str(out)]) == 0
    again, whole = read_table(out / "sessions.csv"), rows_of(read_table(finished.sessions), seed=0)
    pd.testing.assert_frame_equal(again, whole.reset_index(drop=True), check_exact=True)
    before = (out / "sessions.csv").read_bytes()
    assert main(["incremental", "--resume", "--out", str(out)]) == 0  # nothing is left to train
    assert (out / "sessions.csv").read_bytes() == before
    assert "shots must stay 7" in error_of(capsys, "incremental", "--resume", "--shots=8", "--out", str(out))


def test_results_are_printed_and_drawn(finished, capsys):
    assert main(["incremental", "--resume", "--out", str(finished.path)]) == 0
    printed = capsys.readouterr().out
    table = read_table(finished.sessions)
    last = rows_of(table, strategy="grown-etf", session=3, split="test", classes="all", metric="forgetting")["value"]
    (line,) = (line for line in printed.split("\n") if line.startswith("| grown-etf"))
    assert f"{last.mean():.1%} ± {last.std():.1%}" in line
    for name in ("summary.md", "figures/incremental.png", "sessions.csv", "config.yaml"):
        assert (finished.path / name).stat().st_size > 0
        assert str(finished.path / name) in printed
    assert list(table["strategy"].unique()) == list(METHODS)
    assert yaml.safe_load(finished.config.read_text())["sessions"] == SESSIONS
    assert [run.path.name for run in finished.run_folders()] == [
        f"{method}-seed{seed}" for seed in (0, 1) for method in ("standard", "implicit", "fixed")
    ]
    assert main(["report", str(finished.path), "--out", str(finished.path / "base.html")]) == 0


def test_rates_are_chosen_on_the_validation_split(tmp_path):
    out = tmp_path / "run"
    candidates = ["--session_lr=auto", "--session_lr_candidates=0.0001,0.02,1000000"]
    command = ["incremental", *SMALL, "--sessions=5,2,1", "--shots=7", "--session_epochs=2", "--seeds=1", *candidates]
    assert main([*command, "--strategies=preassigned-etf,learned", "--out", str(out)]) == 0
    tuning, table = read_table(out / "tuning" / "sessions.csv"), read_table(out / "sessions.csv")
    assert set(tuning["split"]) == {"train", "validation", "test"}
    assert set(table["split"]) == {"train", "test"}
    assert set(tuning["seed"]) == {1}
    for strategy in ("preassigned-etf", "learned"):
        chosen = rows_of(tuning, strategy=strategy, split="validation", classes="all", metric="accuracy")
        means = chosen[chosen["session"] > 1].groupby("session_lr")["value"].agg(["mean", "count"])
        best = means[means["count"] == 2]["mean"].idxmax()
        assert set(rows_of(table, strategy=strategy)["session_lr"]) == {best}


def test_rates_are_chosen_for_the_number_of_steps_with_all_images(tmp_path):
    out = tmp_path / "run"
    flags = ["--sessions=5,1", "--session_epochs=2", "--session_lr=auto", "--session_lr_candidates=0.001,0.002"]
    sizes = ["--train_samples=300", "--batch_size=26", "--seeds=1", "--strategies=learned"]  # 30 images of a class
    assert main(["incremental", *SMALL, *flags, *sizes, "--out", str(out)]) == 0

    def epochs(folder):
        return [RunFolder(session).settings()["epochs"] for session in folder.glob("runs/*/sessions/*")]

    assert epochs(out / "tuning") == [4, 4]  # of one batch of 24 images: as many steps as two epochs of two batches
    assert epochs(out) == [2]


REFUSED = [
    ("", "sessions must have at least 2 classes in the first one, and one more session, got []"),
    ("--sessions 6", "and one more session, got [6]"),
    ("--sessions 1,9", "sessions must have at least 2 classes in the first one"),
    ("--sessions 6,0,1", "sessions must be at least 1"),
    ("--sessions 6,5", "sessions must have at most the 10 classes of the data, got 11"),
    ("--sessions 6,four", "sessions must be a list"),
    ("--sessions 6,4 --shots 1000", "shots must be at most 1"),
    ("--sessions 6,4 --shots 0", "shots must be at least 1"),
    ("--sessions 6,4 --replay 1000", "replay must be at most 1"),
    (
        "--sessions 6,4 --strategies class-means --replay 5",
        "replay belongs to strategies other than class-means and class-means-etf",
    ),
    ("--sessions 6,4 --strategies class-means --session_epochs 5", "session_epochs belongs to strategies"),
    ("--sessions 6,4 --strategies class-means --session_lr auto", "session_lr belongs to strategies"),
    ("--sessions 6,4 --strategies nearest", "strategies must be a list, each item one of class-means"),
    ("--sessions 6,4 --strategies learned,learned", "strategies must be distinct"),
    ("--sessions 6,4 --session_lr_candidates 0.1,0.2", "session_lr_candidates belongs to session_lr auto"),
    ("--sessions 6,4 --session_lr auto --session_lr_candidates 0.1", "must be distinct, at least two, got [0.1]"),
    ("--sessions 6,4 --seeds 0", "seeds must be at least 1"),
    ("--sessions 6,4 --seeds 1,1", "seeds must be distinct"),
    ("--sessions 6,4 --hold_out_classes 3", "hold_out_classes must not be ['3']"),
    ("--sessions 6,4 --label_noise 0.1", "label_noise must not be 0.1"),
    ("--sessions 6,4 --digits_per_image 2", "digits_per_image must not be 2"),
    ("--sessions 6,4 --optimizer agd", "optimizer must not be agd"),
    ("--sessions 6,4 --freeze nowhere", "session 2 with preassigned-etf is invalid: freeze must name modules"),
    ("--sessions 6,4 --freeze model", "freeze must leave parameters to train, but with preassigned-etf it leaves none"),
    ("--sessions 6,4 --strategies grown-etf --class_weights inverse", "is invalid: class_weights must be None"),
    ("--sessions 6,4 --strategies grown-etf --feature_dim 7", "is invalid: num_new must give at most K = d + 1 = 8"),
    ("--sessions 6,4 --strategies preassigned-etf --feature_dim 7", "must be at least num_classes - 1 = 9, got 7"),
    ("--sessions 6,1 --sampling 2 --strategies learned", "session 2 with learned is invalid: classes_per_batch must"),
    ("--sessions 6,4 --recipe nothing", "recipe"),
    ("--sessions 6,4 --resume", "resume needs the folder of a run"),
    ("--sessions 6,4 --method fixed", "--method"),
]


@pytest.mark.parametrize(("arguments", "expected"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(capsys, "incremental", *arguments.split())
    assert list(Path.cwd().iterdir()) == []


def test_resume_needs_a_folder_of_this_command(finished, capsys):
    base = finished.run("fixed-seed0").path
    assert "was written by another command" in error_of(capsys, "incremental", "--resume", "--out", str(base))
    assert "--resume resumes it" in error_of(capsys, "incremental", *PROTOCOL, "--out", str(finished.path))
