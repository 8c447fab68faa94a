"""Reference values of the library, recorded once and compared after every restructuring.

``python tests/frozen.py record [GROUP…]`` writes them to tests/fixtures/frozen.safetensors;
``python tests/frozen.py compare [GROUP…]`` prints, for each group, how many values are equal to the bit and the largest
relative difference of the others. Without groups, all of them. Names are ``group/case/value``. `test_frozen.py` holds
the tolerances.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import neuralcollapse as nc
from helpers import generator, normal
from neuralcollapse import geometry, losses, metrics, ufm

PATH = Path(__file__).parent / "fixtures" / "frozen.safetensors"
# Recorded, but no longer computed: MIR and HDR as in the released code; MIR and HDR in runs, where they are optional.
REMOVED = re.compile(r"(mir|hdr)_released|^runs/.*-(mir|hdr)/value$")
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
Values = dict[str, Tensor]
# The network and data of runs of the laboratory.
SMALL: dict[str, Any] = {
    "backbone": "mlp",
    "width": 24,
    "depth": 1,
    "train_samples": 200,
    "test_samples": 60,
    "batch_size": 50,
}


def stored_batches(
    num_classes: int, feature_dim: int, dtype: torch.dtype, steps: int = 3
) -> list[tuple[Tensor, Tensor]]:
    """Batches of features around random class means, every class in each.

    Without a class, the nearest ETF to the batch's means is not unique, and the processor would choose it.
    """
    means = 2 * normal(num_classes, feature_dim, seed=1)
    batches = []
    for step in range(steps):
        targets = torch.arange(4 * num_classes) % num_classes
        features = means[targets] + normal(len(targets), feature_dim, seed=10 + step)
        batches.append((features.to(dtype), targets))
    return batches


# --- metrics --------------------------------------------------------------------------------------------------------


def moment_sets() -> Iterator[tuple[str, nc.ClassMoments, Tensor, Tensor, Tensor]]:
    """Ten sets of class moments, each with a weight, a bias and an out-of-distribution mean."""
    for name, num_classes, feature_dim, counts in [
        ("balanced", 5, 12, [20] * 5),
        ("unbalanced", 5, 12, [50, 20, 10, 4, 2]),
        ("two-classes", 2, 6, [15, 15]),
        ("more-classes-than-dimensions", 12, 5, [8] * 12),
        ("absent-class", 5, 12, [20, 0, 20, 20, 20]),
        ("one-sample-per-class", 4, 8, [1] * 4),
        ("equal-means", 3, 6, [10] * 3),
        ("collapsed", 4, 8, [10] * 4),
        ("far-from-zero", 4, 8, [10] * 4),
        ("hundred-classes", 100, 64, [5] * 100),
    ]:
        means = 3 * normal(num_classes, feature_dim, seed=num_classes)
        noise = 0.7
        if name == "equal-means":
            means = means[:1].expand_as(means)
        if name == "collapsed":
            means, noise = 5 * nc.random_simplex_etf(num_classes, feature_dim, generator=generator(3)).double(), 0.0
        if name == "far-from-zero":
            means = means + 1e4
        targets = torch.arange(num_classes).repeat_interleave(torch.tensor(counts))
        features = means[targets] + noise * normal(len(targets), feature_dim, seed=7)
        moments = nc.ClassMoments(num_classes, feature_dim, class_scatter=True)
        moments.update(features, targets)
        weight = means - means.mean(0) + 0.1 * normal(num_classes, feature_dim, seed=8)
        yield name, moments, weight, normal(num_classes, seed=9), normal(feature_dim, seed=10)


def measured_moments() -> Values:
    """Every metric of moments, with each centre."""
    values: Values = {}
    for name, moments, weight, bias, ood_mean in moment_sets():
        code = geometry.code_from_gram(geometry.simplex_gram(len(weight)).double(), feature_dim=len(weight))
        for center in ("samples", "classes"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                options = nc.MeasureOptions(center=center, code=code)
                found = nc.collapse_metrics(moments, weight, bias, ood_mean=ood_mean, options=options)
            values |= {f"{name}-{center}/{metric}": torch.tensor(value) for metric, value in found.items()}
        if name in ("balanced", "unbalanced", "more-classes-than-dimensions"):
            found = nc.etf_distances(weight, moments.means) if len(weight) <= weight.shape[1] + 1 else {}
            values |= {f"{name}/{metric}": torch.as_tensor(value) for metric, value in found.items()}
    return values


def measured_samples() -> Values:
    """Every metric of single samples, by `measure` of a small network on stored data."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).double()
    targets = torch.arange(120) % 4
    inputs = 2 * normal(4, 6, seed=5)[targets] + normal(120, 6, seed=6)
    loader = list(zip(inputs.split(40), targets.split(40), strict=True))
    ood, options = [(normal(20, 6, seed=7), None)], nc.MeasureOptions(information=True)
    measurement = nc.measure(model, loader, ood=ood, layers=["0"], options=options, progress=False)
    values = {f"network/{name}": torch.tensor(value) for name, value in measurement.metrics.items()}
    values |= {f"layer/{name}": torch.tensor(value) for name, value in measurement.layers["0"].items()}
    values["network/cos_margins"] = measurement.cos_margins
    values["network/class_mismatch"] = measurement.ncc_mismatch
    per_class = metrics.class_values(measurement.moments, measurement.weight)
    for name, value in vars(per_class).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            values[f"per-class/{name}"] = value
    return values


