"""`neuralcollapse detect`: detection of inputs of unknown classes with the checkpoints of runs."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.common import (
    Append,
    Outcome,
    add_backbone,
    add_epochs,
    add_runs,
    epochs_of,
    option,
    runs_and_figures,
    unknown_sets_of,
)
from neuralcollapse.lab.settings import closest_names


def _add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--ood", action=Append, metavar="SET", help="noise, shuffled, rotated, held-out, or "
                        "NAME=FOLDER with images; may be given several times")  # fmt: skip
    parser.add_argument("--scores", metavar="A,B", help="scores to evaluate; by default all but knn")
    add_epochs(parser)
    parser.add_argument("--out", metavar="FOLDER", help="folder of the figures; by default figures/ of the run")
    add_backbone(parser)


def _run(settings: Namespace) -> int:
    sets = unknown_sets_of(option(settings, "ood", list[str], []))
    epochs = epochs_of(settings)
    runs = runs_and_figures(settings)

    from neuralcollapse.lab.evaluate.detection import detect_run
    from neuralcollapse.lab.figures.detection import write_detection
    from neuralcollapse.lab.training.runs import Preparation

    scores = _scores(option(settings, "scores", list[str]))
    outcome, preparation = Outcome(), Preparation(resumed=True, progress=True)
    for run, figures in runs:
        detections = []
        for detection in detect_run(
            run, preparation, sets, scores=scores, epochs=epochs, backbone=settings.get("backbone")
        ):
            if detection.measured_because:
                print(f"epoch {detection.epoch}: train split measured again: {detection.measured_because}")
            detections.append(detection)
            outcome.written += detection.written
        last = detections[-1]
        print(f"{run.path.name}, epoch {last.epoch}, test images against unknown inputs\n\n{last.evaluation!r}\n")
        outcome.written += write_detection(run, last.evaluation, last.epoch, figures)
    outcome.written = [*dict.fromkeys(outcome.written)]
    return outcome.report()


def _scores(names: list[str] | None) -> list[str] | Literal["all"]:
    """Return the names of scores.

    Raises:
        ValueError: if a name is unknown.
    """
    from neuralcollapse.ood import SCORES

    if names is None or names == ["all"]:
        return "all"
    if not names:
        raise ValueError(f"scores must be all or among {', '.join(SCORES)}, got none")
    if unknown := [name for name in names if name not in SCORES]:
        raise ValueError(
            f"scores must be among {', '.join(SCORES)}, got {unknown[0]!r}{closest_names(unknown[0], SCORES)}"
        )
    return [*dict.fromkeys(names)]


DETECT = Command(
    "Evaluate how well out-of-distribution scores, fitted to the record of the train split, distinguish test images "
    "from inputs of unknown classes: AUROC, false positives at 95% true positives, average precision. The sets noise "
    "(Gaussian, with mean and standard deviation of the training pixels), shuffled (test images with permuted pixels), "
    "rotated (test images rotated by 90 degrees) and held-out (test images of hold_out_classes) need no download; the "
    "images of a folder are converted to the channels and the image_size of the run. Rates are written to "
    "detection.csv of the run and replace those of the same epoch, set and score. Figures show the distributions of "
    "the scores on each set, and AUROC against NC1 over the epochs.",
    _add_arguments,
    _run,
)
