"""What the commands that train have in common, before and after."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import Namespace

from neuralcollapse.lab.results.folder import RunFolder


def stored_settings(
    settings: Namespace, given: dict[str, Any], out: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is asked for, and the settings to take where nothing is: of the run to go on with, if there is one.

    A file of settings of format 0 has some without effect: they count where they have one.
    """
    folder = RunFolder(out)
    if settings.get("resume") and folder.config.exists():
        return given, folder.settings()
    if settings.get("environment") is not None:
        return {}, given
    return given, None


def show_config(settings: dict[str, Any]) -> None:
    """Print settings as the YAML that `--config` takes."""
    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")


def finish(folder: RunFolder, command: str) -> None:
    """Write the table, the summary and the figures, and say so."""
    from neuralcollapse.lab.figures.summary import summarise

    summary = summarise(folder, command)
    print(f"\n{summary.table}\n\nwrote {summary.written[0]}")
    for path in summary.written[1:]:
        print(f"      {path}")
