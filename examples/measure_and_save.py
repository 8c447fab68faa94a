"""A measurement saved to a file, and all its metrics recomputed from the file without the model and the data."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import neuralcollapse as nc
from neuralcollapse.metrics import Provenance, class_values

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
images, labels = torch.randn(400, 20), torch.randint(5, (400,))
origin = Provenance(epoch=0, split="train")
measurement = nc.measure(model, [(images, labels)], layers=["1"], provenance=origin, progress=False)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "epoch0000-train.safetensors"
    measurement.save(path)
    print(f"{path.stat().st_size / 1e3:.0f} kB")
    loaded = nc.Measurement.load(path)

print(loaded.provenance)
about_class_means = loaded.recompute(center="classes")
for name, value in about_class_means.metrics.items():
    print(f"{name:36} {loaded.metrics[name]:10.4f} about the sample mean, {value:10.4f} about the mean of the classes")
print("norms of the class means:", class_values(loaded.moments).mean_norms.tolist())
