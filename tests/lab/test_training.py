from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import generator, normal, simplex_gram, slow_except
from neuralcollapse import measure, nearest_simplex_etf
from neuralcollapse.lab import train_runs
from neuralcollapse.lab.config import METHODS, DataSettings, ModelSettings, RunConfig
from neuralcollapse.lab.data.batches import EpochBatches, evaluation_batches
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.models.backbones import FastConvNet
from neuralcollapse.lab.models.build import build_backbone, build_model
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.training.distributed import launched_fabric, quiet_lightning, resolve_device
from neuralcollapse.lab.training.optimizers import build_optimizer
from neuralcollapse.lab.training.progress import check_loggers
from neuralcollapse.lab.training.run import Run
from neuralcollapse.lightning import CollapseCallback

SMALL = {"backbone": "mlp", "width": 24, "depth": 1, "train_samples": 200, "test_samples": 60, "epochs": 2}
OWN_CLASS = {name: value for name, value in SMALL.items() if name not in ("backbone", "width", "depth")}
BACKBONES = ["convnet", "mlp", "resnet18", "resnet34", "resnet50", "vgg13"]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 33, 20)])
@pytest.mark.parametrize("feature_dim", [None, 11])
def test_backbones_give_features_of_the_dimension_they_say(backbone, shape, feature_dim):
    network = build_backbone(ModelSettings(backbone=backbone, width=8, feature_dim=feature_dim), shape)
    features = network(torch.randn(2, *shape))
    assert features.shape == (2, network.feature_dim)
    assert feature_dim in (None, network.feature_dim)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_batch_norm_without_scale_leaves_no_vector(backbone):
    network = build_backbone(
        ModelSettings(backbone=backbone, width=8, backbone_options={"batch_norm_affine": False}), (1, 8, 8)
    )
    assert all(parameter.ndim >= 2 for parameter in network.parameters())


# Parameters of the networks for ImageNet (11,689,512 and so on) without their last layer.
@pytest.mark.parametrize(
    ("backbone", "parameters", "feature_dim"),
    [
        ("resnet18", 11_176_512, 512),
        ("resnet34", 21_284_672, 512),
        ("resnet50", 23_508_032, 2048),
        ("resnet101", 42_500_160, 2048),
        ("resnet152", 58_143_808, 2048),
        ("resnext50-32x4d", 22_979_904, 2048),
        ("resnext101-32x8d", 88_791_336 - 2_049_000, 2048),
        ("wide-resnet50-2", 66_834_240, 2048),
        ("wide-resnet101-2", 126_886_696 - 2_049_000, 2048),
    ],
)
def test_resnets_are_the_published_ones(backbone, parameters, feature_dim):
    network = build_backbone(ModelSettings(backbone=backbone), (3, 32, 32))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert network.feature_dim == feature_dim


BIAS_FREE = {"classifier_bias": "none", "backbone_options": {"batch_norm_affine": False}}
PLAIN = {"feature_norm": "none", "classifier_bias": "learned"}


# Parameters of the released models whose last block alone is narrowed.
@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({"backbone": "resnet18", "feature_dim": 10, "method": "standard", **PLAIN}, 8_867_542),
        ({"backbone": "resnet18", "feature_dim": 10, "method": "fixed", **PLAIN}, 8_867_442),
        ({"backbone": "resnet18", "feature_dim": 11, "method": "standard", **BIAS_FREE}, 8_864_046),
        ({"backbone": "resnet50", "stem": "3x3", "feature_dim": 10, "method": "standard", **PLAIN}, 22_473_430),
    ],
)
def test_a_feature_dim_narrows_the_last_block_alone(settings, parameters):
    model = build_model(RunConfig(**settings), (3, 32, 32), 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.head.in_features == settings["feature_dim"]


# ViT-Ti/16 and ViT-S/16 for images of 224 pixels, whose totals are with a classifier of 1000 classes.
@pytest.mark.parametrize(("backbone", "total", "width"), [("vit-tiny", 5_717_416, 192), ("vit-small", 22_050_664, 384)])
def test_vision_transformers_are_the_published_ones(backbone, total, width):
    network = build_backbone(ModelSettings(backbone=backbone), (3, 224, 224))
    assert sum(parameter.numel() for parameter in network.parameters()) == total - 1000 * (width + 1)
    assert network.feature_dim == width
    attention = network.layers.layers[0].self_attn
    assert attention.num_heads == width // 64
    first, second = (layer.linear1.weight for layer in network.layers.layers[:2])
    assert not torch.equal(first, second)
    assert float(first.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 56)])