# --- geometry -------------------------------------------------------------------------------------------------------


def solved() -> Values:
    """Nearest simplex ETFs and frames, polar factors and codes, with gradients."""
    values: Values = {}
    for precision, dtype in PRECISIONS.items():
        for num_classes, feature_dim in [(2, 3), (5, 4), (10, 64), (40, 48)]:
            case = f"{precision}-K{num_classes}-d{feature_dim}"
            means = normal(num_classes, feature_dim, seed=21, dtype=dtype)
            anchor = nc.random_simplex_etf(num_classes, feature_dim, generator=generator(22), dtype=dtype)
            class_weights = normal(num_classes, seed=23, dtype=dtype).abs()
            direction = normal(num_classes, feature_dim, seed=24, dtype=dtype)
            for option, arguments in {
                "plain": {},
                "anchored": {"anchor": anchor, "proximal_weight": 0.5},
                "weighted": {"class_weights": class_weights},
                "products": {"method": "products"},
            }.items():
                values |= _with_gradient(
                    f"etf-{case}-{option}",
                    lambda h, arguments=arguments: nc.nearest_simplex_etf(h, **arguments),
                    means,
                    direction,
                )
            matrix = normal(num_classes, max(num_classes, feature_dim), seed=25, dtype=dtype)
            values |= _with_gradient(f"polar-{case}", nc.polar_factor, matrix, torch.ones_like(matrix).cumsum(1))
        attributes = torch.cartesian_prod(torch.arange(3), torch.arange(2))
        gram = geometry.attribute_gram(attributes, torch.tensor([0.5, 0.3], dtype=dtype))
        code = geometry.code_from_gram(gram, feature_dim=10)
        means, direction = normal(6, 10, seed=26, dtype=dtype), normal(6, 10, seed=27, dtype=dtype)
        nearest = partial(nc.nearest_frame, code=code)
        values |= _with_gradient(f"frame-{precision}", nearest, means, direction)
        weights = torch.arange(1.0, 7.0, dtype=dtype)
        nearest = partial(nc.nearest_frame, code=code, class_weights=weights)
        values |= _with_gradient(f"frame-{precision}-weighted", nearest, means, direction)
        values[f"frame-{precision}/gram"] = gram
        values[f"frame-{precision}/tree"] = geometry.tree_gram(torch.tensor([4, 4, 5, 5, 6, 6, -1]), 3.0, dtype=dtype)
        values[f"frame-{precision}/embedding"] = geometry.embedding_gram(normal(5, 3, seed=28, dtype=dtype))
        values[f"frame-{precision}/distance"] = geometry.distance_gram(gram.max() - gram, 2.0)
        values[f"frame-{precision}/seli"] = _gram(geometry.seli_code(torch.tensor([8, 4, 2, 1]), dtype=dtype))
    return values


def _gram(rows: Tensor) -> Tensor:
    """Gram matrix, which does not depend on an orientation."""
    return rows @ rows.mT


def _with_gradient(name: str, function: Callable[[Tensor], Tensor], inputs: Tensor, direction: Tensor) -> Values:
    inputs = inputs.clone().requires_grad_()
    output = function(inputs)
    (gradient,) = torch.autograd.grad((output * direction).sum(), inputs)
    return {f"{name}/value": output.detach(), f"{name}/gradient": gradient}


