"""Losses of directions alone: features and class vectors on the unit sphere, at a temperature.

With u_i = h_i/‖h_i‖, ŵ_k = w_k/‖w_k‖ and s_ik = u_i·ŵ_k/t, a sample is told from the other classes by its row of s, and
a class vector from the other samples by its column. Rows and columns give the losses here; none has a bias.
`dot_regression` compares with no other class or sample, and keeps the norms.

All take features (..., d), targets (...) and a weight (K, d): what `Head.prepare` gives (without its bias), an
``nn.Linear``'s, or any other. They are computed in at least fp32, under autocast and for low-precision input as well,
and their value is of the precision they are computed in.

Under ``torch.distributed`` the batch is that of all ranks of the default process group, whatever its split: columns
are summed over the ranks, with gradient. Each rank's value is its share of the loss times the number of ranks, so that
the mean over ranks is the loss of the whole batch, and the mean of the gradients, which is what
DistributedDataParallel takes, is its gradient.
"""

from neuralcollapse.losses.functions import decoupled_cross_entropy, dot_regression, nonl, normface, ntce, two_way
from neuralcollapse.losses.modules import (
    DecoupledCrossEntropyLoss,
    DotRegressionLoss,
    NONLLoss,
    NormFaceLoss,
    NTCELoss,
    TwoWayLoss,
)

__all__ = [
    "DecoupledCrossEntropyLoss",
    "DotRegressionLoss",
    "NONLLoss",
    "NTCELoss",
    "NormFaceLoss",
    "TwoWayLoss",
    "decoupled_cross_entropy",
    "dot_regression",
    "nonl",
    "normface",
    "ntce",
    "two_way",
]