@pytest.mark.parametrize("feature_dim", [None, 11])
def test_a_vision_transformer_is_its_formula(shape, feature_dim):
    """Pre-norm blocks by hand; with small images there are patches of 2 or 4 pixels."""
    settings = ModelSettings(backbone="vit-tiny", width=24, depth=2, feature_dim=feature_dim)
    network = build_backbone(settings, shape).double().eval()
    images, side = normal(3, *shape), 2 if shape[1] < 16 else 4
    patches = torch.nn.functional.unfold(images, side, stride=side).mT @ network.patches.weight.flatten(1).T
    tokens = torch.cat([network.class_token.expand(3, 1, 24), patches + network.patches.bias], 1) + network.positions
    for layer in network.layers.layers:
        normed = layer.norm1(tokens)
        query, key, value = (normed @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).chunk(3, -1)
        weights = (query @ key.mT / 24**0.5).softmax(-1)
        tokens = tokens + layer.self_attn.out_proj(weights @ value)
        tokens = tokens + layer.linear2(torch.nn.functional.gelu(layer.linear1(layer.norm2(tokens))))
    expected = network.projection(network.layers.norm(tokens[:, 0]))
    for mode in (True, False):
        found = network.train(mode)(images)
        assert torch.allclose(found, expected, atol=1e-10)
    assert found.shape == (3, feature_dim or 24)


@pytest.mark.parametrize("method", ["implicit", "frame", "attribute-frame"])
def test_class_weights_are_those_of_the_training_images(method, tmp_path):
    attributes = {"class_attributes": "digits"} if method == "attribute-frame" else {}
    long_tail = {"imbalance": {"step": 0.5}}
    config = RunConfig(**SMALL | {"epochs": 1}, method=method, class_weights="inverse", **long_tail, **attributes)
    data = load_data(config, progress=False)
    counts = data.train.labels.bincount(minlength=10)
    assert len(counts.unique()) > 1
    folder = train_runs(config, tmp_path / "out", progress=False)
    weights = torch.load(folder.last_checkpoint, weights_only=True)["state_dict"]["model.head.class_weights"]
    assert torch.allclose(weights * counts, torch.ones(10))
    plain = train_runs(config.replace(class_weights="none"), tmp_path / "plain", progress=False)
    states = [torch.load(one.last_checkpoint, weights_only=True)["state_dict"] for one in (folder, plain)]
    assert "model.head.class_weights" not in states[1]
    assert not torch.allclose(*(state["model.head.weight"] for state in states), atol=1e-3)


def test_patches_and_heads_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match="patch_size must divide the height and the width of the images, 33 and 20, got"
    ):
        build_backbone(ModelSettings(backbone="vit-small"), (3, 33, 20))
    with pytest.raises(ValueError, match=re.escape("width must be a multiple of its 3 heads (width / 64), got 200")):
        build_backbone(ModelSettings(backbone="vit-tiny", width=200), (3, 32, 32))
    with pytest.raises(ValueError, match="backbone_options.batch_norm_affine belongs to the built-in backbones with"):
        ModelSettings(backbone="vit-tiny", backbone_options={"batch_norm_affine": True})
    with pytest.raises(ValueError, match="backbone_options.patch_size belongs to backbone vit-tiny or vit-small; here"):
        ModelSettings(backbone="mlp", backbone_options={"patch_size": 4})


def test_a_vision_transformer_trains(tmp_path):
    config = RunConfig(backbone="vit-tiny", width=32, depth=2, optimizer="adamw", lr=3e-3, epochs=3, train_samples=500)
    folder = train_runs(config, tmp_path / "out", progress=False)
    metrics = read_table(folder.metrics)
    last = metrics[(metrics["metric"] == "accuracy") & (metrics["split"] == "train") & (metrics["epoch"] == 3)]
    assert float(last["value"].iloc[0]) > 0.5


def test_a_feature_dim_or_width_that_a_backbone_cannot_give_is_refused():
    with pytest.raises(ValueError, match="feature_dim belongs to the built-in backbones; here backbone is"):
        ModelSettings(backbone="package.module.Class", feature_dim=10)
    with pytest.raises(ValueError, match="width must be such that 32 groups divide 2 x width, got 8"):
        build_backbone(ModelSettings(backbone="resnext50-32x4d", width=8), (3, 32, 32))


