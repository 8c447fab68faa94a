"""Evaluation of how well out-of-distribution scores separate in-distribution data from other data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from neuralcollapse._checks import check_module, check_shapes, compute_dtype
from neuralcollapse._running import device_of, evaluation_mode, unchanged_on_error
from neuralcollapse.classifier import ClassifierObserver, classifier_with
from neuralcollapse.metrics.measure import ModelRun
from neuralcollapse.metrics.measurement import Measurement
from neuralcollapse.metrics.tokens import Unpack
from neuralcollapse.ood.detector import check_rate, threshold_at, unpack_inputs
from neuralcollapse.ood.fit import SCORES, FittedScore, fit_score

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

TEST = "test"  # name of the in-distribution set


class Row(NamedTuple):
    """Detection rates of one score on one out-of-distribution set.

    Attributes:
        set: Name of the set.
        score: Name of the score.
        auroc: Area under the ROC curve; 0.5 for scores that do not separate the sets.
        fpr95: Share of the set that is accepted at the threshold that accepts 95% of the test data.
        aupr_in: Average precision in detecting the test data.
        aupr_out: Average precision in detecting the set.
        reason: Reason for NaN values, otherwise empty.
    """

    set: str
    score: str
    auroc: float
    fpr95: float
    aupr_in: float
    aupr_out: float
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Result of `evaluate`; it prints as a table.

    Attributes:
        rows: One row per set and score.
        scores: Name of each score to a dictionary from set to values (N,) in fp64; ``"test"`` is the test data. Scores
            that are not defined for the measurement are absent.
    """

    rows: list[Row]
    scores: dict[str, dict[str, Tensor]]

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a data frame."""
        import pandas

        return pandas.DataFrame(self.rows, columns=Row._fields)

    def plot(self) -> Figure:
        """Draw the distributions of each score on the test data and on each set, with one panel per score.

        Raises:
            ValueError: if no score is defined.
        """
        from matplotlib.figure import Figure

        names = [name for name, sets in self.scores.items() if not any(map(_is_undefined, sets.values()))]
        if not names:
            raise ValueError("a figure needs at least one defined score, got none")
        columns = min(3, len(names))
        lines = math.ceil(len(names) / columns)
        figure = Figure(figsize=(4 * columns, 2.6 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False)
        for axes, name in zip(panels.flat, names, strict=False):
            finite = {label: values[values.isfinite()].numpy() for label, values in self.scores[name].items()}
            for label, values in finite.items():
                axes.hist(values, bins=50, density=True, histtype="step", label=label)
            axes.set(title=name, yticks=[])
        for axes in panels.flat[len(names) :]:
            axes.set_visible(False)
        panels[0, 0].legend()
        return figure

    def __repr__(self) -> str:
        """Return the table, and the reasons for undefined values."""
        width = max(len(str(row.set)) for row in self.rows) + 2
        lines = [f"{'set':{width}}{'score':22}{'AUROC':>8}{'FPR95':>8}{'AUPR in':>9}{'AUPR out':>10}"]
        lines += [
            f"{row.set:{width}}{row.score:22}{row.auroc:8.4f}{row.fpr95:8.4f}{row.aupr_in:9.4f}{row.aupr_out:10.4f}"
            for row in self.rows
        ]
        reasons = dict.fromkeys((row.score, row.reason) for row in self.rows if row.reason)
        return "\n".join([*lines, *(f"{score}: {reason}" for score, reason in reasons)])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    measurement: Measurement,
    test_loader: Iterable[Any],
    ood: Mapping[str, Iterable[Any]],
    scores: Literal["all"] | Sequence[str] | Mapping[str, FittedScore] = "all",
    *,
    classifier: str | nn.Module | None = None,
    unpack: Unpack | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate how well scores separate test data from out-of-distribution sets.

    The model runs once over each loader for all scores, in evaluation mode; afterwards the mode of every module is
    restored. If a score is undefined for the measurement, or NaN for an input, its rows are NaN and contain the reason.

    Args:
        model: The measured model.
        measurement: Measurement of the model on the training data.
        test_loader: Held-out in-distribution data: batches of inputs, or ``(input, target)`` pairs whose targets are
            ignored.
        ood: Loader of each out-of-distribution set by name, with or without targets.
        scores: ``"all"``: all of `SCORES` except ``"knn"``, which needs training features; names of scores; or a
            dictionary of fitted scores by any name.
        classifier: The classifier or its dotted name, if several modules have the measured weight.
        unpack: Function of a batch that returns ``(inputs, targets)``, as for `measure`.
        progress: Show a progress bar.

    Raises:
        ValueError: if no module of the model has the measured weight or computes the output of the model, a loader is
            empty, or the name of a set or score is invalid. The model is then left unchanged.

    Examples:
        >>> import neuralcollapse as nc
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> train, test = ([(torch.randn(32, 4), torch.arange(32) % 3)] for _ in range(2))
        >>> record = nc.measure(model, train, progress=False)
        >>> table = evaluate(model, record, test, {"noise": [9 * torch.randn(20, 4)]}, ["msp", "ncm"], progress=False)
        >>> [(row.set, row.score) for row in table.rows]
        [('noise', 'msp'), ('noise', 'ncm')]
    """
    check_module("model", model)
    loaders = _checked_loaders(test_loader, ood)
    requested = _requested(measurement, scores)
    fitted = {name: score for name, score in requested.items() if isinstance(score, FittedScore)}
    module = classifier_with(model, measurement.weight, measurement.bias, classifier)
    observer = ClassifierObserver(model, module)
    run = ModelRun(model, observer, (), "mean", unpack or unpack_inputs, device_of(model), progress)
    values: dict[str, dict[str, Tensor]] = {name: {} for name in fitted}
    with unchanged_on_error(model), evaluation_mode(model):
        for label, loader in loaders.items():
            argument = "test_loader" if label == TEST else f"ood[{label!r}]"
            parts = _scores_of(run, loader, argument, label, fitted)
            for name in fitted:
                values[name][label] = torch.cat(parts[name])
    rows = [
        _row(label, name, values[name]) if name in values else _undefined(label, name, str(score))
        for label in ood
        for name, score in requested.items()
    ]
    return Evaluation(rows, values)


