"""Class-incremental training: a first session, which is an ordinary run, and later sessions that add classes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from neuralcollapse.heads import AttachedHead, ClassMeanClassifier, Head, LearnedClassifier
from neuralcollapse.lab.config import BatchSettings, RunConfig, derived_seed
from neuralcollapse.lab.data.batches import EvaluationBatches, evaluation_batches
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.experiments import FROZEN, STRATEGIES, Incremental, Strategy, incremental_runs
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.results.files import write_csv
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import common_settings
from neuralcollapse.lab.results.sessions import COLLAPSE, of_session, session_metrics
from neuralcollapse.lab.results.tables import SESSION_COLUMNS, read_table
from neuralcollapse.lab.training.checkpoint import CheckpointFiles
from neuralcollapse.lab.training.objective import Diverged
from neuralcollapse.lab.training.progress import Progress
from neuralcollapse.lab.training.run import Run, new_model
from neuralcollapse.lab.training.runs import Preparation, data_facts, train_prepared
from neuralcollapse.metrics import ClassMoments, MeasureOptions
from neuralcollapse.metrics.collapse import measure_moments

# Constants that, combined with the seed of a run, give the seeds of random choices per class or session.
_SHOTS, _REPLAY, _ROWS = 4, 5, 6


def train_incremental(
    protocol: Incremental,
    settings: Mapping[str, Any],
    folder: str | Path | RunFolder,
    *,
    base: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Train a model on the first classes and then add the others, with each strategy and seed.

    The first session of each method and seed is an ordinary run in ``runs/``, with the other classes held out; the
    later sessions of a strategy are in its ``sessions/``. Each trained session has its own checkpoints, from which it
    resumes. Results are written after each session.

    Args:
        protocol: Sessions, strategies and seeds.
        settings: Settings of all runs, as for `incremental_runs`.
        folder: Folder to write; or a `RunFolder` inside its ``writing`` context, which is already locked and checked.
        base: As for `incremental_runs`.
        resume: Resume the sessions in the folder.
        overwrite: Delete the content of the folder.
        progress: Show progress.

    Returns:
        The table in ``sessions.csv``: columns strategy, seed, session_lr (0 for class means, which are not trained in
        these sessions), session (from 1), split, classes (``all`` classes seen; ``old``, those of the first session;
        ``new``, those added since; ``session j``), metric and value. The metrics are those of `session_metrics`, and
        NC1 to NC3 of the classes (NaN for a single class), in evaluation mode on images without augmentation. The train
        split contains all images that were trained on so far.

    Raises:
        ValueError: if settings, data or a folder cannot be used; raised before anything is written.
        Diverged: if a session diverged; the message names it.
    """
    whole = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    runs = incremental_runs(protocol, settings, base)
    preparation = Preparation(resumed=resume, progress=progress)
    with whole.writing(protocol.in_force() | common_settings(runs), resume=resume, overwrite=overwrite):
        sessions = SessionData(preparation.data(runs[0]), protocol, runs[0])
        _check(sessions, runs)
        whole.begin(data_facts(sessions.data) | {"runs": [_base_name(run) for run in runs]})
        if protocol.session_lr == "auto":
            rates = _chosen_rates(sessions, runs, preparation, whole, resume=resume)
        else:
            of_methods = {run.method: protocol.session_lr or (run.lr or 0) / 10 for run in runs}
            rates = {name: of_methods[STRATEGIES[name]] for name in protocol.strategies}
        courses = [
            Course(strategy, run, None if strategy in FROZEN else rates[strategy], sessions)
            for seed in protocol.base_sessions.seed_list
            for strategy in protocol.strategies
            for run in runs
            if (run.method, run.seed) == (STRATEGIES[strategy], seed)
        ]
        return _train_courses(courses, whole, preparation)