def test_first_weights_of_convolutions_are_he_s_or_torch_s():
    def spread(**options: str) -> float:
        config = RunConfig(backbone="resnet18", method="fixed", backbone_options=options)
        model = build_model(config, (3, 32, 32), 10)
        return float(model.model[0].layers[4][1].residual[0][0].weight.detach().std())

    fan = 512 * 9
    assert spread() == pytest.approx((2 / fan) ** 0.5, rel=0.01)
    assert spread(initialisation="torch") == pytest.approx((1 / (3 * fan)) ** 0.5, rel=0.01)
    with pytest.raises(
        ValueError, match="backbone_options.initialisation belongs to backbone resnet18, .* or vgg13 and optimizer"
    ):
        RunConfig(backbone="mlp", backbone_options={"initialisation": "torch"})


def test_the_bias_of_a_fixed_head_begins_as_that_of_a_linear_layer():
    config = RunConfig(method="fixed", classifier_bias="learned", backbone="mlp", width=64)
    bias = build_model(config, (1, 8, 8), 10).head.learned_bias
    assert bias.requires_grad
    assert 0 < float(bias.detach().abs().max()) <= 1 / 8
    assert len(bias.unique()) == 10


@pytest.mark.parametrize("optimizer", ["sgd", "agd"])
@pytest.mark.parametrize("unit_start", [True, False])
def test_unit_rows_begin_so_or_are_brought_to_it_by_the_first_step(optimizer, unit_start):
    settings = BIAS_FREE | {
        "optimizer": optimizer,
        "unit_weight": True if unit_start else "published",
        "backbone": "mlp",
        "width": 64,
    }
    config = RunConfig(method="standard", **settings)
    model = build_model(config, (1, 8, 8), 10)
    optimiser = build_optimizer(config, model)

    def unit() -> bool:
        return torch.allclose(model.head.weight.norm(dim=1), torch.ones(10), atol=1e-5)

    assert unit() is unit_start
    model(torch.randn(8, 1, 8, 8, generator=generator())).square().sum().backward()
    optimiser.step()
    assert unit()


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({"epochs": 200, "measure_at": [1, 6, ".."]}, list(range(1, 200, 5))),
        ({"epochs": 200, "measure_at": [1, 6, "..", "last"]}, [*range(1, 200, 5), 200]),
        ({"epochs": 350, "measure_at": 5}, [1, *range(5, 351, 5)]),
    ],
)
def test_the_published_epochs_are_measured(settings, epochs):
    config = RunConfig(**settings)
    assert [epoch for epoch in range(1, config.epochs + 1) if config.is_measured(epoch)] == epochs


def test_vgg13_is_the_published_one():
    network = build_backbone(ModelSettings(backbone="vgg13"), (3, 32, 32))
    kernels = [parameter for parameter in network.parameters() if parameter.ndim == 4]
    assert [len(kernel) for kernel in kernels] == [64, 64, 128, 128, 256, 256, 512, 512, 512, 512]
    # 133,047,848 of torchvision's vgg13 with its linear layers of 123,642,856; its convolutions have biases.
    assert sum(kernel.numel() for kernel in kernels) == 133_047_848 - 123_642_856 - 2944


@pytest.mark.parametrize(
    ("options", "widths", "number"),
    [({}, [64, 256, 256], 2), ({"widths": [128, 512, 512], "convolutions": 3}, [128, 512, 512], 3)],
)
def test_the_fast_network_is_the_published_one(options, widths, number):
    network = build_backbone(ModelSettings(backbone="fast-convnet", backbone_options=options), (3, 32, 32))
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    shifts = number * sum(widths)
    kernels = sum(
        9 * width * (before + (number - 1) * width) for before, width in zip([24, *widths], widths, strict=False)
    )
    assert trained == 24 + kernels + shifts  # neither the whitening nor scales of batch norm
    if not options:
        assert trained + 256 * 10 == pytest.approx(1.97e6, rel=2e-3)  # as Jordan (2024) says


def test_stages_of_the_fast_network_begin_as_the_identity_of_their_channels():
    network = FastConvNet((3, 12, 12), widths=(30, 40, 50))
    images = normal(2, 24, 6, 6).float()
    assert torch.equal(network.layers[2].first[0](images)[:, :24], images)  # a sum of the value and of zeros


