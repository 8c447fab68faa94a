"""Records of measurements: metrics, the moments from which they were computed, and their provenance."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_choice, listed
from neuralcollapse._files import write_whole
from neuralcollapse._html import html_table
from neuralcollapse.catalogue import CORE, METRICS, in_order
from neuralcollapse.metrics.collapse import measure_moments
from neuralcollapse.metrics.conventions import wu2024
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.statistics import MeasureOptions
from neuralcollapse.metrics.undefined import MetricValues, grouped, warn_of_undefined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neuralcollapse.metrics.profile import LayerProfile

KIND, FORMAT = "neuralcollapse.measurement", 2
_LARGEST_HEADER = 100_000_000  # bytes, of the safetensors format
_OF_CLASSES = ("min_samples", "drop_classes_above")
_SAVED = ("center", *_OF_CLASSES, "pairwise")  # options that affect metrics of moments, in addition to the code


@dataclass(frozen=True)
class Provenance:
    """Origin of a measurement; `measure` sets the last two fields, and ``model`` to the class name if it is empty.

    Attributes:
        epoch: Number of epochs trained, or None.
        split: Measured split of the data, or None.
        model: Name given by the caller, or the class name of the model.
        labels: SHA-256 of the measured labels, as 64-bit integers in their order.
        package_version: Version of neuralcollapse.

    Raises:
        ValueError: if the epoch is not an integer of at least 0.
    """

    epoch: int | None = None
    split: str | None = None
    model: str = ""
    labels: str = ""
    package_version: str = ""

    def __post_init__(self) -> None:
        if self.epoch is not None:
            check_at_least("epoch", self.epoch, 0)


@dataclass(frozen=True, eq=False)
class Measurement:
    """Result of `measure`.

    Attributes:
        metrics: Dictionary from name to value, NaN for undefined metrics: all of `collapse_metrics`; ``accuracy`` and
            (for K > 5) ``accuracy_top5`` of the classifier itself; and the metrics of single samples.
            `neuralcollapse.catalogue` defines all of them.
        moments: Class moments of the features.
        weight: W (K, d) of the classifier; (0, d) if features were measured without one.
        bias: b (K,), or None.
        cos_margins: (N,) cosine margins of all samples, ascending.
        ncc_mismatch: (K,) share of the samples of each class whose nearest class mean is not the predicted class; NaN
            for a class without samples.
        class_accuracy: (K,) share of the samples of each class that the classifier assigns to that class; NaN for a
            class without samples, and NaN everywhere without a classifier.
        mean_max_logit: Mean over samples of the greatest logit that the model returned.
        residual_norms: (d,) mean norm of the components of the features outside the j leading principal directions
            about −W⁺b, for j = 0, …, d − 1, for the out-of-distribution score ViM; empty without ``per_sample``.
        agreement_without_bias: Share of the samples whose nearest class mean is the class of the greatest entry of Wh,
            as the library of Wu & Papyan measures NC4; NaN without such samples.
        undefined: Dictionary from name to reason, for each metric that is NaN or that is absent because the labels are
            predictions.
        layers: Metrics of each named layer.
        layers_undefined: For each layer with undefined metrics, the reasons.
        layer_moments: Class moments of each named layer.
        sample_features: At most 1,000 of the features for figures, in fp16 (bf16 if they exceed the range of fp16); the
            same samples are chosen for the same data.
        sample_targets: Classes of the samples in ``sample_features``.
        ood_means: Mean of the out-of-distribution features, under the key ``""``, and of each layer, under its name;
            empty without such data.
        train_moments: Class moments of the train split that served as the reference, if another split is measured; not
            saved.
        provenance: Origin of the measurement.
        options: Options of the measurement. Of these, ``center``, ``min_samples``, ``drop_classes_above``, ``pairwise``
            and ``code`` are saved.
    """

    metrics: dict[str, float]
    moments: ClassMoments
    weight: Tensor
    bias: Tensor | None
    cos_margins: Tensor
    ncc_mismatch: Tensor
    class_accuracy: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    mean_max_logit: float = math.nan
    residual_norms: Tensor = field(default_factory=lambda: torch.empty(0))
    agreement_without_bias: float = math.nan
    undefined: dict[str, str] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    layers_undefined: dict[str, dict[str, str]] = field(default_factory=dict)
    layer_moments: dict[str, ClassMoments] = field(default_factory=dict)
    sample_features: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float16))
    sample_targets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    ood_means: dict[str, Tensor] = field(default_factory=dict)
    train_moments: ClassMoments | None = None
    provenance: Provenance = field(default_factory=Provenance)
    options: MeasureOptions = field(default_factory=MeasureOptions)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.moments.num_classes

    @property
    def absent_classes(self) -> list[int]:
        """Classes without a measured sample."""
        return (self.moments.counts == 0).nonzero().flatten().tolist()

    def __repr__(self) -> str:
        """Return the core metrics by group, the reasons for undefined ones and the absent classes, without tensors."""
        return self.summary()

    def summary(self, metrics: str = "core") -> str:
        """Return metrics by group with their values at collapse, the reasons for undefined ones and the absent classes.

        Args:
            metrics: ``"core"``: the about twelve metrics that `print` shows; ``"all"``: all metrics.

        Raises:
            ValueError: if ``metrics`` is neither.
        """
        caption, head, rows, notes = self._summary(metrics)
        lines = [caption, f"  {head[0]:34} {head[1]:>10} {head[2]:>12}"]
        lines += [row[0] if len(row) == 1 else f"  {row[0]:34} {row[1]:>10} {row[2]:>12}".rstrip() for row in rows]
        return "\n".join([*lines, *notes])

    def _repr_html_(self) -> str:
        return html_table(*self._summary("core"))

    def _summary(self, metrics: str) -> tuple[str, list[str], list[list[str]], list[str]]:
        """Return caption, head, rows and notes of a table of metrics; the heading row of a group has one cell."""
        check_choice("metrics", metrics, ("core", "all"))
        shown = {name: self.metrics[name] for name in self.metrics if metrics == "all" or name in CORE}
        rows: list[list[str]] = []
        group = ""
        for name, value in shown.items():
            entry = METRICS.get(name)
            of_metric = "other" if entry is None else entry.group
            if of_metric != group:
                rows.append([group := of_metric])
            at_collapse = None if entry is None else entry.value_at_collapse(self.num_classes)
            rows.append([name, f"{value:.4g}", "" if at_collapse is None else f"{at_collapse:.4g}"])
        notes = []
        if hidden := len(self.metrics) - len(shown):
            notes.append(f"{hidden} more: see measurement.metrics and measurement.summary('all')")
        if absent := self.absent_classes:
            present = self.num_classes - len(absent)
            notes.append(f"of {self.num_classes:,} classes {present:,} have samples; absent: {listed(absent)}")
        if reasons := grouped(self.undefined, self.layers_undefined):
            notes += ["undefined:", *(f"  {line}" for line in reasons)]
        subject = f"Measurement of {self.provenance.model or 'a model'}"
        caption = f"{subject}, {self.moments.counts.sum():,} samples, {self.num_classes:,} classes"
        return caption, ["", "value", "at collapse"], rows, notes

    def plot(self, figure: str = "classes") -> Figure:
        """Draw a figure, by default norms, variances and cosines of every class; see `neuralcollapse.plot` for others.

        Args:
            figure: Name of the figure.

        Raises:
            ValueError: if the figure is unknown.
            ImportError: if matplotlib or pandas, of the extra ``lab``, is not installed.
        """
        from neuralcollapse.metrics.figures.records import plot

        return plot(self, figure)

    def recompute(self, **changes: Any) -> Measurement:
        """Compute every metric of moments again, with changed options and the formulas of this version.

        Values that need single samples or per-class scatter are retained if the changed options do not affect them, and
        left out otherwise. Accuracies are always retained. The other values are retained if the measured classes are
        the same and, for values that depend on the centre, if the centre is the same. One warning gives the reasons for
        undefined metrics.

        Args:
            **changes: Any of the options ``center``, ``min_samples``, ``drop_classes_above``, ``pairwise`` and ``code``
                of `MeasureOptions`.

        Raises:
            ValueError: if another option is given, or as for `MeasureOptions` and `collapse_metrics`.
        """
        if unknown := changes.keys() - {*_SAVED, "code"}:
            names = ", ".join((*_SAVED, "code"))
            raise ValueError(f"recompute must be given options among {names}, got {', '.join(sorted(unknown))}")
        options = replace(self.options, **changes)

        def updated(old: MetricValues, new: MetricValues) -> MetricValues:
            """Return the new values, and the old values that the options do not affect."""
            names = {name for name in old.metrics if name not in new.metrics and self._is_unaffected(name, options)}
            return MetricValues(
                in_order({name: value for name, value in old.metrics.items() if name in names} | new.metrics),
                in_order({name: reason for name, reason in old.undefined.items() if name in names} | new.undefined),
            )

        metrics, undefined = updated(
            MetricValues(self.metrics, self.undefined),
            measure_moments(
                self.moments, self.weight if len(self.weight) else None, self.bias, self.ood_means.get(""), options
            ),
        )
        layers = {
            layer: updated(
                MetricValues(self.layers[layer], self.layers_undefined.get(layer, {})),
                measure_moments(moments, None, None, self.ood_means.get(layer), options),
            )
            for layer, moments in self.layer_moments.items()
        }
        layers_undefined = {layer: reasons for layer, (_, reasons) in layers.items() if reasons}
        warn_of_undefined(undefined, layers_undefined)
        same_classes = self._is_unaffected("nc4_ncc_mismatch", options)
        return replace(
            self,
            agreement_without_bias=self.agreement_without_bias if same_classes else math.nan,
            metrics=metrics,
            undefined=undefined,
            layers={layer: values for layer, (values, _) in layers.items()},
            layers_undefined=layers_undefined,
            options=options,
        )

    def named(self, convention: str) -> dict[str, float]:
        """Return the metrics under the names and with the conventions of another library.

        ``"wu2024"`` is rhubarbwu/neural-collapse, the library of Wu & Papyan (NeurIPS 2024), with the eleven names of
        its example: ``nc1_pinv``, ``nc1_svd``, ``nc1_quot``, ``nc1_cdnv``, ``nc2_etf_err``, ``nc2g_dist``,
        ``nc2g_log``, ``nc3_dual_err``, ``nc3u_uni_dual``, ``nc4_agree``, ``nc5_ood_dev``. As in that library, the
        centre is the mean of the class means, a class without samples counts as a class with mean 0, all classes are
        measured regardless of the options, the values of ``nc2g`` are the variances of the kernels, and the classifier
        of ``nc4_agree`` has no bias.

        Metrics whose inputs were not measured (a weight, single samples, out-of-distribution data) are left out. One
        warning gives the reasons for undefined metrics, which are NaN.

        Args:
            convention: ``"wu2024"``.

        Raises:
            ValueError: if the convention is unknown.

        Examples:
            >>> from neuralcollapse.metrics import measure_features
            >>> features = torch.tensor([[1.0, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]])
            >>> measurement = measure_features(features, torch.tensor([0, 0, 1, 1]), progress=False)
            >>> round(measurement.named("wu2024")["nc1_quot"], 4)
            0.01
        """
        check_choice("convention", convention, ("wu2024",))
        values, undefined = wu2024(self)
        warn_of_undefined(undefined)
        return values

    def profile(self, test: Measurement | None = None) -> LayerProfile:
        """Return the profile of the layers by depth: collapse, errors of the probes, and rank; the features are last.

        Args:
            test: Measurement of another split with the same layers, relative to this measurement (``train=``). The
                profile then also shows its errors.

        Raises:
            ValueError: if no layers were measured, or the other split has other layers.

        Examples:
            >>> import neuralcollapse as nc
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8),
            ...                             torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> batches = [(torch.randn(16, 4), torch.arange(16) % 2) for _ in range(3)]
            >>> measurement = nc.measure(model, batches, layers="blocks", probes=True, progress=False)
            >>> measurement.profile().layers
            ('1', 'features')
        """
        from neuralcollapse.metrics.profile import LayerProfile

        return LayerProfile.of(self, test)

    def _is_unaffected(self, name: str, options: MeasureOptions) -> bool:
        """Return whether a value that does not follow from moments is the same with other options."""
        entry = METRICS.get(name)
        if entry is None or entry.group == "accuracy":  # metrics that this version does not have are left out
            return entry is not None
        same_classes = all(getattr(self.options, bound) == getattr(options, bound) for bound in _OF_CLASSES)
        same_center = "center" not in entry.inputs or self.options.center == options.center
        return entry.of_samples and same_classes and same_center

    def save(self, path: str | Path) -> None:
        """Write the measurement, without ``train_moments`` and per-class scatter, to a safetensors file.

        Moments, weight, margins and values are written in fp64, and each scatter as its upper triangle. The header
        contains the version of the format and the `Provenance`. The file contains no code and can be read from any
        language. It is written completely or not at all.

        Raises:
            OSError: if the file cannot be written; an existing file is then left unchanged.
        """
        tensors = {
            "weight": self.weight.double(),
            "cos_margins": self.cos_margins.double(),
            "ncc_mismatch": self.ncc_mismatch.double(),
            "class_accuracy": self.class_accuracy.double(),
            "mean_max_logit": torch.tensor(self.mean_max_logit, dtype=torch.float64),
            "residual_norms": self.residual_norms.double(),
            "agreement_without_bias": torch.tensor(self.agreement_without_bias, dtype=torch.float64),
            "sample_features": self.sample_features,
            "sample_targets": self.sample_targets,
            "values": torch.tensor(list(self.metrics.values()), dtype=torch.float64),
            **_packed("", self.moments),
        }
        if self.bias is not None:
            tensors["bias"] = self.bias.double()
        if self.options.code is not None:
            tensors["code"] = self.options.code.double()
        for index, name in enumerate(self.layers):  # numbered, because a layer may have any name
            tensors |= _packed(f"layer{index}.", self.layer_moments[name])
            tensors[f"layer{index}.values"] = torch.tensor(list(self.layers[name].values()), dtype=torch.float64)
        for index, mean in enumerate(self.ood_means.values()):
            tensors[f"ood{index}"] = mean.double()
        contents = {
            "provenance": asdict(self.provenance),
            "options": {name: getattr(self.options, name) for name in _SAVED},
            "classes": {"of_weight": self.num_classes, "with_samples": self.num_classes - len(self.absent_classes)},
            "metrics": list(self.metrics),
            "undefined": self.undefined,
            "layers_undefined": self.layers_undefined,
            "layers": {name: list(values) for name, values in self.layers.items()},
            "ood": list(self.ood_means),
        }
        header = {name: json.dumps(value) for name, value in contents.items()}
        header |= {"format": KIND, "format_version": str(FORMAT), "package_version": self.provenance.package_version}
        write_record(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read a file written by `save` of this version or of an earlier one.

        Raises:
            ValueError: if the file is truncated, damaged, not a measurement, or of a newer format; the message says
                which.
            OSError: if the file does not exist or cannot be read.
        """
        tensors, header = read_record(path, KIND, FORMAT)
        contents = {name: json.loads(header[name]) for name in ("provenance", "options", "metrics", "layers", "ood")}
        if "max_samples" in contents["options"]:  # the name that format 1 uses
            contents["options"]["drop_classes_above"] = contents["options"].pop("max_samples")
        layers: dict[str, list[str]] = contents["layers"]
        return cls(
            metrics=dict(zip(contents["metrics"], tensors["values"].tolist(), strict=True)),
            moments=_unpacked("", tensors),
            weight=tensors["weight"],
            bias=tensors.get("bias"),
            cos_margins=tensors["cos_margins"],
            ncc_mismatch=tensors["ncc_mismatch"],
            **_optional(tensors),
            undefined=json.loads(header.get("undefined", "{}")),
            layers_undefined=json.loads(header.get("layers_undefined", "{}")),
            layers={
                name: dict(zip(names, tensors[f"layer{index}.values"].tolist(), strict=True))
                for index, (name, names) in enumerate(layers.items())
            },
            layer_moments={name: _unpacked(f"layer{index}.", tensors) for index, name in enumerate(layers)},
            sample_features=tensors["sample_features"],
            sample_targets=tensors["sample_targets"],
            ood_means={name: tensors[f"ood{index}"] for index, name in enumerate(contents["ood"])},
            provenance=Provenance(**contents["provenance"]),
            options=MeasureOptions(**contents["options"], code=tensors.get("code")),
        )