# --- heads and losses -----------------------------------------------------------------------------------------------


def heads(num_classes: int, feature_dim: int) -> dict[str, Callable[[], Any]]:
    """Each head, in each of its configurations."""
    sizes = (feature_dim, num_classes)
    gram = geometry.tree_gram(torch.tensor([6, 6, 7, 7, 8, 8, 9, 9, 9, -1])[: num_classes + 4], 3.0)
    # A triangular factor is unique, unlike the eigenvectors of equal eigenvalues that code_from_gram would take.
    factor = torch.linalg.cholesky(gram.double() + 0.1 * torch.eye(num_classes, dtype=torch.float64))
    code = torch.nn.functional.pad(factor, (0, feature_dim - num_classes)).to(gram.dtype)
    class_weights = torch.arange(1.0, num_classes + 1)
    return {
        "learned": lambda: nc.LearnedClassifier(*sizes),
        "learned-unit": lambda: nc.LearnedClassifier(*sizes, feature_norm="auto", unit_weight=True),
        "fixed": lambda: nc.FixedETFClassifier(*sizes),
        "fixed-canonical": lambda: nc.FixedETFClassifier(*sizes, orientation="canonical", bias="learned"),
        # In another orientation it would begin with those eigenvectors.
        "fixed-frame": lambda: nc.FixedFrameClassifier(*sizes, code, bias="none", orientation="given"),
        "nearest": lambda: nc.NearestETFClassifier(*sizes),
        "nearest-published": lambda: nc.NearestETFClassifier(*sizes, momentum="published", bias="none"),
        "nearest-weighted": lambda: nc.NearestETFClassifier(*sizes, class_weights=class_weights),
        "nearest-detached": lambda: nc.NearestETFClassifier(*sizes, implicit_gradient=False, proximal_weight=0.0),
        "nearest-products": lambda: nc.NearestETFClassifier(*sizes, solver=nc.heads.ClosedForm("products")),
        "nearest-trust-region": lambda: nc.NearestETFClassifier(*sizes, solver=nc.heads.TrustRegion()),
        "nearest-frame": lambda: nc.NearestFrameClassifier(*sizes, frame=code),
        "nearest-means": lambda: nc.NearestFrameClassifier(*sizes, frame=nc.heads.LeadingDirections(3)),
        "class-means": lambda: nc.ClassMeanClassifier(*sizes),
        "class-means-current": lambda: nc.ClassMeanClassifier(*sizes, means="current", class_weights=class_weights),
        "class-means-differentiable": lambda: nc.ClassMeanClassifier(*sizes, means="differentiable", bias="none"),
    }


def trained_heads() -> Values:
    """Logits, gradients of the features and the weight of each head over three batches, then in evaluation mode."""
    num_classes, feature_dim = 6, 16
    values: Values = {}
    for precision, dtype in PRECISIONS.items():
        batches = stored_batches(num_classes, feature_dim, dtype)
        with default_dtype(dtype):
            made = heads(num_classes, feature_dim)
            for name, make in made.items():
                torch.manual_seed(0)
                head = make()
                case = f"{name}-{precision}"
                for step, (features, targets) in enumerate(batches):
                    features = features.clone().requires_grad_()
                    logits = head(features, targets)
                    torch.nn.functional.cross_entropy(logits, targets).backward()
                    values[f"{case}/logits{step}"] = logits.detach()
                    values[f"{case}/gradient{step}"] = features.grad
                head.eval()
                values[f"{case}/weight"] = head.weight.detach().clone()
                values[f"{case}/evaluation"] = head(batches[0][0]).detach()
    return values


