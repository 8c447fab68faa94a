"""Objective of training: loss and penalties, training metrics, sizes of gradients, and search for non-finite values."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from neuralcollapse import losses
from neuralcollapse._distributed import number_of_ranks, sum_over_ranks
from neuralcollapse.heads import AttachedHead, Head
from neuralcollapse.lab.config import METHODS, LossSettings, Optimisation, RunConfig
from neuralcollapse.lab.models.build import own_module
from neuralcollapse.lab.training.agd import AGD
from neuralcollapse.metrics import alignment

_OF_FEATURES: dict[str, Callable[..., Tensor]] = {
    "dot-regression": losses.dot_regression,
    "normface": losses.normface,
    "ntce": losses.ntce,
    "nonl": losses.nonl,
    "bidirectional-nonl": losses.bidirectional_nonl,
    "decoupled": losses.decoupled_cross_entropy,
    "two-way": losses.two_way,
}
# Value in the released code of Zhu et al. (NeurIPS 2021).
PUBLISHED_FEATURE_DECAY = 1e-4
_NEVER = 2**62


class Objective(nn.Module):
    """Loss of a batch as a function of the parameters of a model, in training mode.

    Args:
        config: All settings.
        model: A model that ends in a head.
        class_counts: (K,), training images of each class.

    Attributes:
        keeps_head_tensors: Whether the features, class means, weight and bias that a head with class means computes
            from a batch retain their gradients, in ``head_tensors``.
    """

    def __init__(self, config: RunConfig, model: AttachedHead, class_counts: Tensor) -> None:
        super().__init__()
        device = next(model.parameters()).device
        self._of_classes = {  # stored in the dtype and on the device of the loss, to avoid a copy at each step
            name: value.to(device, torch.float32) if isinstance(value, Tensor) else value
            for name, value in class_options(config, class_counts).items()
        }
        self._own_loss = OwnLoss(config, *model.head.weight.shape) if "." in config.loss else None  # type: ignore[misc]
        self._regulariser = RunRegulariser(model, config.regulariser) if config.regulariser else None
        self.config = config
        self.model = model
        self.keeps_head_tensors = False
        self.head_tensors: dict[str, Tensor] = {}
        self._backbone = torch.compile(model.model.forward) if config.compile else model.model.forward

    def forward(self, images: Tensor, targets: Tensor, samples: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the loss, the training metrics and the features for the part of a batch on this rank.

        Args:
            images: (N, C, H, W).
            targets: (N,).
            samples: Number of samples of the batch over all ranks.

        Returns:
            The loss with penalties, whose mean over ranks is that of the batch; `batch_loss`, `batch_accuracy`,
            `batch_alignment` and `batch_accuracy_top5` over all ranks; the features (N, d).

        Raises:
            ValueError: if the features are not finite and the head checks them.
        """
        head: Head = self.model.head  # type: ignore[assignment]
        with self._keeping_head_tensors(head) as keep:
            # In evaluation mode, a head treats its statistics as constants.
            features, weight, bias = head.prepare(self._backbone(images), targets if head.training else None)
            keep(features=features, weight=weight, bias=bias)
        logits, features = head.decide(features, weight, bias).float(), features.float()
        ranks = self.config.ranks
        if self._own_loss is not None:
            loss = self._own_loss(features, targets, weight)
        else:
            adjustment = {"bias": bias, **self._of_classes} if self._of_classes else None
            share = ranks * len(targets) / samples
            loss = batch_loss(self.config, logits, targets, features, weight, share, adjustment)
        if self._regulariser is not None:
            loss = loss + self._regulariser(features, targets, weight)
        penalties = penalty(self.config, self.model, features, ranks)
        loss = loss if penalties is None else loss + penalties
        return loss, self._metrics(loss, logits, features, targets, samples), features.detach()

    @contextmanager
    def _keeping_head_tensors(self, head: Head) -> Iterator[Callable[..., None]]:
        """Store the class means of a head; yield a function that stores other tensors."""
        self.head_tensors = {}
        class_means = getattr(head, "class_means", None) if self.keeps_head_tensors else None
        if class_means is None:
            yield lambda **_: None
            return

        def keep(**tensors: Tensor | None) -> None:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.requires_grad and not tensor.is_leaf:  # not a parameter
                    tensor.retain_grad()
                    self.head_tensors[name] = tensor

        hook = class_means.register_forward_hook(lambda _, __, means: keep(class_means=means[0]))
        yield keep
        hook.remove()

    @torch.no_grad()
    def _metrics(
        self, loss: Tensor, logits: Tensor, features: Tensor, targets: Tensor, samples: int
    ) -> dict[str, Tensor]:
        part = len(targets) / samples
        centre = sum_over_ranks(part * features.mean(0))
        answers = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        weight: Tensor = self.model.head.weight  # type: ignore[assignment]
        metrics = {
            "batch_loss": loss.detach() / self.config.ranks,
            "batch_accuracy": part * answers[:, 0].float().mean(),
            "batch_alignment": part * alignment(features, targets, weight, centre),
        }
        if logits.shape[1] > 5:
            metrics["batch_accuracy_top5"] = part * answers.any(1).float().mean()
        return dict(zip(metrics, sum_over_ranks(torch.stack(list(metrics.values()))).unbind(), strict=True))


