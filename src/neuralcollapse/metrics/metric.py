"""All metrics of moments as one ``torchmetrics.Metric``, or each as one of a collection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torchmetrics import Metric, MetricCollection

from neuralcollapse._checks import check_bool, check_choice, check_code, check_ignore_index, check_sample_bounds
from neuralcollapse._running import evaluation_mode
from neuralcollapse.catalogue import METRICS
from neuralcollapse.classifier import check_not_lazy, is_classifier
from neuralcollapse.metrics.accumulation import Workspace, flat_batch
from neuralcollapse.metrics.collapse import collapse_metrics
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.statistics import Center

# What torchmetrics changes while `forward` runs, besides the states.
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
_FEATURES_CHECKED = 64  # of a batch, to see whether it is normalised


class _Reference:
    """A module held by reference: not a submodule of the holder, and not copied with it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return self


class NeuralCollapse(Metric):
    """Neural collapse of the features seen, over all ranks: `collapse_metrics` as a ``torchmetrics.Metric``.

    The classifier is held by reference: its parameters are read whenever `compute` is called, which therefore computes
    anew each time (``compute_with_cache=True`` keeps the values until the next update). It is not in the metric's
    ``state_dict`` and not copied by ``clone``. A deep copy of a model that holds the metric therefore still measures
    the first model's classifier.

    States are the class moments, read as ``metric.moments``. Their merge is exact, so ``full_state_update`` is
    False: `forward` updates once and merges, ranks are merged in `compute`, and `merge_state` merges any two metrics.
    Synchronising gathers the (K, d) means and the (d, d) scatter of every rank. `forward` also computes the batch's
    own metrics, which costs more than updating; in a training loop call ``update``. Whatever raises, the states are
    as they were. Metrics that are not defined, as NC1 for a batch of one class, are NaN, and a warning says why.

    ``half()``, ``double()`` and ``to(dtype)`` leave the states' dtype as it is; ``set_dtype`` changes it, to fp32 or
    fp64.

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
        drop_classes_above: As for `collapse_metrics`.
        pairwise: As for `collapse_metrics`.
        code: As for `collapse_metrics`.
        **kwargs: Those of every ``torchmetrics.Metric``.

    Raises:
        ValueError: K or d out of range, an argument of another kind, a classifier whose weight is not (K, d), or a code
            that is not (K, r).

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
        dtype: torch.dtype | Literal["mixed"] = torch.float64,
        class_scatter: bool = False,
        ignore_index: int | None = None,
        check_values: bool = True,
        center: Center = "samples",
        min_samples: int = 1,
        drop_classes_above: int | None = None,
        pairwise: bool = True,
        code: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"compute_with_cache": False} | kwargs)
        for name, value in {"class_scatter": class_scatter, "check_values": check_values, "pairwise": pairwise}.items():
            check_bool(name, value)
        check_choice("center", center, ("samples", "classes"))
        check_sample_bounds(min_samples, drop_classes_above)
        check_ignore_index(ignore_index)
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
            check_not_lazy("of the metric", classifier)
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
            "drop_classes_above": drop_classes_above,
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

        Raises:
            ValueError: As for `ClassMoments.update`; and if the classifier normalises its input, and these features are
                not normalised (where ``check_values`` is True).
        """
        try:
            moments = self.moments
            moments.num_batches = self._update_count - 1
            features, target = flat_batch(features, target, moments.feature_dim, moments.device, self.ignore_index)
            if self.check_values and self._classifier is not None:
                _check_normalised(self._classifier.module, features)
            moments.update(features, target, check_values=self.check_values)
        except BaseException:
            self._update_count -= 1
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take in a batch, and compute the metrics of it alone; if it is refused, the states are as they were."""
        # torchmetrics puts other tensors in their place, unless it synchronises at every step: then it updates these.
        kept = self._copy_state_dict() if self.dist_sync_on_step else dict(self.metric_state)
        internal = {name: getattr(self, name) for name in _INTERNAL}
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            for name, value in (kept | internal).items():
                setattr(self, name, value)
            raise

    def set_dtype(self, dst_type: str | torch.dtype) -> NeuralCollapse:
        """Change the dtype of means and scatters, as for a device without fp64; counts stay integers.

        Args:
            dst_type: ``torch.float32`` or ``torch.float64``.

        Raises:
            ValueError: if it is another dtype.
        """
        if dst_type not in (torch.float32, torch.float64):
            raise ValueError(f"dst_type must be torch.float32 or torch.float64, got {dst_type!r}")
        super().set_dtype(dst_type)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> NeuralCollapse:
        """Move the states with the module; only `set_dtype` changes a dtype, and never that of counts."""
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
        """As every ``torchmetrics.Metric`` has it, but that the rank's own states come back if `compute` raises."""
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
        """Every metric by name, as scalars; NaN, with a warning, for what is not defined. See `collapse_metrics`."""
        values = collapse_metrics(self.moments, *self._weight_and_bias(), **self._options)
        return {name: torch.tensor(value, dtype=self.means.dtype, device=self.device) for name, value in values.items()}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values, as every ``torchmetrics.Metric`` does; needs matplotlib.

        Args:
            val: What `compute` or `forward` returned, or a list of such, for a curve each; computed if not given.
            ax: Axes of matplotlib to draw on; new ones if not given.

        Returns:
            The figure (None if ``ax`` was given) and the axes.
        """
        return self._plot(val, ax)

    @staticmethod
    def collection(
        num_classes: int,
        feature_dim: int,
        classifier: nn.Module | None = None,
        *,
        metrics: Sequence[str] | None = None,
        prefix: str | None = None,
        postfix: str | None = None,
        **options: Any,
    ) -> MetricCollection:
        """Each metric as a scalar, in a ``torchmetrics.MetricCollection``: ``self.log_dict(collection)`` in lightning.

        They are one compute group: ``update`` takes a batch in once, whatever the number of metrics, and all values
        are computed at once. (``forward`` takes it in for each of them, as in every collection; call ``update``.) A
        metric that is not defined for what was seen is NaN.

        Args:
            num_classes: K.
            feature_dim: d.
            classifier: As for `NeuralCollapse`.
            metrics: Names; by default all that the arguments allow.
            prefix: What each name begins with.
            postfix: What each name ends with.
            **options: The other arguments of `NeuralCollapse`.

        Raises:
            ValueError: As for `NeuralCollapse`, and a name that is not one of its metrics with these arguments.

        Examples:
            >>> from neuralcollapse.metrics import NeuralCollapse
            >>> collection = NeuralCollapse.collection(2, 2, metrics=["nc1_quotient", "nc2_etf_means"], prefix="val/")
            >>> features = torch.tensor([[1.0, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]])
            >>> collection.update(features, torch.tensor([0, 0, 1, 1]))
            >>> {name: round(float(value), 4) for name, value in collection.compute().items()}
            {'val/nc1_quotient': 0.01, 'val/nc2_etf_means': 0.0}
        """
        whole = NeuralCollapse(num_classes, feature_dim, classifier, **options)
        possible = whole._names()
        names = possible if metrics is None else metrics
        if isinstance(names, str) or not isinstance(names, Sequence) or not names or not set(names) <= set(possible):
            raise ValueError(f"metrics must be a list of names among {', '.join(possible)}; got {metrics!r}")
        names = list(dict.fromkeys(names))
        last = _LastValues()
        scalars: dict[str, Any] = {
            name: CollapseScalar(name, last, num_classes, feature_dim, classifier, **options) for name in names
        }
        return MetricCollection(scalars, prefix=prefix, postfix=postfix, compute_groups=[names])

    def _names(self) -> list[str]:
        """The metrics that `compute` returns, seen on two classes in two dimensions."""
        moments = ClassMoments(2, 2, class_scatter=self.moments.class_scatter is not None)
        moments.update(torch.tensor([[1.0, 0], [1, 1], [-1, 0], [-1, -1]]), torch.tensor([0, 0, 1, 1]))
        weight = None if self._classifier is None else torch.eye(2)
        code = None if self._options["code"] is None else torch.eye(2)
        small = {"min_samples": 1, "drop_classes_above": None, "code": code}
        return list(collapse_metrics(moments, weight, **self._options | small))

    def _weight_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        if self._classifier is None:
            return None, None
        classifier: Any = self._classifier.module
        _remake_weight(classifier)
        return classifier.weight, classifier.bias

    def _moments_of(self, state: dict[str, Any]) -> ClassMoments:
        dtype = state["means"].dtype
        mixed = self._moments_dtype == "mixed" and dtype == torch.float64
        return ClassMoments.from_state(state, dtype="mixed" if mixed else dtype, workspace=self._workspace)

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


class CollapseScalar(NeuralCollapse):
    """One metric of `NeuralCollapse` as a scalar; made by `NeuralCollapse.collection`.

    Args:
        metric: Its name.
        last: What the scalars of one collection have in common.
        *args: Those of `NeuralCollapse`.
        **kwargs: Those of `NeuralCollapse`.
    """

    def __init__(self, metric: str, last: _LastValues, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metric = metric
        self._last = last

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """As the catalogue has it; None for neither."""
        return {"higher": True, "lower": False}.get(METRICS[self.metric].better or "")

    def compute(self) -> Tensor:  # type: ignore[override]
        """The metric, (); NaN where it is not defined."""
        values = self._last.of(self, super().compute)
        return values.get(self.metric, torch.tensor(torch.nan, dtype=self.means.dtype, device=self.device))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """As `NeuralCollapse.plot`, named."""
        figure, axes = super().plot(val, ax)
        axes.set_ylabel(self.metric)
        return figure, axes


class _LastValues:
    """The values last computed, and of what, so that scalars of equal states cost one computation.

    Equal, not the same: each metric of a collection gathers the ranks' states for itself.
    """

    def __init__(self) -> None:
        self._seen: list[Tensor | None] = []
        self._values: dict[str, Tensor] = {}

    def of(self, metric: NeuralCollapse, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The metric's values."""
        parts: list[Any] = [*metric.metric_state.values(), *metric._weight_and_bias()]
        if len(parts) != len(self._seen) or not all(map(_equal, parts, self._seen)):
            self._values = compute()
            self._seen = [None if part is None else part.detach().clone() for part in parts]
        return self._values


