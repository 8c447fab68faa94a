"""Formats of run folders: conversion of the settings of earlier formats to current names and meanings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuralcollapse.lab.results.resuming import SETTINGS, check_types

# Number of the format that is written. Format 0, with settings and environment in one file, was never released. Before
# format 2, a fixed classifier had the canonical orientation, one-cycle did not change the momentum, and dot-regression
# was what is now dot-regression-published. Before format 3, options that now belong to one setting were separate
# settings; before format 4, so were those of schedules, the initialisation and batch_norm_affine.
FORMAT = 4


def settings_of_format(stored: Mapping[str, Any] | None, config: Path) -> dict[str, Any]:
    """Return the settings in the file of a run, in any format, with current names and meanings.

    Args:
        stored: Content of the file; None if it is not a mapping.
        config: The file.

    Raises:
        ValueError: if these are not the settings of a run, or their format is newer or was never released.
    """
    if stored is None or not {"format", "environment"} & set(stored):
        raise ValueError(f"{str(config)!r} must be the settings of a run, but is not; --overwrite starts it again")
    number, folder = stored.get("format", 0), str(config.parent)
    if not isinstance(number, int):
        raise ValueError(f"{str(config)!r} is damaged: format must be a number, got {number!r}")
    if number > FORMAT:
        raise ValueError(
            f"{folder!r} is a run of format {number}, but this version of neuralcollapse reads up to {FORMAT}: install "
            "a newer version"
        )
    if number < 1:
        raise ValueError(
            f"{folder!r} is a run of an unreleased format, {number}, but this version of neuralcollapse reads 1 to "
            f"{FORMAT}; --overwrite starts that run again"
        )
    settings = {name: value for name, value in stored.items() if name != "format"}
    check_types(settings, SETTINGS, f"{str(config)!r} is damaged")
    return with_earlier_meanings(settings, number)


def with_earlier_meanings(stored: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return settings of an earlier format with current names and meanings.

    Args:
        stored: The settings as stored.
        number: Number of their format.
    """
    settings = dict(stored)
    if number < 2:
        for name in ("loss", "losses"):
            settings = settings | {name: _renamed_loss(settings[name])} if settings.get(name) is not None else settings
        if {"fixed", "fixed-frame"} & {stored.get("method"), *(stored.get("methods") or [])}:
            settings.setdefault("orientation", "canonical")
        if stored.get("schedule") == "one-cycle" and stored.get("optimizer", "sgd") != "lbfgs":
            settings.setdefault("cycle_momentum", False)
    if number < 3:
        settings = _with_names_of_format_3(settings)
    return _with_options(settings, _OPTIONS_4) if number < 4 else settings


def _renamed_loss(value: Any) -> Any:
    """Return a loss, or a list of losses, with current names."""
    if isinstance(value, list):
        return [_renamed_loss(loss) for loss in value]
    return "dot-regression-published" if value == "dot-regression" else value


# Settings that are options since format 3, with the setting that contains them and their name in it.
_OPTIONS_3 = {
    **{name: ("data_options", name) for name in ("train_split", "test_split", "label_column", "table")},
    "data_config": ("data_options", "config"),
    **{name: ("augmentation", name) for name in ("crop_padding", "flip", "rotation")},
    **{
        name: ("schedule_options", name) for name in ("three_phase", "div_factor", "final_div_factor", "cycle_momentum")
    },
    "patch_size": ("backbone_options", "patch_size"),
    "gain": ("optimizer_options", "gain"),
    "lbfgs_history": ("optimizer_options", "history"),
    "lbfgs_iterations": ("optimizer_options", "iterations"),
}
# Settings that are options since format 4.
_OPTIONS_4 = {
    **{name: ("schedule_options", name) for name in ("warmup_epochs", "step_at", "lr_factor")},
    **{name: ("backbone_options", name) for name in ("initialisation", "batch_norm_affine")},
}
# Settings before format 3 that are items of `leave_out` now.
_LEFT_OUT = {"drop_unlabelled": "unlabelled", "drop_copies": "copies", "allow_absent_classes": "absent-classes"}


def _with_options(stored: Mapping[str, Any], options: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Return settings, of which some are now options of others; ``one_cycle`` is now ``schedule_options``."""
    settings = {name: value for name, value in stored.items() if name not in options}
    if "one_cycle" in settings:
        settings["schedule_options"] = settings.pop("one_cycle")
    for name, (holder, option) in options.items():
        if stored.get(name) is not None:
            present = settings.get(holder)
            settings[holder] = {**(present if isinstance(present, dict) else {}), option: stored[name]}
    return settings


def _with_names_of_format_3(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a format before 3 with the names of format 3."""
    settings = _with_options({name: value for name, value in stored.items() if value is not None}, _OPTIONS_3)
    left_out = [item for name, item in _LEFT_OUT.items() if settings.pop(name, False)]
    if left_out:
        settings["leave_out"] = left_out
    if "generator" in settings:
        settings["data_options"] = settings.pop("generator")
    if settings.pop("bidirectional", False):
        settings["loss"] = "bidirectional-nonl"
    if settings.pop("published_quirk", False):  # constant: its factor affects only the logged loss
        settings["feature_decay"] = "published"
    if settings.pop("unit_start", True) is False:
        settings["unit_weight"] = "published"
    if settings.pop("random_labels", False):
        settings["label_noise"] = "permuted"
    shape, factor = settings.get("imbalance"), settings.pop("imbalance_factor", 0.01)
    if isinstance(shape, str):
        settings["imbalance"] = None if shape == "none" else {shape: factor}
    classes, stratified = settings.pop("classes_per_batch", None), settings.pop("stratified", None)
    if classes is not None or stratified is not None:
        settings["sampling"] = classes or ("stratified" if stratified else "random")
    steps = {name: settings.pop(name) for name in ("milestones", "step_epochs") if name in settings}
    if settings.get("schedule") == "multistep":
        settings["schedule"] = "step"
    if steps:
        settings["step_at"] = next(iter(steps.values()))
    budget = settings.pop("memory_budget", None)
    if budget is not None and budget > 4:
        settings.setdefault("workers", "in-memory")
    every, last = settings.pop("measure_every", None), settings.pop("measure_last", True)
    first = settings.pop("measure_from", every)
    if every is not None:
        settings["measure_at"] = every if last and first == every else _epochs(every, first) + ["last"] * last
    every, chosen = settings.pop("checkpoint_every", None), settings.pop("checkpoint_epochs", [])
    first = settings.pop("checkpoint_from", every)
    if every is not None:
        settings["keep_at"] = every if first == every and not chosen else [*chosen, *_epochs(every, first)]
    elif chosen:
        settings["keep_at"] = chosen
    return settings


def _epochs(every: int, first: int) -> list[Any]:
    """Return the first epoch, and every ``every``-th epoch from ``first`` on."""
    return [*([1] if first > 1 else []), first, first + every, ".."]
