"""A custom declarative layer: a classifier with orthonormal rows whose weight solves an optimisation problem.

The weight is the matrix with orthonormal rows that minimises the sum of distances to the class means of the batch. An
outlying class affects this sum less than it would affect a sum of squares. The problem has no closed-form solution;
`argmin_on_stiefel` solves it and differentiates through the solution.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import neuralcollapse as nc
from neuralcollapse.geometry import argmin_on_stiefel, stiefel


class RobustFrame(nn.Module):
    def __init__(self, feature_dim, num_classes):
        super().__init__()
        self.weight, self.bias = stiefel.random_point(num_classes, feature_dim), None

    def features(self, inputs):
        return 5 * nn.functional.normalize(inputs, dim=-1)

    def forward(self, inputs, targets=None):
        features = self.features(inputs)
        if targets is None:
            return features @ self.weight.T
        means = torch.stack([features[targets == k].mean(0) for k in range(10)]) / 5
        solution = argmin_on_stiefel(self.cost, means, self.weight, tolerance=1e-3)
        self.weight = solution.point.detach()
        return features @ solution.point.T

    @staticmethod
    def cost(point, means):
        return (0.01 + (point - means).square().sum(-1)).sqrt().sum(-1)


torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=300, shuffle=True)
test = DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=300)

backbone, head = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)), RobustFrame(32, 10)
optimizer = torch.optim.AdamW(backbone.parameters(), lr=3e-3)
for _ in range(12):
    for batch, targets in train:
        optimizer.zero_grad()
        cross_entropy(head(backbone(batch), targets), targets).backward()
        optimizer.step()

metrics = nc.measure(nn.Sequential(backbone, head), test, train=train, classifier=head).metrics
print(f"test accuracy {metrics['accuracy']:.1%}, nc1_quotient {metrics['nc1_quotient']:.3f}")
