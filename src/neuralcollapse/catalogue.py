"""Catalogue of metrics: their computation, and their presentation in figures, tables and documentation.

Importing this module imports neither torch nor matplotlib. Symbols: K classes, d dimensions, N samples, n_k samples of
class k; W (K, d) the weight of the classifier, b its bias, M (K, d) class means, m the centre, C = M − m, h a feature,
Σ_W = S/N the pooled within-class covariance, Σ_B = CᵀC/K, v_k the mean of ‖h − M_k‖² over class k,
T = (I − 11ᵀ/K)/√(K − 1).

To add a metric, write its function in a module of `neuralcollapse.metrics`, and add an entry here that names the
function and its inputs. A module that has all inputs of an entry computes the metric:

- metrics of class moments (`neuralcollapse.metrics.collapse`): class_means, centred_means, center, counts,
  within_class_trace, within_class_variances, within_class_covariance, spectrum (of Σ_B) and, if available,
  class_scatter, weight, bias, code and ood_mean;
- metrics of single samples (`neuralcollapse.metrics.samples`): features, targets, predictions, weight, center and
  class_means for each sample; unit_class_sums, present_weight and entropies over all samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

Value = TypeVar("Value")
Center = Literal["any", "classes", "balanced"]

# Conditions under which metrics with each input are undefined; `neuralcollapse.metrics.undefined` evaluates them.
_CONDITIONS = {
    "class_means": ("range",),
    "center": ("range",),
    "centred_means": ("one class", "range", "constant features", "equal means"),
    "within_class_trace": ("range of squares",),
    "within_class_variances": ("range of squares",),
    "within_class_covariance": ("range of squares", "pooled scatter"),
    "class_scatter": ("one class", "range", "range of squares", "constant features"),
    "weight": ("one class",),
    "code": ("equal rows of the code",),
    "ood_mean": ("one class", "zero ood mean"),
    "features": ("one class", "no sample of a measured class"),
    "unit_class_sums": ("one class", "no sample of a measured class"),
    "entropies": ("one class", "no sample of a measured class"),
}


@dataclass(frozen=True)
class OfClasses:
    """Number that depends on the number of classes K, with its formula."""

    formula: str
    function: Callable[[int], float]

    def __call__(self, num_classes: int) -> float:
        return self.function(num_classes)


@dataclass(frozen=True)
class Metric:
    """Definition of a metric.

    Attributes:
        name: Key under which the metric is returned and written.
        label: Words and symbols for an axis of a figure, with mathematics in the syntax of matplotlib.
        group: NC0 to NC5, ``"accuracy"`` or ``"other"``.
        formula: Definition in plain characters.
        range: Minimum and maximum.
        at_collapse: Value at perfect collapse: a number, a function of K, or None if it is not defined.
        scale: Suitable scale of an axis; ``"percent"`` for shares.
        better: Direction of collapse (or of a better classifier), or None.
        source: First publication.
        cost: Order of the work after the moments, or other requirements.
        center: Centre for which an exact ETF with unequal n_k has the value at collapse; ``"balanced"`` if there is no
            such centre.
        function: ``"MODULE.FUNCTION"`` in `neuralcollapse.metrics`, looked up when the metric is computed; empty for
            accuracies and distances to ETFs.
        inputs: Names of the arguments of the function, in their order.
        over: Values of which the metric is a statistic. Empty: the function returns the metric itself. ``"pairs"``: it
            returns a value for each pair of rows of the first input, given as a `PairTile`. ``"samples"``: it returns a
            value for each sample.
        statistic: Statistic of the values over pairs or samples; ``"class mean"`` averages over samples, then classes.
        undefined_if: Conditions under which the metric is undefined, in addition to those of its inputs.
        optional: Computed only with ``MeasureOptions(information=True)``.
    """

    name: str
    label: str
    group: str
    formula: str
    range: tuple[float, float | OfClasses]
    at_collapse: float | OfClasses | None
    scale: Literal["log", "linear", "percent"]
    better: Literal["lower", "higher"] | None
    source: str
    cost: str = "Kd"
    center: Center = "any"
    function: str = ""
    inputs: tuple[str, ...] = ()
    over: Literal["", "pairs", "samples"] = ""
    statistic: Literal["mean", "variance", "std", "class mean"] = "mean"
    undefined_if: tuple[str, ...] = ()
    optional: bool = False

    @property
    def conditions(self) -> set[str]:
        """Conditions under which the metric is undefined."""
        return {"no sample", *self.undefined_if}.union(*(_CONDITIONS.get(name, ()) for name in self.inputs))

    @property
    def of_samples(self) -> bool:
        """True if the metric cannot be computed from class moments without per-class scatter."""
        return bool({"features", "unit_class_sums", "entropies", "class_scatter"} & {*self.inputs})

    def value_at_collapse(self, num_classes: int) -> float | None:
        """Return the value at perfect collapse of K classes, or None if it is not defined.

        Examples:
            >>> METRICS["nc2_cos_margin"].value_at_collapse(5)
            1.25
        """
        value = self.at_collapse(num_classes) if isinstance(self.at_collapse, OfClasses) else self.at_collapse
        return None if value is None or math.isnan(value) else value


PAPYAN = "Papyan, Han & Donoho 2020"
ZHU = "Zhu et al. 2021"
MARKOU = "Markou, Ajanthan & Gould 2024"
UNIFORMITY = "Liu et al. 2023; Wu & Papyan 2024"
WU = "Wu & Papyan 2024"
GALANTI = "Galanti, Galanti & Ben-Shaul 2022"
ZHOU = "Zhou et al. 2022"
KOROMILAS = "Koromilas et al. 2026"
SONG = "Song et al. 2024"

_MARGIN = OfClasses("K/(K−1)", lambda k: k / (k - 1))
_ROOT_K = OfClasses("√K", math.sqrt)
_SPREAD_OF_COSINES = OfClasses("≈1", lambda k: math.sqrt(k * (k - 1) / (k * (k - 1) - 1)))
_SIMPLEX_DISTANCE = OfClasses("√(2K/(K−1))", lambda k: math.sqrt(2 * k / (k - 1)))
_SIMPLEX_LOG = OfClasses("−½log(2K/(K−1))", lambda k: -0.5 * math.log(2 * k / (k - 1)))
_SIMPLEX_RIESZ = OfClasses("√((K−1)/2K)", lambda k: math.sqrt((k - 1) / (2 * k)))
_CLASSES = OfClasses("K", float)
_OTHERS = OfClasses("K−1", lambda k: k - 1)
_INF = math.inf


def _shared_information(num_classes: int) -> float:
    """Return MIR at balanced collapse to a simplex ETF; NaN for two classes, whose entropy is 0."""
    if num_classes == 2:
        return math.nan
    others = num_classes - 1
    return 1 / others + (others - 1) * math.log(others - 1) / (others * math.log(others))


_SHARED = OfClasses("1/(K−1) + (K−2)log(K−2)/((K−1)log(K−1))", _shared_information)


def _of_means_and_weights(template: Metric) -> list[Metric]:
    """Return the entries of an NC2 metric of rows x_k of X, for the centred class means C and for the weight W."""
    of_means: dict[str, Any] = {"center": "classes", "inputs": ("centred_means",)}
    of_weights: dict[str, Any] = {"inputs": ("weight",), "undefined_if": ("zero weight",)}
    if template.over == "pairs":
        of_means["undefined_if"] = ("mean at the centre",)
        of_weights["undefined_if"] += ("zero row of the weight",)
    return [
        replace(
            template,
            name=f"{template.name}_{vectors}",
            label=template.label.replace("  $", f" of {vectors}  $").replace("X", symbol).replace("x", symbol.lower()),
            formula=template.formula.replace("X", symbol).replace("x", symbol.lower()),
            **fields,
        )
        for vectors, symbol, fields in (("means", "C", of_means), ("weights", "W", of_weights))
    ]


def _of_kernel(
    kernel: str, symbols: str, formula: str, lowest: float, upper: float, at_collapse: OfClasses
) -> list[Metric]:
    """Return the entries of mean and variance over pairs of a kernel of the distance r between unit centred means."""
    better: Literal["lower", "higher"] = "higher" if kernel == "dist" else "lower"
    conditions = ("mean at the centre", *(() if kernel == "dist" else ("equal directions",)))
    shared: tuple[str, str, Center, str, tuple[str], Literal["pairs"]]
    shared = (UNIFORMITY, "K²d (pairs)", "classes", f"nc2.kernel_{kernel}", ("centred_means",), "pairs")
    return [
        Metric(f"nc2_hyperspherical_{kernel}_mean", f"uniformity: mean of ${symbols}$", "NC2",
               f"mean over pairs of {formula}, r = ‖ĉ_k − ĉ_l‖", (lowest, upper), at_collapse, "linear", better,
               *shared, "mean", conditions),
        Metric(f"nc2_hyperspherical_{kernel}_variance", f"uniformity: variance of ${symbols}$", "NC2",
               f"variance over pairs of {formula}", (0, 1 if kernel == "dist" else _INF), 0, "linear", "lower",
               *shared, "variance", conditions),
    ]  # fmt: skip


def _etf_distance(name: str, words: str, symbols: str, formula: str, upper: float, at_collapse: float | None) -> Metric:
    """Return the entry of a squared distance between matrices of unit Frobenius norm; E(X) is the nearest ETF."""
    better: Literal["lower"] | None = None if at_collapse is None else "lower"
    return Metric(name, f"{words}  ${symbols}$", "other", formula, (0, upper), at_collapse, "linear", better, MARKOU,
                  "nearest ETF", "classes" if "C" in formula else "any", undefined_if=("equal rows",))  # fmt: skip


_SAMPLE = ("features", "targets", "weight", "center")
_CENTRED = ("constant features", "mean row of the weight", "sample at the centre")
_SPHERE = ("zero feature", "zero row of the weight")
_MISMATCH = ("constant features", "equal means")

_ALL = [
    Metric("nc0_weight_sum", r"sum of weights  $\|\sum_k w_k\|/\|W\|_F$", "NC0", "‖Σ_k w_k‖₂/‖W‖_F", (0, _ROOT_K), 0,
           "linear", "lower", "NC0 of arXiv 2602.16642, made scale-free",
           function="nc2.nc0_weight_sum", inputs=("weight",), undefined_if=("zero weight",)),
    Metric("nc1_pinv", r"variability  $\mathrm{tr}(\Sigma_W\Sigma_B^\dagger)/K$", "NC1", "tr(Σ_W Σ_B†)/K", (0, _INF), 0,
           "log", "lower", f"{PAPYAN} (Fig. 6)", "SVD of C",
           function="nc1.nc1_pinv", inputs=("within_class_covariance", "centred_means", "spectrum"),
           undefined_if=("no spread",)),
    Metric("nc1_quotient", r"variability  $\mathrm{tr}\,\Sigma_W\,/\,\mathrm{tr}\,\Sigma_B$", "NC1", "tr Σ_W / tr Σ_B",
           (0, _INF), 0, "log", "lower", "Tirer, Huang & Niles-Weed 2023",
           function="nc1.nc1_quotient", inputs=("within_class_trace", "centred_means"), undefined_if=("no spread",)),
    Metric("nc1_cdnv", r"CDNV  $(v_k+v_l)\,/\,2\|M_k-M_l\|^2$", "NC1", "mean over pairs of (v_k + v_l)/(2‖M_k − M_l‖²)",
           (0, _INF), 0, "log", "lower", "Galanti, György & Hutter 2021", "K²d (pairs)",
           function="nc1.cdnv", inputs=("centred_means", "within_class_variances"), over="pairs",
           undefined_if=("no spread", "equal mean of two classes")),
    Metric("nc1_vci", r"VCI  $1-\mathrm{tr}((\Sigma_W+\Sigma_B)^\dagger\Sigma_B)/r$", "NC1",
           "1 − tr((Σ_W + Σ_B)†Σ_B)/r, r = min(d, K−1)", (0, 1), 0, "log", "lower", "Xu & Liu 2023", "SVD of C, d³",
           function="nc1.nc1_vci", inputs=("within_class_covariance", "centred_means", "spectrum"),
           undefined_if=("no spread",)),
    Metric("nc1_numerical_rank", r"numerical rank  $(\|H_k\|_*/\|H_k\|_F)^2$", "NC1",
           "mean over k of (‖H_k‖_*/‖H_k‖_F)², H_k the features of class k", (1, _INF), 1, "linear", "lower", ZHOU,
           "N·d·min(n_k, d)",
           function="nc1.nc1_numerical_rank", inputs=("class_scatter", "class_means", "counts"),
           undefined_if=("no spread", "zero features of a class")),
    *_of_means_and_weights(Metric(
        "nc2_etf", r"Gram  $\|XX^\top/\|XX^\top\|_F-T\|_F$", "NC2", "‖XXᵀ/‖XXᵀ‖_F − T‖_F", (0, 2), 0, "linear", "lower",
        f"{ZHU} (NC2)", "Kd·min(K, d)", function="nc2.nc2_etf")),
    Metric("nc2_gram_means", r"means to a Gram  $\|CC^\top/\|CC^\top\|_F-\hat G\|_F$", "NC2",
           "‖CCᵀ/‖CCᵀ‖_F − G/‖G‖_F‖_F, C, G centred over classes", (0, 2), 0, "linear", "lower",
           f"{ZHU} (NC2), of a given Gram", "Kd·min(K, d)", function="nc2.nc2_gram", inputs=("centred_means", "code")),
    Metric("nc2_gram_weights", r"weights to a Gram  $\|WW^\top/\|WW^\top\|_F-\hat G\|_F$", "NC2",
           "‖WWᵀ/‖WWᵀ‖_F − G/‖G‖_F‖_F, W, G centred over classes", (0, 2), 0, "linear", "lower",
           f"{ZHU} (NC2), of a given Gram", "Kd·min(K, d)", function="nc2.nc2_gram", inputs=("weight", "code"),
           undefined_if=("zero weight", "equal rows of the weight")),
    *_of_means_and_weights(Metric(
        "nc2_equinorm", r"norms  $\mathrm{std}\|x_k\|\,/\,\mathrm{mean}\|x_k\|$", "NC2", "std/mean over k of ‖x_k‖",
        (0, _ROOT_K), 0, "linear", "lower", f"{PAPYAN} (Fig. 2)", function="nc2.nc2_equinorm")),
    Metric("nc2_equinorm_difference", "norms: means against weights", "NC2", "abs(equinorm of C − equinorm of W)",
           (0, _ROOT_K), 0, "linear", "lower", MARKOU, "Kd", "classes",
           "nc2.nc2_equinorm_difference", ("centred_means", "weight"), undefined_if=("zero weight",)),
    *_of_means_and_weights(Metric(
        "nc2_equiangular", r"angles  $\mathrm{std}\,\cos(x_k,x_l)$", "NC2", "std over k ≠ l of cos(x_k, x_l)",
        (0, _SPREAD_OF_COSINES), 0, "linear", "lower", f"{PAPYAN} (Fig. 3)", "K²d (pairs)", function="nc2.cosines",
        over="pairs", statistic="std")),
    *_of_means_and_weights(Metric(
        "nc2_max_angle", r"angles  $|\cos(x_k,x_l)+\frac{1}{K-1}|$", "NC2",
        "mean over pairs of abs(cos(x_k, x_l) + 1/(K−1))", (0, _MARGIN), 0, "linear", "lower", f"{PAPYAN} (Fig. 4)",
        "K²d (pairs)", function="nc2.distance_to_max_angle", over="pairs")),
    *_of_kernel("dist", "r", "r", 0, 2, _SIMPLEX_DISTANCE),
    *_of_kernel("log", r"-\log r", "−log r", -math.log(2), _INF, _SIMPLEX_LOG),
    *_of_kernel("riesz", "1/r", "1/r", 0.5, _INF, _SIMPLEX_RIESZ),
    Metric("nc2_cos_margin", r"cosine margin  $\cos(h,w_y)-\max_{k\neq y}\cos(h,w_k)$", "NC2",
           "mean over samples of cos(h−m, w_y−w̄) − max over k≠y of cos(h−m, w_k−w̄)", (-2, 2), _MARGIN, "linear",
           "higher", ZHOU, "NKd (samples)", "classes", "nc2.cos_margins", _SAMPLE, "samples", undefined_if=_CENTRED),
    Metric("nc3_duality", r"duality  $\|WC^\top/\|WC^\top\|_F-T\|_F$", "NC3", "‖WCᵀ/‖WCᵀ‖_F − T‖_F", (0, 2), 0,
           "linear", "lower", f"{ZHU} (NC3)", "Kd·min(K, d)", "classes",
           "nc3.nc3_duality", ("weight", "centred_means"), undefined_if=("zero weight",)),
    Metric("nc3_gram_duality", r"duality to a Gram  $\|WC^\top/\|WC^\top\|_F-\hat G\|_F$", "NC3",
           "‖WCᵀ/‖WCᵀ‖_F − G/‖G‖_F‖_F, all centred over classes", (0, 2), 0, "linear", "lower",
           f"{ZHU} (NC3), of a given Gram", "Kd·min(K, d)", function="nc3.nc3_gram_duality",
           inputs=("weight", "centred_means", "code"), undefined_if=("zero weight", "equal rows of the weight")),
    Metric("nc3_distance", r"means to weights  $\|\hat W-\hat C\|_F^2$", "NC3", "‖W/‖W‖_F − C/‖C‖_F‖_F²", (0, 4), 0,
           "linear", "lower", f"{PAPYAN} (Fig. 5)", "Kd", "classes",
           "nc3.nc3_distance", ("weight", "centred_means"), undefined_if=("zero weight",)),
    Metric("nc3_uniform", r"uniform duality  $\mathrm{var}_k\,w_k\cdot c_k$", "NC3", "variance over k of w_k·c_k",
           (0, _INF), 0, "linear", "lower", f"{WU} (UNC3)", "Kd", "classes",
           "nc3.nc3_uniform", ("weight", "centred_means"), undefined_if=("zero weight",)),
    Metric("nc3_uniform_cos", r"uniform duality  $\mathrm{var}_k\cos(w_k,c_k)$", "NC3",
           "variance over k of cos(w_k, c_k)", (0, 2), 0, "linear", "lower", f"{WU} (UNC3)", "Kd", "classes",
           "nc3.nc3_uniform_cos", ("weight", "centred_means"),
           undefined_if=("zero weight", "mean at the centre", "zero row of the weight")),
    Metric("alignment", r"alignment  $\cos(h-m,w_y-\bar w)$", "NC3", "mean over samples of cos(h−m, w_y−w̄)", (-1, 1), 1,
           "linear", "higher", MARKOU, "Nd (samples)", "classes",
           "alignment.sample_alignments", _SAMPLE, "samples", undefined_if=_CENTRED),
    Metric("instance_alignment", r"instances to weights  $\|\hat h-\hat w_y\|^2$", "NC3",
           "mean over samples of ‖h/‖h‖ − w_y/‖w_y‖‖²", (0, 4), 0, "linear", "lower", KOROMILAS, "Nd (samples)",
           function="alignment.sample_distances", inputs=("features", "targets", "weight"), over="samples",
           undefined_if=_SPHERE),
    Metric("class_alignment", r"classes to weights  $\|\hat u_k-\hat w_k\|^2$", "NC3",
           "mean over k of ‖û_k − w_k/‖w_k‖‖², û_k the unit mean of the class's h/‖h‖", (0, 4), 0, "linear", "lower",
           KOROMILAS, "Nd (samples)",
           function="alignment.alignment_of_sums", inputs=("unit_class_sums", "present_weight"),
           undefined_if=_SPHERE),
    Metric("nc4_ncc_mismatch", "nearest class mean disagrees", "NC4",
           "share of samples whose nearest class mean is not the predicted class", (0, 1), 0, "percent", "lower",
           f"{PAPYAN} (Fig. 7)", "NKd (samples)", function="nc4.mismatches",
           inputs=("features", "predictions", "class_means"), over="samples", undefined_if=_MISMATCH),
    Metric("nc4_ncc_mismatch_class_mean", "nearest class mean disagrees, over classes", "NC4",
           "mean over classes of the share of such samples in each class", (0, 1), 0, "percent", "lower",
           f"{PAPYAN} (Fig. 7); {WU}", "NKd (samples)", function="nc4.mismatches",
           inputs=("features", "predictions", "class_means"), over="samples", statistic="class mean",
           undefined_if=_MISMATCH),
    Metric("nc4_bias", r"logits at the centre  $\|Wm+b\|_2$", "NC4", "‖Wm + b‖₂", (0, _INF), 0, "linear", "lower",
           f"{ZHU} (NC4)", "Kd", "classes", "nc4.nc4_bias", ("weight", "bias", "center")),
    Metric("nc5_ood", r"out of distribution  $|\cos(M_k,m_{\mathrm{ood}})|$", "NC5",
           "mean over k of abs cos(M_k, m_ood)", (0, 1), 0, "linear", "lower", "Ammar et al. 2024 (NECO)",
           function="nc4.nc5_ood", inputs=("class_means", "ood_mean"), undefined_if=("zero class mean",)),
    Metric("accuracy", "accuracy", "accuracy", "of the classifier itself", (0, 1), 1, "percent", "higher", "–", "–"),
    Metric("accuracy_top5", "top-5 accuracy", "accuracy", "target among the five greatest logits", (0, 1), 1, "percent",
           "higher", "–", "–"),
    Metric("ncc_error", "error of the nearest class mean", "accuracy",
           "share of samples whose nearest class mean, of the train split, is not that of their class", (0, 1), 0,
           "percent", "lower", GALANTI, "NKd (probes=True)",
           undefined_if=("one class", "range", *_MISMATCH, "no sample of a measured class")),
    Metric("probe_error", "error of the linear probe", "accuracy",
           "share of samples that least squares on one-hot targets, of the train split, misclassifies", (0, 1), 0,
           "percent", "lower", "Alain & Bengio 2017", "d³ + NKd (probes=True)",
           undefined_if=("one class", "range", "range of squares", "no sample of a measured class")),
    Metric("effective_depth", "effective depth", "accuracy",
           "number of the first layer whose ncc_error is at most 0.01, else of the last; the features are the last",
           (1, _INF), None, "linear", "lower", GALANTI, "– (layers, probes=True)"),
    Metric("feature_norm", r"feature norm  $\sqrt{\langle\|h\|^2\rangle}$", "other", "√(Σ‖h‖²/N)", (0, _INF), None,
           "linear", None, "–",
           function="rank.feature_norm", inputs=("class_means", "within_class_variances", "counts")),
    Metric("rank_me", r"RankMe  $\exp(-\sum_i p_i\log p_i)$", "other",
           "exp(−Σ p_i log p_i), p_i = σ_i/Σσ, σ_i the singular values of all h", (1, _INF),
           OfClasses("K−1 (m = 0)", lambda k: k - 1), "linear", None, "Garrido et al. 2023", "d³", "balanced",
           "rank.rank_me", ("within_class_covariance", "class_means", "counts"), undefined_if=("zero features",)),
    Metric("effective_rank_means", "effective rank of means", "other",
           "exp(−Σ p_i log p_i), p_i = σ_i/Σσ, σ_i the singular values of C", (1, _CLASSES), _OTHERS, "linear", None,
           "Roy & Vetterli 2007", "SVD of C", "classes", "rank.effective_rank", ("centred_means",)),
    Metric("effective_rank_weights", "effective rank of weights", "other",
           "exp(−Σ p_i log p_i), p_i = σ_i/Σσ, σ_i the singular values of W", (1, _CLASSES), _OTHERS, "linear", None,
           f"Roy & Vetterli 2007; {KOROMILAS}", "SVD of W",
           function="rank.effective_rank", inputs=("weight",), undefined_if=("zero weight",)),
    Metric("mir", "mutual information ratio (MIR)", "other",
           "(H(K₁) + H(K₂) − H(K₁∘K₂))/min(H(K₁), H(K₂)) of 512 samples, K₁ = UUᵀ/N of h/‖h‖, K₂ of w_y", (0, 1),
           _SHARED, "linear", "higher", f"{SONG}; {KOROMILAS}", "N³, N = 512", "balanced",
           "alignment.mutual_information_ratio", ("entropies",), undefined_if=(*_SPHERE, "no entropy"),
           optional=True),
    Metric("hdr", "entropy difference ratio (HDR)", "other", "abs(H(K₁) − H(K₂))/max(H(K₁), H(K₂))", (0, 1), 0,
           "linear", "lower", f"{SONG}; {KOROMILAS}", "N³, N = 512",
           function="alignment.entropy_difference_ratio", inputs=("entropies",),
           undefined_if=(*_SPHERE, "no entropy"), optional=True),
    _etf_distance("etf_weights", "weights to nearest ETF", r"\|E(W)-W\|_F^2", "‖E(W) − W‖_F²", 2, 0),
    _etf_distance("etf_means", "means to nearest ETF", r"\|E(C)-C\|_F^2", "‖E(C) − C‖_F²", 2, 0),
    _etf_distance("etf_between", "ETF of weights to ETF of means", r"\|E(W)-E(C)\|_F^2", "‖E(W) − E(C)‖_F²", 4, 0),
    _etf_distance("etf_weights_reference", "ETF of weights to reference", r"\|E(W)-E(W_0)\|_F^2",
                  "‖E(W) − E(W₀)‖_F², W₀ of a reference epoch", 4, None),
    _etf_distance("etf_means_reference", "ETF of means to reference", r"\|E(C)-E(C_0)\|_F^2",
                  "‖E(C) − E(C₀)‖_F², C₀ of a reference epoch", 4, None),
]  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""Every metric by name, in the order in which metrics are returned and shown."""

