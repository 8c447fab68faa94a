"""Metrics of a measurement under the names and with the conventions of other libraries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from neuralcollapse.metrics.nc1 import nc1_cdnv, nc1_pinv, nc1_quotient
from neuralcollapse.metrics.nc2 import nc2_etf, nc2_hyperspherical
from neuralcollapse.metrics.nc3 import nc3_duality, nc3_uniform
from neuralcollapse.metrics.nc4 import nc5_ood
from neuralcollapse.metrics.undefined import MetricValues

if TYPE_CHECKING:
    from neuralcollapse.metrics.measurement import Measurement


@torch.no_grad()
def wu2024(measurement: Measurement) -> MetricValues:
    """Return the eleven metrics of the example of rhubarbwu/neural-collapse, and the reasons for undefined ones.

    With M (K, d) the class means, 0 for a class without samples, m = Σ_k M_k/K, C = M − m, Σ_W = S/N, Σ_B = CᵀC/K:

    - ``nc1_pinv``, ``nc1_svd``: tr(Σ_B† Σ_W)/K, which that library computes by two algorithms; ``nc1_quot``:
      tr Σ_W/tr Σ_B;
      ``nc1_cdnv``: mean over pairs of (v_k + v_l)/(2‖M_k − M_l‖²);
    - ``nc2_etf_err``: ‖CCᵀ/‖CCᵀ‖_F − (I − 11ᵀ/K)/√(K−1)‖_F; ``nc2g_dist``, ``nc2g_log``: population variance over pairs
      of r and −log r, r = ‖ĉ_k − ĉ_l‖;
    - ``nc3_dual_err``: ‖WCᵀ/‖WCᵀ‖_F − (I − 11ᵀ/K)/√(K−1)‖_F; ``nc3u_uni_dual``: unbiased variance of w_k·c_k;
    - ``nc4_agree``: share of samples whose nearest class mean is argmax_k (Wh)_k;
    - ``nc5_ood_dev``: mean over k of |cos(M_k, m_ood)|; here m_ood is the mean of all out-of-distribution samples, in
      that library the mean of their class means.
    """
    moments = measurement.moments.to("cpu")
    means, counts = moments.means.double(), moments.counts
    centred = means - means.mean(dim=0)
    within = moments.within_class_scatter.double() / counts.sum()
    variances = moments.within_class_trace.double() / counts.clamp(min=1)
    reason, undefined = "the formula has no finite value for the measured data", {}
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in (means, within, variances))
    values = dict.fromkeys(
        ("nc1_pinv", "nc1_svd", "nc1_quot", "nc1_cdnv", "nc2_etf_err", "nc2g_dist", "nc2g_log"), math.nan
    )
    if finite:
        pinv = float(nc1_pinv(within, centred))
        values |= {
            "nc1_pinv": pinv,
            "nc1_svd": pinv,
            "nc1_quot": float(nc1_quotient(within.trace(), centred)),
            "nc1_cdnv": float(nc1_cdnv(means, variances)),
            "nc2_etf_err": float(nc2_etf(centred)),
            "nc2g_dist": float(nc2_hyperspherical(centred, "dist")[1]),
            "nc2g_log": float(nc2_hyperspherical(centred, "log")[1]),
        }
    if len(weight := measurement.weight.double().cpu()):
        values["nc3_dual_err"] = float(nc3_duality(weight, centred)) if finite else math.nan
        values["nc3u_uni_dual"] = float(nc3_uniform(weight, centred)) if finite else math.nan
        if "nc4_ncc_mismatch" in measurement.metrics:
            values["nc4_agree"] = measurement.agreement_without_bias
            if measurement.absent_classes:
                values["nc4_agree"] = math.nan
                undefined["nc4_agree"] = "classes without samples would be treated as classes with mean 0"
    if "" in measurement.ood_means:
        values["nc5_ood_dev"] = float(nc5_ood(means, measurement.ood_means[""].double().cpu()))
    infinite = [name for name, value in values.items() if not math.isfinite(value)]
    undefined = {name: undefined.get(name, reason) for name in infinite}
    return MetricValues({name: math.nan if name in undefined else value for name, value in values.items()}, undefined)
