"""All metrics of class moments as one ``torchmetrics.Metric``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torchmetrics import Metric

from neuralcollapse._checks import check_bool, check_code
from neuralcollapse._running import evaluation_mode
from neuralcollapse.classifier import check_classifier
from neuralcollapse.metrics.collapse import collapse_metrics
from neuralcollapse.metrics.moments import ClassMoments, Workspace, flat_batch
from neuralcollapse.metrics.statistics import MeasureOptions

# Attributes that torchmetrics changes in `forward`, in addition to the states.
_INTERNAL = (
    "_update_count",
    "_computed",
    "_forward_cache",
    "_cache",
    "_is_synced",
    "_to_sync",
    "_should_unsync",
    "_enable_grad",
    "compute_on_cpu",
)
_FEATURES_CHECKED = 64  # number of features per batch that are checked for normalisation


class _Reference:
    """Reference to a module that is neither registered as a submodule nor copied with its holder."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return self


class NeuralCollapse(Metric):
    """Neural collapse of all features, over all ranks: `collapse_metrics` as a ``torchmetrics.Metric``.

    `compute` returns a dictionary. In lightning, log it at the end of an epoch with
    ``self.log_dict(self.collapse.compute())``, then call ``self.collapse.reset()``.

    The metric holds a reference to the classifier: `compute` reads its current parameters, and therefore computes the
    values at each call (with ``compute_with_cache=True``, they are cached until the next update). The classifier is not
    part of the ``state_dict`` of the metric and not copied by ``clone``; in a deep copy of a model that holds the
    metric, the metric still measures the original classifier.

    The states are the class moments, available as ``metric.moments``. Merging them is exact, so ``full_state_update``
    is False: `forward` updates once and merges, ranks are merged in `compute`, and `merge_state` merges any two
    metrics. Synchronisation gathers the (K, d) means and the (d, d) scatter of every rank. `forward` also computes the
    metrics of the batch, which takes longer than an update; in a training loop, call ``update``. If an error is raised,
    the states are left unchanged. Undefined metrics, such as NC1 for a batch with one class, are NaN, with a warning.

    ``half()``, ``double()`` and ``to(dtype)`` do not change the dtype of the states; ``set_dtype`` sets fp32 or fp64.

    Args:
        num_classes: K.
        feature_dim: d.
        classifier: An ``nn.Linear`` or a head; without it, metrics of the weight are left out.
        options: Classes left out, centre, code, precision, per-class scatter and ignored target.
        check_values: Check at every update that features are finite and targets in range. On an accelerator, this check
            waits for the device.
        **kwargs: Arguments of every ``torchmetrics.Metric``.

    Raises:
        ValueError: if K or d is out of range, the weight of the classifier is not (K, d), the code is not (K, r), or
            an argument has the wrong type.

    Examples:
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
    rounding: Tensor

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        classifier: nn.Module | None = None,
        *,
        options: MeasureOptions = MeasureOptions(),
        check_values: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"compute_with_cache": False} | kwargs)
        check_bool("check_values", check_values)
        state = ClassMoments(num_classes, feature_dim, dtype=options.dtype, class_scatter=options.class_scatter).state
        for name, tensor in state.items():
            self.add_state(name, tensor, dist_reduce_fx=None)
        if classifier is not None:
            weight: Any = getattr(classifier, "weight", None)
            check_classifier("of the metric", classifier)
            if weight.shape != (num_classes, feature_dim):
                raise ValueError(
                    f"classifier must have a weight of shape ({num_classes}, {feature_dim}), got {tuple(weight.shape)}"
                )
        if options.code is not None:
            check_code(options.code, num_classes)
        self._classifier = None if classifier is None else _Reference(classifier)
        self._workspace = Workspace()
        self.check_values = check_values
        self.options = options

    @property
    def moments(self) -> ClassMoments:
        """Class moments, which share the memory of the metric."""
        return self._moments_of(self.metric_state)

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            features: (..., d), the tensor that the weight multiplies (``classifier.features(x)`` for a head).
            target: (...) integer classes.

        Raises:
            ValueError: as for `ClassMoments.update`; with ``check_values``, also if the classifier normalises its input
                but these features are not normalised.
        """
        try:
            moments = self.moments
            moments.num_batches = self._update_count - 1
            features, target = flat_batch(
                features, target, moments.feature_dim, moments.device, self.options.ignore_index
            )
            if self.check_values and self._classifier is not None:
                _check_normalised(self._classifier.module, features)
            moments.update(features, target, check_values=self.check_values)
        except BaseException:
            self._update_count -= 1
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch, and compute its metrics; if an error is raised, the states are left unchanged."""
        # torchmetrics replaces these tensors; if it synchronises at every step, it updates them in place instead.
        before = self._copy_state_dict() if self.dist_sync_on_step else dict(self.metric_state)
        internal = {name: getattr(self, name) for name in _INTERNAL}
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            for name, value in (before | internal).items():
                setattr(self, name, value)
            raise

    def set_dtype(self, dst_type: str | torch.dtype) -> NeuralCollapse:
        """Set the dtype of means and scatters, for instance for a device without fp64; counts stay integers.

        Args:
            dst_type: ``torch.float32`` or ``torch.float64``.

        Raises:
            ValueError: if the dtype is neither of these.
        """
        if dst_type not in (torch.float32, torch.float64):
            raise ValueError(f"dst_type must be torch.float32 or torch.float64, got {dst_type!r}")
        super().set_dtype(dst_type)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> NeuralCollapse:
        """Move the states with the module; only `set_dtype` changes their dtype, and never that of counts."""
        if not self._dtype_convert:
            other = fn

            def fn(tensor: Tensor) -> Tensor:
                return tensor.to(other(torch.empty(0, device=tensor.device)).device)

        super()._apply(fn, exclude_state=("counts", *exclude_state))
        defaults: Any = self._defaults
        self.counts, defaults["counts"] = (counts.to(self.means.device) for counts in (self.counts, defaults["counts"]))
        return self

    @contextmanager
    def sync_context(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        should_unsync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> Iterator[None]:
        """Synchronise as in ``torchmetrics.Metric``, and restore the states of the rank even if `compute` raises."""
        self.sync(
            dist_sync_fn=dist_sync_fn,
            process_group=process_group,
            should_sync=should_sync,
            distributed_available=distributed_available,
        )
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    def compute(self) -> dict[str, Tensor]:
        """Return every metric of `collapse_metrics` by name, as scalars; undefined ones are NaN, with a warning."""
        values = collapse_metrics(self.moments, *self._weight_and_bias(), options=self.options)
        return {name: torch.tensor(value, dtype=self.means.dtype, device=self.device) for name, value in values.items()}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values as in ``torchmetrics.Metric``; needs matplotlib.

        Args:
            val: Values of `compute` or `forward`, or a list of such values for curves; by default those of `compute`.
            ax: Axes of matplotlib; by default new ones.

        Returns:
            The figure (None if ``ax`` was given) and the axes.
        """
        return self._plot(val, ax)

    def _weight_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        if self._classifier is None:
            return None, None
        classifier: Any = self._classifier.module
        _refresh_weight(classifier)
        return classifier.weight, classifier.bias

    def _moments_of(self, state: dict[str, Any]) -> ClassMoments:
        dtype = state["means"].dtype
        mixed = self.options.dtype == "mixed" and dtype == torch.float64
        return ClassMoments.from_state(state, dtype="mixed" if mixed else dtype, workspace=self._workspace)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Merge moments in `forward` and `merge_state`, where torchmetrics would stack the states."""
        self.moments.merge(self._moments_of(incoming_state))

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all ranks, and merge them in the order of ranks."""
        super()._sync_dist(*args, **kwargs)
        gathered = self.metric_state
        merged = self._moments_of({name: states[0].clone() for name, states in gathered.items()})
        for rank in range(1, len(self.counts)):
            merged.merge(self._moments_of({name: states[rank] for name, states in gathered.items()}))
        for name, tensor in merged.state.items():
            setattr(self, name, tensor)


