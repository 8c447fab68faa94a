"""Models of transformers with a head attached: labels, Trainer, saving and loading."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import normal
from neuralcollapse import (
    FixedETFClassifier,
    LearnedClassifier,
    NearestETFClassifier,
    attach_head,
    find_classifier,
    measure,
)

transformers = pytest.importorskip("transformers")

IMAGES, LABELS = normal(40, 1, 8, 8, dtype=torch.float32), torch.arange(40) % 5
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def vit(num_labels=5, **settings):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, num_labels=num_labels, **SIZES, **settings
    )
    return transformers.ViTForImageClassification(config)


def attached(num_labels=5, **options):
    return attach_head(vit(num_labels), NearestETFClassifier(16, 5, **options), output="logits")


def trainer(model, folder, loss=None, targets=False, **settings):
    settings = {"max_steps": 4, "per_device_train_batch_size": 10, "learning_rate": 1e-2} | settings
    arguments = transformers.TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **settings
    )
    data = [{"pixel_values": image, "labels": label, "name": 3} for image, label in zip(IMAGES, LABELS, strict=True)]
    data = [sample | {"targets": sample["labels"]} for sample in data] if targets else data
    accuracy = lambda seen: {"accuracy": (seen.predictions.argmax(-1) == seen.label_ids).mean()}  # noqa: E731
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=accuracy, compute_loss_func=loss
    )


def test_labels_are_passed_to_the_head_and_give_the_loss():
    model = attached()
    again = copy.deepcopy(model)
    output = model(pixel_values=IMAGES, labels=LABELS, output_hidden_states=True)
    logits = again(pixel_values=IMAGES, targets=LABELS)
    assert type(output) is type(vit()(IMAGES))
    assert torch.equal(output.logits, logits)
    assert output[0] is output.loss
    assert torch.allclose(output.loss, cross_entropy(logits, LABELS))
    assert len(output.hidden_states) == 2
    whole = model(pixel_values=IMAGES, labels=LABELS, num_items_in_batch=80).loss
    assert torch.allclose(2 * whole, cross_entropy(again(pixel_values=IMAGES, targets=LABELS), LABELS))


def test_padded_tokens_train_with_labels():
    config = transformers.BertConfig(vocab_size=20, num_labels=5, max_position_embeddings=8, **SIZES)
    model = attach_head(
        transformers.BertForTokenClassification(config), NearestETFClassifier(16, 5, ignore_index=-100), output="logits"
    )
    tokens, labels = torch.arange(32).reshape(4, 8) % 20, torch.arange(32).reshape(4, 8) % 5
    labels[:, 6:] = -100
    output = model(input_ids=tokens, labels=labels)
    assert output.logits.shape == (4, 8, 5)
    assert int(model.head.class_means.overall.seen) == 24
    assert torch.allclose(output.loss, cross_entropy(output.logits.flatten(0, 1), labels.flatten()))


@pytest.mark.filterwarnings("ignore")
def test_trainer_trains_evaluates_saves_and_resumes(tmp_path):
    model = attached()
    run = trainer(model, tmp_path, save_steps=2, gradient_accumulation_steps=2, activation_checkpointing=True)
    run.train()
    assert int(model.head.class_means.overall.batches) == 8  # each batch once, in spite of checkpointing
    found = run.evaluate()
    with torch.no_grad():
        logits = model.eval()(IMAGES)
    assert found["eval_accuracy"] == pytest.approx(float((logits.argmax(-1) == LABELS).double().mean()))
    assert found["eval_loss"] == pytest.approx(float(cross_entropy(logits, LABELS)), rel=1e-5)
    run.save_model(str(tmp_path / "final"))
    again = attached()
    again.load_state_dict(load_file(tmp_path / "final" / "model.safetensors"))
    assert torch.equal(again.eval()(IMAGES), logits)
    resumed = attached()
    trainer(resumed, tmp_path, gradient_accumulation_steps=2).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert torch.allclose(resumed.eval()(IMAGES), logits, atol=1e-5)


def margin_loss(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.multi_margin_loss(outputs["logits"], labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


OWN_LOSSES = {
    "label smoothing": (
        {"label_smoothing_factor": 0.1},
        lambda logits: cross_entropy(logits, LABELS, label_smoothing=0.1),
    ),
    "a function": ({"loss": margin_loss}, lambda logits: torch.nn.functional.multi_margin_loss(logits, LABELS)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [LearnedClassifier, FixedETFClassifier, NearestETFClassifier])
@pytest.mark.parametrize("own_loss", OWN_LOSSES)
@pytest.mark.parametrize("targets", [False, True])
def test_a_trainer_that_computes_the_loss(tmp_path, kind, own_loss, targets):
    settings, expected = OWN_LOSSES[own_loss]
    model = attach_head(vit(), kind(16, 5), output="logits")
    before = [parameter.clone() for parameter in model.parameters()]
    run = trainer(model, tmp_path, targets=targets, save_strategy="no", **settings)
    if kind is NearestETFClassifier and not targets:
        with pytest.raises(ValueError, match="add the labels to the dataset a second time, as column `targets`$"):
            run.train()
        return
    run.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    found = run.evaluate()
    with torch.no_grad():
        logits = model.eval()(IMAGES)
    assert found["eval_loss"] == pytest.approx(float(expected(logits)), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx(float((logits.argmax(-1) == LABELS).double().mean()))


def test_without_labels_the_models_own_output_type_has_no_loss():
    model = attach_head(vit(), LearnedClassifier(16, 5), output="logits")
    output = model(pixel_values=IMAGES, num_items_in_batch=40)
    assert type(output) is type(vit()(IMAGES))
    assert "loss" not in output
    assert torch.equal(output.logits, model(IMAGES))
    plain = attach_head(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), LearnedClassifier(64, 5))
    assert plain(IMAGES, num_items_in_batch=40).keys() == {"logits"}


def test_logits_of_another_name_are_replaced_by_that_name():
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES)
    model = attach_head(
        transformers.BertForNextSentencePrediction(config),
        LearnedClassifier(16, 2),
        classifier="cls.seq_relationship",
        output="logits",
    )
    tokens = torch.arange(32).reshape(4, 8) % 20
    assert model(input_ids=tokens, labels=LABELS[:4] % 2).logits.shape == (4, 2)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    named = nn.Module()
    named.body = inner
    named.forward = lambda images: {"scores": inner(images), "images": images}
    output = attach_head(named, LearnedClassifier(64, 5), output="scores")(IMAGES, labels=LABELS)
    assert output.keys() == {"loss", "scores", "images"}
    assert output["scores"].shape == (40, 5)


HUGGING_FACE = {
    "vit": ("classifier", vit, {"pixel_values": IMAGES}),
    "bert": (
        "classifier",
        lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(vocab_size=20, num_labels=5, max_position_embeddings=8, **SIZES)
        ),
        {"input_ids": torch.arange(320).reshape(40, 8) % 20},
    ),
    "bert, hidden states as well": (
        "classifier",
        lambda: transformers.BertForTokenClassification(
            transformers.BertConfig(
                vocab_size=20, num_labels=5, max_position_embeddings=8, output_hidden_states=True, **SIZES
            )
        ),
        {"input_ids": torch.arange(320).reshape(40, 8) % 20},
    ),
    "gpt2": (
        "lm_head",
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=5, n_positions=8, n_embd=16, n_layer=1, n_head=2)
        ),
        {"input_ids": torch.arange(320).reshape(40, 8) % 5},
    ),
}


@pytest.mark.parametrize("network", HUGGING_FACE)
def test_models_of_transformers_are_measured(network):
    name, make, inputs = HUGGING_FACE[network]
    torch.manual_seed(0)
    model = make()
    assert find_classifier(model, inputs)[0] == name
    with torch.no_grad():
        returned = model.eval()(**inputs)
    logits = returned["logits"] if isinstance(returned, dict) else returned[0]
    labels = torch.arange(logits[..., 0].numel()).reshape(logits.shape[:-1]) % 5
    measured = measure(model, [{**inputs, "labels": labels}], unpack=lambda batch: (inputs, labels), progress=False)
    assert measured.metrics["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    assert torch.equal(measured.weight, model.get_submodule(name).weight)


def test_a_classifier_whose_last_token_is_chosen_afterwards_is_refused():
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, num_labels=5, pad_token_id=0
    )
    inputs = {"input_ids": torch.arange(320).reshape(40, 8) % 20}
    with pytest.raises(ValueError, match=r"'score' with weight \(5, 16\) on features \(40, 8, 16\) differs by up to"):
        find_classifier(transformers.GPT2ForSequenceClassification(config), inputs)


@pytest.mark.parametrize("num_labels", [5, 3])
@pytest.mark.parametrize(
    "head",
    [
        lambda: NearestETFClassifier(16, 5, feature_norm=None),
        lambda: NearestETFClassifier(16, 5, feature_norm=None, bias="none"),
        lambda: LearnedClassifier(16, 5),
    ],
)
def test_a_head_without_norm_is_loaded_by_from_pretrained(tmp_path, head, num_labels):
    model = attach_head(vit(num_labels), head(), output="logits")
    for _ in range(3):
        model(pixel_values=IMAGES, labels=LABELS).loss.backward()
    logits = model.eval()(IMAGES)
    with pytest.raises(ValueError, match=r"model.to_inference\(\).save_pretrained\(folder\)"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    model.to_inference().save_pretrained(tmp_path)
    again, report = transformers.ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.num_labels == 5
    assert torch.allclose(again(IMAGES).logits, logits, atol=1e-6)
    assert torch.allclose(again(IMAGES, labels=LABELS).loss, cross_entropy(logits, LABELS), atol=1e-6)


@pytest.mark.parametrize("kind", [FixedETFClassifier, NearestETFClassifier])
def test_saving_an_attached_head_is_refused_and_the_users_model_is_not_patched(tmp_path, kind):
    inner = vit()
    model = attach_head(inner, kind(16, 5), output="logits")
    model(IMAGES, targets=LABELS)
    for save in (model.save_pretrained, copy.deepcopy(model).save_pretrained, model.push_to_hub):
        with pytest.raises(
            ValueError, match=rf"random classifier in place of the {kind.__name__}: call model.to_infer"
        ):
            save(tmp_path)
    assert not any(tmp_path.iterdir())
    assert "save_pretrained" not in vars(inner)
    assert model.to_inference() is inner
    inner.classifier = nn.Linear(16, 5)
    inner.save_pretrained(tmp_path)
    assert transformers.ViTForImageClassification.from_pretrained(tmp_path).classifier.weight.equal(
        inner.classifier.weight
    )


def test_after_a_refused_attach_the_model_can_be_saved(tmp_path):
    model = vit()
    classifier = model.classifier
    refused = attach_head(model, NearestETFClassifier(16, 5), output="logit")
    with pytest.raises(ValueError, match="which has no 'logit'"):
        refused(IMAGES, targets=LABELS)
    assert model.classifier is classifier
    model.save_pretrained(tmp_path)
    assert torch.equal(
        transformers.ViTForImageClassification.from_pretrained(tmp_path)(IMAGES).logits, model(IMAGES).logits
    )
