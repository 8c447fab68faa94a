"""Checkpoints: what is saved, when, and how it is read again."""

from __future__ import annotations

import errno
import pickle
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.results.files import write_whole
from neuralcollapse.lab.results.folder import RunFolder, with_earlier_meanings
from neuralcollapse.lab.results.records import is_due
from neuralcollapse.lab.results.resuming import OPEN_ENDED, changed_data, changed_settings
from neuralcollapse.lab.running import Record
from neuralcollapse.lab.stopping import terminate
from neuralcollapse.lab.untrusted import without_secrets

# Number of the format of checkpoints that is written. Those of 0 do not say whose they are.
FORMAT = 1
# Where a checkpoint says it.
PROVENANCE = "neuralcollapse"


class Checkpointing(Callback):
    """Saves where a run goes on from, and the epochs to keep. Comes after what has a state to save.

    A run goes on from the end of its last epoch; or from inside one, of which it saves where it is every
    ``checkpoint_minutes`` and when SIGTERM comes. In the last batch of an epoch, and while it is measured, SIGTERM
    leaves what was saved before. In a job of SLURM, lightning's signal to requeue it stops it in the same way, and then
    lightning requeues it.
    """

    def __init__(self, folder: RunFolder, settings: Record) -> None:
        self.folder = folder
        self.settings = settings
        self._saved = time.monotonic()
        self._in_batch = self._terminated = False
        self._alone = True
        self._before_end: Callable[[], Any] = lambda: None

    def on_sigterm(self, *_: Any) -> None:
        """Stop: once the batch is trained on and saved, or at once where there is none."""
        self._terminated = True
        if self._alone and not self._in_batch:
            self._end()

    def on_train_start(self, *_: Any) -> None:
        """Have lightning's answers to signals wait until the state is whole.

        In the middle of a batch it would save, and of several ranks meet the others where they wait for something else.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self.on_sigterm)
        if not SLURMEnvironment.detect():
            return
        requeue = signal.getsignal(signal.SIGUSR1)
        if not callable(requeue):
            return

        def on_requeue(*arguments: Any) -> None:
            self._before_end = partial(requeue, *arguments)
            self.on_sigterm()

        signal.signal(signal.SIGUSR1, on_requeue)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of several ranks, none stops by itself."""
        self._alone = trainer.world_size == 1

    def on_train_batch_start(self, *_: Any) -> None:
        """From here on the state is that of no batch."""
        self._in_batch = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        """Save inside an epoch, where it is time to and a step is done: a checkpoint holds no gradients."""
        if (batch_index + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        self._in_batch = False
        late = time.monotonic() - self._saved > 60 * self.settings.checkpoint_minutes
        due = self._of_any(trainer, late or self._terminated)
        # Of the last batch, lightning would take the epoch's end as done too.
        if due and not trainer.is_last_batch:
            module: Any = pl_module
            module.check_finite()  # what has diverged is not resumed
            self._save_last(trainer)
        if due and self._of_any(trainer, self._terminated):
            self._end()

    def _end(self) -> None:
        before, self._before_end = self._before_end, lambda: None  # while it is requeued, SIGTERM may come as well
        before()
        terminate()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        epoch = trainer.current_epoch + 1
        settings, every = self.settings, self.settings.checkpoint_every
        due = every is not None and is_due(epoch, every, settings.checkpoint_from)
        if due or epoch in settings.checkpoint_epochs:
            trainer.save_checkpoint(self.folder.checkpoint(epoch))
        self._save_last(trainer)  # last: a run that is killed here makes the other again

    def _of_any(self, trainer: Trainer, true: bool) -> bool:
        """Whether it is true of any rank: all of them save, or none."""
        return true if self._alone else trainer.strategy.reduce_boolean_decision(true, all=False)

    def _save_last(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder.last_checkpoint)
        self._saved = time.monotonic()


def provenance(config: RunConfig, trainer: Trainer, data: Mapping[str, Any]) -> dict[str, Any]:
    """Whose checkpoint it is that is written now, and where it is in training.

    Args:
        config: The run's settings.
        trainer: What trains it.
        data: The fingerprint of its data.

    Returns:
        Format and package, config without secrets, seed, data and epoch (counted from 1); inside it ``batches``, the
        number of those trained on, and the states of the generators that the network draws from.
    """
    epoch: Any = trainer.fit_loop.epoch_progress.current
    found = {
        "format_version": FORMAT,
        "package_version": version("neuralcollapse"),
        "config": without_secrets(config.in_force()),
        "seed": config.seed,
        "data": dict(data),
        "epoch": trainer.current_epoch + 1,
    }
    if epoch.processed < epoch.started:
        found["batches"] = trainer.fit_loop.batch_idx + 1
        accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        found["generators"] = [torch.get_rng_state(), *accelerators]
    return found


def restore_generators(found: dict[str, Any]) -> None:
    """Set the states that `provenance` kept, if it kept some."""
    first, *others = found.get("generators", [None])
    if first is not None:
        torch.set_rng_state(first)
        torch.cuda.set_rng_state_all(others[: torch.cuda.device_count()])


@dataclass(frozen=True)
class Owner:
    """The run that a checkpoint is to be of.

    Attributes:
        config: Its settings.
        data: The fingerprint of its data.
    """

    config: RunConfig
    data: Mapping[str, Any]

    def check(self, kept: Mapping[str, Any], epoch: int | None = None) -> None:
        """Check that a checkpoint says that it is of this run.

        Args:
            kept: What `provenance` kept in it; nothing in those of format 0.
            epoch: The epoch that it is to be of, where its name says one.

        Raises:
            ValueError: if it is of another run, of other data or of another epoch.
        """
        stored = kept.get("config", {})
        if not kept.get("data"):  # of an earlier version, in whose time some settings had other meanings
            stored = with_earlier_meanings(stored)
        compared_otherwise = ("epochs", "data") if kept.get("data") else ("epochs",)
        config = {name: value for name, value in stored.items() if name not in compared_otherwise}
        asked = {name: value for name, value in self.config.in_force().items() if name in config}
        changed, _ = changed_settings(config, asked)
        different = [f"its {name} is {there!r}, not {here!r}" for name, (there, here) in changed.items()]
        if data := changed_data(kept.get("data") or {}, self.data):
            different.append(f"its data are other ones: {data}")
        at, epochs = kept.get("epoch"), stored.get("epochs", self.config.epochs)
        if epochs != self.config.epochs and (self.config.schedule not in OPEN_ENDED or epochs > self.config.epochs):
            different.append(f"its epochs are {epochs}, not {self.config.epochs}")
        if at is not None and epoch is not None and at != epoch:
            different.append(f"it is of epoch {at}, not {epoch}")
        if different:
            raise ValueError(f"it is not of this run: {'; '.join(different)}")


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints of tensors and plain values, that replace the last one only when they are whole.

    Each of their records has a checksum, which is compared when they are read.

    Args:
        model: Tensors of the model that they are to be of, by name; by default that is not looked at.
        owner: The run that they are to be of; by default that is not looked at.
    """

    def __init__(self, model: Mapping[str, Tensor] | None = None, owner: Owner | None = None) -> None:
        self.model = model
        self.owner = owner

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; raises OSError if it cannot be written."""
        write_whole(Path(path), partial(_save, checkpoint))

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint, and execute nothing of it.

        Raises:
            ValueError: It is truncated, damaged, foreign, of a newer format, of another run or epoch than its place and
                name say, or of another model, as the message says.
        """
        path = Path(path)
        try:
            found = _read(path)
            if self.owner is not None:
                number = path.stem.removeprefix("epoch")
                self.owner.check(found[PROVENANCE], int(number) if number.isdecimal() else None)
            if self.model is not None:
                _check_model(found["state_dict"], self.model)
        except ValueError as error:
            raise ValueError(
                f"checkpoint {str(path)!r} cannot be read: {error}; delete it to start that run again"
            ) from error
        return found


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # torch itself would not say why a write failed
        torch.save(checkpoint, file)


def _read(path: Path) -> dict[str, Any]:
    check_zip(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds other things than tensors and plain values, which are not executed") from error
    except Exception as error:  # what is not as torch wrote it fails in many ways
        raise ValueError(f"it is no checkpoint ({_first_line(error)})") from error
    if not isinstance(found, dict) or not {"state_dict", "loops", "epoch"} <= set(found):
        raise ValueError("it is foreign: no run of the laboratory wrote it")
    kept = found.setdefault(PROVENANCE, {})
    sound = (
        isinstance(kept, dict) and isinstance(kept.get("config", {}), dict) and isinstance(found["state_dict"], dict)
    )
    if not sound or not all(isinstance(number, int) for number in (kept.get("format_version", 0), found["epoch"])):
        raise ValueError("it is foreign: what it says of itself is not what the laboratory writes")
    if kept.get("format_version", 0) > FORMAT:
        raise ValueError(
            f"it is of format {kept['format_version']}, written by neuralcollapse {kept.get('package_version')}, and "
            f"this version reads up to {FORMAT}: install a newer one"
        )
    return found


def check_zip(path: Path) -> None:
    """Check that each record of a file written by torch is as it was written, by its checksum.

    Raises:
        ValueError: if it is truncated or damaged, or holds compressed records, which torch does not write.
        OSError: if it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    try:
        with zipfile.ZipFile(path) as records:
            compressed = next((one.filename for one in records.infolist() if one.compress_type), None)
            damaged = None if compressed is not None else records.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"it is truncated, or no checkpoint ({error})") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place in the file that its directory names, and that there is not
            raise
        raise ValueError("it is damaged: its directory is not that of its records") from error
    except Exception as error:  # a damaged directory fails in many ways
        raise ValueError(f"it is damaged ({_first_line(error)})") from error
    if compressed is not None:
        raise ValueError(f"it is damaged, or no checkpoint: its record {compressed} is compressed")
    if damaged is not None:
        raise ValueError(f"it is damaged: its record {damaged} does not have the checksum that it was written with")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_model(found: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in one.items()} for one in (found, model)]
    names = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    if names:
        there, here = (one.get(names[0], "missing") for one in shapes)
        more = f", and {len(names) - 1} more differ" if len(names) > 1 else ""
        raise ValueError(
            f"it is of another model than settings and data ask for: {names[0]} is {there}, not {here}{more}"
        )
