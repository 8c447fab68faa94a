"""Checkpoints of a run: files of tensors and plain values, from which training resumes bit for bit."""

from __future__ import annotations

import errno
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.results.files import write_whole
from neuralcollapse.lab.results.formats import with_earlier_meanings
from neuralcollapse.lab.results.resuming import OPEN_ENDED, changed_data, changed_settings
from neuralcollapse.lab.untrusted import without_secrets

# Number of the format that is written. Checkpoints of format 1, written by the Trainer of lightning, can be measured.
FORMAT = 2
# Entry that identifies the run of a checkpoint.
PROVENANCE = "neuralcollapse"


@dataclass(frozen=True)
class CheckpointFiles:
    """Reader and writer of the checkpoints of one run.

    Attributes:
        config: Settings of the run.
        fingerprint: Fingerprint of the data of the run.
    """

    config: RunConfig
    fingerprint: Mapping[str, Any]

    def save(self, path: Path, *, epoch: int, batches: int | None, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; an earlier one is replaced only after the new file is complete.

        Args:
            path: The file.
            epoch: Epoch of training, counted from 1.
            batches: Number of completed batches of the epoch; None if the epoch is complete.
            state: Values to save by name: ``"state_dict"``, and other values that training needs to resume.

        Raises:
            OSError: if the file cannot be written.
        """
        provenance = {
            "format_version": FORMAT,
            "package_version": version("neuralcollapse"),
            "config": without_secrets(self.config.in_force()),
            "seed": self.config.seed,
            "data": dict(self.fingerprint),
            "epoch": epoch,
        }
        if batches is not None:
            provenance["batches"] = batches

        def write(partial: Path) -> None:
            with partial.open("wb") as file:  # torch itself would not report why a write failed
                torch.save({PROVENANCE: provenance, **state}, file)

        write_whole(path, write)

    def load(self, path: Path, *, resumed: nn.Module | None = None) -> dict[str, Any]:
        """Read a checkpoint without executing code from it.

        Args:
            path: The file; a name such as ``epoch0003.ckpt`` determines the epoch that it must have.
            resumed: The model whose training shall resume from the checkpoint, if any.

        Raises:
            ValueError: if the file is truncated, damaged or not a checkpoint of the laboratory, or belongs to another
                format, run, epoch or model.
        """
        try:
            checkpoint = _read(path)
            provenance, number = checkpoint[PROVENANCE], path.stem.removeprefix("epoch")
            self._check_run(provenance, int(number) if number.isdecimal() else None)
            if resumed is not None and provenance["format_version"] < FORMAT:
                raise ValueError(
                    f"it is of format {provenance['format_version']}, written by an earlier version, and can be "
                    "measured but not resumed"
                )
            if resumed is not None:
                _check_model(checkpoint["state_dict"], resumed.state_dict())
        except ValueError as error:
            raise ValueError(
                f"checkpoint {str(path)!r} cannot be read: {error}; delete it to start that run again"
            ) from error
        return checkpoint

    def _check_run(self, provenance: Mapping[str, Any], epoch: int | None) -> None:
        """Check that a checkpoint belongs to this run, and to the epoch in its name, if any."""
        stored: Mapping[str, Any] = provenance.get("config", {})
        fingerprint = provenance.get("data")
        # The checkpoint may be from an earlier version, in which some settings had other meanings or names.
        stored = with_earlier_meanings(stored, 2 if fingerprint else 1)
        compared_otherwise = ("epochs", "data") if fingerprint else ("epochs",)
        compared = {name: value for name, value in stored.items() if name not in compared_otherwise}
        asked = {name: value for name, value in self.config.in_force().items() if name in compared}
        changed, _ = changed_settings(compared, asked)
        different = [f"its {name} is {was!r}, not {now!r}" for name, (was, now) in changed.items()]
        if data := changed_data(fingerprint or {}, self.fingerprint):
            different.append(f"its data are different: {data}")
        at, epochs = provenance.get("epoch"), stored.get("epochs", self.config.epochs)
        if epochs != self.config.epochs and (self.config.schedule not in OPEN_ENDED or epochs > self.config.epochs):
            different.append(f"its epochs are {epochs}, not {self.config.epochs}")
        if at is not None and epoch is not None and at != epoch:
            different.append(f"it is of epoch {at}, not {epoch}")
        if different:
            raise ValueError(f"it is not of this run: {'; '.join(different)}")


def _read(path: Path) -> dict[str, Any]:
    check_zip(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it contains objects other than tensors and plain values, which are not loaded") from error
    except Exception as error:  # files that were not written by torch fail in many ways
        raise ValueError(f"it is not a checkpoint ({_first_line(error)})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError("it is not a checkpoint of a run of the laboratory")
    provenance = checkpoint.get(PROVENANCE)
    if provenance is None and {"loops", "epoch"} <= set(checkpoint):
        raise ValueError("it has an unreleased format")
    if provenance is None:
        raise ValueError("it is not a checkpoint of a run of the laboratory")
    is_sound = (
        isinstance(provenance, dict)
        and isinstance(provenance.get("config", {}), dict)
        and isinstance(checkpoint["state_dict"], dict)
        and all(isinstance(provenance.get(name), int) for name in ("format_version", "epoch"))
    )
    if not is_sound:
        raise ValueError("it is not a checkpoint of a run of the laboratory: its provenance is invalid")
    if provenance["format_version"] > FORMAT:
        raise ValueError(
            f"it is of format {provenance['format_version']}, written by neuralcollapse "
            f"{provenance.get('package_version')}, but this version reads up to {FORMAT}: install a newer version"
        )
    return checkpoint


def check_zip(path: Path) -> None:
    """Check that each record of a file written by torch matches its checksum.

    Raises:
        ValueError: if the file is truncated or damaged, or contains compressed records, which torch does not write.
        OSError: if the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    try:
        with zipfile.ZipFile(path) as records:
            compressed = next((record.filename for record in records.infolist() if record.compress_type), None)
            damaged = None if compressed is not None else records.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"it is truncated, or not a checkpoint ({error})") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: the directory refers to a position outside the file
            raise
        raise ValueError("it is damaged: its directory does not match its records") from error
    except Exception as error:  # damaged directories fail in many ways
        raise ValueError(f"it is damaged ({_first_line(error)})") from error
    if compressed is not None:
        raise ValueError(f"it is damaged, or not a checkpoint: its record {compressed} is compressed")
    if damaged is not None:
        raise ValueError(f"it is damaged: its record {damaged} does not match its checksum")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_model(stored: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (stored, model)]
    names = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    if names:
        was, expected = (of_file.get(names[0], "missing") for of_file in shapes)
        more = f", and {len(names) - 1} more differ" if len(names) > 1 else ""
        raise ValueError(f"its model does not match settings and data: {names[0]} is {was}, not {expected}{more}")


def generator_states(ranks: int) -> list[list[Tensor]]:
    """Return the states of the random generators of each rank: that of the CPU, then those of cuda."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
    gathered: list[Any] = [states]
    if ranks > 1:
        gathered = [None] * ranks
        torch.distributed.all_gather_object(gathered, states)
    return gathered


def set_generator_states(states: list[list[Tensor]], rank: int) -> None:
    """Set the states of the random generators of this rank, if a checkpoint contains them."""
    if rank < len(states):
        of_cpu, *of_cuda = states[rank]
        torch.set_rng_state(of_cpu)
        torch.cuda.set_rng_state_all(of_cuda[: torch.cuda.device_count()])
