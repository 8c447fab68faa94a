"""Train a list of runs: what `train`, `compare` and a notebook call."""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from neuralcollapse.lab.config import BatchSettings, DataSettings, RunConfig
from neuralcollapse.lab.data.batches import EvaluationBatches, evaluation_batches
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.ranks import global_rank
from neuralcollapse.lab.results.files import write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import common_settings, tell_apart
from neuralcollapse.lab.results.provenance import forget_peak_memory, peak_memory
from neuralcollapse.lab.results.resuming import is_folder_name
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.training.distributed import in_processes, training_device
from neuralcollapse.lab.training.objective import Diverged
from neuralcollapse.lab.training.progress import Progress, check_loggers
from neuralcollapse.lab.training.run import Run

# Bytes that are left for the suffixes of temporary files in the longest name of a folder.
_LONGEST_NAME = 200


def train_runs(
    runs: RunConfig | Sequence[RunConfig] | Mapping[str, RunConfig],
    folder: str | Path,
    *,
    settings: dict[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    leave_out_failed: bool = False,
    parallel: int = 1,
    before_writing: Callable[[], None] | None = None,
    finish: Callable[[RunFolder], object] | None = None,
) -> RunFolder:
    """Train one run, or several, one after another or so many at a time.

    Settings, data, models and folders are checked for all of them before anything is written. A run that is finished
    is left as it is, one that was stopped goes on.

    Args:
        runs: The settings of one run, whose folder it will be; or of several, each with a folder of its own in
            ``runs/``, whose name says in what it differs, or is given: a plain name of a folder, which differs from the
            others in more than case.
        folder: Where to write.
        settings: What the folder keeps as the settings of several runs; by default what they have in common.
        resume: Go on with what the folder holds.
        overwrite: Delete what the folder holds.
        progress: Show progress.
        leave_out_failed: Name a run that fails on stderr, and go on with the next one.
        parallel: Train so many of several runs at a time, each in a process of its own: on a CPU with a part of its
            threads, on cuda on one device in turn.
        before_writing: Called when everything is checked.
        finish: Called with the folder when all runs are trained, to write what is made of them, while no other process
            may write there. The folder counts as finished only after it.

    Returns:
        The folder, whose `run_folders` are those of the runs.

    Raises:
        ValueError: if settings, data or a folder cannot be used; or a run failed, which is named.
        Diverged: if runs diverged; the others are trained to their end first.
        KeyboardInterrupt: The user stopped it; it can be resumed.

    Examples:
        >>> from neuralcollapse.lab import RunConfig, train_runs
        >>> runs = [RunConfig(method="fixed", epochs=1, backbone="mlp", width=16, seed=seed) for seed in (1, 2)]
        >>> folder = train_runs(runs, getfixture("tmp_path") / "digits", progress=False)
        >>> [run.path.name for run in folder.run_folders()]
        ['fixed-seed1', 'fixed-seed2']
    """
    if parallel < 1 or (parallel > 1 and isinstance(runs, RunConfig)):
        raise ValueError(f"parallel must be at least 1, and 1 for one run, got {parallel}")
    whole = RunFolder(folder)
    if isinstance(runs, RunConfig):
        if runs.ranks > 1 and global_rank() > 0:  # the first rank writes the folder
            Preparation(resumed=resume, progress=False).run(runs, whole).train(whole)
            return whole
        places, own = {whole: runs}, runs.in_force()
    else:
        named = runs if isinstance(runs, Mapping) else _named(runs)
        _check_folder_names(named)
        if any(run.ranks > 1 for run in named.values()):
            raise ValueError("devices must be 1 for each of several runs: ranks are for one run")
        places, own = {whole.run(name): run for name, run in named.items()}, common_settings([*named.values()])
    settings = own if settings is None else settings
    whole.check(settings, resume=resume, overwrite=overwrite)
    preparation = Preparation(resumed=resume, progress=progress)
    kinds = {_kind(run): (run, place) for place, run in reversed(places.items())}
    data = [preparation.run(*kind).data for kind in kinds.values()][-1]
    names = [] if whole in places else [place.path.name for place in places]
    facts = _facts(data) | ({"runs": names} if names else {})
    if before_writing is not None:
        before_writing()
    bar = Progress(len(places), shown=progress)
    if progress:
        _say_of_batches(next(iter(places.values())), len(data.train))
    done = finish or (lambda _: None)
    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "facts": facts, "reported": finish is not None}
    with closing(bar), whole.writing(settings, **options):
        there = whole.read_environment().get("runs", names)
        if new := [name for name in names if name not in there]:
            whole.add_facts(runs=there + new)
        if isinstance(runs, RunConfig):
            _train_one(preparation.run(runs, whole), whole, bar.next_run(runs.method, 0))
            bar.close()
            done(whole)
            return whole
        ended = _apart(places, bar, parallel, resume) if parallel > 1 else _in_turn(places, bar, preparation)
        diverged = []
        for name, failure in ended:
            if failure is None:
                continue
            if leave_out_failed:
                print(f"neuralcollapse: left out: {name}: {failure}", file=sys.stderr)
            elif "diverged" in whole.run(name).read_environment():
                diverged.append(f"{name}: {failure}")
            else:
                raise ValueError(f"{name}: {failure}") from failure
        bar.close()
        if not diverged or whole.run_folders():
            done(whole)
        if diverged:
            raise Diverged("; ".join(diverged))
    return whole


