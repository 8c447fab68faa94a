"""A small ViT with a nearest-ETF head, trained and evaluated on scikit-learn's digits with transformers' Trainer."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import neuralcollapse as nc

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)
samples = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
train, test = samples[:1500], samples[1500:]
config = ViTConfig(
    image_size=8,
    patch_size=4,
    num_channels=1,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=128,
    num_labels=10,
)


def new_model() -> torch.nn.Module:
    head = nc.NearestETFClassifier(64, num_classes=10)
    return nc.attach_head(ViTForImageClassification(config), head, output="logits")


model = new_model()  # takes labels= and returns loss and logits, as the ViT does
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=5,
        per_device_train_batch_size=50,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        bf16=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=lambda seen: {"accuracy": (seen.predictions.argmax(-1) == seen.label_ids).mean()},
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]

    # The head normalises its features, which a ViT's own classifier cannot do, so save_pretrained raises an error.
    # Save the state dict instead, and load it into a model with the same kind of head.
    trainer.save_model(folder)
    reloaded = new_model()
    reloaded.load_state_dict(load_file(Path(folder) / "model.safetensors"))

batches = list(zip(images[1500:].split(100), labels[1500:].split(100), strict=True))
metrics = nc.measure(reloaded, batches, progress=False).metrics
print(f"test accuracy {accuracy:.1%}, {metrics['accuracy']:.1%} reloaded, nc1_quotient {metrics['nc1_quotient']:.3f}")
