"""Causal language models: the next token is the target, and targets that are not shifted are noticed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from neuralcollapse import measure
from neuralcollapse.metrics import MeasureOptions, measure_features
from neuralcollapse.metrics.tokens import next_tokens

V, T = 11, 6
OPTIONS = MeasureOptions(pairwise=False)


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "n_positions": T, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three sequences; the last is padded on the right by two, the second on the left by one."""
    tokens = torch.randint(1, V, (3, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[2, -2:] = mask[1, 0] = 0
    return {"input_ids": tokens.where(mask.bool(), 0), "attention_mask": mask}


def by_hand(model, batch, labels: list[tuple[int, int]]):
    """Measure the positions (sequence, position) one by one, with the token after each as its class."""
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    features = torch.stack([output.hidden_states[-1][b, t] for b, t in labels])
    targets = torch.tensor([int(batch["input_ids"][b, t + 1]) for b, t in labels])
    return measure_features(features, targets, model.lm_head.weight.detach(), progress=False, options=OPTIONS)


def test_targets_are_the_next_tokens_of_positions_that_are_not_padding(model, batch):
    positions = [(0, t) for t in range(T - 1)] + [(1, t) for t in range(1, T - 1)] + [(2, t) for t in range(T - 3)]
    expected = by_hand(model, batch, positions)
    measurement = measure(model, [batch], unpack="next_token", options=OPTIONS, progress=False)
    assert int(measurement.moments.counts.sum()) == len(positions) == 12
    assert measurement.metrics == pytest.approx(expected.metrics, rel=1e-5, abs=1e-6, nan_ok=True)
    assert torch.equal(measurement.moments.counts, expected.moments.counts)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    same = measure(model, [batch | {"labels": labels}], unpack="next_token", options=OPTIONS, progress=False)
    assert same.metrics == pytest.approx(measurement.metrics, nan_ok=True)


def test_the_loss_of_transformers_is_that_of_the_targets(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :3] = -100  # such as a prompt
    inputs, targets = next_tokens(batch | {"labels": labels})
    assert "labels" not in inputs
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten())
        expected = model(**inputs, labels=labels).loss
    # transformers also counts the position of padding before the first token of a sequence padded on the left
    targets[1, 0] = labels[1, 1]
    with torch.no_grad():
        theirs = nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten())
    assert theirs.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() != expected.item()


def test_another_ignore_index_and_plain_tokens():
    tokens = torch.tensor([[3, 4, 5]])
    assert next_tokens(tokens, ignore_index=255)[1].tolist() == [[4, 5, 255]]
    inputs, targets = next_tokens({"input_ids": tokens, "labels": torch.tensor([[-100, -100, 5]])}, ignore_index=255)
    assert (list(inputs), targets.tolist()) == (["input_ids"], [[255, 5, 255]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tokens: {"labels": tokens.roll(-1, 1).index_fill(1, torch.tensor([T - 1]), -100)},
            "must not be shifted",
        ),
        (lambda tokens: {"labels": tokens[:, 1:]}, "labels must be of the shape of input_ids"),
        (lambda tokens: {"attention_mask": tokens[:, :1]}, "attention_mask must be of the shape of input_ids"),
        (lambda tokens: {"input_ids": tokens[0]}, r"input_ids must be integers of shape \(B, T\).*got shape \(6,\)"),
        (lambda tokens: {"input_ids": None}, "input_ids must be integers"),
    ],
)
def test_what_is_refused(batch, change, message):
    with pytest.raises(ValueError, match=message):
        next_tokens(batch | change(batch["input_ids"]))


def test_pairs_are_refused(model, batch):
    with pytest.raises(ValueError, match="loader must yield token ids or mappings with input_ids, got tuple"):
        measure(model, [(batch["input_ids"], batch["input_ids"])], unpack="next_token", progress=False)


def measured_with(model, tokens, targets, **options):
    """Return the warnings of a measurement of pairs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = MeasureOptions(pairwise=False, **options)
        measure(
            model, [({"input_ids": tokens}, targets)] * 2, unpack=lambda pair: pair, options=options, progress=False
        )
    return [str(warning.message) for warning in caught if "next_token" in str(warning.message)]


def test_targets_that_are_the_input_tokens_are_noticed_once(model, batch):
    tokens = batch["input_ids"]
    assert len(measured_with(model, tokens, tokens)) == 1
    masked = tokens.masked_fill(batch["attention_mask"] == 0, -100)
    assert len(measured_with(model, tokens, masked, ignore_index=-100)) == 1
    targets = next_tokens(batch)[1]
    assert measured_with(model, tokens, targets, ignore_index=-100) == []
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % V
    assert measured_with(model, tokens, changed) == []


def test_classes_of_images_are_never_taken_for_tokens():
    linear, images = nn.Linear(2, 3), torch.randn(6, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(linear, [(images, torch.arange(6) % 3)], progress=False)