def _checked_loaders(test_loader: Iterable[Any], ood: Mapping[str, Iterable[Any]]) -> dict[str, Iterable[Any]]:
    """Return all loaders by name, beginning with the test data."""
    if not isinstance(ood, Mapping) or not ood:
        raise ValueError(f"ood must name at least one set, as {{'svhn': loader}}, got {ood!r}")
    for label, loader in {TEST: test_loader, **ood}.items():
        if not isinstance(loader, Iterable) or isinstance(loader, Tensor | str):
            raise ValueError(f"loaders must be iterables of batches, got {type(loader).__name__} for {label!r}")
    if wrong := [label for label in ood if not isinstance(label, str) or not label or label == TEST]:
        raise ValueError(f"names of sets must be strings other than {TEST!r}, got {wrong[0]!r}")
    return {TEST: test_loader, **ood}


def _requested(measurement: Measurement, scores: object) -> dict[str, FittedScore | str]:
    """Return the fitted scores by name, or the reason if a score is not defined."""
    if isinstance(scores, Mapping):
        if not scores or not all(isinstance(score, FittedScore) for score in scores.values()):
            raise ValueError("scores must be names or map names to fitted scores (fit_score)")
        return dict(scores)
    if not isinstance(measurement, Measurement):
        raise ValueError(f"measurement must be a Measurement, got {type(measurement).__name__}")
    names = [name for name in SCORES if name != "knn"] if scores == "all" else scores
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(f"scores must be 'all', a list of names or a mapping to fitted scores, got {scores!r}")
    if unknown := [name for name in names if name not in SCORES]:
        raise ValueError(f"scores must be among {', '.join(SCORES)}, got {unknown[0]!r}")
    requested: dict[str, FittedScore | str] = {}
    for name in names:
        try:
            requested[name] = fit_score(measurement, name)
        except ValueError as error:
            requested[name] = str(error)
    return requested


