"""The command `detect`: rates against scikit-learn, sets against numpy and Pillow, and what the folder keeps."""

from __future__ import annotations

import base64
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from helpers import error_of
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.batches import evaluation_batches
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.data.unknown import unknown_sets
from neuralcollapse.lab.evaluate.detection import detect_run
from neuralcollapse.lab.figures.detection import detection
from neuralcollapse.lab.models.build import build_model
from neuralcollapse.lab.results.files import write_csv
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.training.runs import Preparation

SMALL = {"backbone": "mlp", "width": 24, "depth": 1, "train_samples": 300}
SETTINGS = {**SMALL, "method": "standard", "epochs": 3, "keep_at": [1, 2], "hold_out_classes": ["8", "9"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "known"
    train_runs(RunConfig(**SETTINGS), folder, progress=False)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(trained, tmp_path / "known"))


def rates(run: RunFolder, epoch: int, name: str, score: str) -> dict[str, float]:
    table = read_table(run.detection).query("epoch == @epoch and set == @name and score == @score")
    return dict(zip(table["metric"], table["value"], strict=True))


def test_rates_are_those_of_scikit_learn_on_brute_force_scores(run, capsys):
    assert main(["detect", str(run.path), "--ood", "held-out", "--ood", "rotated", "--scores", "ncm,msp"]) == 0
    printed = capsys.readouterr().out
    assert "measured again" not in printed
    config = RunConfig(**SETTINGS)
    data = load_data(config, progress=False)
    model = build_model(config, data.image_shape, data.num_classes).eval()
    state = torch.load(run.last_checkpoint, weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    pixels = data.train.images.numpy() / 1.0
    mean, std = pixels.mean(), pixels.std()

    def outputs(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs = torch.tensor((images - mean) / std, dtype=torch.float32)
        features: list[torch.Tensor] = []
        hook = model.head.register_forward_pre_hook(lambda _, args: features.append(model.head.features(args[0])))
        with torch.no_grad():
            logits = model(inputs).double()
        hook.remove()
        return features[0].double().numpy(), logits.numpy()

    train, labels = outputs(data.train.images.numpy())[0], data.train.labels.numpy()
    means = np.stack([train[labels == number].mean(0) for number in range(8)])

    def scores(images: np.ndarray) -> dict[str, np.ndarray]:
        features, logits = outputs(images)
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        distances = np.linalg.norm(features[:, None] - means, axis=2)
        return {"ncm": -distances.min(1), "msp": (exponentials / exponentials.sum(1, keepdims=True)).max(1)}

    inside = scores(data.test.images.numpy())
    sets = {"held-out": data.held_out.images.numpy(), "rotated": np.rot90(data.test.images.numpy(), axes=(2, 3)).copy()}
    for name, images in sets.items():
        for score, outside in scores(images).items():
            values = np.concatenate([inside[score], outside])
            is_inside = np.arange(len(values)) < len(inside[score])
            threshold = np.sort(inside[score])[::-1][math.ceil(0.95 * len(inside[score])) - 1]
            expected = {
                "auroc": roc_auc_score(is_inside, values),
                "fpr95": (outside >= threshold).mean(),
                "aupr_in": average_precision_score(is_inside, values),
                "aupr_out": average_precision_score(~is_inside, -values),
            }
            assert rates(run, 3, name, score) == pytest.approx(expected, abs=1e-9)
            assert f"{expected['auroc']:.2f}" in printed


def batches_of(sets: dict, **settings) -> dict[str, list[torch.Tensor]]:
    """Images of each set, twice, with the settings of data and batches."""
    config = RunConfig(**{**SMALL, "train_samples": None, **settings})
    data = load_data(config, progress=False)
    test = evaluation_batches(data, config)["test"]
    loaders = unknown_sets(sets, data, test, config, progress=False)

    def images(batches: Iterable) -> torch.Tensor:
        return torch.cat([batch if isinstance(batch, torch.Tensor) else batch[0] for batch in batches])

    return {"test": [images(test)]} | {name: [images(loader) for _ in range(2)] for name, loader in loaders.items()}


def test_built_in_sets_are_what_they_say():
    sets = batches_of({"noise": None, "shuffled": None, "rotated": None}, pixel_mean=[0.1], pixel_std=[0.5])
    test = sets.pop("test")[0]
    for first, second in sets.values():
        assert torch.equal(first, second)
    shuffled, rotated, noise = (sets[name][0] for name in ("shuffled", "rotated", "noise"))
    assert torch.equal(shuffled.flatten(1).sort(1).values, test.flatten(1).sort(1).values)
    assert (shuffled != test).flatten(1).any(1).all()
    places = [torch.equal(shuffled[i].flatten().argsort(), shuffled[i + 1].flatten().argsort()) for i in range(9)]
    assert not any(places)
    assert np.array_equal(rotated.numpy(), np.rot90(test.numpy(), axes=(2, 3)))
    pixels = load_data(DataSettings(), progress=False).train.images.double() / 255
    drawn = (noise.double() * 0.5 + 0.1).flatten()
    error = pixels.std() / math.sqrt(len(drawn))
    assert abs(drawn.mean() - pixels.mean()) < 5 * error
    assert abs(drawn.std() - pixels.std()) < 5 * error
    assert noise.shape == test.shape


def test_pixels_of_a_colour_image_are_shuffled_together(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                grey = random.integers(80, size=(4, 4, 1), dtype=np.uint8)
                Image.fromarray(np.concatenate([grey, grey + 20, grey + 40], axis=2)).save(
                    tmp_path / split / name / f"{index}.png"
                )
    images = batches_of({"shuffled": None}, data=str(tmp_path), pixel_mean=[0.0], pixel_std=[1 / 255])["shuffled"][0]
    assert torch.allclose(images[:, 1] - images[:, 0], torch.full_like(images[:, 0], 20))
    assert torch.allclose(images[:, 2] - images[:, 0], torch.full_like(images[:, 0], 40))


@pytest.mark.parametrize("kind", ["files", "splits", "parquet"])
@pytest.mark.parametrize("workers", ["auto", 0])
def test_images_of_a_folder_take_the_form_of_the_runs(kind, workers, tmp_path):
    pictures = [
        Image.fromarray(image) for image in np.random.default_rng(1).integers(256, size=(5, 9, 12, 3), dtype=np.uint8)
    ]
    folder = tmp_path / "ood"
    folder.mkdir()
    if kind == "parquet":
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": pictures}, features=features).to_parquet(folder / "some.parquet")
    else:
        inner = folder / "test" / "cat" if kind == "splits" else folder
        inner.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures):
            picture.save(inner / f"{number}.png")
        if kind == "splits":
            (folder / "train" / "cat").mkdir(parents=True)
            Image.new("RGB", (7, 7)).save(folder / "train" / "cat" / "0.png")
    settings = {"image_size": 6, "workers": workers, "pixel_mean": [0.3], "pixel_std": [0.2]}
    images = batches_of({"other": folder}, **settings)["other"][0]
    expected = []
    for picture in pictures:
        # The shorter side is scaled to 6 and the middle is cropped, as Pillow's ImageOps.fit does for a box.
        grey = picture.convert("L").resize((6, 6), Image.Resampling.BILINEAR, box=(1.5, 0, 10.5, 9))
        expected.append((np.asarray(grey) / 255 - 0.3) / 0.2)
    assert images.shape == (5, 1, 6, 6)
    assert np.allclose(images[:, 0].numpy(), np.stack(expected), atol=1e-5)


def test_every_kept_checkpoint_and_what_a_second_call_replaces(run, capsys):
    command = ["detect", str(run.path), "--ood", "noise"]
    assert main([*command, "--epochs", "all", "--scores", "msp,mahalanobis"]) == 0
    before = read_table(run.detection)
    assert list(before.columns) == ["epoch", "set", "score", "metric", "value"]
    assert before["epoch"].unique().tolist() == [1, 2, 3]
    assert len(before) == 3 * 2 * 4
    capsys.readouterr()
    assert main([*command, "--epochs", "2", "--scores", "msp,knn", "--ood", "shuffled"]) == 0
    assert "knn: knn needs training features" in capsys.readouterr().out
    after = read_table(run.detection)
    assert not after.duplicated(["epoch", "set", "score", "metric"]).any()
    kept = after.query("set == 'noise' and score != 'knn'").sort_values(["epoch", "score", "metric"], ignore_index=True)
    pd.testing.assert_frame_equal(kept, before.sort_values(["epoch", "score", "metric"], ignore_index=True))
    assert after.query("score == 'knn'")["value"].isna().all()
    assert len(after) == len(before) + 4 * 3


def test_a_missing_or_other_record_is_measured_again(run, capsys):
    command = ["detect", str(run.path), "--ood", "held-out", "--scores", "mahalanobis,vim"]
    assert main(command) == 0
    before = read_table(run.detection)
    record = run.measurement(3, "train")
    record.unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert "epoch 3: train split measured again: its record is missing" in capsys.readouterr().out
    assert record.exists()
    pd.testing.assert_frame_equal(read_table(run.detection), before, rtol=1e-6)
    shutil.copy(run.measurement(1, "train"), record)
    assert main(command) == 0
    assert "epoch 3: train split measured again: " in capsys.readouterr().out
    pd.testing.assert_frame_equal(read_table(run.detection), before, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"method": "implicit", "weight_average": 0.3}, {"method": "linear"}])
def test_the_measured_model_is_the_one_that_detects(settings, tmp_path):
    folder = RunFolder(tmp_path / "run")
    train_runs(RunConfig(**{**SETTINGS, **settings, "epochs": 1, "keep_at": None}), folder.path, progress=False)
    preparation = Preparation(resumed=True, progress=False)
    (found,) = detect_run(folder, preparation, {"held-out": None}, scores=["ncm", "energy"])
    assert found.measured_because == ""
    assert found.evaluation.scores["ncm"]["held-out"].shape == found.evaluation.scores["energy"]["held-out"].shape


def test_figures_are_of_each_set_and_over_the_epochs(run, tmp_path, capsys):
    out = tmp_path / "figures"
    command = ["detect", str(run.path), "--ood", "noise", "--ood", "held-out", "--scores", "msp,ncm", "--epochs", "all"]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for name in ("scores-noise.png", "scores-held-out.png", "detection.png"):
        assert (out / name).stat().st_size > 1000
        assert str(out / name) in printed
    first, second = detection(RunGroups([run]))
    assert (first.title, second.title) == ("noise", "held-out")
    axes = Figure().subplots()
    second.draw(axes)
    metrics = read_table(run.metrics).query("split == 'train' and metric == 'nc1_quotient'")
    for line, score in zip(axes.lines, ("msp", "ncm"), strict=True):
        assert line.get_label() == score
        assert line.get_xdata().tolist() == metrics["value"].tolist()
        assert line.get_ydata().tolist() == [rates(run, epoch, "held-out", score)["auroc"] for epoch in (1, 2, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ood must name at least one set: noise, shuffled, rotated, held-out or NAME=FOLDER"),
        (["--ood", "noize"], "ood must be noise, shuffled, rotated, held-out or NAME=FOLDER, got 'noize'; nearest: no"),
        (["--ood", "noise", "--ood", "noise"], "ood must name different sets, got 'noise' twice"),
        (["--ood", "svhn=nowhere"], "ood must be NAME=FOLDER with an existing folder, got 'svhn=nowhere'"),
        (["--ood", "test=."], "ood must be NAME=FOLDER with a name of letters, "),
        (["--ood", "=A1=."], "ood must be NAME=FOLDER with a name of letters, "),
        (["--ood", "noise", "--scores", "mahalanobi"], "got 'mahalanobi'; nearest: mahalanobis, relative_mahalanobis"),
        (["--ood", "noise", "--epochs", "7"], "which has those of 1, 2, 3, got 7"),
        (["--ood", "noise", "--epochs", "some"], "epochs must be one of last, all or a list"),
        (["--ood", "small={small}"], "ood must have images of the run's size, 8x8, and those of"),
        (["--ood", "empty={empty}"], "must have images"),
    ],
)
def test_what_cannot_be_detected_is_one_line(arguments, message, run, tmp_path, capsys):
    small, empty = tmp_path / "small", tmp_path / "empty"
    small.mkdir()
    empty.mkdir()
    Image.new("L", (5, 4)).save(small / "a.png")
    arguments = [argument.format(small=small, empty=empty) for argument in arguments]
    assert message in error_of(capsys, "detect", str(run.path), *arguments)
    assert not run.detection.exists()


def test_held_out_classes_and_square_images_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"needs test images of classes held out in training \(hold_out_classes\)"):
        batches_of({"held-out": None})
    with pytest.raises(ValueError, match="rotated needs square images, but those of the run are 8x16"):
        batches_of({"rotated": None}, digits_per_image=2)