class LabelFingerprint:
    """SHA-256 of labels, computed batch by batch."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, labels: Tensor) -> None:
        """Add the labels of a batch."""
        self._digest.update(labels.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())

    def __str__(self) -> str:
        return self._digest.hexdigest()


def _optional(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the fields that earlier versions did not write."""
    values: dict[str, Any] = {
        name: tensors[name].item() for name in ("mean_max_logit", "agreement_without_bias") if name in tensors
    }
    return values | {name: tensors[name] for name in ("residual_norms", "class_accuracy") if name in tensors}


def _packed(prefix: str, moments: ClassMoments) -> dict[str, Tensor]:
    """Return the moments in fp64, with the upper triangle of the scatter row by row."""
    scatter = moments.within_class_scatter.double()
    rows, columns = torch.triu_indices(*scatter.shape, device=scatter.device).unbind()
    return {
        f"{prefix}counts": moments.counts,
        f"{prefix}means": moments.means.double(),
        f"{prefix}within_class_scatter": scatter[rows, columns],
        f"{prefix}within_class_trace": moments.within_class_trace.double(),
        f"{prefix}rounding": moments.rounding.double(),
    }


def _unpacked(prefix: str, tensors: dict[str, Tensor]) -> ClassMoments:
    state = {name: tensors[prefix + name] for name in ("counts", "means", "within_class_trace")}
    feature_dim = state["means"].shape[1]
    scatter = torch.zeros(feature_dim, feature_dim, dtype=torch.float64)
    rows, columns = torch.triu_indices(feature_dim, feature_dim).unbind()
    scatter[rows, columns] = tensors[f"{prefix}within_class_scatter"]
    state |= {"within_class_scatter": scatter}
    if f"{prefix}rounding" in tensors:  # absent from format 1
        state["rounding"] = tensors[f"{prefix}rounding"]
    return ClassMoments.from_state(state)


