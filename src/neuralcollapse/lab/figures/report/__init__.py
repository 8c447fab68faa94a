"""Report: self-contained HTML page about one or several runs, written from their folders alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from neuralcollapse.lab.config import METHODS
from neuralcollapse.lab.figures.report import numbers
from neuralcollapse.lab.figures.report.detection import detection_section
from neuralcollapse.lab.figures.report.tables import html_table, metric_tables, provenance_tables
from neuralcollapse.lab.results.files import write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.lab.results.labels import differing_settings
from neuralcollapse.lab.results.tables import baseline_table, group_table, read_table, results_table, seed_of
from neuralcollapse.metrics.figures.curves import COLORS, COLORS_ON_DARK, style_numbers

_HEADLINE = ("accuracy", "nc1_quotient", "nc2_etf_means", "nc2_etf_weights", "nc3_duality", "nc4_ncc_mismatch")


def write_report(folders: Sequence[RunFolder], path: Path, classes: Sequence[int] | None = None) -> None:
    """Write the page.

    Args:
        folders: Folders of single runs, all with the same number of classes.
        path: File to write.
        classes: Three or four classes whose collapse is shown; by default the first three that have samples.

    Raises:
        ValueError: if a run has no records or no table, the numbers of classes differ, or a class is not in the
            records.
    """
    runs = RunGroups(folders)
    moving = numbers.motion(runs, classes)
    metrics = runs.metrics[runs.metrics["split"].isin(numbers.SPLITS)]
    detection = detection_section(runs)
    text = _template("page.html").substitute(
        title=escape(runs.title),
        description=escape(_description(runs)),
        style=_template("page.css").substitute(light=_colours(COLORS), dark=_colours(COLORS_ON_DARK)),
        results=_results(runs, metrics),
        detection=detection,
        detection_link=' <a href="#detection">Detection</a>' if detection else "",
        values=metric_tables(metrics, runs.num_classes),
        runs=provenance_tables(folders),
        numbers=_embedded(_numbers(runs, metrics, moving)),
        plotly=(files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8"),
        script=_read("page.js"),
    )
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _description(runs: RunGroups) -> str:
    settings = [run.settings() for group in runs.groups.values() for run in group]
    seeds = sorted({config["seed"] for config in settings if config.get("seed") is not None})
    over = f", seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else ""
    differing = differing_settings(settings)
    return (
        f"{len(settings)} run{'s' if len(settings) > 1 else ''}{over}: {'; '.join(runs.groups)}. "
        + (f"They differ in {', '.join(differing)}. " if differing else "")
        + "Everything is measured in evaluation mode, without targets, on images without augmentation."
    )


def _results(runs: RunGroups, metrics: pd.DataFrame) -> str:
    tables = {"At the last measured epoch; collapse metrics of the train split": results_table(metrics, _seconds(runs))}
    of_groups = group_table(metrics)
    if of_groups is not None:
        tables["Classes with many, a medium number of and few training images, at the last measured epoch"] = of_groups
    to_baseline = baseline_table(metrics, _baseline(runs))
    if to_baseline is not None:
        tables["Epochs until as good on the test split as standard of the same seed at its end"] = to_baseline
    heading = "method" if set(runs.groups) <= set(METHODS) else "run"
    return "".join(html_table(table.rename(columns={"method": heading}), name) for name, table in tables.items())


def _seconds(runs: RunGroups) -> pd.DataFrame:
    """Return the training logs with the labels of the groups; an empty table if a run has no log."""
    tables = []
    for label, group in runs.groups.items():
        for run in group:
            if not run.training_log.exists():
                return pd.DataFrame()
            tables.append(read_table(run.training_log).assign(method=label, seed=seed_of(run)))
    return pd.concat(tables, ignore_index=True)


def _baseline(runs: RunGroups) -> str | None:
    """Return the label of the group with method standard, cross-entropy and no average, if there is exactly one."""
    plain = {"method": "standard", "loss": "cross-entropy", "weight_average": None}
    labels = []
    for label, group in runs.groups.items():
        settings = group[0].settings()
        if all(settings.get(name, value) == value for name, value in plain.items()):
            labels.append(label)
    return labels[0] if len(labels) == 1 else None


def _numbers(runs: RunGroups, metrics: pd.DataFrame, moving: dict[str, Any] | None) -> dict[str, Any]:
    """Return the data of all figures of the page."""
    matrices = numbers.cosine_matrices(runs)
    size = len(next(iter(matrices["matrices"].values()))["means"])
    return {
        "styles": style_numbers(list(runs.groups)),
        "colours": len(COLORS),
        "courses": numbers.courses(metrics),
        "metrics": numbers.described(runs.metrics, matrices["classes"]),
        "headline": [name for name in _HEADLINE if name in set(metrics["metric"])],
        "motion": None if moving is None else moving | {"words": _caption_of_motion(runs, moving)},
        "cosines": matrices | {"words": _caption_of_cosines(runs, size, matrices["classes"])},
    }


def _caption_of_motion(runs: RunGroups, moving: dict[str, Any]) -> str:
    chosen = ", ".join(map(str, moving["classes"]))
    simplex = "on the plane" if len(moving["classes"]) == 3 else "in the space (drag to turn it)"
    sentences = [
        f"Classes {chosen} {simplex} of the simplex ETF nearest to their means. Small marks are up to "
        f"{moving['samples']} training samples per class, large marks the class means, and lines from the centre the "
        "rows of the classifier; at collapse, all are at the vertices of the dotted simplex.",
        *_left_out(runs),
    ]
    if moving["thinned"]:
        sentences.append(f"{len(moving['epochs'])} of the measured epochs are shown, evenly spaced.")
    return " ".join(sentences)


def _caption_of_cosines(runs: RunGroups, size: int, num_classes: int) -> str:
    of = f"the first {size} of {num_classes}" if size < num_classes else f"all {num_classes}"
    sentences = [
        f"Between the centred class means, and between the classifier's rows, of {of} classes at the last epoch. At "
        f"collapse to a simplex ETF all are −1/(K − 1) = −{1 / (num_classes - 1):.3g}, the middle of the colours.",
        *_left_out(runs),
    ]
    return " ".join(sentences)


def _left_out(runs: RunGroups) -> list[str]:
    """Return sentences about runs that are not shown, if any."""
    several = any(len(group) > 1 for group in runs.groups.values())
    sentences = ["The first seed of each group is shown."] if several else []
    if len(runs.groups) > numbers.MAX_GROUPS:
        sentences.append(f"The first {numbers.MAX_GROUPS} of {len(runs.groups)} groups are shown.")
    return sentences


def _colours(colours: Sequence[str]) -> str:
    return " ".join(f"--c{number}: {colour};" for number, colour in enumerate(colours))


def _embedded(content: dict[str, Any]) -> str:
    """Return JSON for a script element, escaped so that texts from a folder cannot end the element."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _read(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")


def _template(name: str) -> Template:
    return Template(_read(name))
