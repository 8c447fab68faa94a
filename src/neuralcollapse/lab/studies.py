"""Studies: published figures as YAML files of runs, claims and scales, with their execution, figures and verdicts."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.experiments import single_run
from neuralcollapse.lab.recipes import load_recipe
from neuralcollapse.lab.results.files import sole_writer, write_yaml
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.statistics import rounded, student_interval
from neuralcollapse.lab.results.tables import COLUMNS, GROUPS, OF_GROUPS, read_table
from neuralcollapse.lab.results.verdicts import (
    Claim,
    Finished,
    Groups,
    Kind,
    Relation,
    Value,
    against_reference,
    judge,
    verdict_record,
)
from neuralcollapse.lab.settings import closest_names, load_typed_yaml
from neuralcollapse.lab.untrusted import check_class_is_named

if TYPE_CHECKING:
    import pandas as pd

SCALES = ("small", "full")
_HELD_OUT = "held-out"  # split of accuracies on the classes that a run held out
_TUNING_SHARE = 0.2  # share of the training images on which rates are chosen
_FOLDER = Path(__file__).parent / "studies"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of the runs of a study.

    Attributes:
        cost: Compute time of all runs, in words.
        seeds: Seeds of every run.
        settings: Settings of all runs in which they have an effect; they override those of recipes.
        runs: Settings of single runs, which override ``settings``.
        lr_candidates: Learning rates from which that of each run is chosen by the accuracy on a validation split, with
            a seed that is not compared. None if the runs give their rates.
        reduced: Differences from the published size, in words; None without differences.
    """

    cost: str
    seeds: list[int]
    settings: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    lr_candidates: list[float] | None
    reduced: str | None

    def seeds_from(self, given: int | list[int] | None) -> list[int]:
        """Return the seeds of every run: the given list, or the given number of seeds from the first seed of the scale.

        Raises:
            ValueError: if seeds are not distinct, or negative.
        """
        if given is None:
            return self.seeds
        seeds = given if isinstance(given, list) else [self.seeds[0] + index for index in range(given)]
        if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must be at least one, distinct and not negative, got {given}")
        return seeds


@dataclass(frozen=True, kw_only=True)
class Study:
    """Study of a published figure.

    Attributes:
        name: File name without its suffix.
        title: Subject of the figure.
        source: Paper and figure.
        figure: Name of the figure to draw, as in `plot`.
        runs: Settings of each run by name, with the ``recipe`` on which it is based. Empty for the unconstrained
            features model.
        is_ufm: If True, the runs are all methods and optimisers of the unconstrained features model.
        ood: Sets of unknown inputs on which the scores of every kept checkpoint are evaluated: built-in sets of
            `detect`, or names whose folders are given (`StudyOptions`).
        scores: Names of the evaluated scores.
        transfer: If True, the features of every kept checkpoint are evaluated on the classes that the runs held out.
        profile: If True, the blocks of every kept checkpoint are measured, with probes.
        claims: Claims to judge.
        scales: Scales by name.
    """

    name: str
    title: str
    source: str
    figure: str
    runs: dict[str, dict[str, Any]]
    is_ufm: bool
    claims: list[Claim]
    scales: dict[str, Scale]
    ood: list[str] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)
    transfer: bool = False
    profile: bool = False

    def scale(self, name: str) -> Scale:
        """Return a scale by name.

        Raises:
            ValueError: if the study has no scale with this name.
        """
        if name not in self.scales:
            raise ValueError(f"scale must be {' or '.join(self.scales)} for the study {self.name}, got {name!r}")
        return self.scales[name]


