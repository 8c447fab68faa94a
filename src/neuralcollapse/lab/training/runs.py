"""Training of one or several runs, as called by `train`, `compare` and notebooks."""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from neuralcollapse.lab.config import BatchSettings, DataSettings, RunConfig
from neuralcollapse.lab.data.batches import EvaluationBatches, evaluation_batches
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.process import global_rank
from neuralcollapse.lab.results.files import write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import common_settings, tell_apart
from neuralcollapse.lab.results.provenance import forget_peak_memory, peak_memory
from neuralcollapse.lab.results.resuming import is_folder_name
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.training.distributed import in_processes, resolve_precision, training_device
from neuralcollapse.lab.training.objective import Diverged
from neuralcollapse.lab.training.progress import Progress, check_loggers
from neuralcollapse.lab.training.run import Run

# Maximum length of a folder name in bytes, which leaves room for the suffixes of temporary files.
_LONGEST_NAME = 200


def train_runs(
    runs: RunConfig | Sequence[RunConfig] | Mapping[str, RunConfig],
    folder: str | Path | RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    parallel: int = 1,
) -> RunFolder:
    """Train one or several runs, one after another or several at a time.

    Settings, data, models and folders of all runs are checked before anything is written. Finished runs are not
    changed, and runs that were stopped resume.

    Args:
        runs: Settings of a single run, which is written to the folder itself; or of several runs, each with a folder in
            ``runs/``. The names of these folders show in which settings the runs differ, unless names are given as the
            keys of a mapping: plain folder names that differ from each other in more than case.
        folder: Folder to write; or a `RunFolder` inside its ``writing`` context, which is already locked and checked.
        resume: Resume the runs in the folder.
        overwrite: Delete the content of the folder.
        progress: Show progress.
        parallel: Number of runs to train at a time, each in a separate process: on a CPU with a part of its threads,
            with cuda on one device in turn.

    Returns:
        The folder, whose `run_folders` are those of the runs.

    Raises:
        ValueError: if settings, data or a folder cannot be used, or if a run failed; the message names it.
        Diverged: if runs diverged; the other runs are completed first.
        KeyboardInterrupt: if Ctrl-C stopped training, which can be resumed.

    Examples:
        >>> from neuralcollapse.lab import RunConfig, train_runs
        >>> runs = [RunConfig(method="fixed", epochs=1, backbone="mlp", width=16, seed=seed) for seed in (1, 2)]
        >>> folder = train_runs(runs, getfixture("tmp_path") / "digits", progress=False)
        >>> [run.path.name for run in folder.run_folders()]
        ['fixed-seed1', 'fixed-seed2']
    """
    whole = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    preparation = Preparation(resumed=resume, progress=progress)
    if isinstance(runs, RunConfig):
        if parallel != 1:
            raise ValueError(f"parallel must be 1 for one run, got {parallel}")
        if runs.ranks > 1 and global_rank() > 0:  # the first rank writes the folder
            preparation.run(runs, whole).train(whole)
            return whole
        with (
            whole.writing(runs.in_force(), resume=resume, overwrite=overwrite),
            closing(Progress(shown=progress)) as shown_progress,
        ):
            _train_one(runs, whole, preparation, shown_progress.next_run(runs.method, 0))
        return whole
    runs = runs if isinstance(runs, Mapping) else named_runs(runs)
    with whole.writing(common_settings([*runs.values()]), resume=resume, overwrite=overwrite):
        whole.begin(preparation.check(runs, whole, parallel))
        diverged = []
        with closing(train_each(runs, whole, preparation, parallel)) as failures:
            for name, failure in failures:
                if "diverged" not in whole.run(name).read_environment():
                    raise ValueError(f"{name}: {failure}") from failure
                diverged.append(f"{name}: {failure}")
        if diverged:
            raise Diverged("; ".join(diverged))
    return whole