def computed_losses() -> Values:
    """Each loss with its gradients of the features and of the weight."""
    functions = {
        "normface": lambda *arguments: losses.normface(*arguments, temperature=0.2),
        "decoupled": losses.decoupled_cross_entropy,
        "decoupled-margin": lambda *arguments: losses.decoupled_cross_entropy(*arguments, margin=0.5),
        "ntce": losses.ntce,
        "nonl": losses.nonl,
        "nonl-bidirectional": losses.bidirectional_nonl,
        "two-way": losses.two_way,
        "two-way-ignore": lambda *arguments: losses.two_way(*arguments, ignore_index=2),
        "dot-regression": losses.dot_regression,
    }
    values: Values = {}
    for precision, dtype in PRECISIONS.items():
        features, targets = stored_batches(6, 16, dtype)[1]
        for name, function in functions.items():
            leaves = features.clone().requires_grad_(), normal(6, 16, seed=31, dtype=dtype).requires_grad_()
            value = function(leaves[0], targets, leaves[1])
            value.backward()
            case = f"{name}-{precision}"
            values |= {
                f"{case}/value": value.detach(),
                f"{case}/features": leaves[0].grad,
                f"{case}/weight": leaves[1].grad,
            }
    return values


# --- unconstrained features model -----------------------------------------------------------------------------------


def ufm_optima() -> Values:
    """Closed-form optima, saddles and the ends of Hessian spectra."""
    values: Values = {}
    for loss in ("cross-entropy", "mse"):
        for bias in (True, False):
            optimum = ufm.global_optimum(4, 3, 0.01, 0.02, feature_dim=6, loss=loss, bias=bias)
            case = f"{loss}-{'bias' if bias else 'none'}"
            for name in ("loss", "weight_norm_squared", "feature_norm_squared", "margin", "bias_value"):
                values[f"{case}/{name}"] = torch.tensor(getattr(optimum, name), dtype=torch.float64)
            values[f"{case}/weight"] = optimum.weight
    torch.manual_seed(0)
    head = nc.LearnedClassifier(4, 3)
    model = ufm.UnconstrainedFeatures(3, 2, 4, head, weight_decay=0.01, feature_decay=0.01, generator=generator(0))
    values["model/curvature"] = torch.tensor(ufm.origin_curvature(3, 2, 0.01, 0.01), dtype=torch.float64)
    extremes = ufm.hessian_extremes(model, count=2, method="dense")
    values |= {"model/least": extremes.least, "model/greatest": extremes.greatest}
    descent = ufm.minimize(model)
    values["model/loss"] = torch.tensor(descent.objective, dtype=torch.float64)
    return values


# --- runs of the laboratory -----------------------------------------------------------------------------------------


def runs() -> Values:
    """Train and test metrics of two-epoch runs on the digits, for five methods."""
    from neuralcollapse.lab import RunConfig, train_runs

    with tempfile.TemporaryDirectory() as folder:
        configs = [
            RunConfig(method=method, epochs=2, device="cpu", **SMALL)
            for method in ("linear", "standard", "fixed", "implicit", "means")
        ]
        train_runs(configs, Path(folder) / "runs")
        return {
            name: value
            for path in sorted(Path(folder).rglob("metrics.csv"))
            for name, value in _table_columns(path, path.parent.name).items()
        }


def trainings() -> Values:
    """Tables and final states of two-epoch runs: methods with optimisers, two ranks, a stopped and resumed run."""
    from neuralcollapse.lab import RunConfig, RunFolder, train_runs

    values: Values = {}
    with tempfile.TemporaryDirectory() as parent:
        for case, settings in training_settings():
            folder = Path(parent) / case
            train_runs(RunConfig(**settings), folder, progress=False)
            values |= _run_values(folder, case)
        small = [f"--{name}={value}" for name, value in SMALL.items()]
        for case, *commands in [
            ("two-ranks", ["--devices=2", "--epochs=2"]),
            ("resumed", ["--epochs=1", "--schedule=constant"], ["--epochs=2", "--schedule=constant", "--resume"]),
        ]:
            folder = Path(parent) / case
            for options in commands:
                command = [sys.executable, "-m", "neuralcollapse.cli", "train", f"--out={folder}", "--device=cpu"]
                subprocess.run([*command, *small, *options], check=True, capture_output=True)
            values |= _run_values(RunFolder(folder).path, case)
    return values