CORE = (
    "nc1_pinv",
    "nc1_quotient",
    "nc1_cdnv",
    "nc2_etf_means",
    "nc2_equinorm_means",
    "nc2_max_angle_means",
    "nc3_duality",
    "nc3_distance",
    "alignment",
    "nc4_ncc_mismatch",
    "nc5_ood",
    "accuracy",
)
"""Metrics that are printed by default, some from each group."""

REFERENCE_EPOCH = "etf_reference_epoch"
"""Name in tables of the reference epoch, to whose ETFs the reference distances are computed."""

TO_REFERENCE = ("etf_weights_reference", "etf_means_reference", REFERENCE_EPOCH)
"""Metrics that depend on the reference epoch."""

_SAME = 1e-20  # smaller squared distances are those of an ETF to itself


def in_order(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return values in the order of `METRICS`; names that are not in it come last, in their original order.

    Examples:
        >>> in_order({"nc4_bias": 1.0, "nc1_vci": 2.0})
        {'nc1_vci': 2.0, 'nc4_bias': 1.0}
    """
    position = {name: index for index, name in enumerate(METRICS)}
    return dict(sorted(values.items(), key=lambda item: position.get(item[0], len(position))))


def reference_epochs(table: Any) -> set[int]:
    """Return the epochs to whose simplex ETFs a table contains distances.

    Args:
        table: Data frame with columns epoch, metric, value. If it has no rows of `REFERENCE_EPOCH`, as in earlier
            versions, the reference epoch is the epoch at which the distance is 0.

    Examples:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"epoch": [1, 2], "metric": "etf_means_reference", "value": [0.3, 0.0]})
        >>> reference_epochs(table)
        {2}
    """
    named = table[table["metric"] == REFERENCE_EPOCH]["value"]
    if named.empty:
        named = table[(table["metric"] == "etf_means_reference") & (table["value"] < _SAME)]["epoch"]
    return {int(epoch) for epoch in named}
