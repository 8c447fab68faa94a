"""`neuralcollapse study`: a published figure from its runs to its picture and a verdict."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.common import option, print_written
from neuralcollapse.lab.figures import draw
from neuralcollapse.lab.results.files import read_yaml, write_yaml
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.locking import sole_writer
from neuralcollapse.lab.studies import SCALES, Scale, Study, load_study, study_names, study_runs
from neuralcollapse.lab.untrusted import check_class_is_named

if TYPE_CHECKING:
    from neuralcollapse.lab.config import RunConfig
    from neuralcollapse.lab.results.verdicts import Finished

_FOLDER = Path("runs/studies")


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="the study, of those that are listed "
                        "without a name; or a YAML file of one's own")  # fmt: skip
    parser.add_argument("--scale", metavar="SCALE", help="small, for two CPU cores, or full, as published; "
                        "by default small where there is one")  # fmt: skip
    parser.add_argument("--seeds", metavar="N", help="number of seeds, or the seeds with commas between them")
    parser.add_argument("--data", metavar="FOLDER", help="where the data are; by default the hub's are fetched")
    parser.add_argument("--out", metavar="FOLDER", help="folder to write; by default runs/studies/NAME-SCALE")
    parser.add_argument("--backbone", metavar="CLASS", help="class of yours that the study's file names: "
                        "it is not imported for that")  # fmt: skip
    parser.add_argument("--parallel", metavar="N", help="train N runs at a time; by default 1")
    parser.add_argument("--overwrite", action="store_true", help="delete what the folder holds, and train again")


def _run(settings: Namespace) -> None:
    """List the studies, or run one, and say what was found and written."""
    name = settings.get("name")
    if name is None:
        print(_listing())
        return
    study = load_study(name)
    scale = settings.get("scale") or next(iter(study.scales))
    chosen = study.scale(scale)
    seeds = _seeds(option(settings, "seeds", int | list[int]), chosen)
    folder = RunFolder(settings.get("out") or _FOLDER / f"{study.name}-{scale}")
    with ExitStack() as locks:
        if study.is_ufm:
            groups, figures = _ufm_results(chosen, seeds, settings, folder)
            locks.enter_context(sole_writer(folder.path))
        else:
            data = settings.get("data") or (None if settings.get("overwrite") else _data_of(folder))
            runs = study_runs(study, scale, seeds, data)
            for one in runs.values():
                check_class_is_named(one.in_force(), settings.get("backbone"), name)
            parallel = option(settings, "parallel", int, 1)
            overwrite = bool(settings.get("overwrite"))
            kept = {"study": study.name, "scale": scale}
            _train_missing(runs, folder, kept, locks, overwrite=overwrite, parallel=parallel)
            found = _finished_runs(study, runs, folder)
            groups = {label: _results(of_label) for label, of_label in found.items()}
            figures = _draw(study, found, folder)
        print()
        _report(study, scale, seeds, groups, folder, figures)


def _seeds(given: int | list[int] | None, scale: Scale) -> list[int]:
    """Return the seeds of every run, from their number or a list."""
    if given is None:
        return scale.seeds
    seeds = given if isinstance(given, list) else [scale.seeds[0] + index for index in range(given)]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be at least one, distinct and not negative, got {given}")
    return seeds


def _data_of(folder: RunFolder) -> str | None:
    """Where the runs that are there took their data from."""
    there = sorted(folder.runs.glob(f"*/{folder.config.name}"))
    return str(RunFolder(there[0].parent).settings()["data"]) if there else None


def _is_finished(place: RunFolder) -> bool:
    return place.config.exists() and place.read_environment().get("finished") is True


def _train_missing(
    runs: Mapping[str, RunConfig],
    folder: RunFolder,
    settings: dict[str, Any],
    locks: ExitStack,
    *,
    overwrite: bool,
    parallel: int,
) -> None:
    """Train what is not finished, if anything; hold the folder for writing from then on.

    Raises:
        ValueError: Runs are there that were made with other settings; each difference is named.
    """
    there = {} if overwrite else {name: run for name, run in runs.items() if folder.run(name).config.exists()}
    differing = []
    for name, one in there.items():
        try:
            folder.run(name).check(one.in_force(), resume=True)
        except ValueError as error:
            differing.append(f"{name}: {error}")
    if differing:
        raise ValueError(
            f"{len(differing)} of the runs in {str(folder.path)!r} are not the study's: {'; '.join(differing)}; "
            "--out names another folder, --overwrite trains all of it again"
        )

    def hold() -> None:
        locks.enter_context(sole_writer(folder.path))

    if all(name in there and _is_finished(folder.run(name)) for name in runs):
        hold()
        return

    from neuralcollapse.lab.training.runs import train_runs  # seconds

    resume = folder.config.exists() and not overwrite
    train_runs(
        runs,
        folder.path,
        settings=settings,
        resume=resume,
        overwrite=overwrite,
        leave_out_failed=True,
        parallel=parallel,
        before_writing=hold,
    )


def _finished_runs(study: Study, runs: Mapping[str, RunConfig], folder: RunFolder) -> dict[str, dict[int, RunFolder]]:
    """The study's runs that are finished, by name and seed."""
    found: dict[str, dict[int, RunFolder]] = {label: {} for label in study.runs}
    for name, one in runs.items():
        if _is_finished(folder.run(name)):
            found[name.rpartition("-seed")[0]][one.seed] = folder.run(name)
    return found


