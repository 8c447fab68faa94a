"""`neuralcollapse landscape`: critical points of the unconstrained features model."""

from __future__ import annotations

import sys
from itertools import chain
from typing import Annotated

from jsonargparse import ArgumentParser, Namespace
from pydantic import Field

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.arguments import add_output, asked_for
from neuralcollapse.lab.commands.common import output_folder, print_config, print_written
from neuralcollapse.lab.config import AtLeast1, AtLeast2, Positive, Seed
from neuralcollapse.lab.settings import Default, Settings


class Landscape(Settings):
    """Landscape."""

    num_classes: AtLeast2 = 6
    """K."""
    samples_per_class: AtLeast1 = 3
    """n."""
    feature_dim: Annotated[AtLeast1 | None, Default(lambda values: values["num_classes"])] = None
    """d, at least K - 1. By default K."""
    weight_decay: Positive = 0.01
    """Decay of W. Times feature_decay it must be less than 1/(K²n), for there to be more than the origin."""
    feature_decay: Positive = 0.01
    """Decay of H."""
    starts: Annotated[int, Field(ge=0)] = 20
    """Random starts."""
    seed: Seed = 0
    """Seed of the starts, and of the ways out of saddles."""

    @property
    def title(self) -> str:
        """The model, for figures."""
        return (
            f"K = {self.num_classes}, n = {self.samples_per_class}, d = {self.feature_dim}, "
            f"λ_W = {self.weight_decay:g}, λ_H = {self.feature_decay:g}"
        )


def _add_arguments(parser: ArgumentParser) -> None:
    add_output(parser, "runs/landscape")


def _run(settings: Namespace) -> None:
    """Find, classify, draw, and say what was written."""
    config = Landscape(**asked_for(settings, Landscape))
    if settings.get("print_config"):
        print_config(config.in_force())
        return
    if settings.get("resume"):
        raise ValueError("resume must not be given: landscape takes seconds, --overwrite starts it again")

    import torch  # seconds: not for a mistake in a flag
    from tqdm.auto import tqdm

    from neuralcollapse.heads import LearnedClassifier
    from neuralcollapse.lab.results.folder import RunFolder
    from neuralcollapse.lab.ufm.landscape import tabulate, write_landscape
    from neuralcollapse.ufm import UnconstrainedFeatures, origin_curvature, survey

    feature_dim = config.feature_dim or config.num_classes
    model = UnconstrainedFeatures(
        config.num_classes,
        config.samples_per_class,
        feature_dim,
        LearnedClassifier(feature_dim, config.num_classes),
        weight_decay=config.weight_decay,
        feature_decay=config.feature_decay,
    )
    generator = torch.Generator().manual_seed(config.seed)
    visits = survey(model, starts=config.starts, generator=generator)
    first = next(visits)  # what is wrong with the sizes shows here, before anything is deleted
    folder = RunFolder(output_folder(settings, "runs/landscape"))
    folder.check(config.in_force(), overwrite=bool(settings.get("overwrite")))
    groups = sum(config.num_classes % number == 0 for number in range(1, config.num_classes))
    total, quiet = config.starts + 2 * groups, not sys.stderr.isatty()
    bar = tqdm(chain([first], visits), total=total, unit="point", dynamic_ncols=True, disable=quiet)
    with folder.writing(config.in_force(), overwrite=bool(settings.get("overwrite")), reported=True):
        tables = tabulate(bar, generator)
        bound = origin_curvature(
            config.num_classes, config.samples_per_class, config.weight_decay, config.feature_decay
        )
        table, written = write_landscape(folder, tables, config.title, bound)
    print(f"\n{table}\n")
    print_written(written)


LANDSCAPE = Command(
    "Find critical points of the unconstrained features model with cross-entropy: descend from random starts, "
    "construct saddles, classify each by gradient and curvature, escape from every saddle; draw the edge of the "
    "Hessian's spectrum and the loss along the way out.",
    _add_arguments,
    _run,
    (Landscape,),
)
