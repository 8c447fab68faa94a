"""Detection rates against scikit-learn, and the table of all scores on several sets."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import nn

from helpers import CountedLoader, normal
from neuralcollapse import MeasureOptions, measure, ood

N, K, D = 60, 3, 8
TARGETS = torch.arange(N) % K
CENTERS = 2 * normal(K, 6, seed=1, dtype=torch.float32)
TRAIN, TEST = (normal(N, 6, seed=seed, dtype=torch.float32) + CENTERS[TARGETS] for seed in (0, 7))
FAR = 4 * normal(40, 6, seed=2, dtype=torch.float32)
NAMES = [name for name in ood.SCORES if name != "knn"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Dropout(), nn.Linear(D, K))


def batches(inputs, targets=None, size=16):
    if targets is None:
        return list(inputs.split(size))
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def record(model, **options):
    return measure(model, batches(TRAIN, TARGETS), progress=False, options=MeasureOptions(**options))


def table(model=None, sets=None, scores="all", test=None, **options):
    model = model or net()
    sets = {"far": batches(FAR)} if sets is None else sets
    test = batches(TEST, TARGETS) if test is None else test
    return ood.evaluate(model, record(model), test, sets, scores, progress=False, **options)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 30), (50, 3), (200, 300)])
@pytest.mark.parametrize("levels", [None, 3])
def test_rates_equal_those_of_scikit_learn(sizes, levels):
    inside, outside = normal(sizes[0], seed=1) + 0.5, normal(sizes[1], seed=2)
    if levels:  # ties
        inside, outside = (inside * levels).round(), (outside * levels).round()
    scores = torch.cat([inside, outside]).numpy()
    labels = np.repeat([1, 0], sizes)
    assert ood.auroc(inside, outside) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert ood.aupr(inside, outside) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert ood.aupr(-outside, -inside) == pytest.approx(average_precision_score(1 - labels, -scores), abs=1e-12)
    false_positives, true_positives, _ = roc_curve(labels, scores, drop_intermediate=False)
    for tpr in (0.5, 0.95, 1.0):
        expected = false_positives[true_positives >= tpr - 1e-12].min()
        assert ood.fpr_at_tpr(inside, outside, tpr) == pytest.approx(expected, abs=1e-12)


def test_properties_of_the_rates():
    inside, outside = normal(40, seed=1), normal(30, seed=2)
    assert ood.auroc(inside, outside) == pytest.approx(1 - ood.auroc(outside, inside))
    assert ood.auroc(inside.exp(), outside.exp()) == ood.auroc(inside, outside)
    assert ood.auroc(inside, inside) == 0.5
    assert ood.auroc(torch.tensor([math.inf, 3.0]), torch.tensor([-math.inf, 2.0])) == 1.0
    assert ood.fpr_at_tpr(inside, inside.min()[None] - 1) == 0.0


def test_the_table_has_the_rates_of_each_score_on_each_set():
    model = net()
    sets = {"far": batches(FAR), "near": batches(TEST[:20] + 1, TARGETS[:20], 7), "one": [(FAR[:1],)]}
    result = table(model, sets)
    assert [(row.set, row.score) for row in result.rows] == [(label, name) for label in sets for name in NAMES]
    data = {"far": FAR, "near": TEST[:20] + 1, "one": FAR[:1]}
    model.eval()
    for row in result.rows:
        fitted = ood.fit_score(record(model), row.score)
        inside, outside = (fitted(model[:4](inputs)).double().detach() for inputs in (TEST, data[row.set]))
        torch.testing.assert_close(result.scores[row.score]["test"], inside, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.scores[row.score][row.set], outside, rtol=1e-4, atol=1e-4)
        inside, outside = (result.scores[row.score][label] for label in ("test", row.set))
        labels = np.repeat([1, 0], [len(inside), len(outside)])
        assert row.auroc == pytest.approx(roc_auc_score(labels, torch.cat([inside, outside]).numpy()), abs=1e-12)
        assert row.reason == ""


def test_the_model_runs_once_on_each_batch_and_keeps_its_modes():
    model = net()
    measurement, runs = record(model), []
    model[3].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with model[0].register_forward_hook(lambda module, args, output: runs.append(len(output))):
        ood.evaluate(model, measurement, batches(TEST), {"far": batches(FAR)}, progress=False)
    assert runs == [16, 16, 16, 12, 16, 16, 8]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not model[4]._forward_hooks
    assert not model[4]._forward_pre_hooks


@pytest.mark.parametrize("progress", [False, True])
def test_each_loader_is_iterated_once_under_its_own_name(progress, capsys):
    model, loaders = net(), [*map(CountedLoader, (batches(TEST, TARGETS), batches(FAR), batches(FAR / 4)))]
    test, far, near = loaders
    ood.evaluate(model, record(model), test, {"far": far, "near": near}, ["msp"], progress=progress)
    assert [loader.passes for loader in loaders] == [1, 1, 1]
    bars = {line.partition(":")[0].strip() for line in re.split(r"[\r\n]", capsys.readouterr().err)} - {""}
    assert bars == ({"test", "far", "near"} if progress else set())


def test_named_and_fitted_scores():
    model = net()
    assert [row.score for row in table(model, scores=["ncm", "msp"]).rows] == ["ncm", "msp"]
    model.eval()
    measurement = record(model)
    raw = ood.fit_score(measurement, "neco", standardise=False)
    neighbours = ood.fit_score(measurement, "knn", bank=model[:4](TRAIN).detach(), k=3)
    result = table(model, scores={"raw": raw, "neighbours": neighbours})
    assert [row.score for row in result.rows] == ["raw", "neighbours"]
    torch.testing.assert_close(result.scores["raw"]["far"], raw(model[:4](FAR)).double().detach())


def test_what_is_undefined_is_not_ranked():
    """A score that the record does not give, and inputs whose features are zero, on which NECO is undefined."""
    model = net()
    model[4].bias.data.fill_(-1)
    without = ood.evaluate(
        model, record(model, per_sample=False), batches(TEST), {"far": batches(FAR)}, ["vim", "ncm"], progress=False
    )
    vim, ncm = without.rows
    assert math.isnan(vim.auroc)
    assert "per_sample=True" in vim.reason
    assert not math.isnan(ncm.auroc)
    assert set(without.scores) == {"ncm"}
    assert "vim: alpha of vim needs" in repr(without)

    plain = nn.Sequential(nn.Linear(6, D), nn.ReLU(), nn.Linear(D, K))
    plain[0].bias.data.zero_()
    raw = ood.fit_score(record(plain), "neco", standardise=False)
    zeros = torch.cat([FAR[:5], torch.zeros(2, 6)])
    for test, far, where in ((batches(TEST), [zeros], "far"), ([zeros], [FAR], "test")):
        (row,) = table(plain, {"far": far}, {"neco": raw}, test=test).rows
        assert math.isnan(row.auroc)
        assert math.isnan(row.fpr95)
        assert row.reason == f"2 of 7 scores of '{where}' are NaN"


def test_the_table_prints_and_becomes_a_frame_and_a_figure():
    result = table(sets={"far": [FAR], "shifted": [TEST + 3]})
    frame = result.to_pandas()
    assert list(frame.columns) == ["set", "score", "auroc", "fpr95", "aupr_in", "aupr_out", "reason"]
    assert len(frame) == 2 * len(NAMES)
    assert len(repr(result).splitlines()) == 1 + 2 * len(NAMES)
    figure = result.plot()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == NAMES
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["test", "far", "shifted"]
    with pytest.raises(ValueError, match="at least one defined score"):
        ood.Evaluation([], {}).plot()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sets": {}}, "ood must name at least one set"),
        ({"sets": [FAR]}, "ood must name at least one set"),
        ({"sets": {"far": FAR}}, "loaders must be iterables of batches, got Tensor for 'far'"),
        ({"sets": {"far": []}}, r"ood\['far'\] must yield at least one batch"),
        ({"sets": {"far": [FAR[:0]]}}, r"ood\['far'\] must yield at least one sample"),
        ({"sets": {"test": [FAR]}}, "names of sets must be strings other than 'test'"),
        ({"test": []}, "test_loader must yield at least one batch"),
        ({"test": 3}, "loaders must be iterables of batches, got int for 'test'"),
        ({"scores": "ncm"}, "scores must be 'all', a list of names or a mapping"),
        ({"scores": []}, "scores must be 'all'"),
        ({"scores": ["odin"]}, "scores must be among msp, .* got 'odin'"),
        ({"scores": {"a": "ncm"}}, "must be names or map names to fitted scores"),
        ({"sets": {"far": [{"pixels": FAR}]}}, "unpack="),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        table(**arguments)


def test_the_model_must_be_the_measured_one():
    model = net()
    measurement = record(model)
    model[4].bias.data.add_(1)
    with pytest.raises(ValueError, match="no module of Sequential has the measured weight"):
        ood.evaluate(model, measurement, [TEST], {"far": [FAR]}, progress=False)
    with pytest.raises(ValueError, match="measurement must be a Measurement"):
        ood.evaluate(model, None, [TEST], {"far": [FAR]}, progress=False)


def test_bad_rates():
    for function in (ood.auroc, ood.fpr_at_tpr):
        with pytest.raises(ValueError, match="outside must have at least one score"):
            function(torch.ones(2), torch.ones(0))
        with pytest.raises(ValueError, match="inside must have no NaN, got 1 of 2"):
            function(torch.tensor([1.0, math.nan]), torch.ones(2))
    with pytest.raises(ValueError, match="negative must be a floating-point tensor"):
        ood.aupr(torch.ones(2), [1.0])
    with pytest.raises(ValueError, match="tpr must be in"):
        ood.fpr_at_tpr(torch.ones(2), torch.ones(2), 0)