def training_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings of runs, by name: every method with every optimiser that can train it, then further options."""
    common = {"epochs": 2, "device": "cpu", **SMALL}
    for method in ("standard", "fixed", "implicit", "linear", "means", "frame"):
        for optimizer in ("sgd", "adam", "adamw", "lbfgs", "agd"):
            settings: dict[str, Any] = {**common, "method": method, "optimizer": optimizer}
            if optimizer == "lbfgs" and method in ("implicit", "means", "frame"):
                continue  # refused: the weight changes during the line search
            if optimizer == "agd":
                settings |= {"classifier_bias": "none", "backbone_options": {"batch_norm_affine": False}}
            else:
                settings |= {"lr": 0.05 if optimizer == "sgd" else 0.5 if optimizer == "lbfgs" else 0.002}
            if optimizer == "lbfgs" and method == "standard":
                settings |= {"unit_weight": False}
            yield f"{method}-{optimizer}", settings
    for case, further in {
        "average": {"weight_average": 0.5},
        "accumulate": {"accumulate": 3, "gradient_clip": 0.5},
        "convnet": {
            "backbone": "convnet",
            "width": 8,
            "depth": None,
            "augmentation": {"crop_padding": 1, "flip": True},
        },
        "bf16": {"precision": "bf16-mixed"},
        "one-cycle": {"schedule": "one-cycle", "loss": "nonl"},
        "label-noise": {"label_noise": 0.2, "validation_share": 0.2, "sampling": "stratified"},
        "decay": {"method": "linear", "feature_decay": 1e-4, "loss": "mse"},
    }.items():
        yield case, common | further


def _run_values(folder: Path, case: str) -> Values:
    """Columns of a run's tables, and the tensors of its last checkpoint as one vector."""
    values = _table_columns(folder / "metrics.csv", f"{case}-metrics")
    values |= _table_columns(folder / "training.csv", f"{case}-training")
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    state = checkpoint["state_dict"]
    values[f"{case}/state"] = torch.cat([state[name].reshape(-1).double() for name in sorted(state)]).float()
    return values


def _table_columns(path: Path, case: str) -> Values:
    """Columns of numbers of a table, but for seconds, by its columns of words."""
    import pandas

    table = pandas.read_csv(path)
    words = [name for name in table.columns if table[name].dtype.kind not in "fi"]
    values: Values = {}
    for keys, rows in table.groupby(words) if words else [((), table)]:
        for column in rows.columns:
            if rows[column].dtype.kind == "f" and "seconds" not in column:
                name = "-".join([case, *map(str, keys)])
                values[f"{name}/{column}"] = torch.tensor(rows[column].to_numpy(), dtype=torch.float64)
    return values


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


GROUPS: dict[str, Callable[[], Values]] = {
    "moments": measured_moments,
    "samples": measured_samples,
    "geometry": solved,
    "heads": trained_heads,
    "losses": computed_losses,
    "ufm": ufm_optima,
    "runs": runs,
    "trainings": trainings,
}


def stored_values() -> Values:
    """Recorded values, without those that are no longer computed."""
    return {name: value for name, value in load_file(PATH).items() if not REMOVED.search(name)}


def compute(group: str) -> Values:
    """Values of a group, by ``group/case/value``."""
    with one_thread():
        return {f"{group}/{name}": value.detach().contiguous().clone() for name, value in GROUPS[group]().items()}


def difference(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest magnitude of the reference; 0 only if equal to the bit."""
    value, reference = value.double(), reference.double()
    if value.shape != reference.shape or not torch.equal(value.isnan(), reference.isnan()):
        return math.inf
    value, reference = value.nan_to_num(0), reference.nan_to_num(0)
    if not value.numel() or torch.equal(value, reference):
        return 0.0
    scale = float(reference.abs().max())
    return float((value - reference).abs().max()) / max(scale, 1e-30)


def main(command: str, *groups: str) -> None:
    chosen = groups or tuple(GROUPS)
    if command == "record":
        others = {name: value for name, value in load_file(PATH).items() if name.partition("/")[0] not in chosen}
        save_file(others | {name: value for group in chosen for name, value in compute(group).items()}, PATH)
        return
    stored = stored_values()
    for group in chosen:
        computed = compute(group)
        expected = {name for name in stored if name.startswith(f"{group}/")}
        for name in sorted(expected ^ computed.keys()):
            print(f"{'missing' if name in expected else 'new'}: {name}")
        found = {name: difference(computed[name], stored[name]) for name in sorted(expected & computed.keys())}
        other = {name: value for name, value in found.items() if value > 0}
        print(f"{group}: {len(found) - len(other)} of {len(found)} equal to the bit; largest other difference", end=" ")
        print(f"{max(other.values(), default=0.0):.2g}")
        for name, value in sorted(other.items(), key=lambda item: -item[1])[:8]:
            print(f"    {name} {value:.2g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