@torch.no_grad()
def _check_normalised(classifier: nn.Module, features: Tensor) -> None:
    """Raise if the classifier's own `features` would normalise these, as it would not what it has normalised.

    It is known by doing nothing the second time.
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
        except RuntimeError:  # it takes another shape or dtype: then these are not its input
            return
    if once.shape == rows.shape and _close(once, twice) and not _close(rows, once):
        name, radius = type(classifier).__name__, getattr(classifier, "feature_norm", None)
        norms = torch.linalg.vector_norm(rows.double(), dim=1)
        on_sphere = "" if radius is None else f" of norm {radius:.4g}"
        raise ValueError(
            f"features must be what the weight of {name} multiplies, which it normalises first{on_sphere}; "
            f"got norms from {norms.min():.4g} to {norms.max():.4g}. Give it classifier.features(features)"
        )


def _close(first: Tensor, second: Tensor) -> bool:
    """Return whether rows are equal within the rounding of bf16, in which they may have been computed."""
    first, second = first.double(), second.double()
    size = torch.linalg.vector_norm(second, dim=1)
    distance = torch.linalg.vector_norm(first - second, dim=1)
    return bool((distance <= torch.finfo(torch.bfloat16).eps * size).all())


def _remake_weight(classifier: nn.Module) -> None:
    """Have a weight that hooks of torch make before each forward made of the parameters as they are now."""
    with evaluation_mode(classifier):
        for hook in classifier._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                hook(classifier, ())


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.device == second.device and torch.equal(first, second)