def write_record(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file completely or not at all; its metadata contain a checksum of the header and of the tensors.

    Raises:
        OSError: if the file cannot be written; an existing file is then left unchanged.
    """
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksum = _checksum(*_split(serialise(data, dict(metadata))))
    content = serialise(data, {**metadata, "checksum": checksum})
    write_whole(Path(path), lambda temporary: temporary.write_bytes(content))


def read_record(path: str | Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file of the given kind, with a format up to ``version``.

    Raises:
        ValueError: if the file is truncated, damaged, not of this kind, or of a newer format; the message says which.
        OSError: if the file does not exist or cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        header, body = _split(content)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except EOFError:
        raise ValueError(f"{path} is truncated: it ends inside its header, after {len(content)} bytes") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is not a safetensors file") from None
    metadata: dict[str, str] = dict(header.get("__metadata__", {}))
    if metadata.get("format") != kind:
        raise ValueError(f"{path} is a safetensors file, but not a {kind}")
    number = metadata.get("format_version", "")
    if not number.isdecimal() or int(number) > version:
        raise ValueError(
            f"{path} has the newer format {number} of {kind}, written by neuralcollapse "
            f"{metadata.get('package_version')}; this version reads formats up to {version}"
        )
    if len(body) < max(ends, default=0):
        raise ValueError(f"{path} is truncated: it holds {len(body)} of {max(ends)} bytes of tensors")
    if _checksum(header, body) != metadata.get("checksum"):
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    return parse(content), metadata


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file and the bytes of its tensors; raise EOFError if the header is cut off."""
    length = int.from_bytes(content[:8], "little")
    if content[8:9] not in (b"{", b"") or length > _LARGEST_HEADER:
        raise ValueError("not a header")
    if len(content) < 8 + length:
        raise EOFError
    header = json.loads(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("not a header")
    return header, content[8 + length :]


def _checksum(header: Mapping[str, Any], body: bytes) -> str:
    """Return the SHA-256 of header and tensors, without the checksum itself."""
    metadata = {name: text for name, text in header.get("__metadata__", {}).items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())
    digest.update(body)
    return digest.hexdigest()
