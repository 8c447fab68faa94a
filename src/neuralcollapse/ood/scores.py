"""Out-of-distribution scores as functions of features and of fitted tensors; greater is more in-distribution.

"At collapse" means that every training feature h equals its class mean M_k, the deviations C_k = M_k − m from the mean
m of the class means form a simplex ETF, and W = cC (NC1, NC2, NC3). All scores are differentiable in the features.

Arguments of the functions:

- ``features``: h (N, d), the input of the weight of the classifier.
- ``weight``: W (K, d) of the classifier.
- ``bias``: b (K,) of the classifier, or None for 0.
- ``class_means``: M (K', d), of the classes with samples.
- ``center``: m (d,), the mean of all training features.
- ``temperature``: T > 0.
- ``whitening``: Matrix X (d, r) such that XXᵀ is the pseudoinverse of Σ_W, the within-class covariance.
- ``total_whitening``: Matrix X (d, r) such that XXᵀ is the pseudoinverse of Σ_T, the covariance of all training
  features.
- ``origin``: o = −W⁺b (d,).
- ``basis``: (d, r), orthonormal: for `neco` the leading principal directions P of the features, for `residual` and
  `vim` the other principal directions R.
- ``alpha``: α, the weight of the residual for `vim`, and of the norm for `nci`.
- ``shift``: (d,), subtracted from the features: their mean, or zero.
- ``scale``: (d,), divisor of the features: their standard deviations, or one.
- ``bank``: Unit training features (n, d).
- ``k``: Number of the neighbour, from 1 to n.

Each function returns scores (N,) and raises ``ValueError`` if a shape or type is wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from neuralcollapse._checks import check_at_least, check_shapes
from neuralcollapse.metrics.nc4 import nearest_class_mean

_TILE_ELEMENTS = 2**24  # maximum number of similarities between features and the bank in memory at a time


def msp(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Greatest softmax probability max_k p_k.

    At collapse it is 1/(1 + (K−1)e^{−g}) for every training sample, with the gap g = c‖C_k‖² K/(K−1) of the logits.
    Source: Hendrycks & Gimpel, ICLR 2017.

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> msp(torch.zeros(1, 2), torch.eye(2))
        tensor([0.5000])
    """
    return _logits(features, weight, bias).softmax(dim=1).amax(dim=1)