class Preparation:
    """Data on the training device, loaded and standardised once for all runs that share them.

    Args:
        resumed: Whether runs may resume; the labels stored in their folders are then used.
        progress: Show progress, including that of decoding images.
    """

    def __init__(self, *, resumed: bool, progress: bool) -> None:
        self.resumed = resumed
        self.progress = progress
        self._warned = False
        self._data: dict[str, ImageData] = {}
        self._evaluation: dict[str, dict[str, EvaluationBatches]] = {}

    def run(self, config: RunConfig, folder: RunFolder) -> Run:
        """Build a run for training, with the labels stored in its folder if it is resumed.

        Raises:
            ValueError: if settings do not fit each other, the data or this machine.
        """
        data = self.data(config)
        if data.relabelled and self.resumed and folder.train_labels.exists():
            return Run(config, data.with_train_labels(_read_labels(folder.train_labels)))
        key = f"{_key(config)} {config.section(BatchSettings)}"
        if key not in self._evaluation:
            self._evaluation[key] = evaluation_batches(data, config)
        return Run(config, data, self._evaluation[key])

    def data(self, config: RunConfig) -> ImageData:
        """Return the data of a run on its device.

        Raises:
            ValueError: if settings do not fit the data or this machine.
        """
        check_loggers(config.loggers)
        device = training_device(config)
        if (key := _key(config)) not in self._data:
            data = load_data(config, batch_size=config.batch_size, progress=self.progress)
            self._data[key] = data.to(device)
        return self._data[key]

    def check(self, runs: Mapping[str, RunConfig], folder: RunFolder, parallel: int = 1) -> dict[str, Any]:
        """Check names, settings and data of several runs, and return facts of their data for the folder.

        Raises:
            ValueError: if names, settings or data cannot be used.
        """
        if parallel < 1:
            raise ValueError(f"parallel must be at least 1, got {parallel}")
        _check_folder_names(runs)
        if any(run.ranks > 1 for run in runs.values()):
            raise ValueError("devices must be 1 for several runs; several ranks are supported for single runs only")
        kinds = {repr(run.in_force() | {"seed": 0}): name for name, run in reversed([*runs.items()])}
        built = [self.run(runs[name], folder.run(name)) for name in kinds.values()]
        for run in built:
            run.check_loss()
        data = built[-1].data
        self.warn_of_one_batch(next(iter(runs.values())), data)
        return data_facts(data) | {"runs": list(runs)}

    def warn_of_one_batch(self, config: RunConfig, data: ImageData) -> None:
        """Print once if a batch is larger than the train split."""
        if self.progress and not self._warned and config.batch_size > len(data.train):
            images = f"the {len(data.train)} training images"
            print(f"batch_size {config.batch_size} exceeds {images}: one batch per epoch", file=sys.stderr)
            self._warned = True


def train_each(
    runs: Mapping[str, RunConfig], folder: RunFolder, preparation: Preparation, parallel: int = 1
) -> Generator[tuple[str, ValueError], None, None]:
    """Train each run that is not finished, into its folder in ``runs/``; yield the names of failed runs with reasons.

    Args:
        runs: Settings by name, already checked by `Preparation.check`.
        folder: Folder of all runs, for which `RunFolder.begin` was called.
        preparation: Data of the runs.
        parallel: Number of runs to train at a time, each in a separate process.
    """
    unfinished = [name for name, run in runs.items() if not folder.run(name).is_finished(run.in_force())]
    with closing(Progress(len(runs), shown=preparation.progress)) as progress:
        if parallel > 1:
            progress.count_runs(len(runs) - len(unfinished))
            tasks = {name: (runs[name], folder.run(name).path, preparation.resumed) for name in unfinished}
            with closing(in_processes(_train_in_process, tasks, parallel)) as ended:
                for name, failure in ended:
                    progress.count_runs(1, name)
                    if failure is not None:
                        yield name, failure
            return
        for position, name in enumerate(runs):
            if name in unfinished:
                try:
                    _train_into(runs[name], folder.run(name), preparation, progress.next_run(name, position))
                except ValueError as error:
                    yield name, error


def _train_in_process(config: RunConfig, path: Path, resumed: bool) -> None:
    _train_into(config, RunFolder(path), Preparation(resumed=resumed, progress=False), Progress(shown=False))


def _train_into(config: RunConfig, folder: RunFolder, preparation: Preparation, progress: Progress) -> None:
    """Train one of several runs."""
    with folder.writing(config.in_force(), resume=True):
        _train_one(config, folder, preparation, progress)


