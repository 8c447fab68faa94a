"""`CollapseCallback` on a LightningModule whose model is an attribute."""

from __future__ import annotations

import gc
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from helpers import normal
from neuralcollapse import Measurement, NearestETFClassifier, attach_head, measure
from neuralcollapse.lab import RunFolder
from neuralcollapse.lab.training.distributed import quiet_lightning
from neuralcollapse.lightning import CollapseCallback

BATCHES = [(normal(30, 6, seed=seed, dtype=torch.float32), torch.arange(30) % 3) for seed in range(3)]


class TrainsAnAttribute(LightningModule):
    """Calls its parts in its steps, and has no forward, as most do."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch, _):
        images, labels = batch
        return torch.nn.functional.cross_entropy(next(iter(self.children()))(images, targets=labels), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_once(module, callback, max_epochs=2):
    with quiet_lightning():
        trainer = Trainer(
            max_epochs=max_epochs,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(*map(torch.cat, zip(*BATCHES, strict=True))), 30))
    return trainer


def attached_net():
    return attach_head(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), NearestETFClassifier(8, 3))


@pytest.mark.parametrize("name", ["model", "net"])
def test_the_callback_measures_the_attribute_that_is_the_model(name, caplog):
    module = TrainsAnAttribute(**{name: attached_net()})
    with caplog.at_level("INFO", "neuralcollapse"):
        trainer = fit_once(module, CollapseCallback({"train": BATCHES}))
    assert f"measuring {name} (AttachedHead) and its classifier 'head'" in caplog.text
    expected = measure(getattr(module, name), BATCHES, progress=False).metrics
    assert float(trainer.callback_metrics["train/nc1_quotient"]) == pytest.approx(expected["nc1_quotient"])


def test_the_callback_asks_which_of_several_attributes_is_the_model():
    module = TrainsAnAttribute(student=attached_net(), teacher=attached_net())
    with pytest.raises(ValueError, match="model must name what .* could be 'student', 'teacher'"):
        fit_once(module, CollapseCallback({"train": BATCHES}))
    with pytest.raises(
        ValueError, match="model must name a module of TrainsAnAttribute, got 'stduent'; it has 'student'"
    ):
        fit_once(module, CollapseCallback({"train": BATCHES}, model="stduent"))
    callback = CollapseCallback({"train": BATCHES}, model="student")
    fit_once(module, callback, max_epochs=1)
    assert callback.rows


class Plain(LightningModule):
    """A network with a forward, whose features are the same when it is copied."""

    def __init__(self, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.lr = lr

    def forward(self, images):
        return self.network(images) + torch.zeros(3)  # of the default dtype, as many models make tensors

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*map(torch.cat, zip(*BATCHES, strict=True))), 30)


def trainer_of(*callbacks, **options) -> Trainer:
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", callbacks=[*callbacks], **{"logger": False} | quiet | options)


def fit(*callbacks, module=None, ckpt_path=None, **options) -> Trainer:
    with quiet_lightning():
        trainer = trainer_of(*callbacks, **options)
        trainer.fit(module or Plain(), loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def epochs(rows) -> list[int]:
    return sorted({row[0] for row in rows})


def epochs_in(path: Path) -> list[int]:
    return pd.read_csv(path)["epoch"].unique().tolist()


class StopAfter(Callback):
    """Asks the trainer to stop, in a hook that is called after the callback's own."""

    def __init__(self, epoch, hook):
        setattr(self, hook, lambda trainer, *_: setattr(trainer, "should_stop", trainer.current_epoch + 1 >= epoch))


class Clock(Timer):
    """One on which every batch takes a second, and the training is to take 4."""

    def __init__(self, interval):
        super().__init__(timedelta(seconds=4), interval=interval)
        self.seconds = 0

    def time_elapsed(self, stage=None):
        return float(self.seconds)

    def on_train_batch_end(self, trainer, *args, **kwargs):
        self.seconds += 1
        super().on_train_batch_end(trainer, *args, **kwargs)


