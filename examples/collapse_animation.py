"""Animation of neural collapse: the features of three classes of digits contract to the corners of a triangle.

Writes ``collapse.gif``, or the given file: ``python examples/collapse_animation.py docs/figures/collapse.gif``.
"""

import sys
from io import BytesIO

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import neuralcollapse as nc

matplotlib.use("agg")
COLORS, MARKERS = ("#0072b2", "#d55e00", "#009e73"), "osD"
EPOCHS = [*range(16), *range(16, 40, 3), *range(40, 81, 5)]  # collapse slows down

torch.manual_seed(0)
digits = load_digits(n_class=3)
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
layers = [nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU()]
backbone = nn.Sequential(*layers, nn.Linear(64, 2, bias=False))  # two features: the plane of the picture
model = nn.Sequential(backbone, nn.Linear(2, 3, bias=False))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS[-1] + 1)


def frame(epoch: int) -> Image.Image:
    """Draw features, class means and rows of the classifier, with the simplex ETF nearest to the means."""
    measurement = nc.measure(model, [(images, labels)], progress=False)
    nc1 = measurement.metrics["nc1_quotient"]
    centre = measurement.moments.means.mean(0)
    means = measurement.moments.means - centre
    scale = means.norm(dim=1).mean()
    with torch.no_grad():
        features = (model.eval()[0](images) - centre) / scale
    corners = nc.geometry.nearest_simplex_etf(means)
    rows = normalize(measurement.weight - measurement.weight.mean(0))
    figure = Figure(figsize=(4.4, 4.4), dpi=100)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.86))
    axes.plot(*corners[[0, 1, 2, 0]].T, ":", color="0.4")
    for k in range(3):
        axes.plot(*torch.stack([torch.zeros(2), rows[k]]).T, color=COLORS[k], linewidth=2)
        axes.plot(*features[labels == k].T, MARKERS[k], color=COLORS[k], markersize=3, alpha=0.35)
        axes.plot(*(means[k] / scale), MARKERS[k], color=COLORS[k], markersize=11, markeredgecolor="black")
    axes.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", xticks=[], yticks=[])
    figure.suptitle(f"epoch {epoch}:  within-class / between-class variance {nc1:.2g}", fontsize=10, y=0.95)
    print(f"epoch {epoch:3} nc1_quotient {nc1:.4f} nc3_duality {measurement.metrics['nc3_duality']:.4f}")
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return Image.open(picture).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)


frames = []
for epoch in range(EPOCHS[-1] + 1):
    if epoch in EPOCHS:
        frames.append(frame(epoch))
    model.train()
    for batch in torch.randperm(len(labels)).split(64):
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    schedule.step()
file = sys.argv[1] if len(sys.argv) > 1 else "collapse.gif"
durations = [120] * (len(frames) - 1) + [2500]  # milliseconds
frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
print("wrote", file)
