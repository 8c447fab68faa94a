"""A nearest-ETF head in place of a model's last layer: two lines of code, and targets passed in the training loop."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import neuralcollapse as nc

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=100, shuffle=True)
test = DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=100)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
model = nc.attach_head(model, nc.NearestETFClassifier(64, num_classes=10))

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(10):
    model.train()
    for batch, targets in train:
        optimizer.zero_grad()
        cross_entropy(model(batch, targets=targets), targets).backward()
        optimizer.step()

metrics = nc.measure(model, test, train=train).metrics
print(f"test accuracy {metrics['accuracy']:.1%}, nc1_quotient {metrics['nc1_quotient']:.3f}")

plain = model.to_inference()  # the nn.Sequential again, ending in plain modules
print(plain)
