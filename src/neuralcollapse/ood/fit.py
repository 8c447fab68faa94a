"""Fits of out-of-distribution scores to a measurement, without a further pass over the training data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_at_least,
    check_bool,
    check_exponent,
    check_features,
    check_finite,
    check_floating,
    check_not_negative,
    compute_dtype,
    is_number,
)
from neuralcollapse.metrics.measurement import Measurement
from neuralcollapse.metrics.principal import logit_origin, principal_directions
from neuralcollapse.metrics.samples import FeatureCache
from neuralcollapse.metrics.statistics import ClassStatistics, class_statistics
from neuralcollapse.ood import scores

# Threshold of the rule for "auto", chosen on earlier runs of the studies ood-digits and ood-mnist (with 2,000 training
# images; mean AUROC of five heads on three unknown sets, 15 pairs). On the same data, the rule is at most 0.09 behind
# the best of eight scores. In 12 pairs it is ahead of another rule, energy for features that are not collapsed and NCI
# for collapsed features, which on photographs is up to 0.91 behind. docs/ood.md tests it on later runs.
COLLAPSED = 0.1


@dataclass(frozen=True, eq=False)
class FittedScore:
    """Score with its fitted arguments, a function of features (N, d).

    Attributes:
        name: Name of the score.
        function: Function of `neuralcollapse.ood.scores`.
        feature_dim: d.
        tensors: Fitted arguments of the function, in fp64 on the CPU.
        numbers: Other arguments of the function.
        reason: Reason for the choice with ``"auto"``, otherwise empty.
    """

    name: str
    function: Callable[..., Tensor]
    feature_dim: int
    tensors: dict[str, Tensor]
    numbers: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    def to(self, device: torch.device, dtype: torch.dtype) -> FittedScore:
        """Return the score with its tensors on the given device and in the given dtype."""
        return replace(self, tensors={name: tensor.to(device, dtype) for name, tensor in self.tensors.items()})

    def __call__(self, features: Tensor) -> Tensor:
        """Return the scores (N,) of features (N, d), computed in at least fp32 and in the dtype of the features.

        Raises:
            ValueError: if the features have the wrong shape or are not floating point.
        """
        check_features(features, self.feature_dim)
        features = features.to(compute_dtype(features.dtype))
        return self.function(features, **{name: t.to(features) for name, t in self.tensors.items()}, **self.numbers)


def fit_score(measurement: Measurement, score: str = "auto", **options: Any) -> FittedScore:
    """Fit a score to the record of the training data.

    The fit uses the moments, the weight and the bias of the record and, for the α of ViM, its mean greatest logit and
    mean residual norms. It takes O(K d² + d³) time and O(K d + d²) memory, regardless of the number of samples. Classes
    without samples have no class mean: scores based on class means treat their inputs as out of distribution. Scores
    based on logits use all rows of the weight.

    Args:
        measurement: Measurement of the training data.
        score: One of `SCORES`, or ``"auto"``, which selects ``"mahalanobis"`` if ``nc1_quotient`` of the record is at
            most 0.1 (but ``"ncm"`` if the features do not vary within classes at all), ``"relative_mahalanobis"`` if it
            is greater, and ``"energy"`` if it is not defined. The rule comes from two studies, of digits and of MNIST;
            `neuralcollapse.ood.evaluate` compares all scores on your data.
        **options: Options of the score. ``energy``: ``temperature`` (1). ``vim`` and ``residual``: ``dimension`` of the
            principal space (1000 if d ≥ 2048, 512 if d ≥ 768, otherwise d // 2). ``vim``: ``alpha``. ``nci``: ``alpha``
            (1e-4). ``neco``: ``standardise`` (True), ``times_max_logit`` (False), and ``dimension``: a number, a share
            of the variance below 1, or by default K − 1, K the number of classes with samples. ``knn``: ``bank``,
            training features (n, d) or a cache of them, and ``k`` (50). Directions without variance are left out of
            principal spaces.

    Raises:
        ValueError: if the score or an option is unknown, or the score is not defined for the record; the message says
            what is missing, and which option of `measure` provides it.

    Examples:
        >>> import neuralcollapse as nc
        >>> model = torch.nn.Linear(8, 3)
        >>> batch = torch.randn(30, 8), torch.arange(30) % 3
        >>> fitted = fit_score(nc.measure(model, [batch], progress=False), "mahalanobis")
        >>> fitted(batch[0]).shape
        torch.Size([30])
    """
    if not isinstance(measurement, Measurement):
        raise ValueError(f"measurement must be a Measurement, got {type(measurement).__name__}")
    reason = ""
    if score == "auto":
        score, reason = _choose(Record.of(measurement))
    if score not in _FITS:
        raise ValueError(f"score must be 'auto' or one of {', '.join(_FITS)}, got {score!r}")
    fit = _FITS[score]
    known = list(inspect.signature(fit).parameters)[1:]
    if unknown := [name for name in options if name not in known]:
        accepted = f"accepts the options {', '.join(known)}" if known else "has no options"
        raise ValueError(f"score {score!r} {accepted}, got {', '.join(unknown)}")
    arguments = fit(Record.of(measurement), **options)
    tensors = {name: value.detach().cpu() for name, value in arguments.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in arguments.items() if isinstance(value, int)}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{score} is not defined: {name}, computed from the measurement, is not finite")
    return FittedScore(score, getattr(scores, score), measurement.moments.feature_dim, tensors, numbers, reason)


def _choose(record: Record) -> tuple[str, str]:
    """Return the score for ``"auto"``, and the reason."""
    value = record.measurement.metrics.get("nc1_quotient", math.nan)
    if math.isnan(value):
        return "energy", "nc1_quotient is not defined, so that the collapse of the features is unknown"
    if value > COLLAPSED:
        reason = f"nc1_quotient = {value:.3g} is above {COLLAPSED}: the features are not near collapse"
        return "relative_mahalanobis", reason
    if not record.varies(torch.linalg.eigvalsh(record.within)).any():
        return "ncm", "the features do not vary within classes; nearest class mean is then the limit of Mahalanobis"
    return "mahalanobis", f"nc1_quotient = {value:.3g} is at most {COLLAPSED}: the features are near collapse"


@dataclass(frozen=True, eq=False)
class Record:
    """Statistics of a measurement for the fits, in fp64 on the CPU.

    Attributes:
        measurement: The measurement.
        classes: Statistics of the classes with samples.
        eps: Relative rounding error of the scatter.
    """

    measurement: Measurement
    classes: ClassStatistics
    eps: float

    @classmethod
    def of(cls, measurement: Measurement) -> Record:
        moments = measurement.moments
        if moments.device.type != "cpu":
            moments = moments.to("cpu")
            measurement = replace(measurement, moments=moments)
        if not moments.counts.any():
            raise ValueError("measurement must have at least one sample, got none")
        for tensor in (moments.means, moments.within_class_scatter):
            if not torch.isfinite(tensor).all():
                raise ValueError("measurement must have finite moments; measure the features in a wider dtype")
        eps = torch.finfo(moments.dtype if isinstance(moments.dtype, torch.dtype) else torch.float32).eps
        return cls(measurement, class_statistics(moments), eps)

    @property
    def classifier(self) -> dict[str, Tensor]:
        """Weight and bias; the bias is zero if the classifier has none."""
        weight, bias = self.measurement.weight, self.measurement.bias
        if not len(weight):
            raise ValueError("scores of logits need the weight of the classifier; measure(model, loader) records it")
        check_finite("weight", weight)
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        check_finite("bias", bias)
        return {"weight": weight.double(), "bias": bias.double()}

    @property
    def within(self) -> Tensor:
        """Σ_W (d, d)."""
        covariance = self.classes.within_class_covariance
        assert covariance is not None  # no class with samples is left out
        return covariance

    @property
    def total(self) -> Tensor:
        """Covariance Σ_T (d, d) of all features."""
        rows = self.classes.class_means - self.classes.center
        shares = self.classes.counts.double() / self.classes.counts.sum()
        return self.within + (rows * shares[:, None]).T @ rows

    def whitening(self, covariance: Tensor) -> Tensor:
        """Return a matrix X (d, r) such that XXᵀ is the pseudoinverse of a covariance."""
        eigenvalues, eigenvectors, rank = self.spectrum(covariance)
        rank = min(rank, int(self.varies(eigenvalues).sum()))
        if not rank:
            raise ValueError(
                "the Mahalanobis distance is not defined, because the features do not vary within classes (collapse, "
                "or one sample per class); 'ncm' is its limit if the spread is equal in all directions"
            )
        return eigenvectors[:, :rank] / eigenvalues[:rank].sqrt()

    def varies(self, variances: Tensor) -> Tensor:
        """Return whether these variances of directions exceed those of rounding errors."""
        return variances > self.classes.resolution**2

    def spectrum(self, matrix: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return eigenvalues in descending order, eigenvectors, and the number of eigenvalues above d·eps·λ₁."""
        eigenvalues, eigenvectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        eigenvalues, eigenvectors = eigenvalues.flip(0).clamp(min=0), eigenvectors.flip(1)
        return eigenvalues, eigenvectors, self.rank(eigenvalues)

    def rank(self, eigenvalues: Tensor) -> int:
        """Return the number of eigenvalues above d·eps·λ₁."""
        return int((eigenvalues > len(eigenvalues) * self.eps * eigenvalues.max()).sum())


def _fit_logits(record: Record) -> Mapping[str, Any]:
    return record.classifier


def _fit_energy(record: Record, *, temperature: float = 1.0) -> Mapping[str, Any]:
    check_exponent("temperature", temperature)
    return {**record.classifier, "temperature": torch.tensor(temperature, dtype=torch.float64)}


def _fit_mahalanobis(record: Record) -> Mapping[str, Any]:
    return {"class_means": record.classes.class_means, "whitening": record.whitening(record.within)}


def _fit_relative_mahalanobis(record: Record) -> Mapping[str, Any]:
    background = {"center": record.classes.center, "total_whitening": record.whitening(record.total)}
    return {**_fit_mahalanobis(record), **background}


def _fit_residual(record: Record, *, dimension: int | None = None) -> Mapping[str, Any]:
    feature_dim = record.measurement.moments.feature_dim
    if dimension is None:
        dimension = 1000 if feature_dim >= 2048 else 512 if feature_dim >= 768 else feature_dim // 2
    check_at_least("dimension", dimension, 0)
    if dimension >= feature_dim:
        raise ValueError(f"dimension must be less than d = {feature_dim}, got {dimension}")
    classifier = record.classifier
    origin = logit_origin(classifier["weight"], classifier["bias"])
    eigenvalues, directions = principal_directions(record.measurement.moments, origin)
    dimension = min(dimension, record.rank(eigenvalues))
    return {"origin": origin, "basis": directions[:, dimension:]}


def _fit_vim(record: Record, *, dimension: int | None = None, alpha: float | None = None) -> Mapping[str, Any]:
    arguments = {**record.classifier, **_fit_residual(record, dimension=dimension)}
    if alpha is not None:
        check_not_negative("alpha", alpha)
        return {**arguments, "alpha": torch.tensor(alpha, dtype=torch.float64)}
    norms, logit = record.measurement.residual_norms, record.measurement.mean_max_logit
    if not norms.numel() or math.isnan(logit):
        raise ValueError(
            "alpha of vim needs the mean residual norms of the training features, which are not in this measurement: "
            "measure with MeasureOptions(per_sample=True) and this version, or give alpha"
        )
    principal = len(norms) - arguments["basis"].shape[1]
    distances = torch.linalg.vector_norm(record.classes.class_means - arguments["origin"], dim=1)
    if not float(norms[principal]) > len(norms) * record.eps * float(distances.max()):
        raise ValueError(
            f"alpha of vim is not defined, because the training features lie in {principal} dimensions and have no "
            "residual; give a smaller dimension"
        )
    return {**arguments, "alpha": logit / norms[principal].double()}


def _fit_neco(
    record: Record,
    *,
    standardise: bool = True,
    times_max_logit: bool = False,
    dimension: float | None = None,
) -> Mapping[str, Any]:
    check_bool("standardise", standardise)
    check_bool("times_max_logit", times_max_logit)
    covariance, center = record.total, record.classes.center
    if record.classes.constant or covariance.trace() <= len(center) * record.classes.resolution**2:
        raise ValueError("neco is not defined, because the features do not vary")
    shift, scale = torch.zeros_like(center), torch.ones_like(center)
    if standardise:
        deviations = covariance.diagonal().clamp(min=0).sqrt()
        # Dimensions that are constant up to rounding are not scaled.
        shift, scale = center, torch.where(deviations > record.classes.resolution, deviations, 1.0)
    eigenvalues, eigenvectors, rank = record.spectrum(covariance / torch.outer(scale, scale))
    leading = min(_neco_dimension(dimension, eigenvalues, len(record.classes.classes)), rank)
    arguments = {"shift": shift, "scale": scale, "basis": eigenvectors[:, :leading]}
    return {**arguments, **record.classifier} if times_max_logit else arguments


def _neco_dimension(dimension: float | None, eigenvalues: Tensor, num_classes: int) -> int:
    """Return the number of principal directions: K − 1, the number for a share of the variance, or a given number."""
    feature_dim = len(eigenvalues)
    if dimension is None:
        if num_classes < 2:
            raise ValueError("neco is not defined for one class with samples, whose K − 1 is 0; give dimension")
        if num_classes > feature_dim:
            raise ValueError(
                f"neco is not defined for K − 1 = {num_classes - 1} directions of d = {feature_dim} dimensions, whose "
                "share is always 1; give a smaller dimension"
            )
        return num_classes - 1
    if isinstance(dimension, float) and is_number(dimension) and 0 < dimension < 1:
        shares = eigenvalues.cumsum(0) / eigenvalues.sum()
        return min(int((shares < dimension).sum()) + 1, feature_dim)
    check_at_least("dimension", dimension, 1)  # type: ignore[arg-type]
    if dimension >= feature_dim:
        raise ValueError(f"dimension must be less than d = {feature_dim}, or a share of the variance, got {dimension}")
    return int(dimension)


def _fit_nci(record: Record, *, alpha: float = 1e-4) -> Mapping[str, Any]:
    check_not_negative("alpha", alpha)
    return {
        **record.classifier,
        "center": record.classes.center,
        "alpha": torch.tensor(alpha, dtype=torch.float64),
    }


def _fit_fdbd(record: Record) -> Mapping[str, Any]:
    classifier = record.classifier
    weight = classifier["weight"]
    if len(torch.unique(weight, dim=0)) < len(weight):
        raise ValueError("fdbd is not defined, because two classes have the same row of the weight and no boundary")
    return {**classifier, "center": record.classes.center}


def _fit_ncm(record: Record) -> Mapping[str, Any]:
    return {"class_means": record.classes.class_means}


def _fit_knn(record: Record, *, bank: Any = None, k: int = 50) -> Mapping[str, Any]:
    if isinstance(bank, FeatureCache):
        rows = [batch.features.cpu() for batch in bank]
        bank = torch.cat(rows) if rows else None
    feature_dim = record.measurement.moments.feature_dim
    if bank is None:
        raise ValueError(
            "knn needs training features, which measurements do not contain: give bank, features (n, d) or a cache of "
            "them"
        )
    check_floating("bank", bank)
    if bank.ndim != 2 or bank.shape[1] != feature_dim:
        raise ValueError(f"bank must be of shape (n, {feature_dim}), got {tuple(bank.shape)}")
    check_at_least("k", k, 1)
    if k > len(bank):
        raise ValueError(f"k must be at most the number of features in the bank, {len(bank)}, got {k}")
    norms = torch.linalg.vector_norm(bank.double(), dim=1, keepdim=True)
    if not norms.all():
        raise ValueError("bank must not contain zero features, which have no direction")
    return {"bank": bank.double() / norms, "k": k}


_FITS: dict[str, Callable[..., Mapping[str, Any]]] = {
    "msp": _fit_logits,
    "maxlogit": _fit_logits,
    "energy": _fit_energy,
    "mahalanobis": _fit_mahalanobis,
    "relative_mahalanobis": _fit_relative_mahalanobis,
    "residual": _fit_residual,
    "vim": _fit_vim,
    "neco": _fit_neco,
    "nci": _fit_nci,
    "fdbd": _fit_fdbd,
    "ncm": _fit_ncm,
    "knn": _fit_knn,
}
SCORES = tuple(_FITS)
"""Names of all scores."""
