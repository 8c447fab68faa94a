"""All metrics of moments as one ``torchmetrics.Metric``."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from neuralcollapse.classifier import is_classifier
from neuralcollapse.metrics.accumulation import Workspace
from neuralcollapse.metrics.collapse import collapse_metrics
from neuralcollapse.metrics.doors import check_code
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.statistics import Center


class _Reference:
    """A module held by reference: not a submodule of the holder, and not copied with it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return self


class NeuralCollapse(Metric):
    """Neural collapse of the features seen, over all ranks: `collapse_metrics` as a ``torchmetrics.Metric``.

    The classifier is held by reference: its parameters are read when `compute` is called, it is not in the
    metric's ``state_dict`` and not copied by ``clone``. A deep copy of a model that holds the metric therefore still
    measures the first model's classifier.

    States are the class moments, read as ``metric.moments``. Their merge is exact, so ``full_state_update`` is
    False: `forward` updates once and merges, ranks are merged in `compute`, and `merge_state` merges any two metrics.
    Synchronising gathers the (K, d) means and the (d, d) scatter of every rank. `forward` also computes the batch's
    own metrics, which costs more than updating and needs two classes in the batch; in a training loop call
    ``update``.

    Args:
        num_classes: K.
        feature_dim: d.
        classifier: An ``nn.Linear`` or a head; without one the metrics of the weight are left out.
        dtype: As for `ClassMoments`.
        class_scatter: Keep per-class scatter, K d² numbers, for ``nc1_numerical_rank``.
        ignore_index: Samples of this target are left out.
        check_values: Check that features are finite and targets in range at every update, which on an accelerator
            waits for the device.
        center: As for `collapse_metrics`.
        min_samples: As for `collapse_metrics`.
        max_samples: As for `collapse_metrics`.
        pairwise: As for `collapse_metrics`.
        code: As for `collapse_metrics`.
        **kwargs: Those of every ``torchmetrics.Metric``.

    Raises:
        ValueError: K or d out of range, a classifier whose weight is not (K, d), or a code that is not (K, r).

    Example:
        >>> from neuralcollapse.metrics import NeuralCollapse
        >>> metric = NeuralCollapse(num_classes=2, feature_dim=2)
        >>> metric.update(torch.tensor([[1.0, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()["nc1_quotient"]
        tensor(0.0100, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    counts: Tensor
    means: Tensor
    within_class_scatter: Tensor
    within_class_trace: Tensor

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        classifier: nn.Module | None = None,
        *,
        dtype: torch.dtype | Literal["mixed"] = torch.float64,
        class_scatter: bool = False,
        ignore_index: int | None = None,
        check_values: bool = True,
        center: Center = "samples",
        min_samples: int = 1,
        max_samples: int | None = None,
        pairwise: bool = True,
        code: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        state = ClassMoments(num_classes, feature_dim, dtype=dtype, class_scatter=class_scatter).state
        for name, tensor in state.items():
            self.add_state(name, tensor, dist_reduce_fx=None)
        if classifier is not None:
            weight: Any = getattr(classifier, "weight", None)
            if not is_classifier(classifier):
                raise ValueError(
                    "classifier must be an nn.Linear or have weight (K, d), bias and features(x), "
                    f"got {type(classifier).__name__}"
                )
            if weight.shape != (num_classes, feature_dim):
                raise ValueError(
                    f"classifier must have a weight of shape ({num_classes}, {feature_dim}), got {tuple(weight.shape)}"
                )
        check_code(code, num_classes)
        self._classifier = None if classifier is None else _Reference(classifier)
        self._moments_dtype = dtype
        self._workspace = Workspace()
        self.ignore_index = ignore_index
        self.check_values = check_values
        self._options: dict[str, Any] = {
            "center": center,
            "min_samples": min_samples,
            "max_samples": max_samples,
            "pairwise": pairwise,
            "code": code,
        }

    @property
    def moments(self) -> ClassMoments:
        """The class moments seen so far; they share the metric's memory."""
        return self._moments_of(self.metric_state)

    def update(self, features: Tensor, target: Tensor) -> None:
        """Take in a batch.

        Args:
            features: (..., d), what the classifier's weight multiplies (``classifier.features(x)`` of a head).
            target: (...) integer classes.
        """
        moments = self.moments
        moments.num_batches = self._update_count - 1
        moments.update(features, target, ignore_index=self.ignore_index, check_values=self.check_values)

    def compute(self) -> dict[str, Tensor]:
        """Every metric by name, as scalars; see `collapse_metrics`."""
        classifier: Any = None if self._classifier is None else self._classifier.module
        weight, bias = (None, None) if classifier is None else (classifier.weight, classifier.bias)
        values = collapse_metrics(self.moments, weight, bias, **self._options)
        return {name: torch.tensor(value, dtype=self.means.dtype, device=self.device) for name, value in values.items()}

    def _moments_of(self, state: dict[str, Any]) -> ClassMoments:
        return ClassMoments.from_state(state, dtype=self._moments_dtype, workspace=self._workspace)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Merge, where torchmetrics would stack (it calls this in `forward` and `merge_state`)."""
        self.moments.merge(self._moments_of(incoming_state))

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """Gather the ranks' states, which torchmetrics stacks, and merge them in the order of ranks."""
        super()._sync_dist(*args, **kwargs)
        gathered = self.metric_state
        merged = self._moments_of({name: states[0].clone() for name, states in gathered.items()})
        for rank in range(1, len(self.counts)):
            merged.merge(self._moments_of({name: states[rank] for name, states in gathered.items()}))
        for name, tensor in merged.state.items():
            setattr(self, name, tensor)
