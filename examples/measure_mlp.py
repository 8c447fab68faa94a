"""An nn.Sequential MLP, trained for a few seconds on scikit-learn's digits and measured on both splits."""

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
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(30):
    for batch, targets in train:
        optimizer.zero_grad()
        cross_entropy(model(batch), targets).backward()
        optimizer.step()

on_train = nc.measure(model, train)
on_test = nc.measure(model, test, train=train)

for name, value in on_train.metrics.items():
    print(f"{name:32} train {value:10.4f}   test {on_test.metrics[name]:10.4f}")