def test_whitened_patches_have_variance_1_in_every_direction_and_each_filter_its_negative():
    mixed = torch.einsum("nchw,dc->ndhw", normal(300, 3, 10, 10), normal(3, 3)).float()
    network = FastConvNet((3, 10, 10))
    network.whiten([mixed[:100], mixed[100:]])
    responses = network.whitening(mixed)
    assert torch.allclose(responses[:, :12], -responses[:, 12:], atol=1e-5)
    moments = responses[:, :12].transpose(0, 1).flatten(1)
    assert torch.allclose(moments @ moments.T / moments.shape[1], torch.eye(12), atol=0.02)


@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_whitening_of_constant_images_is_finite(pixel):
    network = FastConvNet((3, 10, 10), widths=(8, 8, 8))
    network.whiten([torch.full((5, 3, 10, 10), pixel)])
    assert network(torch.full((5, 3, 10, 10), pixel)).isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_the_fast_network_are_bounded_on_grey_images_with_an_even_background(seed):
    torch.manual_seed(seed)
    images = torch.zeros(200, 1, 28, 28)
    for image in images[:, 0]:  # a horizontal and a vertical line
        row, column = torch.randint(6, 22, (2,))
        image[row, 6:22] = image[6:22, column] = 1
    images = (images - images.mean()) / images.std()
    network = FastConvNet((1, 28, 28), widths=(16, 32, 64))
    network.whiten([images])
    head, labels = torch.nn.Linear(64, 8), torch.randint(8, (200,))
    torch.nn.functional.cross_entropy(head(network(images)), labels).backward()
    assert all(
        float(shift.grad.norm()) < 1 for shift in network.parameters() if shift.grad is not None and shift.dim() == 1
    )


def test_whitening_is_in_32_bits_under_autocast():
    torch.manual_seed(0)
    network, images = FastConvNet((3, 10, 10), widths=(4, 4, 4)), torch.randn(20, 3, 10, 10)
    network.whiten([images])
    expected = network.whitening(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.whitening(images), expected.bfloat16())  # rounded once, at the end


def test_inputs_are_not_rounded_with_bf16_mixed():
    inputs, config = torch.tensor([1 + 2**-12]), RunConfig(**SMALL, precision="bf16-mixed", device="cpu")
    with launched_fabric(config, torch.device("cpu")) as fabric:
        module = fabric.setup_module(torch.nn.Identity())
        assert torch.equal(module(inputs), inputs)


def test_a_run_whitens_the_patches_of_its_own_training_images():
    small = {"backbone": "fast-convnet", "backbone_options": {"widths": [9, 9, 9]}, "image_size": 10}
    config = RunConfig(**small, train_samples=50, test_samples=20, epochs=1)
    run = Run(config, load_data(config, progress=False))
    backbone = next(module for module in run.trained.model.modules() if isinstance(module, FastConvNet))
    images = torch.cat([images for images, _ in run.evaluation["train"]])
    responses = backbone.whitening(images)[:, 1:4].transpose(0, 1).flatten(1)  # the last of 4 is along constant patches
    assert torch.allclose(responses.square().mean(1), torch.ones(3), atol=0.1)


def test_the_fast_network_refuses_images_of_which_its_stages_leave_nothing():
    with pytest.raises(ValueError, match="images must be at least 9x9 for backbone fast-convnet, got 8x12"):
        FastConvNet((1, 8, 12))
    assert FastConvNet((1, 9, 9))(torch.randn(2, 1, 9, 9)).shape == (2, 256)


@pytest.mark.parametrize("method", ["standard", "fixed", "implicit", "means"])
def test_every_head_trains_on_the_fast_network(method, tmp_path):
    small = {"backbone": "fast-convnet", "backbone_options": {"widths": [4, 4, 12]}, "image_size": 10}
    config = RunConfig(**small, method=method, train_samples=60, test_samples=20, epochs=2, batch_size=30)
    folder = RunFolder(tmp_path)
    folder.start(config.in_force())
    Run(config, load_data(config, progress=False)).train(folder)
    metrics = read_table(folder.metrics).query("split == 'train' and epoch == 2").set_index("metric")["value"]
    assert metrics[["nc1_pinv", "nc2_etf_means", "accuracy"]].notna().all()