def class_options(config: LossSettings, class_counts: Tensor) -> dict[str, Any]:
    """Return the arguments of a loss that follow from its options and the numbers of training images (K,).

    Args:
        config: The settings.
        class_counts: (K,).
    """
    asked, counts = {} if "." in config.loss else config.loss_options or {}, class_counts.double()
    present, options = counts.clamp_min(1), {}
    if asked.get("class_weights") == "inverse":
        options["class_weights"] = (counts > 0) / present
    if asked.get("prior"):
        options |= {"prior": present, "prior_scale": asked["prior"]}
    if asked.get("class_lengths") == "inverse-root":
        options["class_lengths"] = (counts.mean() / present).sqrt()
    return options


class OwnLoss:
    """Loss given by a user-defined class or a class of another library, such as pytorch-metric-learning.

    The loss is called with features (N, d) and targets (N,). The weight of the classifier replaces its class weights,
    so that their gradient is that of the classifier, and the optimiser does not hold a second copy.

    Args:
        config: The settings: dotted path, options and method.
        num_classes: K.
        feature_dim: d.

    Raises:
        ValueError: if the class cannot be imported or constructed, or is not an `nn.Module`; if it has parameters or
            buffers other than one parameter (K, d) or (d, K), from which training could not resume; or if it has no
            such parameter and the weight of the classifier would not be trained either.
    """

    def __init__(self, config: RunConfig, num_classes: int, feature_dim: int) -> None:
        sizes = {"num_classes": num_classes, "embedding_size": feature_dim}
        self.path = config.loss
        self.module = own_module(config.loss, config.loss_options or {}, sizes, setting="loss")
        shapes = {name: tuple(value.shape) for name, value in self.module.state_dict().items()}
        self._name = next((name for name, _ in self.module.named_parameters()), None)
        of_classes = {(num_classes, feature_dim), (feature_dim, num_classes)}
        if set(shapes) != ({self._name} - {None}) or not set(shapes.values()) <= of_classes:
            listed_shapes = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(
                f"loss must have no state besides class weights {(num_classes, feature_dim)} or "
                f"{(feature_dim, num_classes)}, but {self.path} has {listed_shapes}"
            )
        if self._name is not None and num_classes == feature_dim:
            raise ValueError(
                f"feature_dim must differ from the number of classes, {num_classes}, for the loss {self.path}: "
                "otherwise the dimensions of its class weights are ambiguous"
            )
        if self._name is None and not METHODS[config.method].follows_means:
            raise ValueError(
                f"loss {self.path} has no class weights: it needs a method whose classifier follows the class means, "
                f"such as means or implicit, got {config.method}"
            )
        self._is_transposed = self._name is not None and shapes[self._name] == (feature_dim, num_classes)

    def __call__(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Return the loss of a batch, with gradients with respect to features and weight.

        Raises:
            ValueError: if it is not a scalar.
        """
        replaced = {} if self._name is None else {self._name: weight.T if self._is_transposed else weight}
        with torch.autocast(features.device.type, enabled=False):
            loss = torch.func.functional_call(self.module, replaced, (features, targets))
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss must return a scalar, but {self.path} returns {got}")
        return loss


class RunRegulariser:
    """Regulariser of a run: a weighted loss of the features at the classifier or at a named layer.

    Args:
        model: The model.
        options: The setting ``regulariser``.

    Raises:
        ValueError: if the model does not have the layer.
    """

    def __init__(self, model: AttachedHead, options: Mapping[str, Any]) -> None:
        self.loss, self.weight = options["loss"], options["weight"]
        self.radius = getattr(model.head, "feature_norm", None)
        of_features: Any = {
            "variability": partial(losses.variability, detach_between=bool(options.get("detach_between"))),
            "koleo": losses.koleo,
            "supcon": losses.supcon,
        }.get(self.loss)
        self._of_features = of_features
        self._of_layer = None
        if options.get("layer"):
            try:
                self._of_layer = losses.regularise(model, options["layer"], of_features, self.weight)
            except ValueError as error:
                raise ValueError(f"regulariser.{error}") from None

    def __call__(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted loss of a batch; its mean over ranks is the loss of the whole batch."""
        if self._of_layer is not None:
            return self._of_layer(targets)
        if self.loss == "center":
            return self.weight * losses.center_loss(features, targets, weight, radius=self.radius)
        return self.weight * self._of_features(features, targets)


def batch_loss(
    config: LossSettings,
    logits: Tensor,
    targets: Tensor,
    features: Tensor,
    weight: Tensor,
    share: float = 1.0,
    of_classes: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return the mean loss over the samples of a batch; with several ranks, the mean over ranks is this loss.

    - ``"cross-entropy"``, with the share ``label_smoothing`` of each target distributed over all classes;
    - ``"mse"``: mean over samples and classes of (logit − one-hot)² (Zhu et al., NeurIPS 2021);
    - ``"dot-regression-published"``: ½(w_y·h + b_y − 1)² (released code of Markou, Ajanthan, Gould, NeurIPS 2024);
    - losses of `neuralcollapse.losses`, of features and weight.

    Args:
        config: The settings.
        logits: (N, K).
        targets: (N,).
        features: (N, d), the input of the weight.
        weight: (K, d), with its graph.
        share: Share of the samples of the whole batch on this rank, times the number of ranks.
        of_classes: `class_options`, with the ``bias`` of the logits.
    """
    bias, classes = None, dict(of_classes or {})
    if classes:
        bias = classes.pop("bias")
        classes = {name: value.to(features) if isinstance(value, Tensor) else value for name, value in classes.items()}
        if config.loss == "cross-entropy":
            smoothing = config.label_smoothing or 0.0
            return losses.cross_entropy(features, targets, weight, bias, label_smoothing=smoothing, **classes)
    if config.loss in _OF_FEATURES:
        options = {"temperature": config.temperature, "margin": config.margin}
        given: dict[str, Any] = {name: float(value) for name, value in options.items() if value is not None}
        return _OF_FEATURES[config.loss](features, targets, weight, **given, **classes)
    if config.loss == "mse":
        return share * functional.mse_loss(logits, functional.one_hot(targets, logits.shape[1]).to(logits.dtype))
    if config.loss == "dot-regression-published":
        true_logit = logits.gather(1, targets[:, None])
        return share * 0.5 * (true_logit - 1).square().mean()
    return share * functional.cross_entropy(logits, targets, label_smoothing=config.label_smoothing or 0.0)


def penalty(config: Optimisation, model: AttachedHead, features: Tensor, ranks: int = 1) -> Tensor | None:
    """Return the penalty for the loss of a batch, or None; with several ranks, the mean over ranks is the penalty.

    With a ``feature_decay`` λ_H, λ/2 (‖W‖² + ‖b‖²) of the classifier and λ_H/2 Σ‖h‖² over the batch (separate decay,
    Zhu et al., NeurIPS 2021); for L-BFGS without it, λ/2 of the squared norm of all parameters.

    Args:
        config: The settings.
        model: The model.
        features: h (N, d), the input of the classifier.
        ranks: Number of ranks that share the batch.
    """
    if config.feature_decay is not None:
        decay = config.feature_decay
        if decay == "published":
            decay, features = PUBLISHED_FEATURE_DECAY, functional.normalize(features)
        of_features = 0.5 * decay * ranks * features.square().sum()
        return of_features + _half_square(model.head, config.weight_decay or 0.0, features)
    if config.optimizer == "lbfgs":
        return _half_square(model, config.weight_decay or 0.0, features)
    return None


def _half_square(module: nn.Module, decay: float, like: Tensor) -> Tensor:
    total = like.new_zeros(())
    for parameter in module.parameters():
        total = total + torch.sum(parameter.square())
    return 0.5 * decay * total


class Diverged(ValueError):
    """Error raised if a value of a run is not finite."""


class FirstNonFinite:
    """Search for the first value of an epoch that is not finite, among the features, the loss and the parameters.

    Results stay on the device until `find` reads them, so that training steps do not cause device syncs.

    Args:
        model: The model whose parameters are checked.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        self._names = list(named)
        self._parameters: list[Tensor] = list(named.values())
        self._kinds = len(named) + 2
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Discard the values of the previous epoch."""
        self._of_loss: Tensor | None = None
        self._of_parameters: Tensor | None = None
        self._finite: Tensor | None = None

    @torch.no_grad()
    def see_loss(self, step: int, loss: Tensor, features: Tensor) -> None:
        """Check a batch.

        Args:
            step: Number of the batch in its epoch, counted from 1.
            loss: Loss of the batch, over all ranks.
            features: Features of the part of the batch on this rank.
        """
        # Metrics and penalties use squares, which overflow long before the features.
        whole = features.detach().square().isfinite().all()
        finite = whole & loss.detach().isfinite()
        code = torch.where(finite, _NEVER, step * self._kinds + whole.long())
        self._of_loss = code if self._of_loss is None else torch.minimum(self._of_loss, code)
        self._finite = finite.long() if self._finite is None else self._finite + finite

    @torch.no_grad()
    def see_parameters(self, step: int) -> None:
        """Check the parameters after a step."""
        if self._parameters[0].device.type == "cpu":  # on a CPU, this is ten times as fast as computing norms
            bounds = torch.stack([torch.stack(parameter.aminmax()) for parameter in self._parameters])
            finite = bounds.isfinite().all(1)
        else:
            finite = torch.stack(torch._foreach_norm(self._parameters, math.inf)).isfinite()
        code = torch.where(finite.all(), _NEVER, step * self._kinds + 2 + (~finite).long().argmax())
        self._of_parameters = code if self._of_parameters is None else torch.minimum(self._of_parameters, code)

    def find(self, *, scaled: bool = False, of_all_ranks: bool = False) -> tuple[int, str] | None:
        """Return the step and the name of the first value that is not finite, or None; this causes a device sync.

        Args:
            scaled: Whether a gradient scaler skips steps that overflow. In this case, a batch without a finite loss
                counts only if no batch of the epoch has a finite loss.
            of_all_ranks: Whether to search over all ranks; all ranks must then call this method.
        """
        codes = [_NEVER if code is None else int(code) for code in (self._of_loss, self._of_parameters)]
        if scaled and self._finite is not None and int(self._finite) > 0:
            codes[0] = _NEVER
        first = min(codes)
        if of_all_ranks and number_of_ranks() > 1:
            shared = torch.tensor(first, device=self._parameters[0].device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN)
            first = int(shared)
        if first >= _NEVER:
            return None
        step, kind = divmod(first, self._kinds)
        names = ["the square of a feature", "the loss", *(f"the parameter {name}" for name in self._names)]
        return step, names[kind]


@dataclass
class EpochLog:
    """Training metrics of an epoch so far, weighted by samples, and training time without measurements.

    Attributes:
        lr: Learning rate at the start of the epoch; NaN for AGD, which has none.
        samples: Number of samples, without those of batches that overflowed and were skipped.
        sums: Sum of each metric.
        eta: Sum of the steps η of AGD.
        steps: Number of steps in ``eta``.
        seconds: Training time of the epoch before training was resumed within it.
    """

    lr: float
    samples: int | Tensor = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    eta: float | Tensor = 0.0
    steps: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.perf_counter() - self.seconds

    def add(self, metrics: dict[str, Tensor], samples: int | Tensor, optimizer: Optimizer, *, skips: bool) -> None:
        """Add a batch; if steps that overflow are skipped, only batches with a finite loss are added."""
        if skips:
            samples = samples * metrics["batch_loss"].isfinite()
            metrics = {name: torch.where(samples > 0, value, 0.0) for name, value in metrics.items()}
        self.samples += samples
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + samples * value
        if isinstance(optimizer, AGD) and optimizer.eta is not None:
            self.eta += optimizer.eta
            self.steps += 1

    def end(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the metrics, and the row of the training log; this causes a device sync."""
        metrics = {name: float(total / self.samples) for name, total in self.sums.items()}
        row = {"seconds": time.perf_counter() - self._started, **metrics}
        return metrics, row | ({"agd_eta": float(self.eta / self.steps)} if self.steps else {"lr": self.lr})

    def state(self) -> dict[str, Any]:
        """Return the fields for saving."""
        state = {name: value for name, value in vars(self).items() if name != "_started"}
        return state | {"seconds": time.perf_counter() - self._started}


def gradient_sizes(objective: Objective, scale: float = 1.0) -> list[dict[str, Any]]:
    """Return the size of each gradient after a backward pass: mean and largest magnitude, and norm.

    Included are the gradients of the parameters, and those of the features, class means, weight and bias that a head
    computes from a batch, if they are not parameters and their gradients are retained.

    Args:
        objective: The objective.
        scale: Factor by which a gradient scaler multiplied the loss.
    """
    gradients = {name: parameter.grad for name, parameter in objective.model.named_parameters()}
    for name, tensor in objective.head_tensors.items():
        gradients[f"head.{name}"] = None if tensor.grad is None else tensor.grad.float()
    rows = []
    for name, gradient in gradients.items():
        if gradient is not None:
            size = (gradient / scale).abs()
            sizes = torch.stack([size.mean(), size.max(), torch.linalg.vector_norm(size)]).tolist()
            rows.append({"parameter": name, **dict(zip(("mean", "max", "norm"), sizes, strict=True))})
    return rows