def _results(runs: Mapping[int, RunFolder]) -> dict[int, Finished]:
    from neuralcollapse.lab.results.tables import read_table
    from neuralcollapse.lab.results.verdicts import Finished

    found = {}
    for seed, run in runs.items():
        seconds = float(read_table(run.training_log)["seconds"].sum())
        found[seed] = Finished(read_table(run.metrics), run.read_environment() | {"seconds": seconds})
    return found


def _draw(study: Study, found: Mapping[str, Mapping[int, RunFolder]], folder: RunFolder) -> list[Path]:
    from neuralcollapse.lab.results.groups import RunGroups
    from neuralcollapse.lab.results.tables import add_rows, distance_rows, read_table

    there = {label: list(runs.values()) for label, runs in found.items() if runs}
    if not there:
        raise ValueError(f"study {study.name} has no run that is finished: none trained to its end")
    if study.figure == "markou":
        for one in (run for runs in there.values() for run in runs):
            with sole_writer(one.path):
                if "etf_means" not in set(read_table(one.metrics)["metric"]):
                    add_rows(one.metrics, [row for row in distance_rows(one) if isinstance(row, tuple)])
    drawn = RunGroups(there)
    written = draw(study.figure, drawn, folder.figures, ["png"])
    for problem in drawn.problems.values():
        print(f"neuralcollapse: skipped: {problem}", file=sys.stderr)
    return written


def _ufm_results(
    scale: Scale, seeds: Sequence[int], settings: Namespace, folder: RunFolder
) -> tuple[dict[str, dict[int, Finished]], list[Path]]:
    """Train the unconstrained features model as `ufm` does, with iterations in place of epochs."""
    from neuralcollapse.lab.commands.ufm import FreeFeatures, train_ufm
    from neuralcollapse.lab.results.verdicts import Finished

    if list(seeds) != list(range(len(seeds))) or settings.get("data") is not None:
        raise ValueError(
            "seeds of the unconstrained features model must be a number, and data must not be given: it has none"
        )
    config = FreeFeatures(**scale.settings, seeds=len(seeds))
    options = {"overwrite": bool(settings.get("overwrite"))}
    _, metrics, figures = train_ufm(config, folder, resume=folder.config.exists(), **options)
    groups: dict[str, dict[int, Finished]] = {}
    for (classes, optimizer, method, seed), table in metrics.groupby(
        ["classes", "optimizer", "method", "seed"], sort=False
    ):
        tidy = table.rename(columns={"iteration": "epoch"}).assign(split="train")
        seconds = tidy.loc[tidy["metric"] == "seconds", "value"].max()
        facts = folder.read_environment() | {"seconds": float(seconds)}
        groups.setdefault(f"UFM-{classes} {optimizer} {method}", {})[int(str(seed))] = Finished(tidy, facts)
    return groups, figures