def study_names() -> list[str]:
    """Return the names of all studies, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_study(name: str | Path) -> Study:
    """Return a study, read from its file.

    Args:
        name: One of `study_names`, or the path of a file that ends in ``.yaml``.

    Raises:
        ValueError: if no study has this name (the message contains the nearest names), or the file is not a study.

    Examples:
        >>> study = load_study("papyan2020-cifar10")
        >>> study.scale("full").seeds, list(study.runs)
        ([0], ['cross-entropy'])
    """
    path, names = Path(name), study_names()
    if path.suffix != ".yaml":
        if str(name) not in names:
            raise ValueError(
                f"study must be one of those that 'neuralcollapse study' lists, or a file that ends in .yaml, "
                f"got {str(name)!r}{closest_names(str(name), names)}"
            )
        path = _FOLDER / f"{name}.yaml"
    try:
        content = load_typed_yaml(path.read_text(encoding="utf-8"))
        if "like" in content:
            content = _content_of(content.pop("like")) | content
        scales = {scale: _scale(content.pop(scale)) for scale in SCALES if scale in content}
        claims = [_claim(claim) for claim in content.pop("claims")]
        runs = content.pop("runs", {})
        study = Study(name=path.stem, runs=runs, is_ufm=not runs, claims=claims, scales=scales, **content)
    except (yaml.YAMLError, ValueError, AttributeError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} must be a study, but is not: {reason}") from error
    _check(study, path)
    return study


def _content_of(name: str) -> dict[str, Any]:
    """Return the content of a study, without its scales."""
    if name not in study_names():
        raise ValueError(f"like must be the name of a study, got {name!r}{closest_names(name, study_names())}")
    content = load_typed_yaml((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in SCALES}


def _check(study: Study, path: Path) -> None:
    """Check that claims refer to runs, metrics and levels that exist."""
    from neuralcollapse.catalogue import METRICS

    wrong = []
    if not study.scales:
        wrong.append(f"it has no scale, {' or '.join(SCALES)}")
    for name, scale in study.scales.items():
        given = [
            settings for settings in (scale.settings, *study.runs.values(), *scale.runs.values()) if "lr" in settings
        ]
        if scale.lr_candidates is not None and (given or len({*scale.lr_candidates}) < 2):
            wrong.append(f"lr_candidates of scale {name} must be at least two distinct rates, of runs that give no lr")
    if bool(study.ood) != bool(study.scores):
        wrong.append("ood and scores must be given together: the sets, and the scores to evaluate on them")
    if study.scores:
        from neuralcollapse.ood import SCORES

        wrong += [
            f"scores must be among {', '.join(SCORES)}, got {score!r}" for score in study.scores if score not in SCORES
        ]
    splits = _splits_of_evaluations(study)
    metrics = [*METRICS, *splits, *(f"{metric}_{group}" for metric, _, _ in OF_GROUPS.values() for group in GROUPS)]
    for claim in study.claims:
        values = [claim.value] + ([] if claim.than_value is None else [claim.than_value])
        levels = [value.level_of for value in values if value.level_of is not None]
        unknown = [run for run in (*claim.of, *claim.than, *levels) if run not in study.runs]
        if unknown and not study.is_ufm:
            wrong.append(f"a claim is about {unknown[0]!r}, which is not one of its runs {', '.join(study.runs)}")
        for value in values:
            wrong += _wrong_with(value, study, metrics, splits)
        if claim.than_value is not None and not claim.than:
            wrong.append("than_value must be part of a claim that compares runs")
        if claim.bound is None and (claim.relation == "like" or not claim.than):
            wrong.append(f"a claim {claim.relation!r} needs a bound")
    if wrong:
        raise ValueError(f"{str(path)!r} must be a study, but is not: {wrong[0]}")


def _wrong_with(
    value: Value, study: Study, metrics: Sequence[str], splits: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Yield the errors in the value of a claim, given the names of metrics and the splits that some of them need."""
    if value.kind != "fact" and value.of not in metrics and not study.is_ufm:
        yield f"a claim is about {value.of!r}, which is not a metric{closest_names(value.of, metrics)}"
    if value.split not in splits.get(value.of, [value.split]):
        yield f"a claim about {value.of} must have the split {' or '.join(splits[value.of])}, got {value.split!r}"
    if value.kind not in get_args(Kind):
        yield f"kind must be one of {', '.join(get_args(Kind))}, got {value.kind!r}"
    if value.kind in ("epochs", "fall") and math.isnan(value.level):
        yield f"a claim about {value.kind} of {value.of} has no level"
    if (value.kind == "share") != (value.level_of is not None):
        yield f"level_of belongs to claims of kind share, which need it; the kind is {value.kind}"