Ended = Iterator[tuple[str, ValueError | None]]


def _in_turn(places: Mapping[RunFolder, RunConfig], bar: Progress, preparation: Preparation) -> Ended:
    """Train each run that is not finished; the names of those that ended, and what they failed with."""
    for position, (place, run) in enumerate(places.items()):
        if place.is_finished(run.in_force()):
            continue
        try:
            _train_one_of_several(run, place, preparation, bar.next_run(place.path.name, position))
        except ValueError as error:
            yield place.path.name, error
        else:
            yield place.path.name, None


def _apart(places: Mapping[RunFolder, RunConfig], bar: Progress, number: int, resumed: bool) -> Ended:
    """The same, in processes."""
    unfinished = {
        place.path.name: (run, place.path, resumed)
        for place, run in places.items()
        if not place.is_finished(run.in_force())
    }
    bar.count_runs(len(places) - len(unfinished))
    with closing(in_processes(_train_apart, unfinished, number)) as ended:
        for name, failure in ended:
            bar.count_runs(1, name)
            yield name, failure


def _train_apart(run: RunConfig, path: Path, resumed: bool) -> None:
    _train_one_of_several(run, RunFolder(path), Preparation(resumed=resumed, progress=False))


def _train_one_of_several(
    run: RunConfig, place: RunFolder, preparation: Preparation, progress: Progress | None = None
) -> None:
    module = preparation.run(run, place)
    with place.writing(run.in_force(), resume=True, facts=_facts(module.data)):
        _train_one(module, place, progress)


def _train_one(module: Run, place: RunFolder, progress: Progress | None = None) -> None:
    check_not_diverged(place)
    _keep_labels(module.data, place)
    forget_peak_memory()
    try:
        module.train(place, progress)
    except Diverged as error:
        place.add_facts(diverged=str(error))
        raise
    parameters = sum(parameter.numel() for parameter in module.trained.model.parameters())
    before = place.read_environment().get("peak_memory_mib") or 0  # of a run that is resumed
    place.add_facts(parameters=parameters, peak_memory_mib=max(before, round(peak_memory())))


def check_not_diverged(place: RunFolder) -> None:
    """See whether a run can be resumed: from the same state it would diverge again.

    Raises:
        Diverged: if it has diverged.
    """
    if (reason := place.read_environment().get("diverged")) is not None:
        raise Diverged(f"the run in {str(place.path)!r} cannot be resumed: {reason}")


def _say_of_batches(run: RunConfig, images: int) -> None:
    if run.batch_size > images:
        print(f"batch_size {run.batch_size} is over the {images} training images: one batch an epoch", file=sys.stderr)


