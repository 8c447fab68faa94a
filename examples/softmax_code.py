"""A fixed softmax code and a learned classifier for ten classes in four dimensions, where no simplex ETF exists."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import neuralcollapse as nc
from neuralcollapse.geometry.softmax_code import one_vs_rest_margins

digits = load_digits()
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=100, shuffle=True)
test = DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=100)

code = nc.softmax_code(10, 4)
for name, make in {
    "learned": lambda: nc.LearnedClassifier(4, 10, feature_norm=10.0),
    "softmax code": lambda: nc.FixedFrameClassifier(4, 10, code, orientation="given", feature_norm=10.0),
}.items():
    torch.manual_seed(0)
    head = make()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4), head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(15):
        model.train()
        for batch, targets in train:
            optimizer.zero_grad()
            cross_entropy(model(batch), targets).backward()
            optimizer.step()
    metrics = nc.measure(model.eval(), test, train=train).metrics
    rows = nn.functional.normalize(head.weight.detach(), dim=1)
    print(
        f"{name}: least one-vs-rest margin {one_vs_rest_margins(rows).min():.3f}, "
        f"test accuracy {metrics['accuracy']:.1%}, nc1_quotient {metrics['nc1_quotient']:.3f}"
    )