def test_several_runs_have_their_own_figures(run, tmp_path, capsys):
    other = shutil.copytree(run.path, tmp_path / "other")
    command = ["detect", str(run.path), str(other), "--ood", "noise", "--scores", "msp"]
    assert "out belongs to one run, got 2 runs" in error_of(capsys, *command, "--out", str(tmp_path / "out"))
    assert main(command) == 0
    assert all((folder / "figures" / "detection.png").exists() for folder in (run.path, other))


def tables_of(page: Path) -> dict[str, list[list[str]]]:
    """Cells of each table of a page, by caption."""
    tables = {}
    for text in re.findall(r"<table>.*?</table>", page.read_text(), re.S):
        table = ElementTree.fromstring(text)
        tables[table.findtext("caption")] = [[cell.text or "" for cell in row] for row in table.iter("tr")]
    return tables


def test_the_report_shows_the_last_rates_over_seeds(run, tmp_path):
    folder = tmp_path / "seeds"
    runs = [RunConfig(**{**SETTINGS, "seed": seed, "epochs": 2, "keep_at": None}) for seed in (0, 1)]
    train_runs(runs, folder, progress=False)
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--out", str(page)]) == 0
    assert "Detection" not in page.read_text()
    (tmp_path / "null").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "null" / "a.png")
    sets = ["--ood", "held-out", "--ood", f"null={tmp_path / 'null'}"]
    assert main(["detect", str(folder), *sets, "--scores", "ncm,knn"]) == 0
    assert main(["report", str(folder), "--out", str(page), "--overwrite"]) == 0
    heading, *rows = tables_of(page)["Test images against unknown inputs, at the last evaluated epoch"]
    assert heading == ["set", "score", "epoch", "AUROC", "FPR at 95% TPR", "AUPR in", "AUPR out"]
    shown = {(row[0], row[1]): row[2:] for row in rows}
    assert shown.keys() == {(name, score) for name in ("held-out", "null") for score in ("ncm", "knn")}
    seeds = [rates(each, 2, "held-out", "ncm") for each in RunFolder(folder).run_folders()]
    expected = [
        f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" for values in zip(*map(dict.values, seeds), strict=True)
    ]
    assert shown["held-out", "ncm"] == ["2", *expected]
    assert shown["held-out", "knn"] == ["2", "–", "–", "–", "–"]
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">', page.read_text())
    assert [words for _, words in pictures] == [
        "AUROC of each score against NC1, one panel per set of unknown inputs",
        "Distributions of the scores, standard: test images and held-out",
        "Distributions of the scores, standard: test images and null",
    ]
    first = RunFolder(folder).run_folders()[0]
    assert base64.b64decode(pictures[1][0]) == (first.figures / "scores-held-out.png").read_bytes()


def test_no_text_or_file_of_a_folder_is_taken_for_part_of_the_page(run, tmp_path):
    assert main(["detect", str(run.path), "--ood", "noise", "--scores", "msp"]) == 0
    (run.figures / "scores-noise.png").write_text("<script>alert(1)</script>")
    table = read_table(run.detection).replace({"score": {"msp": "<b>msp"}})
    write_csv(run.detection, pd.concat([table, table.assign(set="../../secret")]))
    page = tmp_path / "page.html"
    assert main(["report", str(run.path), "--out", str(page)]) == 0
    text = page.read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;msp" in text
    assert text.count('<img src="data:image/png') == 1  # AUROC against NC1