PATIENCE = {"monitor": "val", "patience": 2, "min_delta": 9.0}
ENDS = {  # callbacks before and after, options of the trainer, the last epoch
    "early stopping before": ([EarlyStopping(**PATIENCE)], [], {}, 3),
    "early stopping after": ([], [EarlyStopping(**PATIENCE, check_on_train_epoch_end=True)], {}, 3),
    "should_stop at an epoch's end": ([], [StopAfter(4, "on_train_epoch_end")], {}, 4),
    "should_stop inside an epoch": ([], [StopAfter(2, "on_train_batch_end")], {}, 2),
    "should_stop, before min_epochs": ([], [StopAfter(2, "on_train_batch_end")], {"min_epochs": 4}, 4),
    "max_steps at an epoch's end": ([], [], {"max_steps": 9}, 3),
    "max_steps inside an epoch": ([], [], {"max_steps": 10}, 4),
    "max_time inside an epoch": ([], [Clock("step")], {}, 2),
    "max_time at an epoch's end": ([], [Clock("epoch")], {}, 2),
    "max_epochs": ([], [], {"max_epochs": 7}, 7),
    "no epochs": ([], [], {"max_epochs": 0}, None),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_last_epoch_is_measured_whatever_ends_the_training(name, tmp_path):
    before, after, options, last = ENDS[name]
    callback = CollapseCallback({"train": BATCHES}, every_n_epochs=5, csv=tmp_path / "metrics.csv")
    module = Plain()
    trainer = fit(*before, callback, *after, module=module, logger=CSVLogger(tmp_path), **{"max_epochs": 50} | options)
    due = [] if last is None else [epoch for epoch in (1, 5) if epoch < last] + [last]
    assert epochs(callback.rows) == due
    if last is None:
        return
    assert epochs_in(tmp_path / "metrics.csv") == due
    expected = measure(module, BATCHES, progress=False).metrics["nc1_quotient"]
    assert callback.rows[-1][0] == last
    assert {row[2]: row[3] for row in callback.rows if row[0] == last}["nc1_quotient"] == pytest.approx(expected)
    assert float(trainer.callback_metrics["train/nc1_quotient"]) == pytest.approx(expected, rel=1e-5)
    logged = pd.read_csv(Path(trainer.logger.log_dir) / "metrics.csv")["train/nc1_quotient"].dropna()
    assert len(logged) == len(due)
    assert logged.iloc[-1] == pytest.approx(expected, rel=1e-5)


def test_without_last_epoch_only_the_steps_are_measured():
    callback = CollapseCallback({"train": BATCHES}, every_n_epochs=5, last_epoch=False)
    fit(EarlyStopping(**PATIENCE), callback, max_epochs=50)
    assert epochs(callback.rows) == [1]


def test_what_is_interrupted_is_not_measured_as_an_epoch():
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    callback = CollapseCallback({"train": BATCHES}, every_n_epochs=5)
    with pytest.raises(SystemExit):
        fit(callback, Interrupt(), max_epochs=50)
    assert epochs(callback.rows) == [1]


def test_every_training_has_a_table_of_its_own(tmp_path):
    csv, moments = tmp_path / "metrics.csv", tmp_path / "moments"
    callback = CollapseCallback({"train": BATCHES}, csv=csv, moments=moments)
    for number, last in enumerate((3, 2, 1), 1):
        fit(callback, max_epochs=last)
        assert epochs(callback.rows) == list(range(1, last + 1))
        path, folder = (
            (csv, moments) if number == 1 else (tmp_path / f"metrics-{number}.csv", tmp_path / f"moments-{number}")
        )
        assert callback.path == path
        assert epochs_in(path) == list(range(1, last + 1))
        assert len(list(folder.iterdir())) == last
    assert epochs_in(csv) == [1, 2, 3]


def test_rows_without_a_file_are_those_of_the_last_training():
    callback = CollapseCallback({"train": BATCHES})
    fit(callback, max_epochs=3)
    fit(callback, max_epochs=1)
    assert epochs(callback.rows) == [1]


@pytest.mark.parametrize("option", ["csv", "moments"])
def test_files_that_are_there_are_not_replaced_unless_that_is_asked_for(option, tmp_path):
    place = tmp_path / option
    first = CollapseCallback({"train": BATCHES}, **{option: place})
    fit(first, max_epochs=2)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = CollapseCallback({"train": BATCHES}, **{option: place})
    with pytest.raises(ValueError, match=f"^{option} must be a .*{option}.* overwrite=True"):
        fit(other, max_epochs=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
    fit(CollapseCallback({"train": BATCHES}, overwrite=True, **{option: place}), max_epochs=1)
    if option == "csv":
        assert epochs_in(place) == [1]
    else:
        assert [path.name for path in place.iterdir()] == ["epoch0001-train.safetensors"]


def test_a_training_that_failed_before_it_measured_leaves_the_name_to_the_next(tmp_path):
    callback = CollapseCallback({"train": BATCHES}, csv=tmp_path / "metrics.csv", model="wrong")
    with pytest.raises(ValueError, match="model must name"):
        fit(callback, max_epochs=1)
    callback.model = None
    fit(callback, max_epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("same_object", [True, False])
def test_a_training_that_resumes_another_goes_on_with_its_table(same_object, tmp_path):
    csv, moments = tmp_path / "metrics.csv", tmp_path / "moments"
    make = lambda: CollapseCallback({"train": BATCHES}, csv=csv, moments=moments)  # noqa: E731
    callback, saved = make(), tmp_path / "two.ckpt"
    fit(callback, max_epochs=2).save_checkpoint(saved)
    resumed = callback if same_object else make()
    fit(resumed, max_epochs=4, ckpt_path=saved)
    assert epochs(resumed.rows) == epochs_in(csv) == [1, 2, 3, 4]
    assert len(list(moments.iterdir())) == 4
    whole = CollapseCallback({"train": BATCHES})
    fit(whole, max_epochs=4)
    assert resumed.rows == whole.rows


def test_a_trainer_that_goes_on_keeps_the_table(tmp_path):
    callback, module = CollapseCallback({"train": BATCHES}, csv=tmp_path / "metrics.csv"), Plain()
    trainer = fit(callback, module=module, max_epochs=2)
    trainer.fit_loop.max_epochs = 3
    with quiet_lightning():
        trainer.fit(module, loader(), loader())
    assert epochs(callback.rows) == epochs_in(tmp_path / "metrics.csv") == [1, 2, 3]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "64-true", "bf16-mixed"])
def test_a_model_is_measured_in_every_precision(precision, tmp_path):
    module, moments = Plain(lr=0.01), tmp_path / "moments"
    callback = CollapseCallback({"train": BATCHES, "test": BATCHES[:1]}, moments=moments)
    fit(callback, module=module, max_epochs=2, precision=precision)
    assert epochs(callback.rows) == [1, 2]
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(
        precision, torch.float32
    )
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32
    network, previous = module.network, torch.get_default_dtype()
    found = Measurement.load(moments / "epoch0002-train.safetensors")
    with torch.no_grad():
        features = network[1](network[0](torch.cat([images for images, _ in BATCHES]).to(dtype))).double()
    means = torch.stack([features[torch.cat([labels for _, labels in BATCHES]) == k].mean(0) for k in range(3)])
    assert torch.get_default_dtype() == previous
    torch.testing.assert_close(found.moments.means, means, rtol=1e-6, atol=1e-6)


def test_measuring_leaves_no_hook_whatever_happens():
    def batches():
        yield BATCHES[0]
        raise RuntimeError("the disk is gone")

    class Once:
        def __iter__(self):
            return batches()

    module = Plain()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        fit(CollapseCallback({"train": Once()}), module=module, max_epochs=1, precision="bf16-true")
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())
    assert torch.get_default_dtype() == torch.float32
    gc.collect()


