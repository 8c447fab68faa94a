"""Train every method with every seed: the command ``neuralcollapse compare``."""

from __future__ import annotations

from pathlib import Path

from neuralcollapse.lab.config import CompareConfig
from neuralcollapse.lab.figures.summary import Report, report_comparison
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.training.logs import ProgressBar, progress_bar
from neuralcollapse.lab.training.many_runs import prepare
from neuralcollapse.lab.training.one_run import train


def compare(
    config: CompareConfig, out: Path, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> Report:
    """Train every method with every seed, from the same weights and the same batches for each seed.

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
    models = [config.run(method, 0) for method in config.method_names]
    data, evaluation = prepare(config, models, folder, resume=resume, overwrite=overwrite, progress=progress)
    runs = [(method, seed) for seed in range(config.seeds) for method in config.method_names]
    with progress_bar(shown=progress) as bar:
        for position, (method, seed) in enumerate(runs):
            run_config, run_folder = config.run(method, seed), folder.run(method, seed)
            run_folder.open(run_config, resume=True)
            shown = ProgressBar(bar, f"{method} seed {seed}", position, len(runs))
            try:
                train(run_config, data, evaluation, run_folder, shown)
            except ValueError as error:
                raise ValueError(f"{method} seed {seed}: {error}") from error
    return report_comparison(config, folder, f"{config.backbone} on {data}")