class SessionData:
    """Images of each session, counted from 1; the labels are those of the data.

    Args:
        data: Images of all classes, on the training device.
        protocol: Sizes of the sessions, shots and replay.
        settings: Batches of all runs.

    Attributes:
        base: Images of the first session, equal to those of a run that holds out the other classes.
        evaluation: Un-augmented batches of the first session; their standardisation is used for all images.
        ends: Number of classes seen after each session.

    Raises:
        ValueError: if the data have fewer classes, or fewer images of a class, than the protocol needs.
    """

    def __init__(self, data: ImageData, protocol: Incremental, settings: BatchSettings) -> None:
        self.data, self.protocol = data, protocol
        self.ends = list(accumulate(protocol.sessions))
        first, total = self.ends[0], self.ends[-1]
        if total > data.num_classes:
            raise ValueError(f"sessions must have at most the {data.num_classes} classes of the data, got {total}")
        counts = data.train.labels.bincount(minlength=data.num_classes)[:total].tolist()
        if (shots := protocol.shots) is not None and shots > min(counts[first:]):
            raise ValueError(
                f"shots must be at most {min(counts[first:])}, the training images of the smallest class that is "
                f"added, got {shots}"
            )
        if (protocol.replay or 0) > max(counts[:first]):
            raise ValueError(
                f"replay must be at most {max(counts[:first])}, the training images of the largest class of the first "
                f"session, got {protocol.replay}"
            )
        for split, part in data.splits.items():
            present = part.labels.bincount(minlength=data.num_classes)[:total].split(protocol.sessions)
            if (empty := next((number for number, of in enumerate(present, 1) if not int(of.sum())), 0)) > 0:
                raise ValueError(f"sessions must have {split} images of their classes, but session {empty} has none")
        self.names = data.class_names or tuple(map(str, range(data.num_classes)))
        self.later_classes = list(self.names[first:])
        labels = data.train.labels.cpu()
        self._of_class = [(labels == label).nonzero().flatten() for label in range(total)]
        held_out = data.test.take((data.test.labels >= first).nonzero().flatten())
        seen = self._images(1, (labels < first).nonzero().flatten())
        self.base = replace(seen, held_out=held_out if len(held_out) else None)
        self.evaluation = evaluation_batches(self.base, settings)

    def training_images(self, session: int, seed: int) -> ImageData:
        """Return the training images of a later session: those of its classes, and replayed ones of earlier classes."""
        start, end = self.ends[session - 2 : session]
        indices = [self._trained_on(label, seed) for label in range(start, end)]
        for label in range(start if self.protocol.replay else 0):
            of_class = self._trained_on(label, seed)
            order = _permutation(len(of_class), seed, label, _REPLAY)
            indices.append(of_class[order[: self.protocol.replay]])
        return self._images(session, torch.cat(indices))

    def added_images(self, session: int, seed: int) -> EvaluationBatches:
        """Return un-augmented batches of the training images of the classes that a session adds."""
        start, end = ([0, *self.ends])[session - 1 : session + 1]
        return self._batches("train", torch.cat([self._trained_on(label, seed) for label in range(start, end)]))

    def seen_images(self, session: int, seed: int) -> dict[str, EvaluationBatches]:
        """Return un-augmented batches of each split after a session; train contains all images trained on so far."""
        batches = {}
        for name, split in self.data.splits.items():
            if name == "train":
                indices = torch.cat([self._trained_on(label, seed) for label in range(self.ends[session - 1])])
            else:
                indices = (split.labels < self.ends[session - 1]).nonzero().flatten()
            batches[name] = self._batches(name, indices)
        return batches

    def _trained_on(self, label: int, seed: int) -> Tensor:
        of_class, shots = self._of_class[label], self.protocol.shots
        if label < self.ends[0] or shots is None:
            return of_class
        return of_class[_permutation(len(of_class), seed, label, _SHOTS)[:shots].sort().values]

    def _images(self, session: int, train: Tensor) -> ImageData:
        """Return the given training images, and the other splits restricted to the classes seen after a session."""
        end, splits = self.ends[session - 1], self.data.splits
        parts: dict[str, Any] = {
            name: split.take(train if name == "train" else (split.labels < end).nonzero().flatten())
            for name, split in splits.items()
        }
        return replace(self.data, **parts, num_classes=end, class_names=self.names[:end], notes=())

    def _batches(self, split: str, indices: Tensor) -> EvaluationBatches:
        return replace(self.evaluation["train"], split=self.data.splits[split].take(indices))


def _permutation(number: int, *seeds: int) -> Tensor:
    return torch.randperm(number, generator=torch.Generator().manual_seed(derived_seed(*seeds)))


class _LaterSession(Run):
    """Session after the first, in which means and variances are constant, because its batches contain only few classes.

    These are the statistics of batch norm, and the class means and the global mean of a head that is not learned: in a
    batch with a single class, the class mean equals the global mean.
    """

    def _set_up(self) -> tuple[int, int]:
        position = super()._set_up()
        for module in self.trained.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        if not isinstance(self.trained.model.head, LearnedClassifier):
            self.trained.model.head.eval()
        return position