def _report(
    study: Study,
    scale: str,
    seeds: Sequence[int],
    groups: Mapping[str, Mapping[int, Finished]],
    folder: RunFolder,
    figures: Sequence[Path],
) -> None:
    """Judge, write, print."""
    from neuralcollapse.lab.figures.summary import write_summary
    from neuralcollapse.lab.results.verdicts import judge, verdict_record

    facts = [run.facts for runs in groups.values() for run in runs.values()]
    claims = [verdict_record(claim, judge(claim, groups)) for claim in study.claims]
    record: dict[str, Any] = {
        "study": study.name,
        "title": study.title,
        "source": study.source,
        "scale": scale,
        "reduced": study.scale(scale).reduced,
        "seeds": list(seeds),
        "claims": claims,
        "command": f"neuralcollapse study {study.name} --scale {scale}",
        "training_minutes": round(sum(one["seconds"] for one in facts) / 60, 1),
        **{name: _each(facts, name) for name in ("neuralcollapse", "git_commit", "machine", "accelerator")},
        "finished": max((one["ended"] for one in facts if one.get("ended")), default=None),
    }
    write_yaml(folder.verdict, record)
    write_summary(folder, f"{study.name}: {study.title}", _sections(record), figures[:1])
    print(_verdicts(record))
    print_written([folder.summary, folder.verdict, *figures])


def _each(facts: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """What the runs' environments say of something, which may not be the same for all."""
    found = dict.fromkeys(str(one[name]) for one in facts if one.get(name))
    return ", ".join(found) or None


def _verdicts(record: Mapping[str, Any]) -> str:
    lines = [f"{record['study']}: {record['title']}", f"{record['source']}; scale {record['scale']}"]
    lines += [f"Reduced: {record['reduced']}"] if record["reduced"] else []
    for claim in record["claims"]:
        lines += ["", f"{claim['verdict'].upper()}: {claim['claim']}", f"  ({claim['measure']})"]
        lines += [f"  {numbers}" for numbers in claim["numbers"]]
    return "\n".join([*lines, ""])


def _sections(record: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs of a study's summary: its source and scale, and each claim with its verdict."""
    reduced = f" Reduced: {record['reduced']}." if record["reduced"] else ""
    sections = [f"{record['source']}. Scale {record['scale']}.{reduced}"]
    for claim in record["claims"]:
        sections.append(f"**{claim['verdict']}**: {claim['claim']} ({claim['measure']}).")
        sections.append("\n".join(f"- {numbers}" for numbers in claim["numbers"]))
    return [*sections, "Differences are of the same seed, intervals are Student's 95% interval over seeds (n - 1)."]


def _listing() -> str:
    lines = []
    for name in study_names():
        study = load_study(name)
        lines += [name, f"  {study.title}", f"  {study.source}; {len(study.claims)} claims"]
        for scale in SCALES:
            if scale not in study.scales:
                continue
            found = RunFolder(_FOLDER / f"{name}-{scale}").verdict
            record = read_yaml(found) if found.exists() else None
            last = "not run" if record is None else ", ".join(one["verdict"] for one in record["claims"])
            lines.append(f"  {scale}: {study.scale(scale).cost}; {last}")
    return "\n".join(lines)


STUDY = Command(
    "Train what is missing of a study's runs, draw its figure, and judge each of its claims: it holds, does not hold "
    "or is undecided, by differences of the same seed with Student's 95% interval over seeds (n - 1). A "
    "study that was stopped resumes when the command is given again, without training finished runs again. Without a "
    "name: list the studies, their costs and the last verdicts in runs/studies.",
    _add_arguments,
    _run,
)
