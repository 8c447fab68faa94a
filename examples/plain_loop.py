"""A plain training loop with gradient accumulation and bf16 autocast; class means and the ETF stay in fp32."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

import neuralcollapse as nc

EPOCHS, ACCUMULATE = 5, 2

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=50, shuffle=True)
test = DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=100)

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
head = nc.NearestETFClassifier(64, num_classes=10)
model = nc.attach_head(ViTForImageClassification(config), head, output="logits")

optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)  # after attach_head
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, EPOCHS * len(train) // ACCUMULATE)
for _ in range(EPOCHS):
    model.train()
    for number, (batch, targets) in enumerate(train, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(batch, targets=targets), targets)
        (loss / ACCUMULATE).backward()
        if number % ACCUMULATE == 0:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

metrics = nc.measure(model, test, train=train, progress=False).metrics
print(f"test accuracy {metrics['accuracy']:.1%}, nc1_quotient {metrics['nc1_quotient']:.3f}")