def _splits_of_evaluations(study: Study) -> dict[str, list[str]]:
    """Return the names of detection rates, such as ``"neco auroc"``, and of transfer accuracies, with their splits."""
    splits: dict[str, list[str]] = {}
    if study.scores:
        from neuralcollapse.lab.evaluate.detection import RATES

        splits |= {f"{score} {rate}": study.ood for score in study.scores for rate in RATES}
    if study.transfer:
        from neuralcollapse.lab.evaluate.transfer import ACCURACIES

        splits |= {accuracy: [_HELD_OUT] for accuracy in ACCURACIES}
    return splits


def study_runs(
    study: Study, scale: str, seeds: Sequence[int] | None = None, data: str | None = None
) -> dict[str, RunConfig]:
    """Return the runs of a study by the names of their folders.

    Args:
        study: Study to run.
        scale: Name of its scale.
        seeds: Seeds of every run, instead of those of the scale.
        data: Data of every run, instead of those of the recipes.

    Raises:
        ValueError: if the study does not have the scale, or a setting is invalid.

    Examples:
        >>> runs = study_runs(load_study("markou2024-mnist"), "small", seeds=[1])
        >>> {name: (run.method, run.seed, run.optimizer) for name, run in runs.items()}["fixed-seed1"]
        ('fixed', 1, 'agd')
    """
    size = study.scale(scale)
    runs = {}
    for seed in size.seeds if seeds is None else seeds:
        for label, settings in study.runs.items():
            given = {**settings, **size.runs.get(label, {}), "seed": seed} | ({} if data is None else {"data": data})
            recipe = given.pop("recipe", None)
            base = {} if recipe is None else {**load_recipe(recipe).settings, "recipe": recipe}
            runs[f"{label}-seed{seed}"] = single_run(given, RunConfig.override(base, size.settings))
    return runs


@dataclass(frozen=True)
class StudyOptions:
    """Options for running a study.

    Attributes:
        seeds: Number of seeds, or the seeds of every run; by default those of the scale.
        data: Data of every run; by default those of earlier runs in the folder, then those of the recipes.
        backbone: Class that may be imported if the file of the study names it as a backbone.
        parallel: Number of runs to train at a time.
        ood: Folder of each set of unknown inputs that is not built in, by name.
        overwrite: Whether to delete the runs in the folder and train again.
    """

    seeds: int | list[int] | None = None
    data: str | None = None
    backbone: str | None = None
    parallel: int = 1
    ood: Mapping[str, Path | None] = field(default_factory=dict)
    overwrite: bool = False


def run_study(
    study: Study, scale: str, folder: RunFolder, options: StudyOptions = StudyOptions()
) -> tuple[dict[str, Any], list[Path]]:
    """Train the missing runs of a study, draw its figure, judge its claims, and write verdicts and summary.

    Returns:
        The record of the verdicts, and the written files, beginning with the most informative.

    Raises:
        ValueError: if the folder has runs with other settings, or no run could be completed.
    """
    from neuralcollapse.lab.figures.summary import write_summary

    seeds = study.scale(scale).seeds_from(options.seeds)
    with ExitStack() as locks:
        if study.is_ufm:
            groups, figures = _ufm_results(study.scale(scale), seeds, folder, options)
            locks.enter_context(sole_writer(folder.path))
        else:
            groups, figures = _results(study, scale, seeds, folder, options, locks)
        record = _record(study, scale, seeds, groups)
        write_yaml(folder.verdict, record)
        write_summary(folder, f"{study.name}: {study.title}", _sections(record), figures[:1])
    return record, [folder.summary, folder.verdict, *figures]