def maxlogit(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Greatest logit max_k (w_k·h + b_k).

    At collapse it is c‖C_k‖² for every training sample if b = −Wm. Source: Hendrycks et al., ICML 2022.

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> maxlogit(torch.tensor([[2.0, 1.0]]), torch.eye(2))
        tensor([2.])
    """
    return _logits(features, weight, bias).amax(dim=1)


def energy(features: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: Tensor | float = 1.0) -> Tensor:
    """Negative free energy T log Σ_k exp(z_k/T) of the logits z.

    At collapse it has the same value for every training sample: `maxlogit` + T log(1 + (K−1)e^{−g/T}), g as in `msp`.
    Source: Liu et al., NeurIPS 2020.

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> energy(torch.zeros(1, 2), torch.eye(2)).exp()
        tensor([2.])
    """
    return temperature * (_logits(features, weight, bias) / temperature).logsumexp(dim=1)


def mahalanobis(features: Tensor, class_means: Tensor, whitening: Tensor) -> Tensor:
    """Negative squared Mahalanobis distance −min_k (h − M_k)ᵀΣ_W⁺(h − M_k) to the nearest class mean.

    Σ_W⁺ is the pseudoinverse: directions without within-class variation are ignored. The score is invariant under
    invertible affine maps of the features. Near collapse, with a spread ε within classes, it is 0 at the class means
    and scales as −1/ε² elsewhere; for Σ_W = 0 it is undefined.
    Source: Lee et al., NeurIPS 2018.

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> mahalanobis(torch.tensor([[3.0, 1.0]]), torch.zeros(2, 2), torch.eye(2))
        tensor([-10.])
    """
    check_shapes(features=(features, "N d"), class_means=(class_means, "K d"), whitening=(whitening, "d r"))
    # The nearest mean is determined in the whitened space, where distances between far points lose digits. The distance
    # itself is computed from h − M_k, which is accurate even in deep collapse.
    center = class_means.mean(dim=0)
    nearest = nearest_class_mean((features - center) @ whitening, (class_means - center) @ whitening)
    return -((features - class_means[nearest]) @ whitening).square().sum(dim=1)


def relative_mahalanobis(
    features: Tensor, class_means: Tensor, whitening: Tensor, center: Tensor, total_whitening: Tensor
) -> Tensor:
    """Mahalanobis distance relative to that of one Gaussian of all classes, `mahalanobis` + (h − m)ᵀΣ_T⁺(h − m).

    Σ_T = Σ_W + Σ_k (n_k/N) C_kC_kᵀ is the covariance of all training features. Near collapse, the score differs from
    `mahalanobis` by at most N/n_k − 1 at the mean of class k; for Σ_W = 0 it is undefined.
    Source: Ren et al., 2021 (arXiv 2106.09022).

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> zero, one = torch.zeros(2, 2), torch.eye(2)
        >>> relative_mahalanobis(torch.tensor([[3.0, 1]]), zero, one, zero[0], one)
        tensor([0.])
    """
    check_shapes(features=(features, "N d"), center=(center, "d"), total_whitening=(total_whitening, "d q"))
    return mahalanobis(features, class_means, whitening) + ((features - center) @ total_whitening).square().sum(dim=1)


def residual(features: Tensor, origin: Tensor, basis: Tensor) -> Tensor:
    """Negative norm −‖Rᵀ(h − o)‖ outside the leading principal directions of the features about o = −W⁺b.

    At collapse it is 0 for training samples if the principal space has at least as many dimensions as the span of the
    vectors h − o, which has at most K.
    Source: Wang et al., CVPR 2022.

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> residual(torch.tensor([[3.0, 4.0]]), torch.zeros(2), torch.tensor([[0.0], [1.0]]))
        tensor([-4.])
    """
    check_shapes(features=(features, "N d"), origin=(origin, "d"), basis=(basis, "d r"))
    return -torch.linalg.vector_norm((features - origin) @ basis, dim=1)


def vim(
    features: Tensor, weight: Tensor, bias: Tensor | None, origin: Tensor, basis: Tensor, alpha: Tensor | float
) -> Tensor:
    """Virtual-logit matching: log Σ_k exp(z_k) − α‖Rᵀ(h − o)‖, from the logits z and the norm of `residual`.

    The score ranks inputs like the negative probability of the virtual logit α‖Rᵀ(h − o)‖ in a softmax together with z.
    The factor α is the mean greatest logit divided by the mean residual norm of the training samples. At collapse, the
    residual of training samples tends to 0 if the principal space is large enough, and α is undefined. Near collapse,
    the residual term dominates.
    Source: Wang et al., CVPR 2022.

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> vim(torch.zeros(1, 2), torch.eye(2), None, torch.tensor([0.0, 3]), torch.tensor([[0.0], [1]]), 0.5).exp()
        tensor([0.4463])
    """
    return energy(features, weight, bias) + alpha * residual(features, origin, basis)


def neco(
    features: Tensor,
    shift: Tensor,
    scale: Tensor,
    basis: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Share ‖Pᵀx‖/‖x‖ of a feature in the leading principal directions of the training features, x = (h − shift)/scale.

    If a weight is given, the share is multiplied by the greatest logit, as published for transformers. The share is at
    most 1; at collapse it is 1 for every training sample if x is standardised and P has K − 1 directions. It is NaN for
    x = 0. Source: Ammar et al., ICLR 2024 (NECO). The released code subtracts the mean of x in the numerator only,
    which changes the share of features that are not standardised.

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> neco(torch.tensor([[3.0, 4.0]]), torch.zeros(2), torch.ones(2), torch.tensor([[1.0], [0.0]]))
        tensor([0.6000])
    """
    check_shapes(features=(features, "N d"), shift=(shift, "d"), scale=(scale, "d"), basis=(basis, "d r"))
    rows = (features - shift) / scale
    share = torch.linalg.vector_norm(rows @ basis, dim=1) / torch.linalg.vector_norm(rows, dim=1)
    return share if weight is None else share * maxlogit(features, weight, bias)


def nci(features: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor, alpha: Tensor | float) -> Tensor:
    """Proximity to the weight vector of the predicted class k, w_k·(h − m)/‖h − m‖ + α‖h‖₁.

    At collapse the first term attains its maximum ‖w_k‖. The score is NaN for h = m.
    Source: Liu & Qin, CVPR 2025 (NCI).

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> nci(torch.tensor([[3.0, 0.0]]), 2 * torch.eye(2), None, torch.zeros(2), 0.1)
        tensor([2.3000])
    """
    check_shapes(features=(features, "N d"), weight=(weight, "K d"), center=(center, "d"))
    rows = weight[_logits(features, weight, bias).argmax(dim=1)]
    deviations = features - center
    proximity = (rows * deviations).sum(dim=1) / torch.linalg.vector_norm(deviations, dim=1)
    return proximity + alpha * features.abs().sum(dim=1)


def fdbd(features: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor) -> Tensor:
    """Mean distance to the decision boundaries of the predicted class k, relative to the distance from the mean.

    The score is the mean over l ≠ k of (z_k − z_l)/(‖w_k − w_l‖ ‖h − m‖), with the logits z. At collapse with b = −Wm
    it is √(K/(2(K−1))) for every training sample. It is infinite or NaN for h = m.
    Source: Liu & Qin, ICML 2024 (fDBD).

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> fdbd(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0], [-1, 0]]), None, torch.zeros(2))
        tensor([1.])
    """
    check_shapes(features=(features, "N d"), weight=(weight, "K d"), center=(center, "d"))
    logits = _logits(features, weight, bias)
    greatest, predictions = logits.max(dim=1, keepdim=True)
    gaps = greatest - logits
    # Distances are computed from differences of rows, because products lose digits if rows are similar.
    distances = torch.cdist(weight[predictions[:, 0]], weight, compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances.scatter(1, predictions, 1.0)  # the gap of the predicted class itself is 0
    mean = (gaps / distances).sum(dim=1) / (len(weight) - 1)
    return mean / torch.linalg.vector_norm(features - center, dim=1)


def ncm(features: Tensor, class_means: Tensor) -> Tensor:
    """Negative distance −min_k ‖h − M_k‖ to the nearest class mean.

    At collapse it is 0 for every training sample.
    Source: Mensink et al., TPAMI 2013 (the classifier).

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> ncm(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
        tensor([-5.])
    """
    nearest = nearest_class_mean(features, class_means)
    return -torch.linalg.vector_norm(features - class_means[nearest], dim=1)


def knn(features: Tensor, bank: Tensor, k: int) -> Tensor:
    """Negative distance of h/‖h‖ to its k-th nearest neighbour among unit training features.

    The score needs the training features themselves. At collapse it is 0 for every training sample whose class has at
    least k samples in the bank. It is NaN for h = 0.
    Source: Sun et al., ICML 2022.

    Arguments, result and errors: see `neuralcollapse.ood.scores`.

    Examples:
        >>> knn(torch.tensor([[2.0, 0.0]]), torch.eye(2), k=2) ** 2
        tensor([2.0000])
    """
    check_shapes(features=(features, "N d"), bank=(bank, "n d"))
    check_at_least("k", k, 1)
    if k > len(bank):
        raise ValueError(f"k must be at most the number of features in the bank, {len(bank)}, got {k}")
    rows = features / torch.linalg.vector_norm(features, dim=1, keepdim=True)
    step = max(1, _TILE_ELEMENTS // len(bank))
    neighbours = [(tile @ bank.T).topk(k, dim=1).indices[:, -1] for tile in rows.split(step)]
    return -torch.linalg.vector_norm(rows - bank[torch.cat(neighbours)], dim=1)


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    of_bias = {} if bias is None else {"bias": (bias, "K")}
    check_shapes(features=(features, "N d"), weight=(weight, "K d"), **of_bias)
    return linear(features, weight, bias)