@dataclass(frozen=True)
class Course:
    """All sessions of one strategy with one seed.

    Attributes:
        strategy: Name of the strategy.
        run: Settings of the first session, without the classes to hold out.
        rate: Learning rate of the later sessions; None if the network is frozen.
        sessions: The images.
        whole: All images, if ``sessions`` are without the validation images that are held out for the choice of rates:
            later sessions then have more epochs, so that their number of steps is about that with all images.
    """

    strategy: Strategy
    run: RunConfig
    rate: float | None
    sessions: SessionData
    whole: SessionData | None = None

    @property
    def protocol(self) -> Incremental:
        """The protocol."""
        return self.sessions.protocol

    @property
    def key(self) -> tuple[str, int, float]:
        """Values of the first columns of the table."""
        return self.strategy, self.run.seed, self.rate or 0.0

    @cached_property
    def config(self) -> RunConfig:
        """Settings of the first session."""
        return self.run.model_copy(update={"hold_out_classes": self.sessions.later_classes})

    def later_config(self, session: int) -> RunConfig:
        """Return the settings of a later session."""
        batches, batches_of_whole = (
            math.ceil(len(sessions.training_images(session, self.run.seed).train.labels) / self.config.batch_size)
            for sessions in (self.sessions, self.whole or self.sessions)
        )
        options = self.config.schedule_options or {}
        options = {name: value for name, value in options.items() if name not in ("warmup_epochs", "step_at")}
        return self.config.replace(
            epochs=round((self.protocol.session_epochs or 0) * batches_of_whole / batches),
            lr=self.rate,
            measure_at=[],
            keep_at=None,
            schedule_options=options or None,
        )

    def first_run(self) -> Run:
        """Build the first session."""
        images, batches = self.sessions.base, self.sessions.evaluation
        assigned = self.sessions.ends[-1] if self.strategy == "preassigned-etf" else None
        return Run(self.config, images, batches, new_model(self.config, images, batches["train"], assigned=assigned))

    def add_classes(self, session: int, model: AttachedHead) -> None:
        """Add the classes of a later session to the model, and freeze the modules of the setting ``freeze``."""
        number = self.protocol.sessions[session - 1]
        generator = torch.Generator().manual_seed(derived_seed(self.run.seed, session, _ROWS))
        model.grow(number, generator=None if self.strategy == "preassigned-etf" else generator)
        for name in self.protocol.freeze or []:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"freeze must name modules of the model, got {name!r}") from None
            module.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"freeze must leave parameters to train, but with {self.strategy} it leaves none")

    def later_run(self, session: int, model: AttachedHead) -> Run:
        """Build a later session for a model that already has its classes."""
        images = self.sessions.training_images(session, self.run.seed)
        return _LaterSession(self.later_config(session), images, {"train": self.sessions.evaluation["train"]}, model)

    def models(self, folder: RunFolder, progress: Progress) -> Iterator[AttachedHead]:
        """Yield the model after each session in turn; sessions that are not finished in the folder are trained."""
        first = self.first_run()
        self._train(first, folder.run(_base_name(self.run)), 1, progress)
        model = first.trained.model
        if self.strategy in FROZEN:
            yield from self._of_class_means(model)
            return
        yield model
        for session in range(2, len(self.sessions.ends) + 1):
            self.add_classes(session, model)
            if self.strategy == "grown-etf":
                self._admit(session, model)
            later = self.later_run(session, model)
            path = folder.run(_base_name(self.run)).path / "sessions" / f"{self.strategy}-lr{self.rate}-{session}"
            self._train(later, RunFolder(path), session, progress)
            yield model

    def _train(self, run: Run, folder: RunFolder, session: int, progress: Progress) -> None:
        """Train a session unless it is finished, and set its model to the weights that are measured."""
        name = f"{self.strategy}, seed {self.run.seed}, session {session}"
        if not folder.is_finished(run.config.in_force()):
            try:
                with folder.writing(run.config.in_force(), resume=True):
                    train_prepared(run, folder, progress.next_run(name, progress.position), resumed=True)
            except ValueError as error:
                raise type(error)(f"{name}: {error}") from error
        progress.position += 1
        state = CheckpointFiles(run.config, run.fingerprint).load(folder.last_checkpoint)["state_dict"]
        run.trained.load_state_dict(state)
        run.trained.model.load_state_dict(run.trained.measured.state_dict())

    @torch.no_grad()
    def _of_class_means(self, model: AttachedHead) -> Iterator[AttachedHead]:
        """Yield the frozen model after adding the class means of the images of each session."""
        trained: Head = model.head  # type: ignore[assignment]
        head = ClassMeanClassifier(trained.in_features, trained.num_classes, feature_norm=trained.feature_norm)
        model.head = head.to(next(model.parameters()).device)
        for session in range(1, len(self.sessions.ends) + 1):
            self._admit(session, model)
            yield model

    @torch.no_grad()
    def _admit(self, session: int, model: AttachedHead) -> None:
        """Let the head admit the classes of a session by means of their training images."""
        model.eval()
        images = self.sessions.added_images(session, self.run.seed)
        with evaluation_layout(model):
            outputs = [(model.model(images_of_batch), labels) for images_of_batch, labels in images]
        features, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        head: Any = model.head
        head.admit(features, labels)
        model.num_classes = head.num_classes