def _train_one(config: RunConfig, folder: RunFolder, preparation: Preparation, progress: Progress) -> None:
    """Train a run whose folder is locked."""
    reason = folder.read_environment().get("diverged") if preparation.resumed else None
    if reason is not None:  # the run would diverge again from the same state
        raise Diverged(f"the run in {str(folder.path)!r} cannot be resumed: {reason}")
    run = preparation.run(config, folder)
    run.check_loss()
    preparation.warn_of_one_batch(config, run.data)
    train_prepared(run, folder, progress, resumed=preparation.resumed)


def train_prepared(run: Run, folder: RunFolder, progress: Progress, *, resumed: bool) -> None:
    """Train a run into its locked folder, and record facts of its data and, if it diverges, of its divergence.

    Args:
        run: The run.
        folder: Folder of the run, inside ``writing``.
        progress: Display of the progress.
        resumed: Whether the run may resume from the folder.

    Raises:
        Diverged: if a value is not finite.
        ValueError: if the run was started with another precision, or as for `Run.train`.
    """
    precision = resolve_precision(run.config.precision, run.data.train.labels.device)
    began_with = folder.read_environment().get("precision", precision) if resumed else precision
    if precision != began_with:
        raise ValueError(f"precision auto is {precision} on this machine, but the run was started with {began_with}")
    folder.begin(data_facts(run.data) | {"precision": precision})
    _keep_labels(run.data, folder)
    forget_peak_memory()
    try:
        run.train(folder, progress)
    except Diverged as error:
        folder.add_facts(diverged=str(error))
        raise
    parameters = sum(parameter.numel() for parameter in run.trained.model.parameters())
    earlier = folder.read_environment().get("peak_memory_mib") or 0  # present if the run was resumed
    folder.add_facts(parameters=parameters, peak_memory_mib=max(earlier, round(peak_memory())))


def _key(config: RunConfig) -> str:
    """Return a text that is the same for runs that share their data."""
    return f"{config.section(DataSettings)} {training_device(config)}"


def data_facts(data: ImageData) -> dict[str, Any]:
    """Return the facts of data and device to store in the environment of a run."""
    facts = {"data": str(data), "num_classes": data.num_classes, "data_fingerprint": data.fingerprint()}
    facts |= {"data_revision": data.revision, "device": str(data.train.labels.device)}
    if data.absent_classes:
        facts["absent_classes"] = data.absent_classes
    if data.notes:
        facts["data_notes"] = list(data.notes)
    return facts | {"largest_class_share": round(float(data.train.labels.bincount().max()) / len(data.train), 6)}


def named_runs(runs: Sequence[RunConfig]) -> dict[str, RunConfig]:
    """Return the runs by folder names that show in which settings the runs differ."""
    if not runs:
        raise ValueError("runs must contain at least one run")
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
        raise ValueError("runs must be distinct, got one of them twice")
    return dict(zip(_folder_names(names, runs), runs, strict=True))


def _folder_names(names: Sequence[str], runs: Sequence[RunConfig]) -> list[str]:
    """Return folder names that are distinct on every file system.

    If names are equal, differ only in case or in invalid characters, or are too long, a hash of the settings is
    appended.
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
    """Return a name as it is compared by file systems that ignore case or the composition of letters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _check_folder_names(names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if not is_folder_name(name) or name.startswith("."):
            raise ValueError(f"runs must have plain folder names, got {name!r}")
        other = seen.setdefault(_alike(name), name)
        if other != name:
            raise ValueError(f"runs must have names that differ in more than case, got {other!r} and {name!r}")


def _keep_labels(data: ImageData, place: RunFolder) -> None:
    if data.relabelled and not place.train_labels.exists():
        labels = pd.DataFrame({"label": data.train.labels.cpu().numpy()})
        write_whole(place.train_labels, lambda path: labels.to_csv(path, index_label="image"))


def _read_labels(path: Path) -> torch.Tensor:
    try:
        return torch.tensor(read_table(path)["label"].tolist())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} must contain the training labels: {error}") from error