def _results(
    study: Study, scale: str, seeds: Sequence[int], folder: RunFolder, options: StudyOptions, locks: ExitStack
) -> tuple[Groups, list[Path]]:
    """Train the missing runs and draw the figure; return the finished runs by name and seed, and the pictures."""
    _check_sets(study, options)
    data = options.data
    if data is None and not options.overwrite:
        configs = sorted(folder.runs.glob(f"*/{folder.config.name}"))
        data = str(RunFolder(configs[0].parent).settings()["data"]) if configs else None
    runs = study_runs(study, scale, seeds, data)
    for config in runs.values():
        check_class_is_named(config.in_force(), options.backbone, f"{study.name}.yaml")
        if "." in config.loss:
            raise ValueError(f"loss must be one that has a name in {study.name}.yaml, got {config.loss!r}")
        if config.hold_out_classes is None and (study.transfer or _HELD_OUT in study.ood):
            raise ValueError(
                f"hold_out_classes must be given in the runs of {study.name}.yaml, which evaluates on them"
            )
    candidates = study.scale(scale).lr_candidates
    if not options.overwrite and candidates is None:
        _check_existing(runs, folder)
    settings, resume = {"study": study.name, "scale": scale}, folder.config.exists() and not options.overwrite
    locks.enter_context(folder.writing(settings, resume=resume, overwrite=options.overwrite))
    if candidates is not None:
        compared = {*study.scale(scale).seeds, *seeds}
        runs = _with_chosen_rates(
            runs, candidates, compared, folder, settings, resume=resume, parallel=options.parallel
        )
        _check_existing(runs, folder)
    if options.overwrite or not all(_is_finished(folder.run(name)) for name in runs):
        _train_missing(study, runs, options, folder, resume=resume)
    finished: dict[str, dict[int, RunFolder]] = {label: {} for label in study.runs}
    for name, config in runs.items():
        if _is_finished(folder.run(name)):
            finished[name.rpartition("-seed")[0]][config.seed] = folder.run(name)
    all_finished = [run for of_label in finished.values() for run in of_label.values()]
    if study.ood:
        _detect(study, all_finished, options)
    if study.transfer:
        _transfer(all_finished, options)
    if study.profile:
        _measure_blocks(all_finished, options)
    groups: dict[str, dict[int, Finished]] = {label: {} for label in study.runs}
    for label, of_label in finished.items():
        for seed, run in of_label.items():
            facts = run.read_environment() | {"seconds": float(read_table(run.training_log)["seconds"].sum())}
            facts["lr"] = run.settings().get("lr")
            groups[label][seed] = Finished(_measured(run, study), facts)
    return groups, _draw(study, {label: list(of_label.values()) for label, of_label in finished.items()}, folder)


def _is_finished(run: RunFolder) -> bool:
    return run.config.exists() and run.read_environment().get("finished") is True


def _check_existing(runs: Mapping[str, RunConfig], folder: RunFolder) -> None:
    """Check that existing runs have the settings of the study.

    Raises:
        ValueError: if some have other settings; the message lists the differences.
    """
    differences = []
    for name, config in runs.items():
        if folder.run(name).config.exists():
            try:
                folder.run(name).check(config.in_force(), resume=True)
            except ValueError as error:
                differences.append(f"{name}: {error}")
    if differences:
        raise ValueError(
            f"{len(differences)} of the runs in {str(folder.path)!r} differ from the study: {'; '.join(differences)}; "
            "--out selects another folder, --overwrite trains all runs again"
        )