@pytest.mark.parametrize(("stem", "smallest"), [("7x7", 1), ("3x3", 4)])
def test_the_stem_of_a_resnet(stem, smallest):
    network = build_backbone(ModelSettings(backbone="resnet18", stem=stem), (3, 32, 32))
    assert network.layers[:-2](torch.randn(2, 3, 32, 32)).shape == (2, 512, smallest, smallest)


def test_a_width_scales_every_stage_of_a_resnet():
    network = build_backbone(ModelSettings(backbone="resnet18", width=5), (3, 32, 32))
    assert [stage[-1].residual[-1][0].out_channels for stage in network.layers[1:5]] == [5, 10, 20, 40]


OWN = """
import torch
class Net(torch.nn.Module):
    def __init__(self, image_shape, neurons=7):
        super().__init__()
        self.layer = torch.nn.Linear(image_shape[1] * image_shape[2], neurons)
    def forward(self, images):
        return self.layer(images.flatten(1)).relu()
class Wrong(torch.nn.Module):
    def forward(self, images):
        return images @ images
class Pictures(torch.nn.Module):
    def forward(self, images):
        return images
"""


def test_a_class_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_nets.py").write_text(OWN)
    config = RunConfig(backbone="my_own_nets.Net", backbone_options={"neurons": 13})
    model = build_model(config, (1, 8, 8), 10)
    assert model.head.in_features == 13
    assert model(torch.randn(2, 1, 8, 8), targets=torch.tensor([0, 1])).shape == (2, 10)
    wrong = [
        ("my_own_nets.Missing", {}, "cannot be imported: .*Missing"),
        ("not_there.Net", {}, "cannot be imported: No module named 'not_there'"),
        ("my_own_nets.Net", {"colour": 1}, "cannot be made with backbone_options .*colour"),
        ("my_own_nets.Pictures", {}, r"must give features of shape \(N, feature_dim\), Pictures gives \(2, 1, 8, 7\)"),
        ("my_own_nets.Wrong", {}, r"must take images .*, of C, H, W = \(1, 8, 7\); Wrong failed"),
        ("./my_own_nets.py", {}, "backbone must be a dotted path"),
        (".my_own_nets.Net", {}, "backbone must be a dotted path"),
        ("vgg", None, "backbone must be one of convnet, .*vgg13, .*or the dotted path"),
        ("mlp", {"neurons": 3}, "backbone_options.neurons is not a setting; nearest: "),
    ]
    for path, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            build_backbone(ModelSettings(backbone=path, backbone_options=options), (1, 8, 7))


@pytest.mark.parametrize("backbone", ["convnet", "mlp", "resnet18"])
def test_every_method_starts_from_the_same_backbone_weights(backbone):
    models = [
        build_model(RunConfig(method=name, seed=3, backbone=backbone, **attributes_for(name)), (1, 8, 8), 10)
        for name in METHODS
    ]
    states = [model.model.state_dict() for model in models]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    other = build_model(RunConfig(method="fixed", seed=4, backbone=backbone), (1, 8, 8), 10).model.state_dict()
    assert any(not torch.equal(other[key], states[0][key]) for key in other)


