"""A measurement as a record: what was found, of what, and enough of it to find everything else again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from neuralcollapse.catalogue import in_order
from neuralcollapse.metrics.collapse import measure_moments
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.statistics import Center
from neuralcollapse.metrics.tensor_file import read_tensors, write_tensors
from neuralcollapse.metrics.undefined import grouped, listed, warn_of

KIND, FORMAT = "neuralcollapse.measurement", 2


@dataclass(frozen=True)
class Options:
    """Which classes counted, about which centre; see `collapse_metrics`."""

    center: Center = "samples"
    min_samples: int = 1
    drop_classes_above: int | None = None
    pairwise: bool = True

    def kept_values(self, other: Options) -> set[str]:
        """Those of the values that moments do not give which stay true under other options."""
        kept = {"accuracy", "accuracy_top5"}
        if (self.min_samples, self.drop_classes_above) == (other.min_samples, other.drop_classes_above):
            kept |= {"nc4_ncc_mismatch", "nc4_ncc_mismatch_class_mean", "nc1_numerical_rank"}
            kept |= {"instance_alignment", "class_alignment", "mir", "hdr", "mir_released", "hdr_released"}
            if self.center == other.center:
                kept |= {"alignment", "nc2_cos_margin"}
        return kept


@dataclass(frozen=True)
class Provenance:
    """Where a measurement comes from.

    Attributes:
        epoch: Epochs trained, if it was said.
        split: What of the data was measured, if it was said.
        model: The model's class, or what the caller named it.
        labels: SHA-256 of the labels measured, as 64-bit integers in their order.
        package_version: The version of neuralcollapse that measured.
    """

    epoch: int | None = None
    split: str | None = None
    model: str = ""
    labels: str = ""
    package_version: str = ""


@dataclass(frozen=True, eq=False)
class Measurement:
    """What `measure` found.

    Attributes:
        metrics: Name to value, NaN for what is not defined: all of `collapse_metrics`; ``accuracy`` and (for K > 5)
            ``accuracy_top5`` of the classifier itself; and of single samples ``alignment``, ``nc2_cos_margin``,
            ``nc4_ncc_mismatch``, ``nc4_ncc_mismatch_class_mean`` (averaged over classes), ``nc1_numerical_rank``, and
            those of `neuralcollapse.metrics.sphere`. What each is: `neuralcollapse.catalogue`.
        moments: Class moments of the features.
        weight: W (K, d) of the classifier.
        bias: b (K,), or None.
        cos_margins: (N,) cosine margins of all samples, ascending.
        ncc_mismatch: (K,) share of each class's samples whose nearest class mean is not the classifier's answer;
            NaN for a class without samples.
        undefined: For each metric that is NaN, why.
        layers: For each layer named, its metrics.
        layers_undefined: For each layer with metrics that are NaN, why each of them is.
        layer_moments: For each layer named, its class moments.
        sample_features: At most 1,000 of the features, in fp16 (bf16 where they exceed its range), for pictures: always
            the same samples of the same data.
        sample_targets: Their classes.
        ood_means: Mean out-of-distribution feature, under ``""``, and of each layer under its name; empty without.
        code: (K, r), whose Gram the classifier was compared with, or None.
        train_moments: Class moments of the train split that was the reference, if ``loader`` was another. Not saved.
        provenance: Of what this is the measurement.
        options: Which classes counted, about which centre.
    """

    metrics: dict[str, float]
    moments: ClassMoments
    weight: Tensor
    bias: Tensor | None
    cos_margins: Tensor
    ncc_mismatch: Tensor
    undefined: dict[str, str] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    layers_undefined: dict[str, dict[str, str]] = field(default_factory=dict)
    layer_moments: dict[str, ClassMoments] = field(default_factory=dict)
    sample_features: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float16))
    sample_targets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    ood_means: dict[str, Tensor] = field(default_factory=dict)
    code: Tensor | None = None
    train_moments: ClassMoments | None = None
    provenance: Provenance = field(default_factory=Provenance)
    options: Options = field(default_factory=Options)

    @property
    def num_classes(self) -> int:
        """K of the weight."""
        return len(self.weight)

    @property
    def absent_classes(self) -> list[int]:
        """Classes of the weight of which no sample was measured."""
        return (self.moments.counts == 0).nonzero().flatten().tolist()

    def __repr__(self) -> str:
        """The metrics, why some of them are not defined, and which classes are absent; tensors would hide them."""
        of = f"Measurement of {self.provenance.model or 'a model'}, {self.moments.counts.sum():,} samples"
        lines = [of, *(f"  {name:32} {value:.4g}" for name, value in self.metrics.items())]
        if absent := self.absent_classes:
            present = self.num_classes - len(absent)
            lines.append(f"of {self.num_classes:,} classes {present:,} have samples; absent: {listed(absent)}")
        reasons = grouped(self.undefined)
        for layer, undefined in self.layers_undefined.items():
            reasons += [f"layer {layer!r}: {line}" for line in grouped(undefined)]
        return "\n".join([*lines, *(["not defined:"] if reasons else []), *(f"  {line}" for line in reasons)])

    def recompute(
        self,
        *,
        center: Center | None = None,
        min_samples: int | None = None,
        drop_classes_above: int | EllipsisType | None = ...,
        pairwise: bool | None = None,
    ) -> Measurement:
        """Every metric that moments give, again, as this version of the package computes it.

        Values that need single samples or per-class scatter stay where the changed options do not touch them (the
        accuracies always; NCC mismatch and numerical rank while the same classes count; alignment and cosine margin
        while the centre is the same as well), and are missing otherwise. One warning says which are not defined.

        Args:
            center: As for `collapse_metrics`; by default as measured, as for the others.
            min_samples: As for `collapse_metrics`.
            drop_classes_above: As for `collapse_metrics`.
            pairwise: As for `collapse_metrics`.

        Raises:
            ValueError: As for `collapse_metrics`.
        """
        changed = {"center": center, "min_samples": min_samples, "pairwise": pairwise}
        options = replace(self.options, **{name: value for name, value in changed.items() if value is not None})  # type: ignore[arg-type]
        if not isinstance(drop_classes_above, EllipsisType):
            options = replace(options, drop_classes_above=drop_classes_above)
        layers = {
            name: self._again(self.layers[name], self.layers_undefined.get(name, {}), moments, name, options)
            for name, moments in self.layer_moments.items()
        }
        classifier = {"weight": self.weight, "bias": self.bias}
        metrics, undefined = self._again(self.metrics, self.undefined, self.moments, "", options, **classifier)
        layers_undefined = {name: reasons for name, (_, reasons) in layers.items() if reasons}
        warn_of(undefined, layers_undefined)
        return replace(
            self,
            metrics=metrics,
            undefined=undefined,
            layers={name: values for name, (values, _) in layers.items()},
            layers_undefined=layers_undefined,
            options=options,
        )

    def _again(
        self,
        values: dict[str, float],
        undefined: dict[str, str],
        moments: ClassMoments,
        name: str,
        options: Options,
        **classifier: Any,
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Return the metrics that moments give under these options, the others that stay true, and their reasons."""
        new, reasons = measure_moments(
            moments, ood_mean=self.ood_means.get(name), code=self.code, **classifier, **asdict(options)
        )
        kept = self.options.kept_values(options) - new.keys()
        return (
            in_order({key: value for key, value in values.items() if key in kept} | new),
            in_order({key: reason for key, reason in undefined.items() if key in kept} | reasons),
        )

    def save(self, path: str | Path) -> None:
        """Write all of it but ``train_moments`` and per-class scatter to a safetensors file, whole or not at all.

        Moments, weight, margins and values are fp64; of each scatter only the upper triangle is written. In the header
        are the format's version and `Provenance`. Nothing of it is code: it can be read from any language.

        Raises:
            OSError: The file cannot be written; one that was there is as it was.
        """
        tensors = {
            "weight": self.weight.double(),
            "cos_margins": self.cos_margins.double(),
            "ncc_mismatch": self.ncc_mismatch.double(),
            "sample_features": self.sample_features,
            "sample_targets": self.sample_targets,
            "values": torch.tensor(list(self.metrics.values()), dtype=torch.float64),
            **_packed("", self.moments),
        }
        if self.bias is not None:
            tensors["bias"] = self.bias.double()
        if self.code is not None:
            tensors["code"] = self.code.double()
        for place, name in enumerate(self.layers):  # numbered: a layer's name may hold anything
            tensors |= _packed(f"layer{place}.", self.layer_moments[name])
            tensors[f"layer{place}.values"] = torch.tensor(list(self.layers[name].values()), dtype=torch.float64)
        for place, mean in enumerate(self.ood_means.values()):
            tensors[f"ood{place}"] = mean.double()
        contents = {
            "provenance": asdict(self.provenance),
            "options": asdict(self.options),
            "classes": {"of_weight": self.num_classes, "with_samples": self.num_classes - len(self.absent_classes)},
            "metrics": list(self.metrics),
            "undefined": self.undefined,
            "layers_undefined": self.layers_undefined,
            "layers": {name: list(values) for name, values in self.layers.items()},
            "ood": list(self.ood_means),
        }
        header = {name: json.dumps(value) for name, value in contents.items()}
        header |= {"format": KIND, "format_version": str(FORMAT), "package_version": self.provenance.package_version}
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read what `save` wrote, of this version or of an earlier one.

        Raises:
            ValueError: The file is truncated, damaged, foreign or of a newer format; the message says which.
            OSError: There is no such file, or it cannot be read.
        """
        tensors, header = read_tensors(path, KIND, FORMAT)
        contents = {name: json.loads(header[name]) for name in ("provenance", "options", "metrics", "layers", "ood")}
        if "max_samples" in contents["options"]:  # as format 1 called it
            contents["options"]["drop_classes_above"] = contents["options"].pop("max_samples")
        layers: dict[str, list[str]] = contents["layers"]
        return cls(
            metrics=dict(zip(contents["metrics"], tensors["values"].tolist(), strict=True)),
            moments=_unpacked("", tensors),
            weight=tensors["weight"],
            bias=tensors.get("bias"),
            cos_margins=tensors["cos_margins"],
            ncc_mismatch=tensors["ncc_mismatch"],
            undefined=json.loads(header.get("undefined", "{}")),
            layers_undefined=json.loads(header.get("layers_undefined", "{}")),
            layers={
                name: dict(zip(names, tensors[f"layer{place}.values"].tolist(), strict=True))
                for place, (name, names) in enumerate(layers.items())
            },
            layer_moments={name: _unpacked(f"layer{place}.", tensors) for place, name in enumerate(layers)},
            sample_features=tensors["sample_features"],
            sample_targets=tensors["sample_targets"],
            ood_means={name: tensors[f"ood{place}"] for place, name in enumerate(contents["ood"])},
            code=tensors.get("code"),
            provenance=Provenance(**contents["provenance"]),
            options=Options(**contents["options"]),
        )


class LabelFingerprint:
    """SHA-256 of labels, taken in batch by batch."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, labels: Tensor) -> None:
        """Take in the labels of a batch."""
        self._digest.update(labels.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())

    def __str__(self) -> str:
        return self._digest.hexdigest()


def _packed(prefix: str, moments: ClassMoments) -> dict[str, Tensor]:
    """The moments in fp64, of the scatter the upper triangle, row after row."""
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
    if f"{prefix}rounding" in tensors:  # which format 1 lacks
        state["rounding"] = tensors[f"{prefix}rounding"]
    return ClassMoments.from_state(state)
