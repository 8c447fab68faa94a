"""Module that computes the out-of-distribution score of each input of a model."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse._checks import check_floating, check_module, compute_dtype, is_number
from neuralcollapse._running import call_model, device_of, evaluation_mode, unwrapped, with_progress
from neuralcollapse.classifier import FeatureRecorder, classifier_with
from neuralcollapse.heads.moving_means import KeepsFullPrecision, full_precision
from neuralcollapse.metrics.measure import unpack_pair
from neuralcollapse.metrics.measurement import Measurement
from neuralcollapse.metrics.tokens import Unpack
from neuralcollapse.ood.fit import fit_score


class Detector(KeepsFullPrecision):
    """Module that maps inputs of a model to out-of-distribution scores (N,); greater is more in-distribution.

    The model itself is not changed. A hook reads the features, the tensor that the weight of the classifier multiplies,
    and the score is computed from them in at least fp32, outside autocast. The fitted tensors are buffers, in fp64 for
    an fp64 model, otherwise in fp32; they keep this dtype if the detector is cast to a lower precision. Initially, the
    detector, and hence the model, is in evaluation mode. ``torch.compile(detector)`` compiles model and score; a model
    that is already compiled runs uncompiled in a detector.

    Args:
        model: The measured model.
        measurement: Measurement of the model on the training data.
        score: One of `SCORES`, or ``"auto"``, as for `fit_score`.
        classifier: The classifier or its dotted name, if several modules have the measured weight.
        **options: Options of the score, as for `fit_score`.

    Attributes:
        score: Name of the score.
        reason: Reason for the choice with ``"auto"``, otherwise empty.
        feature_dim: d.

    Raises:
        ValueError: if not exactly one module of the model has the measured weight and bias, or as for `fit_score`.

    Examples:
        >>> import neuralcollapse as nc
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> train = [(torch.randn(16, 4), torch.arange(16) % 3) for _ in range(3)]
        >>> detector = Detector(model, nc.measure(model, train, progress=False), score="energy")
        >>> detector(torch.randn(5, 4)).shape
        torch.Size([5])
        >>> accepted = detector(torch.randn(5, 4)) >= detector.threshold(train, progress=False)
    """

    def __init__(
        self,
        model: nn.Module,
        measurement: Measurement,
        score: str = "auto",
        *,
        classifier: str | nn.Module | None = None,
        **options: Any,
    ) -> None:
        check_module("model", model)
        super().__init__()
        fitted = fit_score(measurement, score, **options)
        self.score, self.reason = fitted.name, fitted.reason
        self.feature_dim = fitted.feature_dim
        self.model = unwrapped(model)
        module = classifier_with(self.model, measurement.weight, measurement.bias, classifier)
        self._recorder = FeatureRecorder()
        hook = module.register_forward_pre_hook(self._recorder, with_kwargs=True)
        weakref.finalize(self, hook.remove)
        self._function, self._numbers = fitted.function, fitted.numbers
        self._full_precision_buffers = tuple(fitted.tensors)
        dtypes = [parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()]
        dtype = compute_dtype(dtypes[-1]) if dtypes else full_precision()
        of_classifier = any(True for _ in (*module.parameters(), *module.buffers()))
        device = device_of(module if of_classifier else self.model)
        for name, tensor in fitted.tensors.items():
            self.register_buffer(name, tensor.to(device, dtype))
        self.eval()

    def forward(self, *inputs: Any, **named_inputs: Any) -> Tensor:
        """Return the scores of inputs of the model.

        Args:
            *inputs: Positional arguments of the model.
            **named_inputs: Keyword arguments of the model.

        Returns:
            (N,); (N, T) for features (N, T, d) of tokens.

        Raises:
            ValueError: if the model does not call its classifier exactly once.
        """
        return self.from_features(self.features(*inputs, **named_inputs))

    def features(self, *inputs: Any, **named_inputs: Any) -> Tensor:
        """Return the features (N, d) of inputs of the model, or (N, T, d) of tokens.

        Args:
            *inputs: Positional arguments of the model.
            **named_inputs: Keyword arguments of the model.

        Raises:
            ValueError: if the model does not call its classifier exactly once.
        """
        self._recorder.start()
        try:
            self.model(*inputs, **named_inputs)
        finally:
            features, calls = self._recorder.stop()
        if features is None or calls != 1:
            raise ValueError(f"model must call its classifier once per forward, but called it {calls} times")
        return features

    def from_features(self, features: Tensor) -> Tensor:
        """Return the scores (...) of features (..., d).

        Args:
            features: The tensor that the weight of the classifier multiplies.

        Raises:
            ValueError: if the features have the wrong d or are not floating point.
        """
        check_floating("features", features)
        if features.ndim < 2 or features.shape[-1] != self.feature_dim:
            raise ValueError(f"features must be of shape (..., {self.feature_dim}), got {tuple(features.shape)}")
        tensors = {name: getattr(self, name) for name in self._full_precision_buffers}
        dtype = compute_dtype(features.dtype)
        for tensor in tensors.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        rows = features.flatten(0, -2).to(dtype)
        with torch.autocast(features.device.type, enabled=False):
            scores = self._function(rows, **{name: t.to(dtype) for name, t in tensors.items()}, **self._numbers)
        return scores.view(features.shape[:-1])

    @torch.no_grad()
    def threshold(
        self, loader: Iterable[Any], tpr: float = 0.95, *, unpack: Unpack | None = None, progress: bool = True
    ) -> float:
        """Return the greatest score that is reached by at least a share ``tpr`` of held-out in-distribution inputs.

        Inputs with ``detector(x) >= threshold`` are accepted. Do not use training data, for which the threshold would
        be too high, because the detector was fitted to them.

        Args:
            loader: Held-out in-distribution data, as for `measure`; targets are not used.
            tpr: True-positive rate, in (0, 1].
            unpack: As for `measure`.
            progress: Show a progress bar.

        Raises:
            ValueError: if ``tpr`` is out of range, the loader is empty or a score is NaN.
        """
        check_rate(tpr)
        unpack, device = unpack or unpack_inputs, device_of(self)
        with evaluation_mode(self):
            batches = with_progress(loader, "threshold", progress=progress)
            scores = [call_model(self, unpack(batch)[0], device).flatten().cpu() for batch in batches]
        if not sum(map(len, scores)):
            raise ValueError("loader must yield at least one sample, got none")
        return float(threshold_at(torch.cat(scores).double(), tpr))

    def extra_repr(self) -> str:
        return f"score={self.score!r}"


def unpack_inputs(batch: Any) -> tuple[Any, Any]:
    """Return the input of a batch, and its target or None."""
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    return unpack_pair(batch)


def check_rate(tpr: object) -> None:
    """Raise a `ValueError` unless the argument is in (0, 1]."""
    if not (is_number(tpr) and 0 < tpr <= 1):
        raise ValueError(f"tpr must be in (0, 1], got {tpr!r}")


def threshold_at(scores: Tensor, tpr: float) -> Tensor:
    """Return the greatest of the scores (n,) that is reached by a share of at least ``tpr`` of them.

    Examples:
        >>> threshold_at(torch.tensor([1.0, 2, 3, 4]), 0.75)
        tensor(2.)
    """
    if scores.isnan().any():
        raise ValueError(f"scores must not be NaN, got {int(scores.isnan().sum()):,} NaN of {len(scores):,}")
    accepted = math.ceil(tpr * len(scores) - 1e-9)  # in floating point, 0.7 · 10 is 7.000000000000001
    return scores.sort(descending=True).values[max(accepted, 1) - 1]
