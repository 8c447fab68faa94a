"""Settings of the commands `ufm` and `landscape`."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from neuralcollapse.lab.config import PUBLISHED_METHODS, AtLeast1, AtLeast2, Positive, PublishedMethod, Seed
from neuralcollapse.lab.settings import Default, Settings

OptimizerName = Literal["sgd", "agd"]


class UFMSettings(Settings):
    """Unconstrained features model."""

    classes: list[AtLeast2] = Field(default_factory=lambda: [10, 100, 200])
    """Sizes of the model: numbers of classes K. By default 10,100,200."""
    methods: list[PublishedMethod] = Field(default_factory=lambda: list(PUBLISHED_METHODS))
    """Methods to train. By default all."""
    optimizers: list[OptimizerName] = Field(default_factory=lambda: list(get_args(OptimizerName)))
    """Optimisers, each with every method. By default both."""
    seeds: AtLeast1 = 3
    """Number of seeds. For each seed, all methods and rates start from the same features."""
    samples_per_class: AtLeast1 | None = None
    """Number n of samples per class. By default 1000/K, at least 2 and at most 10."""
    feature_dim: AtLeast1 | None = None
    """Dimension d of the features, at least K - 1. By default the least power of two that is at least K and 64."""
    feature_norm: Literal["auto"] | Positive = 5.0
    """Norm of the features, by default the published one; auto computes it from K."""
    iterations: AtLeast1 | None = None
    """Number of steps, each with all samples. By default the published 2000, and 100 for more than 200 classes."""
    tuning_iterations: AtLeast1 | None = None
    """Number of steps after which the rate with the smallest loss is chosen. By default 100, and 20 for more than 200
    classes."""
    sgd_rates: list[Positive] = Field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3, 1.0])
    """Candidate learning rates of sgd, in units of the gradient of a single sample. By default 0.01,0.03,0.1,0.3,1."""
    agd_gains: list[Positive] = Field(default_factory=lambda: [3.0, 10.0, 30.0, 100.0, 300.0])
    """Candidate gains of agd. By default 3,10,30,100,300."""

    def check(self) -> None:
        """Check settings together."""
        super().check()
        for name in ("classes", "methods", "optimizers", "sgd_rates", "agd_gains"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must contain at least one value, all distinct, got {values}")
        for num_classes in self.classes:
            if self.feature_dim is not None and self.feature_dim < num_classes - 1:
                raise ValueError(f"feature_dim must be at least K - 1 = {num_classes - 1}, got {self.feature_dim}")


class LandscapeSettings(Settings):
    """Landscape."""

    num_classes: AtLeast2 = 6
    """K."""
    samples_per_class: AtLeast1 = 3
    """n."""
    feature_dim: Annotated[AtLeast1 | None, Default(lambda values: values["num_classes"])] = None
    """Dimension d of the features, at least K - 1. By default K."""
    weight_decay: Positive = 0.01
    """Decay of W. Its product with feature_decay must be less than 1/(K²n); otherwise the origin is the only critical
    point."""
    feature_decay: Positive = 0.01
    """Decay of H."""
    starts: Annotated[int, Field(ge=0)] = 20
    """Random starts."""
    seed: Seed = 0
    """Seed of the random starts, and of the directions out of saddles."""

    @property
    def title(self) -> str:
        """Sizes and decays of the model, for figures."""
        return (
            f"K = {self.num_classes}, n = {self.samples_per_class}, d = {self.feature_dim}, "
            f"λ_W = {self.weight_decay:g}, λ_H = {self.feature_decay:g}"
        )
