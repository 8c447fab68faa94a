"""`neuralcollapse study`: reproduction of a published figure, with a verdict on each claim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.common import Append, option, print_written, unknown_sets_of
from neuralcollapse.lab.results.files import read_yaml
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.studies import SCALES, StudyOptions, load_study, run_study, study_names

_FOLDER = Path("runs/studies")


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="name of the study (omit it for a list), or a YAML file")
    parser.add_argument("--scale", metavar="SCALE", help="small, for two CPU cores, or full, as published; by default "
                        "small if the study has it")  # fmt: skip
    parser.add_argument("--seeds", metavar="N", help="number of seeds, or comma-separated seeds")
    parser.add_argument("--data", metavar="FOLDER", help="folder of the data; by default downloaded from the hub")
    parser.add_argument("--out", metavar="FOLDER", help="folder to write; by default runs/studies/NAME-SCALE")
    parser.add_argument("--backbone", metavar="CLASS", help="user-defined class that the file of the study names; it "
                        "is not imported merely because the file names it")  # fmt: skip
    parser.add_argument("--ood", action=Append, metavar="NAME=FOLDER", help="folder of a set of unknown inputs of a "
                        "study of detection; may be given several times")  # fmt: skip
    parser.add_argument("--parallel", metavar="N", help="train N runs at a time; by default 1")
    parser.add_argument("--overwrite", action="store_true", help="delete the content of the folder and train again")


def _run(settings: Namespace) -> None:
    name = option(settings, "name")
    if name is None:
        print(_listing())
        return
    study = load_study(name)
    scale = option(settings, "scale", default=next(iter(study.scales)))
    sets = option(settings, "ood", list[str])
    options = StudyOptions(
        seeds=option(settings, "seeds", int | list[int]),
        data=option(settings, "data"),
        backbone=option(settings, "backbone"),
        parallel=option(settings, "parallel", int, 1),
        ood={} if sets is None else unknown_sets_of(sets),
        overwrite=bool(settings.get("overwrite")),
    )
    folder = RunFolder(option(settings, "out", default=_FOLDER / f"{study.name}-{scale}"))
    record, written = run_study(study, scale, folder, options)
    print(f"\n{_verdicts(record)}\n")
    print_written(written)


def _verdicts(record: Mapping[str, Any]) -> str:
    """Return the verdicts of a study for the terminal."""
    lines = [f"{record['study']}: {record['title']}", f"{record['source']}; scale {record['scale']}"]
    lines += [f"Reduced: {record['reduced']}"] if record["reduced"] else []
    for claim in record["claims"]:
        lines += ["", f"{claim['verdict'].upper()}: {claim['claim']}", f"  ({claim['measure']})"]
        lines += [f"  {numbers}" for numbers in claim["numbers"]]
    return "\n".join(lines)


def _listing() -> str:
    """Return all studies with the cost and the last verdicts of each scale."""
    lines = []
    for name in study_names():
        study = load_study(name)
        lines += [name, f"  {study.title}", f"  {study.source}; {len(study.claims)} claims"]
        for scale in (scale for scale in SCALES if scale in study.scales):
            verdict = RunFolder(_FOLDER / f"{name}-{scale}").verdict
            record = read_yaml(verdict) if verdict.exists() else None
            verdicts = "not run" if record is None else ", ".join(claim["verdict"] for claim in record["claims"])
            lines.append(f"  {scale}: {study.scale(scale).cost}; {verdicts}")
    return "\n".join(lines)


STUDY = Command(
    "Train the missing runs of a study, draw its figure, and judge each of its claims. A claim holds, does not hold or "
    "is undecided, according to differences of runs with the same seed and Student's 95% interval over seeds (n - 1). "
    "If a study was stopped, the same command resumes it; finished runs are not trained again. Without a name, list "
    "the studies, with their costs and the last verdicts in runs/studies.",
    _add_arguments,
    _run,
)