def test_validation_alone_and_the_sanity_check_measure_nothing(tmp_path):
    callback = CollapseCallback({"train": BATCHES}, csv=tmp_path / "metrics.csv")
    with quiet_lightning():
        trainer_of(callback).validate(Plain(), loader(), verbose=False)
        trainer_of(callback, fast_dev_run=True).validate(Plain(), loader(), verbose=False)
    assert callback.rows == []
    assert list(tmp_path.iterdir()) == []
    fit(callback, max_epochs=1, num_sanity_val_steps=2)
    assert epochs_in(tmp_path / "metrics.csv") == [1]


def test_the_search_for_a_learning_rate_is_not_measured(tmp_path):
    callback = CollapseCallback({"train": BATCHES}, csv=tmp_path / "metrics.csv")
    module = Plain()
    with quiet_lightning():
        trainer = trainer_of(callback, max_epochs=2, default_root_dir=tmp_path / "root")
        Tuner(trainer).lr_find(module, loader(), loader(), num_training=5)
        assert callback.rows == []
        trainer.fit(module, loader(), loader())
    assert epochs(callback.rows) == epochs_in(tmp_path / "metrics.csv") == [1, 2]


def test_a_training_whose_checkpoint_has_no_table_adds_to_the_one_that_is_there(tmp_path):
    csv, saved = tmp_path / "metrics.csv", tmp_path / "two.ckpt"
    fit(CollapseCallback({"train": BATCHES}, csv=csv), max_epochs=2)
    fit(max_epochs=2).save_checkpoint(saved)
    fit(CollapseCallback({"train": BATCHES}, csv=csv), max_epochs=3, ckpt_path=saved)
    assert epochs_in(csv) == [1, 2, 3]