def test_building_a_model_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    build_model(RunConfig(), (1, 8, 8), 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_device_that_is_not_there_is_refused():
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(ValueError, match=r"device must be auto or an available device \(.*cpu\)"):
        resolve_device(missing)


def attributes_for(method):
    return {"class_attributes": "digits"} if method in ("attribute-frame", "fixed-frame") else {}


@pytest.mark.parametrize("method", slow_except(METHODS, ["standard", "implicit", "means"]))
def test_every_method_trains_with_every_optimiser(method, tmp_path):
    data = load_data(DataSettings(train_samples=200, test_samples=60))
    for optimizer, rate in (("sgd", 0.05), ("adamw", 3e-3)):
        settings = {"method": method, "optimizer": optimizer, "lr": rate, "epochs": 12, "batch_size": 20}
        config = RunConfig(**SMALL | settings | attributes_for(method))
        folder = RunFolder(tmp_path / optimizer)
        folder.start(config.in_force())
        Run(config, data).train(folder)
        last = pd.read_csv(folder.metrics).query("epoch == 12 and split == 'train' and metric == 'accuracy'")
        assert last["value"].item() > 0.6


def test_standard_keeps_unit_rows(tmp_path):
    data = load_data(DataSettings(train_samples=200, test_samples=60))
    config = RunConfig(**SMALL, method="standard")
    folder = RunFolder(tmp_path / "run")
    folder.start(config.in_force())
    Run(config, data).train(folder)
    state = torch.load(folder.last_checkpoint, weights_only=True)["state_dict"]
    assert torch.allclose(state["model.head.weight"].norm(dim=1), torch.ones(10), atol=1e-6)


@pytest.mark.parametrize("method", ["fixed", "implicit", "frame"])
def test_the_classifier_of_a_bf16_run_is_an_etf_to_five_digits(method, tmp_path):
    run = trained(tmp_path / "run", method=method, precision="bf16-mixed", batch_size=20, epochs=3, width=24)
    weight = torch.load(run.last_checkpoint, weights_only=True)["state_dict"]["model.head.weight"]
    assert weight.dtype == torch.float32
    gram = weight.double() @ weight.double().T
    if method == "frame":  # of its own rank: a tight frame, whose eigenvalues are 0 or all the same
        eigenvalues = torch.linalg.eigvalsh(gram)
        eigenvalues = eigenvalues[eigenvalues > 0.5]
        assert float((eigenvalues / eigenvalues.mean() - 1).abs().max()) < 1e-5
    else:
        assert float((gram - simplex_gram(10)).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("has_amx", "has_avx512", "precision"),
    [(True, False, "bf16-mixed"), (False, True, "bf16-mixed"), (False, False, "32")],
)
def test_precision_auto_is_bfloat16_where_the_cpu_has_instructions_for_it(
    has_amx, has_avx512, precision, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512)
    losses = {}
    for name in ("auto", precision):
        run = train_runs(
            RunConfig(**SMALL | {"epochs": 1}, precision=name, device="cpu"), tmp_path / name, progress=False
        )
        losses[name] = read_table(run.path / "training.csv")["batch_loss"].tolist()
        assert run.read_environment()["precision"] == precision
    assert losses["auto"] == losses[precision]


def test_a_run_does_not_resume_in_another_precision(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    config = RunConfig(**SMALL, precision="auto", device="cpu")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_end_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train_runs(config, tmp_path / "run", progress=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(
        ValueError, match="precision auto is 32 on this machine, but the run was started with bf16-mixed"
    ):
        train_runs(config, tmp_path / "run", resume=True, progress=False)


def test_checkpoints_of_epochs_are_kept_on_request(tmp_path):
    data = load_data(DataSettings(train_samples=200, test_samples=60))
    config = RunConfig(**SMALL | {"epochs": 5}, keep_at=2)
    folder = RunFolder(tmp_path / "run")
    folder.start(config.in_force())
    Run(config, data).train(folder)
    assert {path.name for path in folder.checkpoints.iterdir()} == {
        *("epoch0001.ckpt", "epoch0002.ckpt", "epoch0004.ckpt", "last.ckpt")
    }


def trained(folder: Path, **settings) -> RunFolder:
    config = RunConfig(**(OWN_CLASS if "." in settings.get("backbone", "") else SMALL) | settings)
    data = load_data(config)
    run = RunFolder(folder)
    run.start(config.in_force())
    Run(config, data).train(run)
    return run


def test_the_training_log_and_the_gradients(tmp_path):
    run = trained(tmp_path / "run", method="standard", epochs=3, batch_size=50)
    log = pd.read_csv(run.training_log)
    assert log["epoch"].tolist() == [1, 2, 3]
    assert (log["batch_accuracy_top5"] >= log["batch_accuracy"]).all()
    assert log["batch_alignment"].between(-1, 1).all()
    assert log["lr"].tolist() == pytest.approx([0.05, 0.0375, 0.0125])  # that each epoch began with
    gradients = pd.read_csv(run.gradients)
    assert gradients["epoch"].unique().tolist() == [1, 2, 3]
    state = torch.load(run.last_checkpoint, weights_only=True)["state_dict"]
    names = set(gradients["parameter"])
    assert {"head.weight", "head.bias"} < names
    assert len(names) == 5
    for name, rows in gradients.groupby("parameter"):
        size = state[f"model.{name}"].numel()
        assert (rows["mean"] <= rows["max"]).all()
        assert (rows["norm"] <= rows["max"] * size**0.5 * 1.001).all()


HEADS_TENSORS = {"head.features", "head.class_means", "head.weight", "head.bias"}


def gradients_of_heads(folder: Path, **settings) -> pd.DataFrame:
    run = trained(folder, epochs=2, batch_size=50, **settings)
    table = pd.read_csv(run.gradients)
    return table[table["parameter"].str.startswith("head.")]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "implicit"}, HEADS_TENSORS),
        ({"method": "implicit", "classifier_bias": "none"}, HEADS_TENSORS - {"head.bias"}),
        ({"method": "means", "class_means": "differentiable"}, HEADS_TENSORS),
        ({"method": "means"}, {"head.features"}),
        ({"method": "fixed", "classifier_bias": "none"}, set()),
    ],
)
def test_gradients_of_what_a_head_makes_of_a_batch_are_logged(settings, expected, tmp_path):
    rows = gradients_of_heads(tmp_path / "run", **settings)
    for _, of_epoch in rows.groupby("epoch"):
        assert set(of_epoch["parameter"]) == expected
    assert (rows["mean"] <= rows["max"]).all()
    assert (rows["max"] > 0).all()