@torch.no_grad()
def _check_normalised(classifier: nn.Module, features: Tensor) -> None:
    """Raise if `classifier.features` normalises its input, but these features are not normalised.

    A function is considered a normalisation if a second application does not change the result.
    """
    function: Any = getattr(classifier, "features", None)
    if isinstance(classifier, nn.Linear) or not callable(function) or not len(features):
        return
    if getattr(classifier, "in_features", features.shape[1]) != features.shape[1]:
        return
    rows = features.detach()[:_FEATURES_CHECKED]
    with evaluation_mode(classifier):
        try:
            once = function(rows)
            twice = function(once)
        except RuntimeError:  # the function takes another shape or dtype, so the features are not its input
            return
    if once.shape == rows.shape and _close(once, twice) and not _close(rows, once):
        name, radius = type(classifier).__name__, getattr(classifier, "feature_norm", None)
        norms = torch.linalg.vector_norm(rows.double(), dim=1)
        on_sphere = "" if radius is None else f" of norm {radius:.4g}"
        raise ValueError(
            f"features must be the input of the weight of {name}, which normalises features{on_sphere}; "
            f"got norms from {norms.min():.4g} to {norms.max():.4g}. Pass classifier.features(features)"
        )


def _close(first: Tensor, second: Tensor) -> bool:
    """Return whether rows are equal up to the rounding of bf16, in which they may have been computed."""
    first, second = first.double(), second.double()
    size = torch.linalg.vector_norm(second, dim=1)
    distance = torch.linalg.vector_norm(first - second, dim=1)
    return bool((distance <= torch.finfo(torch.bfloat16).eps * size).all())


def _refresh_weight(classifier: nn.Module) -> None:
    """Recompute a weight that torch hooks compute from other parameters before each forward pass."""
    with evaluation_mode(classifier):
        for hook in classifier._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                hook(classifier, ())
