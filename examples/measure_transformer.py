"""A torch.nn.TransformerEncoder classifier that reads each of scikit-learn's digits as eight rows of pixels."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import neuralcollapse as nc


class RowReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 32)
        self.positions = nn.Parameter(torch.randn(8, 32) / 8)
        layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.classifier = nn.Linear(32, 10)

    def forward(self, rows: Tensor) -> Tensor:
        return self.classifier(self.encoder(self.embedding(rows) + self.positions).mean(dim=1))


torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images, labels), batch_size=100, shuffle=True)

model = RowReader()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(10):
    for batch, targets in loader:
        optimizer.zero_grad()
        cross_entropy(model(batch), targets).backward()
        optimizer.step()

measurement = nc.measure(model, loader, layers=["encoder.layers.0", "encoder.layers.1"])

for name, value in measurement.metrics.items():
    print(f"{name:32} {value:10.4f}")