def test_the_logged_gradients_of_the_nearest_etf_are_those_of_finite_differences(tmp_path):
    """The first step, from one batch of all classes: the loss as a function of class means, weight and bias."""
    settings = {"method": "implicit", "loss": "mse", "epochs": 1, "batch_size": 200, "train_samples": 100}
    config = RunConfig(**SMALL | settings)
    prepared = Run(config, load_data(config))
    images, targets = next(iter(prepared.batches(1)))
    with torch.no_grad():
        features = prepared.trained.model.head.features(
            copy.deepcopy(prepared.trained.model.model).train()(images)
        ).double()
    run = RunFolder(tmp_path / "run")
    run.start(config.in_force())
    prepared.train(run)
    logged = pd.read_csv(run.gradients).set_index("parameter")
    mean, classes = features.mean(0), nn.functional.one_hot(targets, 10).double()
    class_means = classes.T @ features / classes.sum(0)[:, None] - mean
    etf = nearest_simplex_etf(class_means)

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (features @ weight.T + bias - classes).square().mean()

    def differences(of: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
        steps = step * torch.eye(at.numel(), dtype=at.dtype).reshape(-1, *at.shape)
        return torch.stack([(of(at + one) - of(at - one)) / (2 * step) for one in steps]).abs()

    of_etf = lambda weight: loss(weight, -weight @ mean)  # noqa: E731
    by_hand = {
        "head.bias": differences(lambda bias: loss(etf, bias), -etf @ mean),
        "head.weight": differences(of_etf, etf),
        "head.class_means": differences(lambda means: of_etf(nearest_simplex_etf(means)), class_means),
    }
    for name, gradient in by_hand.items():
        found = {"mean": float(gradient.mean()), "max": float(gradient.max()), "norm": float(gradient.norm())}
        assert logged.loc[name, list(found)].to_dict() == pytest.approx(found, rel=1e-3), name


def test_agd_logs_its_step(tmp_path):
    run = trained(tmp_path / "run", optimizer="agd", optimizer_options={"gain": 1.0}, **BIAS_FREE, batch_size=50)
    log = pd.read_csv(run.training_log)
    assert (log["agd_eta"] > 0).all()
    assert "lr" not in log


def test_lbfgs_fits_what_it_is_given(tmp_path):
    run = trained(tmp_path / "run", method="fixed", optimizer="lbfgs", lr=0.5, batch_size=200, epochs=5)
    last = pd.read_csv(run.metrics).query("epoch == 5 and split == 'train' and metric == 'accuracy'")
    assert last["value"].item() > 0.9


@pytest.mark.parametrize("backbone", ["convnet", "fast-convnet"])
def test_lbfgs_trains_convolutions_of_both_memory_layouts(backbone, tmp_path):
    settings = {"backbone": backbone, "image_size": 16, "train_samples": 200, "method": "linear", "depth": None}
    fast = {"width": None, "backbone_options": {"widths": [8, 8, 8]}}
    settings |= fast if backbone == "fast-convnet" else {"width": 4}
    run = trained(tmp_path / "run", **settings, optimizer="lbfgs", lr=0.5, batch_size=200, epochs=3)
    losses = pd.read_csv(run.training_log)["batch_loss"]
    assert losses.iloc[-1] < losses.iloc[0]


def test_the_log_of_lbfgs_is_of_the_points_before_each_step(tmp_path):
    settings = {"method": "fixed", "optimizer": "lbfgs", "batch_size": 200, "epochs": 1, "weight_decay": 0.0}
    run = trained(tmp_path / "run", **settings)
    config = RunConfig(**SMALL | settings)
    data = load_data(config)
    model = build_model(config, data.image_shape, data.num_classes)
    ((images, labels),) = EpochBatches(data.train, evaluation_batches(data, config)["train"].standardise, config, 0, 0)
    expected = nn.functional.cross_entropy(model(images, targets=labels), labels)
    assert pd.read_csv(run.training_log)["batch_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_dropout_follows_from_the_seed_and_the_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_dropout_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, image_shape):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.5))\n"
    )
    settings = {"backbone": "my_dropout_net.Net", "epochs": 3, "keep_at": 1}
    first = trained(tmp_path / "first", **settings)
    before = torch.get_rng_state()
    second = trained(tmp_path / "second", **settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.metrics.read_bytes() == second.metrics.read_bytes()
    second.checkpoint(1).replace(second.last_checkpoint)
    second.metrics.unlink()
    trained(tmp_path / "second", **settings)
    assert first.metrics.read_bytes() == second.metrics.read_bytes()


def test_measuring_and_checkpoints_at_chosen_epochs(tmp_path):
    run = trained(tmp_path / "run", epochs=5, measure_at=2, keep_at=4)
    assert pd.read_csv(run.metrics)["epoch"].unique().tolist() == [1, 2, 4, 5]
    assert {path.name for path in run.checkpoints.iterdir()} == {"epoch0001.ckpt", "epoch0004.ckpt", "last.ckpt"}


def test_tensorboard_sees_what_the_tables_say(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(tmp_path / "run", loggers=["tensorboard"])
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    metrics = pd.read_csv(run.metrics).query("split == 'test' and metric == 'accuracy'")["value"]
    assert [event.value for event in events.Scalars("test/accuracy")] == pytest.approx(metrics.tolist())
    assert "batch_loss" in events.Tags()["scalars"]


def test_two_runs_of_one_process_are_two_runs_of_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("first", "second"):
        run = trained(tmp_path / name, loggers=["wandb"], epochs=1)
        assert len(list((run.path / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_a_logger_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("neuralcollapse.lab.training.progress.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb only if it is installed, but it is not: pip install wandb"):
        check_loggers(["wandb"])


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    trained(tmp_path / "run", epochs=1)
    config = RunConfig(**SMALL | {"epochs": 2})
    data = load_data(DataSettings(image_size=12, train_samples=200, test_samples=60))
    with pytest.raises(
        ValueError, match="checkpoint .* is not of this run: its data are different: images of the train split"
    ):
        Run(config, data).train(RunFolder(tmp_path / "run"))


class PlainTraining(LightningModule):
    """Somebody's own training, which knows nothing of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))

    def forward(self, inputs):
        return self.network(inputs)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain_batches(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = generator(number)
    return [(torch.randn(30, 6, generator=random), torch.arange(30) % 3) for _ in range(number)]


def test_the_callback_measures_any_lightning_training(tmp_path):
    module, loaders = PlainTraining(), {"train": plain_batches(3), "test": plain_batches(2)}
    callback = CollapseCallback(loaders, every_n_epochs=2, csv=tmp_path / "metrics.csv")
    with quiet_lightning():
        trainer = Trainer(
            max_epochs=5,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(90, 6), torch.arange(90) % 3), 30))
    table = pd.read_csv(tmp_path / "metrics.csv", converters={"value": float})
    assert list(table.columns) == ["epoch", "split", "metric", "value"]
    assert table["epoch"].unique().tolist() == [1, 2, 4, 5]
    assert module.training
    expected = measure(module, loaders["test"], train=loaders["train"], progress=False).metrics
    last = table.query("epoch == 5 and split == 'test'").set_index("metric")["value"].to_dict()
    assert last == expected
    assert float(trainer.callback_metrics["test/nc1_quotient"]) == pytest.approx(expected["nc1_quotient"])


def test_the_callback_checks_its_arguments():
    with pytest.raises(ValueError, match="loaders must name at least one split"):
        CollapseCallback({})
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        CollapseCallback({"train": []}, every_n_epochs=0)