def _base_name(run: RunConfig) -> str:
    return f"{run.method}-seed{run.seed}"


def _check(sessions: SessionData, runs: Sequence[RunConfig]) -> None:
    """Build every session of each strategy once, with untrained models; raise a `ValueError` if one is invalid."""
    for strategy in sessions.protocol.strategies:
        run = next(run for run in runs if run.method == STRATEGIES[strategy])
        course = Course(strategy, run, run.lr, sessions)
        first = course.first_run()
        first.check_loss()
        model = first.trained.model
        if strategy not in FROZEN:
            for session in range(2, len(sessions.ends) + 1):
                try:
                    course.add_classes(session, model)
                    course.later_run(session, model).check_loss()
                except ValueError as error:
                    raise ValueError(f"session {session} with {strategy} is invalid: {error}") from error


def _train_courses(
    courses: Sequence[Course], folder: RunFolder, preparation: Preparation, *, skip_diverged: bool = False
) -> pd.DataFrame:
    """Train courses, and write the table after each session; return it.

    Args:
        courses: Courses to train.
        folder: Folder to write, for which `RunFolder.begin` was called.
        preparation: Whether progress is shown.
        skip_diverged: Report courses that diverge, and train the others.

    Raises:
        Diverged: if a course diverged and ``skip_diverged`` is False.
    """
    table = read_table(folder.sessions) if folder.sessions.exists() else pd.DataFrame(columns=SESSION_COLUMNS)
    rows = list(table.itertuples(index=False, name=None))
    number = len({_base_name(course.run) for course in courses})
    number += sum(len(course.sessions.ends) - 1 for course in courses if course.rate is not None)
    with closing(Progress(number, shown=preparation.progress)) as progress:
        for course in courses:
            known = {row[3]: row for row in rows if (row[0], row[1], row[2]) == course.key}
            if len(known) == len(course.sessions.ends):
                continue
            try:
                for session, model in enumerate(course.models(folder, progress), start=1):
                    if session not in known:
                        rows += _results(course, session, model, rows)
                        write_csv(folder.sessions, pd.DataFrame(rows, columns=SESSION_COLUMNS))
            except Diverged as error:
                if not skip_diverged:
                    raise
                print(f"neuralcollapse: skipped: session_lr {course.rate}: {error}", file=sys.stderr)
    return pd.DataFrame(rows, columns=SESSION_COLUMNS)