def _with_chosen_rates(
    runs: Mapping[str, RunConfig],
    rates: Sequence[float],
    compared: Collection[int],
    folder: RunFolder,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    parallel: int,
) -> dict[str, RunConfig]:
    """Train the runs of a label at each candidate rate, and return the runs with the best rate of their label."""
    from neuralcollapse.lab.training.tuning import best_rates, tuning_runs  # this import takes seconds

    seed = next(seed for seed in count() if seed not in compared)
    labels = {name: name.rpartition("-seed")[0] for name in runs}
    candidates = {
        f"{labels[name]}-lr{tuned.lr:g}-seed{seed}": (labels[name], tuned)
        for name, run in runs.items()
        for tuned in tuning_runs(run, rates, seed, _TUNING_SHARE)
    }
    best = best_rates(candidates, folder, settings, resume=resume, parallel=parallel)
    return {name: run.replace(lr=best[labels[name]]) for name, run in runs.items()}


def _train_missing(
    study: Study, runs: Mapping[str, RunConfig], options: StudyOptions, folder: RunFolder, *, resume: bool
) -> None:
    """Train the runs that are not finished; runs that fail are reported and skipped.

    Raises:
        ValueError: before training, if a set of unknown inputs cannot be used.
    """
    from neuralcollapse.lab.data.unknown import unknown_sets
    from neuralcollapse.lab.training.runs import Preparation, train_each  # this import takes seconds

    preparation = Preparation(resumed=resume, progress=True)
    facts = preparation.check(runs, folder, options.parallel)
    if study.ood:
        name, config = next(iter(runs.items()))
        first = preparation.run(config, folder.run(name))
        unknown_sets(_sets(study, options), first.data, first.evaluation["test"], config)
    folder.begin(facts)
    with closing(train_each(runs, folder, preparation, options.parallel)) as failures:
        for name, failure in failures:
            print(f"neuralcollapse: skipped: {name}: {failure}", file=sys.stderr)


def _check_sets(study: Study, options: StudyOptions) -> None:
    """Check that the given folders belong to sets of the study.

    Raises:
        ValueError: if one does not.
    """
    if unknown := [name for name in options.ood if name not in study.ood]:
        sets = ", ".join(study.ood) or "no such sets"
        raise ValueError(f"ood must be among the sets of the study {study.name}, {sets}, got {unknown[0]!r}")


def _sets(study: Study, options: StudyOptions) -> dict[str, Path | None]:
    """Return the folder of each set of unknown inputs, or None for built-in sets.

    Raises:
        ValueError: if a set needs a folder that is not given.
    """
    from neuralcollapse.lab.data.unknown import BUILT_IN

    sets = {name: options.ood.get(name) for name in study.ood}
    if without := [name for name, path in sets.items() if path is None and name not in BUILT_IN]:
        raise ValueError(
            f"study {study.name} needs the folder of the unknown inputs {without[0]}: --ood {without[0]}=FOLDER"
        )
    return sets


def _detect(study: Study, runs: Sequence[RunFolder], options: StudyOptions) -> None:
    """Evaluate the scores on every kept checkpoint of each run whose last checkpoint has not been evaluated.

    Raises:
        ValueError: if a set needs a folder that is not given, or as for `detect_run`.
    """
    from neuralcollapse.lab.evaluate.detection import detect_run
    from neuralcollapse.lab.training.runs import Preparation

    missing = [run for run in runs if not _is_detected(run, study)]
    sets = _sets(study, options) if missing else {}
    preparation = Preparation(resumed=True, progress=True)
    for run in missing:
        for _ in detect_run(run, preparation, sets, scores=study.scores, epochs="all", backbone=options.backbone):
            pass


