"""Classification losses of features and class vectors, and losses of features alone that control collapse.

With unit features u_i = h_i/‖h_i‖, unit class vectors ŵ_k = w_k/‖w_k‖ and scores s_ik = u_i·ŵ_k/t, the row of a sample
compares it with the classes, and the column of a class compares its vector with the samples. `normface` and
`decoupled_cross_entropy` use rows, `ntce` and `nonl` use columns, `bidirectional_nonl` and `two_way` use both. These
losses do not have a bias. `cross_entropy` does not normalise features and weight, and has a bias. `dot_regression` and
`center_loss` compare each feature only with the vector of its class, without normalisation. `variability`, `koleo` and
`supcon` do not need class vectors.

Common arguments, which are the outputs of `Head.prepare` without its bias, or the input and weight of an ``nn.Linear``:

- ``features``: h, floating, of shape (..., d).
- ``targets``: y, integers in [0, K) or ``ignore_index``, of shape (...).
- ``weight``: class vectors, floating, of shape (K, d) with K ≥ 2.
- ``temperature``: t > 0 (0.1 by default).
- ``margin``: m ≥ 0, subtracted from the positive score in the denominator, in units of s (1/t times a margin in terms
  of cosines). By default ``math.inf``, which leaves the positive score out of the denominator.
- ``class_weights``: (K,), at least 0. The mean over samples is weighted by that of each sample's class:
  Σ_i c_{y_i} ℓ_i / Σ_i c_{y_i}.
- ``prior``: π (K,), positive, in any unit: frequencies or numbers of samples. Logits become s_ik + τ log π_k, with
  π_k divided by their sum. This is logit adjustment (Menon et al., ICLR 2021), which for numbers of samples and τ = 1
  is the balanced softmax (Ren et al., NeurIPS 2020). The prior is used in training only: the classifier decides by
  s_ik. `ntce`, `nonl`, `dot_regression` and `center_loss` do not have this argument, because they do not compare
  classes.
- ``prior_scale``: τ ≥ 0 (1 by default).
- ``ignore_index``: samples with this target are left out of every sum and mean.

Every loss returns a scalar, which is 0 if all samples are left out. It raises ``ValueError`` if a setting is out of
range or a tensor has the wrong shape or dtype; on a CPU also if labels are out of range, or features or weight are not
finite. On accelerators, values are not checked, because that would require a device sync at every step. Losses are
computed in at least fp32, even under autocast and for low-precision input, and returned in the dtype of the
computation. Use ``functools.partial(two_way, margin=3.0)`` to fix settings for later calls.

Under ``torch.distributed``, the batch is that of all ranks of the default process group, regardless of how it is split:
columns are summed over the ranks, and features are gathered from all ranks, with gradient. Each rank returns its share
of the loss times the number of ranks, or the whole loss. Thus the mean over ranks is the loss of the whole batch, and
the mean of the gradients, which DistributedDataParallel computes, is its gradient.
"""

from __future__ import annotations

from neuralcollapse.losses.classification import (
    bidirectional_nonl,
    center_loss,
    cross_entropy,
    decoupled_cross_entropy,
    dot_regression,
    nonl,
    normface,
    ntce,
    two_way,
)
from neuralcollapse.losses.control import koleo, supcon, variability
from neuralcollapse.losses.regulariser import Regulariser, regularise

__all__ = [
    "Regulariser",
    "bidirectional_nonl",
    "center_loss",
    "cross_entropy",
    "decoupled_cross_entropy",
    "dot_regression",
    "koleo",
    "nonl",
    "normface",
    "ntce",
    "regularise",
    "supcon",
    "two_way",
    "variability",
]