def _facts(data: ImageData) -> dict[str, Any]:
    """What a run's environment says of its data and where it is trained."""
    found = {"data": str(data), "num_classes": data.num_classes, "data_fingerprint": data.fingerprint()}
    found |= {"data_revision": data.revision, "device": str(data.train.labels.device)}
    if data.absent_classes:
        found["absent_classes"] = data.absent_classes
    if data.notes:
        found["data_notes"] = list(data.notes)
    return found | {"largest_class_share": round(float(data.train.labels.bincount().max()) / len(data.train), 6)}


class Preparation:
    """Data on the training device, loaded and standardised once, however many runs share them.

    Args:
        resumed: Whether runs go on: the labels that their folders keep are taken.
        progress: Show a progress bar while decoding.
    """

    def __init__(self, *, resumed: bool, progress: bool) -> None:
        self.resumed = resumed
        self.progress = progress
        self._data: dict[str, ImageData] = {}
        self._evaluation: dict[str, dict[str, EvaluationBatches]] = {}

    def run(self, run: RunConfig, place: RunFolder) -> Run:
        """What trains a run, on the labels that its folder keeps if it is resumed."""
        check_loggers(run.loggers)
        device = training_device(run)
        asked = f"{run.section(DataSettings)} {device}"
        if asked not in self._data:
            self._data[asked] = load_data(run, batch_size=run.batch_size, progress=self.progress).to(device)
        data = self._data[asked]
        if data.relabelled and self.resumed and place.train_labels.exists():
            return Run(run, data.with_train_labels(_read_labels(place.train_labels)))
        asked += str(run.section(BatchSettings))
        if asked not in self._evaluation:
            self._evaluation[asked] = evaluation_batches(data, run)
        return Run(run, data, self._evaluation[asked])


def _named(runs: Sequence[RunConfig]) -> dict[str, RunConfig]:
    """The runs by the names of their folders, which say in what they differ."""
    if not runs:
        raise ValueError("runs must hold at least one run")
    names = [f"{run.method}-seed{run.seed}" for run in runs]
    if len(set(names)) < len(names):
        parts = [
            [
                str(value) if name in ("method", "loss") else f"{name}{value}"
                for name, value in telling.items()
                if value is not None
            ]
            for telling in tell_apart([run.in_force() for run in runs])
        ]
        names = ["-".join([*part, f"seed{run.seed}"]) for part, run in zip(parts, runs, strict=True)]
    if len(set(map(repr, runs))) < len(runs):
        raise ValueError("runs must be different ones, got one of them twice")
    return dict(zip(_folder_names(names, runs), runs, strict=True))


def _folder_names(names: Sequence[str], runs: Sequence[RunConfig]) -> list[str]:
    """Names that every file system tells apart.

    Where two differ in characters that it does not take, in case alone or not at all, or one is too long, a hash of the
    settings follows.
    """
    plain = [re.sub(r"[^\w.=-]+", "_", name) for name in names]
    alike = Counter(map(_alike, plain))
    return [
        name
        if alike[_alike(name)] == 1 and len(name.encode()) <= _LONGEST_NAME
        else f"{name[: _LONGEST_NAME // 4]}-{hashlib.sha256(repr(run).encode()).hexdigest()[:8]}"
        for name, run in zip(plain, runs, strict=True)
    ]


def _alike(name: str) -> str:
    """A name as file systems see it that ignore case, or how letters are composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _check_folder_names(names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if not is_folder_name(name) or name.startswith("."):
            raise ValueError(f"runs must be named by plain names of folders, got {name!r}")
        other = seen.setdefault(_alike(name), name)
        if other != name:
            raise ValueError(f"runs must have names that differ in more than case, got {other!r} and {name!r}")


def _kind(run: RunConfig) -> str:
    """Runs of one kind differ in their seed alone."""
    return repr(run.model_copy(update={"seed": 0}))


def _keep_labels(data: ImageData, place: RunFolder) -> None:
    if data.relabelled and not place.train_labels.exists():
        labels = pd.DataFrame({"label": data.train.labels.cpu().numpy()})
        write_whole(place.train_labels, lambda path: labels.to_csv(path, index_label="image"))


def _read_labels(path: Path) -> torch.Tensor:
    try:
        return torch.tensor(read_table(path)["label"].tolist())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} must hold the labels trained on: {error}") from error
