"""Wrong inputs of models, training loops, metrics and files: each is a ValueError with a message that helps.

Arguments of single functions are tested in the folder of each room, those of the command line in lab/.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import normal
from neuralcollapse import (
    ClassMoments,
    LearnedClassifier,
    Measurement,
    MeasureOptions,
    NearestETFClassifier,
    NeuralCollapse,
    attach_head,
    find_classifier,
    measure,
)
from neuralcollapse.lightning import CollapseCallback
from neuralcollapse.metrics import Provenance

INPUTS, FEATURES, TARGETS = normal(12, 6, dtype=torch.float32), normal(12, 8, dtype=torch.float32), torch.arange(12) % 4
PADDED = torch.where(TARGETS == 0, -100, TARGETS)


def net(last=None):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), last or nn.Linear(8, 4))


def attached(**options):
    return attach_head(net(), NearestETFClassifier(8, 4, **options))


def metric(*arguments, **options):
    return NeuralCollapse(4, 8, *arguments, **options)


def metric_with(**options):
    return metric(options=MeasureOptions(**options))


def measured(loader=((INPUTS, TARGETS),), model=None, **options):
    return measure(model or net(), loader, progress=False, **options)


def callback(loaders=None, **options):
    return CollapseCallback({"train": []} if loaders is None else loaders, **options)


def replaced():
    model = attached()
    model.to_inference()
    return model


def seen(features, targets):
    one = metric()
    one.update(features, targets)
    return one


BAD_INPUTS = {
    # A model, and what is put on it.
    "no name": (lambda: attach_head(net(), NearestETFClassifier(8, 4), classifier=""), "classifier '' must be an nn.L"),
    "lazy": (
        lambda: attach_head(net(nn.LazyLinear(4)), NearestETFClassifier(8, 4)),
        "'2' must know its number of feat",
    ),
    "output=True": (
        lambda: attach_head(net(), LearnedClassifier(8, 4), output=True),
        "output must be a name, an index",
    ),
    "head too narrow": (lambda: attach_head(net(), NearestETFClassifier(7, 4)), "head must take the 8 features"),
    "K over d + 1": (
        lambda: attach_head(net(), NearestETFClassifier(8, 10)),
        "feature_dim must be at least num_classes",
    ),
    "ends in softmax": (lambda: find_classifier(net(nn.Sequential(nn.Softmax(1)))), "must end in a classifier"),
    "replaced by its classifier, measured": (lambda: measured(model=replaced()), "can no longer be called"),
    # A loop.
    "no targets": (lambda: attached()(INPUTS), "targets must be given in training mode"),
    "targets and labels": (lambda: attached()(INPUTS, targets=TARGETS, labels=TARGETS), "must not both be given"),
    "soft labels": (lambda: attached()(INPUTS, labels=normal(12, 4)), "labels must be integer class indices"),
    "labels from 1": (
        lambda: attached()(INPUTS, labels=TARGETS + 1),
        r"targets must lie in \[0, 4\), got labels from 1",
    ),
    "labels from 1, eval": (
        torch.no_grad()(lambda: attached().eval()(INPUTS, labels=TARGETS + 1)),
        r"targets must lie in \[0, 4\)",
    ),
    "training in eval": (
        lambda: attached().eval()(INPUTS, labels=TARGETS),
        "in evaluation mode with gradients enabled",
    ),
    "padding unsaid": (lambda: attached()(INPUTS, labels=PADDED), "got labels from -100 to 3"),
    "other padding": (lambda: attached(ignore_index=-1)(INPUTS, labels=PADDED), "got labels from -100 to 3"),
    "ignore_index='pad'": (lambda: attached(ignore_index="pad"), "ignore_index must be an integer or None, got 'pad'"),
    "half the targets": (
        lambda: attached()(INPUTS, targets=TARGETS[:6]),
        r"targets must be of shape \(12,\), .* got \(6,\)",
    ),
    "a diverged model": (lambda: attached()(INPUTS * torch.nan, targets=TARGETS), "features must be finite"),
    # A metric.
    "classifier by name": (lambda: metric("fc"), "classifier of the metric must be an nn.Linear .* got str"),
    "classifier, lazy": (lambda: metric(nn.LazyLinear(4)), "classifier of the metric must know its number of features"),
    "ignore_index=1.0": (lambda: metric_with(ignore_index=1.0), "ignore_index must be an integer or None, got 1.0"),
    "check_values='no'": (lambda: metric(check_values="no"), "check_values must be True or False, got 'no'"),
    "pairwise=1": (lambda: metric_with(pairwise=1), "pairwise must be True or False, got 1"),
    "class_scatter": (lambda: metric_with(class_scatter="yes"), "class_scatter must be True or False, got 'yes'"),
    "center": (lambda: metric_with(center="mean"), "center must be 'samples' or 'classes', got 'mean'"),
    "min_samples": (lambda: metric_with(min_samples=-1), "min_samples must be at least 0, got -1"),
    "drop_classes_above": (
        lambda: metric_with(min_samples=5, drop_classes_above=2),
        "drop_classes_above must be at least min_samples = 5, got 2",
    ),
    "half precision": (
        lambda: metric_with(dtype=torch.float16),
        "dtype must be torch.float64, torch.float32 or 'mixed'",
    ),
    "unknown option": (lambda: metric(top_k=5), "Unexpected keyword arguments: `top_k`"),
    "padding in a metric": (lambda: seen(FEATURES, PADDED), "got labels from -100 to 3"),
    "merged with a number": (lambda: metric().merge_state(3), "Expected incoming state to be a dict or an instance"),
    # A measurement.
    "targets as a list": (lambda: measured([(INPUTS, TARGETS.tolist())]), "targets must be integer class .* got list"),
    "float targets": (
        lambda: measured([(INPUTS, TARGETS.float())]),
        "targets must be integer class indices, got torch.f",
    ),
    "targets too short": (lambda: measured([(INPUTS, TARGETS[:5])]), r"targets must be a tensor of shape \(12,\)"),
    "unpack to one": (
        lambda: measured(unpack=lambda batch: batch[0]),
        r"unpack must return \(inputs, targets\), got T",
    ),
    "other train moments": (
        lambda: measured(train=ClassMoments(4, 9)),
        r"train must have K, d = \(4, 8\), got \(4, 9\)",
    ),
    "train moments by name": (
        lambda: measured(train="train"),
        "train must be an iterable of batches, a Measurement or ClassMoments, got str",
    ),
    "pooling": (
        lambda: measured(layers=["0"], options=MeasureOptions(layer_pooling="max")),
        "layer_pooling must be .* got 'max'",
    ),
    "epoch": (lambda: measured(provenance=Provenance(epoch="five")), "epoch must be an integer, got 'five'"),
    "cache": (lambda: measured(options=MeasureOptions(cache_bytes=-1)), "cache_bytes must be at least 0, got -1"),
    "padding by name": (
        lambda: measured(options=MeasureOptions(ignore_index="pad")),
        "ignore_index must be an integer or None, got 'pad'",
    ),
    "per_sample=1": (lambda: MeasureOptions(per_sample=1), "per_sample must be True or False, got 1"),
    "a code of text": (lambda: MeasureOptions(code="L"), "code must be a floating-point tensor, got str"),
    "recomputed with a dtype": (
        lambda: measured().recompute(dtype="mixed"),
        "recompute must be given options among center, min_samples, .*, got dtype",
    ),
    "recomputed": (lambda: measured().recompute(min_samples=99), "at least 2 classes of min_samples = 99 samples"),
    # A callback.
    "a loader alone": (lambda: callback([1]), r"loaders must name at least one split, .* got \[1\]"),
    "a loader of none": (lambda: callback({"train": 3}), "loaders must be iterables of batches, got int for 'train'"),
    "every='5'": (lambda: callback(every_n_epochs="5"), "every_n_epochs must be an integer, got '5'"),
    "first epoch 0": (lambda: callback(first_epoch=0), "first_epoch must be at least 1, got 0"),
    "last epoch": (lambda: callback(last_epoch=3), "last_epoch must be True or False, got 3"),
    "model, not its name": (lambda: callback(model=net()), "model must be a dotted name .* got Sequential"),
    "classifier=3": (lambda: callback(classifier=3), "classifier must be a module or its dotted name, got int"),
    "unknown to measure": (lambda: callback(layer=["0"]), "options must be arguments of measure, got layer"),
}


@pytest.mark.parametrize(("call", "words"), BAD_INPUTS.values(), ids=BAD_INPUTS)
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_bad_input_is_a_value_error_with_words_that_help(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_os_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.safetensors"):
        Measurement.load(tmp_path / "missing.safetensors")