def _chosen_rates(
    whole: SessionData, runs: Sequence[RunConfig], preparation: Preparation, folder: RunFolder, *, resume: bool
) -> dict[Strategy, float]:
    """Return the candidate of each strategy with the best validation accuracy, averaged over the later sessions.

    These trainings are stored in ``tuning/`` of the folder. Their later sessions have about as many steps as those with
    all images, because a rate is good only for a number of steps.

    Args:
        whole: All images.
        runs: Settings of the first sessions.
        preparation: As for `train_incremental`.
        folder: Folder of the compared strategies.
        resume: Resume the sessions in the folder.

    Raises:
        ValueError: if a strategy diverges at every candidate.
    """
    protocol = whole.protocol
    seeds = protocol.base_sessions.seed_list
    seed, candidates = next(seed for seed in count() if seed not in seeds), sorted(protocol.session_lr_candidates or [])
    tuned = {
        run.method: run.replace(seed=seed, validation_share=run.validation_share or protocol.tuning_share)
        for run in runs
    }
    first, tuning = next(iter(tuned.values())), RunFolder(folder.tuning)
    sessions = SessionData(preparation.data(first), protocol, first)
    trained = [name for name in protocol.strategies if name not in FROZEN]
    with tuning.writing(protocol.in_force() | common_settings([*tuned.values()]), resume=resume):
        tuning.begin(data_facts(sessions.data) | {"runs": [_base_name(run) for run in tuned.values()]})
        courses = [
            Course(name, tuned[STRATEGIES[name]], rate, sessions, whole) for name in trained for rate in candidates
        ]
        table = _train_courses(courses, tuning, preparation, skip_diverged=True)
    chosen = table[
        (table["split"] == "validation")
        & (table["classes"] == "all")
        & (table["metric"] == "accuracy")
        & (table["session"] > 1)
    ]
    accuracies = chosen.groupby(["strategy", "session_lr"])["value"].agg(["mean", "count"])
    finished = accuracies[accuracies["count"] == len(sessions.ends) - 1]["mean"]
    rates: dict[Strategy, float] = {}
    for name in trained:
        of_rates = {rate: finished[name, rate] for rate in candidates if (name, rate) in finished.index}
        if not of_rates:
            raise ValueError(f"session_lr_candidates must have one at which {name} does not diverge, got {candidates}")
        rates[name] = max(of_rates, key=lambda rate: (of_rates[rate], -rate))
    return rates


@torch.no_grad()
def _results(
    course: Course, session: int, model: AttachedHead, earlier: Sequence[tuple[Any, ...]]
) -> list[tuple[Any, ...]]:
    """Return the rows of a session, from its model and the rows of earlier sessions."""
    ends, rows = course.sessions.ends[:session], []
    for split, batches in course.sessions.seen_images(session, course.run.seed).items():
        correct, moments = _observed(model, batches, ends[0])
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        counts = sum(moments[name].counts for name in moments).cpu()  # type: ignore[union-attr]
        sizes = [int(counts[start:end].sum()) for start, end in bounds]
        last = [int(correct[start:end].sum()) / size for (start, end), size in zip(bounds, sizes, strict=True)]
        known = {
            (row[3], row[5]): row[7]
            for row in earlier
            if row[:3] == course.key and row[4] == split and row[6] == "accuracy"
        }
        accuracies = [[known[number, of_session(j)] for j in range(1, number + 1)] for number in range(1, session)]
        values = session_metrics([*accuracies, last], sizes)
        values |= {(name, metric): value for name, metric, value in _collapse(model.head, moments)}  # type: ignore[arg-type]
        rows += [(*course.key, session, split, classes, metric, value) for (classes, metric), value in values.items()]
    return rows


def _observed(model: AttachedHead, batches: EvaluationBatches, old: int) -> tuple[Tensor, dict[str, ClassMoments]]:
    """Return the number of correct predictions per class (K,), and the moments of old and of new classes."""
    model.eval()
    head: Head = model.head  # type: ignore[assignment]
    shape, device = head.weight.shape, head.weight.device
    moments = {name: ClassMoments(*shape, dtype="mixed", device=device) for name in ("old", "new")}
    correct = torch.zeros(shape[0], dtype=torch.int64, device=device)
    with evaluation_layout(model):
        for images, labels in batches:
            features, weight, bias = head.prepare(model.model(images))
            answers = head.decide(features, weight, bias).argmax(1)
            correct += labels[answers == labels].bincount(minlength=shape[0])
            for name, chosen in (("old", labels < old), ("new", labels >= old)):
                moments[name].update(features[chosen], labels[chosen])
    return correct.cpu(), moments


def _collapse(head: Head, moments: Mapping[str, ClassMoments]) -> Iterator[tuple[str, str, float]]:
    """Yield NC1 to NC3 of old, new and all classes; they are defined for two or more classes."""
    both = ClassMoments.from_state({name: value.clone() for name, value in moments["old"].state.items()})
    both.merge(moments["new"])
    bias = None if head.bias is None else head.bias.double()
    for classes, of_classes in {**moments, "all": both}.items():
        values = {}
        if int((of_classes.counts > 0).sum()) >= 2:
            options = MeasureOptions(pairwise=False)
            values = measure_moments(of_classes, head.weight.double(), bias, None, options).metrics
        for metric in COLLAPSE:
            yield classes, metric, values.get(metric, float("nan"))