def _transfer(runs: Sequence[RunFolder], options: StudyOptions) -> None:
    """Evaluate the features of every kept checkpoint of each run whose last checkpoint has not been evaluated.

    Raises:
        ValueError: if a run did not hold out classes, or as for `transfer_run`.
    """
    from neuralcollapse.lab.evaluate.transfer import transfer_run
    from neuralcollapse.lab.training.runs import Preparation

    preparation = Preparation(resumed=True, progress=True)
    for run in runs:
        if run.transfer.exists() and (read_table(run.transfer)["epoch"] == run.settings()["epochs"]).any():
            continue
        for _ in transfer_run(run, preparation, {}, layers=(), epochs="all", backbone=options.backbone):
            pass


def _measure_blocks(runs: Sequence[RunFolder], options: StudyOptions) -> None:
    """Measure the blocks, with probes, of every kept checkpoint for which this measurement is missing.

    Raises:
        ValueError: if a checkpoint cannot be measured, or as for `measure_run`.
    """
    from neuralcollapse.lab.evaluate.checkpoints import measure_run
    from neuralcollapse.lab.training.runs import Preparation

    preparation = Preparation(resumed=True, progress=True)
    for run in runs:
        for record in measure_run(run, preparation, layers="blocks", probes=True, backbone=options.backbone):
            if isinstance(record, ValueError):
                raise record


def _is_detected(run: RunFolder, study: Study) -> bool:
    """Return whether the last epoch of a run has the rates of each set and score; epochs are evaluated in order."""
    if not run.detection.exists():
        return False
    table = read_table(run.detection)
    last = table[table["epoch"] == run.settings()["epochs"]]
    return {(name, score) for name in study.ood for score in study.scores} <= {
        *zip(last["set"], last["score"], strict=True)
    }


def _measured(run: RunFolder, study: Study) -> pd.DataFrame:
    """Return the metrics of a run with detection rates (the set as split) and transfer accuracies of its features."""
    import pandas as pd

    from neuralcollapse.metrics.profile import FEATURES

    tables = [read_table(run.metrics)]
    if study.ood:
        rates = read_table(run.detection)
        tables.append(rates.assign(split=rates["set"], metric=rates["score"] + " " + rates["metric"])[COLUMNS])
    if study.transfer:
        accuracies = read_table(run.transfer)
        accuracies = accuracies[accuracies["layer"] == FEATURES]
        tables.append(accuracies.assign(split=_HELD_OUT)[COLUMNS])
    return pd.concat(tables, ignore_index=True)


def _draw(study: Study, runs: Mapping[str, list[RunFolder]], folder: RunFolder) -> list[Path]:
    """Draw the figure of a study from its finished runs, and return the files."""
    from neuralcollapse.lab.figures import draw
    from neuralcollapse.lab.results.distances import add_distances
    from neuralcollapse.lab.results.groups import RunGroups

    finished = {label: of_label for label, of_label in runs.items() if of_label}
    if not finished:
        raise ValueError(f"study {study.name} has no finished run")
    if study.figure == "markou":  # this figure shows distances, which training does not measure
        for run in (run for of_label in finished.values() for run in of_label):
            if "etf_means" not in set(read_table(run.metrics)["metric"]):
                add_distances(run)
    drawn = RunGroups(finished)
    figures = draw(study.figure, drawn, folder.figures, ["png"])
    for problem in drawn.problems.values():
        print(f"neuralcollapse: skipped: {problem}", file=sys.stderr)
    return figures


def _ufm_results(
    scale: Scale, seeds: Sequence[int], folder: RunFolder, options: StudyOptions
) -> tuple[Groups, list[Path]]:
    """Train the unconstrained features model as `ufm` does, and return its runs, with iterations instead of epochs."""
    from neuralcollapse.lab.ufm.compare import train_ufm
    from neuralcollapse.lab.ufm.settings import UFMSettings

    if list(seeds) != list(range(len(seeds))) or options.data is not None:
        raise ValueError("seeds of the unconstrained features model must be a number, and data must not be given")
    config = UFMSettings(**scale.settings, seeds=len(seeds))
    _, metrics, figures = train_ufm(config, folder, resume=folder.config.exists(), overwrite=options.overwrite)
    groups: dict[str, dict[int, Finished]] = {}
    keys = ["classes", "optimizer", "method", "seed"]
    for (classes, optimizer, method, seed), table in metrics.groupby(keys, sort=False):
        tidy = table.rename(columns={"iteration": "epoch"}).assign(split="train")
        seconds = tidy.loc[tidy["metric"] == "seconds", "value"].max()
        facts = folder.read_environment() | {"seconds": float(seconds)}
        groups.setdefault(f"UFM-{classes} {optimizer} {method}", {})[int(str(seed))] = Finished(tidy, facts)
    return groups, figures


