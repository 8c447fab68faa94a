"""`neuralcollapse detect`: detection of inputs of unknown classes with the checkpoints of runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.common import Append, Outcome, add_runs, option, runs_of
from neuralcollapse.lab.settings import closest_names

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


def _add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--ood", action=Append, metavar="SET", help="noise, shuffled, rotated, held-out, or "
                        "NAME=FOLDER with images; may be given several times")  # fmt: skip
    parser.add_argument("--scores", metavar="A,B", help="scores to evaluate; by default all but knn")
    parser.add_argument("--epochs", metavar="EPOCHS", help="last, all, or epochs of kept checkpoints with commas "
                        "between them; by default last")  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="folder of the figures; by default figures/ of the run")
    parser.add_argument("--backbone", metavar="CLASS", help="class of yours that a run was trained with: it is not "
                        "imported because config.yaml names it")  # fmt: skip


def _run(settings: Namespace) -> int:
    sets = _sets(option(settings, "ood", list[str], []))
    epochs = option(settings, "epochs", Literal["last", "all"] | list[int], "last")
    runs = runs_of(option(settings, "runs", list[str]))
    out = option(settings, "out")
    if out is not None and len(runs) > 1:
        raise ValueError(f"out belongs to one run, got {len(runs)} runs, whose figures are in their own folders")

    from neuralcollapse.lab.evaluate.detection import detect_run
    from neuralcollapse.lab.figures.detection import write_detection
    from neuralcollapse.lab.training.runs import Preparation

    scores = _scores(option(settings, "scores", list[str]))
    outcome, preparation = Outcome(), Preparation(resumed=True, progress=True)
    for run in runs:
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
        outcome.written += write_detection(run, last.evaluation, last.epoch, Path(out or run.figures))
    outcome.written = [*dict.fromkeys(outcome.written)]
    return outcome.report()


def _sets(texts: list[str]) -> dict[str, Path | None]:
    """Return the folder of each set by its name, None for sets that need no folder.

    Raises:
        ValueError: if a set is unknown or repeated, a name cannot be one, or a folder does not exist.
    """
    from neuralcollapse.lab.data.unknown import BUILT_IN

    forms = f"{', '.join(BUILT_IN)} or NAME=FOLDER"
    if not texts:
        raise ValueError(f"ood must name at least one set: {forms}")
    sets: dict[str, Path | None] = {}
    for text in texts:
        name, has_folder, folder = text.partition("=")
        if not has_folder and name not in BUILT_IN:
            raise ValueError(f"ood must be {forms}, got {text!r}{closest_names(name, BUILT_IN)}")
        if has_folder and (name in (*BUILT_IN, "test") or not _NAME.fullmatch(name)):
            raise ValueError(
                f"ood must be NAME=FOLDER with a name of letters, digits, dots, plus and minus signs and underscores, "
                f"other than test, {', '.join(BUILT_IN)}, got {text!r}"
            )
        if has_folder and not Path(folder).expanduser().is_dir():
            raise ValueError(f"ood must be NAME=FOLDER with an existing folder, got {text!r}")
        if name in sets:
            raise ValueError(f"ood must name different sets, got {name!r} twice")
        sets[name] = Path(folder).expanduser() if has_folder else None
    return sets


def _scores(names: list[str] | None) -> list[str] | Literal["all"]:
    """Return the names of scores.

    Raises:
        ValueError: if one is unknown.
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
    "Evaluate how well out-of-distribution scores, fitted to the record of the train split, tell test images from "
    "inputs of unknown classes: AUROC, false positives at 95% true positives, average precision. The sets noise "
    "(Gaussian, with mean and standard deviation of the training pixels), shuffled (test images with permuted pixels), "
    "rotated (test images turned by 90 degrees) and held-out (test images of hold_out_classes) need no download; a "
    "folder of images is brought to the channels and the image_size of the run. Rates go to detection.csv of the run, "
    "in place of those of the same epoch, set and score. Figures: the distributions of the scores on each set, and "
    "AUROC against NC1 over the epochs.",
    _add_arguments,
    _run,
)