class Named(nn.Module):
    """A hidden layer with a classifier's name, and a prior after the classifier."""

    def __init__(self, prior):
        super().__init__()
        self.fc, self.out, self.prior = nn.Linear(6, 8), nn.Linear(8, 3), prior * torch.arange(3)

    def forward(self, inputs, targets=None):
        return self.out(self.fc(inputs).relu()) + self.prior


def test_the_callback_measures_the_layer_that_computes_the_output(caplog):
    module = TrainsAnAttribute(model=Named(0))
    with caplog.at_level("INFO", "neuralcollapse"):
        trainer = fit_once(module, CollapseCallback({"train": BATCHES}))
    assert "measuring model (Named) and its classifier (the first batch decides)" in caplog.text
    expected = measure(module.model, BATCHES, classifier="out", progress=False).metrics
    assert float(trainer.callback_metrics["train/accuracy"]) == pytest.approx(expected["accuracy"])
    with pytest.raises(
        ValueError, match=r"no module of Named computes .*'out' with weight \(3, 8\).* differs by up to 2"
    ):
        fit_once(TrainsAnAttribute(model=Named(1)), CollapseCallback({"train": BATCHES}))
    with pytest.raises(ValueError, match="classifier must name a module of the model, got 'output'"):
        fit_once(TrainsAnAttribute(model=Named(0)), CollapseCallback({"train": BATCHES}, classifier="output"))


def test_a_run_folder_holds_what_csv_and_moments_hold(tmp_path):
    csv, moments, folder = tmp_path / "metrics.csv", tmp_path / "moments", RunFolder(tmp_path / "run")
    splits = {"train": BATCHES, "test": BATCHES[:1]}
    for files in ({"csv": csv, "moments": moments}, {"folder": folder}):
        fit(CollapseCallback(splits, **files), max_epochs=3)
    assert folder.metrics.read_bytes() == csv.read_bytes()
    assert {path.name for path in folder.moments.iterdir()} == {path.name for path in moments.iterdir()}
    assert folder.settings() == {"name": "Plain"}
    assert folder.read_environment()["num_classes"] == 3
    for path in folder.measured().values():
        assert Measurement.load(path).metrics == pytest.approx(
            Measurement.load(moments / path.name).metrics, nan_ok=True
        )


@pytest.mark.parametrize("same_object", [True, False])
def test_a_training_that_resumes_continues_its_run_folder(same_object, tmp_path):
    callback, saved = CollapseCallback({"train": BATCHES}, folder=tmp_path / "run"), tmp_path / "two.ckpt"
    fit(callback, max_epochs=2).save_checkpoint(saved)
    resumed = callback if same_object else CollapseCallback({"train": BATCHES}, folder=tmp_path / "run")
    fit(resumed, max_epochs=4, ckpt_path=saved)
    assert epochs(resumed.rows) == epochs_in(tmp_path / "run" / "metrics.csv") == [1, 2, 3, 4]
    fit(CollapseCallback({"train": BATCHES}, folder=tmp_path / "whole"), max_epochs=4)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_every_training_has_a_run_folder_of_its_own(tmp_path):
    made = RunFolder.create(tmp_path / "run", name="mine", settings={"seed": 3})
    callback = CollapseCallback({"train": BATCHES}, folder=made)
    fit(callback, max_epochs=2)
    fit(callback, max_epochs=1)
    assert made.settings() == {"name": "mine", "seed": 3}
    assert epochs_in(made.metrics) == [1, 2]
    assert epochs_in(tmp_path / "run-2" / "metrics.csv") == [1]
    other = CollapseCallback({"train": BATCHES}, folder=made.path)
    with pytest.raises(ValueError, match=r"folder must be a run without measurements; .*run' has: .* overwrite=True"):
        fit(other, max_epochs=1)
    fit(CollapseCallback({"train": BATCHES}, folder=made.path, overwrite=True), max_epochs=1)
    assert epochs_in(made.metrics) == [1]
    assert [path.name for path in made.moments.iterdir()] == ["epoch0001-train.safetensors"]


def test_a_run_folder_is_given_alone(tmp_path):
    with pytest.raises(ValueError, match="folder must be given without csv and moments"):
        CollapseCallback({"train": BATCHES}, folder=tmp_path / "run", csv=tmp_path / "metrics.csv")
