"""Train one run: the command ``neuralcollapse train``."""

from __future__ import annotations

from pathlib import Path

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.figures.summary import Report, report_run
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.training.logs import ProgressBar, progress_bar
from neuralcollapse.lab.training.many_runs import prepare
from neuralcollapse.lab.training.one_run import train


def train_single(
    config: RunConfig, out: Path, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> Report:
    """Train one run, from a recipe's settings or any others.

    Args:
        config: All settings.
        out: The folder to write.
        resume: Go on with what the folder holds.
        overwrite: Delete what the folder holds.
        progress: Show progress bars.

    Raises:
        ValueError: Settings, data or a folder that cannot be used.
        KeyboardInterrupt: The user stopped it; it can be resumed.
    """
    folder = RunFolder(out)
    data, evaluation = prepare(config, [config], folder, resume=resume, overwrite=overwrite, progress=progress)
    with progress_bar(shown=progress) as bar:
        train(config, data, evaluation, folder, ProgressBar(bar, config.method))
    return report_run(config, folder, f"{config.backbone} on {data}")