def _scores_of(
    run: ModelRun, loader: Iterable[Any], argument: str, description: str, fitted: Mapping[str, FittedScore]
) -> dict[str, list[Tensor]]:
    """Return the scores of each batch of a loader; errors name the argument, the progress bar shows the description."""
    parts: dict[str, list[Tensor]] = {name: [] for name in fitted}
    moved: dict[str, FittedScore] = {}
    count = 0
    for _, features, _, _ in run.calls(loader, argument, description):
        rows = features.flatten(0, -2)
        count += len(rows)
        moved = moved or {name: score.to(rows.device, compute_dtype(rows.dtype)) for name, score in fitted.items()}
        for name, score in moved.items():
            parts[name].append(score(rows).to("cpu").double())
    if not count:
        raise ValueError(f"{argument} must yield at least one sample, got none")
    return parts


def _is_undefined(scores: Tensor) -> bool:
    return bool(scores.isnan().any())


def _undefined(label: str, name: str, reason: str) -> Row:
    return Row(label, name, math.nan, math.nan, math.nan, math.nan, reason)


def _row(label: str, name: str, sets: Mapping[str, Tensor]) -> Row:
    for of in (TEST, label):
        if undefined := int(sets[of].isnan().sum()):
            return _undefined(label, name, f"{undefined:,} of {len(sets[of]):,} scores of {of!r} are NaN")
    inside, outside = sets[TEST], sets[label]
    of_sets = (auroc(inside, outside), fpr_at_tpr(inside, outside), aupr(inside, outside), aupr(-outside, -inside))
    return Row(label, name, *of_sets)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Area under the ROC curve: probability that an inside score exceeds an outside score, where ties count half.

    Args:
        inside: (n,) scores of in-distribution data.
        outside: (m,) scores of out-of-distribution data.

    Raises:
        ValueError: if a set is empty or contains NaN.

    Examples:
        >>> auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    _check_scores(inside=inside, outside=outside)
    ascending = outside.sort().values
    below = torch.searchsorted(ascending, inside) + torch.searchsorted(ascending, inside, right=True)
    return float(below.double().sum() / (2 * len(inside) * len(outside)))


def fpr_at_tpr(inside: Tensor, outside: Tensor, tpr: float = 0.95) -> float:
    """Share of outside scores that reach the greatest threshold that a share ``tpr`` of the inside scores reaches.

    Args:
        inside: (n,) scores of in-distribution data.
        outside: (m,) scores of out-of-distribution data.
        tpr: True-positive rate, in (0, 1].

    Raises:
        ValueError: if a set is empty or contains NaN, or ``tpr`` is out of range.

    Examples:
        >>> fpr_at_tpr(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.5
    """
    _check_scores(inside=inside, outside=outside)
    check_rate(tpr)
    return float((outside >= threshold_at(inside, tpr)).double().mean())


def aupr(positive: Tensor, negative: Tensor) -> float:
    """Average precision: mean precision over the positive scores as thresholds.

    Args:
        positive: (n,) scores of the data to detect.
        negative: (m,) scores of the other data.

    Raises:
        ValueError: if a set is empty or contains NaN.

    Examples:
        >>> aupr(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.8333...
    """
    _check_scores(positive=positive, negative=negative)
    reaching = [len(scores) - torch.searchsorted(scores.sort().values, positive) for scores in (positive, negative)]
    return float((reaching[0].double() / (reaching[0] + reaching[1])).mean())


def _check_scores(**sets: Tensor) -> None:
    check_shapes(**{name: (scores, name[0]) for name, scores in sets.items()})
    for name, scores in sets.items():
        if not len(scores):
            raise ValueError(f"{name} must have at least one score, got none")
        if scores.isnan().any():
            raise ValueError(f"{name} must have no NaN, got {int(scores.isnan().sum()):,} of {len(scores):,}")