def _record(study: Study, scale: str, seeds: Sequence[int], groups: Groups) -> dict[str, Any]:
    """Return the verdicts on the claims of a study, with the provenance of its runs."""
    from neuralcollapse.lab.data.unknown import BUILT_IN

    facts = [run.facts for runs in groups.values() for run in runs.values()]
    folders = [f"--ood {name}=FOLDER" for name in study.ood if name not in BUILT_IN]
    return {
        "study": study.name,
        "title": study.title,
        "source": study.source,
        "scale": scale,
        "reduced": study.scale(scale).reduced,
        "seeds": list(seeds),
        **({} if study.is_ufm else {"reached": _reached(groups)}),
        "claims": [verdict_record(claim, judge(claim, groups)) for claim in study.claims],
        **({"detection": _last_rates(study, groups)} if study.ood or study.transfer else {}),
        **({"groups": _last_of_groups(groups)} if study.figure == "groups" else {}),
        **({"trade_off": _last_and_shares(study, groups)} if study.figure == "trade-off" else {}),
        **({"rates": _rates(groups)} if study.scale(scale).lr_candidates else {}),
        "command": " ".join([f"neuralcollapse study {study.name} --scale {scale}", *folders]),
        "training_minutes": round(sum(of_run["seconds"] for of_run in facts) / 60, 1),
        **{name: _values_of(name, facts) for name in ("neuralcollapse", "git_commit", "machine", "accelerator")},
        "finished": max((of_run["ended"] for of_run in facts if of_run.get("ended")), default=None),
    }


def _reached(groups: Groups) -> dict[str, list[float]]:
    """Return the least and greatest last train accuracy and NC1 of all runs, which tell how far they have collapsed."""
    runs = [run.metrics for of_label in groups.values() for run in of_label.values()]
    reached = {}
    for metric in ("accuracy", "nc1_quotient"):
        values = [_last(table, metric, "train") for table in runs]
        reached[metric] = [rounded(number) for number in (min(values), max(values))]
    return reached


def _rates(groups: Groups) -> dict[str, float]:
    """Return the learning rate of each run by name."""
    return {label: next(iter(runs.values())).facts["lr"] for label, runs in groups.items() if runs}


def _last_rates(study: Study, groups: Groups) -> list[dict[str, Any]]:
    """Return for each run the last accuracy and NC1, the AUROC of each score on each set, and transfer accuracies."""
    quantities = {"accuracy": ("accuracy", "test"), "nc1_quotient": ("nc1_quotient", "train")}
    quantities |= {f"{name} {score}": (f"{score} auroc", name) for name in study.ood for score in study.scores}
    if study.transfer:
        quantities["linear_probe"] = ("linear_probe", _HELD_OUT)
    return _last_values(groups, quantities)


def _last_of_groups(groups: Groups) -> list[dict[str, Any]]:
    """Return for each run the last test accuracy and train NC1, over all classes and of each group of classes."""
    quantities = {
        name: (name, split)
        for metric, split, _ in OF_GROUPS.values()
        for name in (metric, *(f"{metric}_{group}" for group in GROUPS))
    }
    return _last_values(groups, quantities)


