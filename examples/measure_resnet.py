"""A ResNet from Hugging Face's transformers, built from a config, trained and measured on scikit-learn's digits.

The model returns a dataclass and the loader yields dictionaries. `measure` accepts both; `unpack` splits a batch into
inputs and labels.
Needs `pip install 'neuralcollapse[lab,huggingface]'`.
"""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification

import neuralcollapse as nc

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
samples = [{"pixel_values": x, "labels": y} for x, y in zip(images, torch.tensor(digits.target), strict=True)]
loader = DataLoader(samples, batch_size=100, shuffle=True)

config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
config.downsample_in_first_stage = False
model = ResNetForImageClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(5):
    for batch in loader:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

measurement = nc.measure(
    model,
    loader,
    unpack=lambda batch: ({"pixel_values": batch["pixel_values"]}, batch["labels"]),
    layers=["resnet.encoder.stages.0", "resnet.encoder.stages.1"],
)

for name, value in measurement.metrics.items():
    print(f"{name:32} {value:10.4f}")
for name, metrics in measurement.layers.items():
    print(f"{name:32} nc1_quotient {metrics['nc1_quotient']:.4f}   nc2_etf_means {metrics['nc2_etf_means']:.4f}")