def _last_and_shares(study: Study, groups: Groups) -> list[dict[str, Any]]:
    """Return for each run the last test accuracy and train NC1 to NC3, and their comparison with the reference run.

    The reference is the first ``level_of`` of the claims, if any.
    """
    quantities = {"accuracy": "test", "nc1_quotient": "train", "nc2_etf_means": "train", "nc3_duality": "train"}
    rows = _last_values(groups, {name: (name, split) for name, split in quantities.items()})
    reference = next((claim.value.level_of for claim in study.claims if claim.value.level_of is not None), None)
    if reference is None or not groups.get(reference):
        return rows
    return [row | against_reference(row["run"], reference, quantities, groups) for row in rows]


def _last_values(groups: Groups, quantities: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Return for each finished run the mean over seeds of last values, with half the width of Student's 95% interval.

    Args:
        groups: Finished runs, by name and seed.
        quantities: Metric and split of each quantity by name.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for label in (label for label, runs in groups.items() if runs):
        runs = groups[label]
        row: dict[str, Any] = {"run": label}
        for quantity, (metric, split) in quantities.items():
            last = {seed: _last(run.metrics, metric, split) for seed, run in runs.items()}
            row[quantity] = [rounded(number) for number in student_interval(pd.Series(last, dtype=float))]
        rows.append(row)
    return rows


def _last(table: pd.DataFrame, metric: str, split: str) -> float:
    chosen = table[(table["metric"] == metric) & (table["split"] == split)]
    return float(chosen.sort_values("epoch")["value"].iloc[-1])


def _values_of(name: str, facts: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the distinct values of a fact of several runs."""
    values = dict.fromkeys(str(of_run[name]) for of_run in facts if of_run.get(name))
    return ", ".join(values) or None


def _sections(record: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs of a study's summary: its source and scale, and each claim with its verdict."""
    reduced = f" Reduced: {record['reduced']}." if record["reduced"] else ""
    sections = [f"{record['source']}. Scale {record['scale']}.{reduced}{reached_text(record)}"]
    for claim in record["claims"]:
        sections.append(f"**{claim['verdict']}**: {claim['claim']} ({claim['measure']}).")
        sections.append("\n".join(f"- {numbers}" for numbers in claim["numbers"]))
    return [
        *sections,
        "Differences are of runs with the same seed; intervals are Student's 95% over seeds (n - 1).",
    ]


def reached_text(record: Mapping[str, Any]) -> str:
    """Return a sentence on the last train accuracy and NC1 of the runs in the record of a study, if it has them."""
    if "reached" not in record:
        return ""
    accuracy, collapse = (
        [f"{number:.3g}" for number in record["reached"][name]] for name in ("accuracy", "nc1_quotient")
    )
    return (
        f" At the end, train accuracies are between {accuracy[0]} and {accuracy[1]}, and train NC1 (nc1_quotient) is "
        f"between {collapse[0]} and {collapse[1]}."
    )


def _scale(content: Mapping[str, Any]) -> Scale:
    return Scale(**{"settings": {}, "runs": {}, "lr_candidates": None, "reduced": None, **content})


def _claim(content: Mapping[str, Any]) -> Claim:
    """Return a claim from its mapping, in which a key such as ``below`` gives the relation, with runs or a bound."""
    given = {str(name).replace("_", " "): value for name, value in content.items()}
    relations = [name for name in given if name in get_args(Relation)]
    if len(relations) != 1:
        raise TypeError(f"a claim needs one of {', '.join(get_args(Relation))}, but has {relations}")
    relation = given.pop(relations[0])
    than, bound = ([], relation) if isinstance(relation, int | float) else (_list(relation), given.pop("bound", None))
    value, of = Value(**given.pop("value")), _list(given.pop("of"))
    than_value = Value(**given.pop("than value")) if "than value" in given else None
    return Claim(
        **given,
        value=value,
        of=of,
        relation=relations[0],  # type: ignore[arg-type]
        than=than,
        bound=bound,
        than_value=than_value,
    )


def _list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]
