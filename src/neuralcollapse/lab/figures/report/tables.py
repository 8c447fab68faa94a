"""The page's tables, as HTML in which everything from a folder is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.figures.report.numbers import SPLITS
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import labels_of
from neuralcollapse.lab.results.provenance import shown_settings
from neuralcollapse.lab.results.tables import TO_REFERENCE, last_epoch, reference_epochs, spread

# Facts that say nothing to a reader, or stand elsewhere on the page.
_LEFT_OUT = {"seed", "checkpoints", "reported", "environment", "runs", "num_classes", "largest_class_share"}


def html_table(table: pd.DataFrame, caption: str) -> str:
    """A table whose first column names its rows; it scrolls by itself where it is wider than the page."""
    heading = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in table)
    rows = "".join(
        f'<tr><th scope="row">{escape(str(first))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
        + "</tr>\n"
        for first, *cells in table.itertuples(index=False)
    )
    name = escape(caption)
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table><caption>{name}</caption>\n'
        f"<thead><tr>{heading}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n"
    )


def metric_tables(metrics: pd.DataFrame, num_classes: int | None) -> str:
    """The last value of every metric, a table a split: mean ± standard deviation over seeds.

    Args:
        metrics: Columns method, seed, epoch, split, metric, value.
        num_classes: K.
    """
    last = last_epoch(metrics)
    return "".join(
        html_table(_last_values(last[last["split"] == split], num_classes), f"Last values, {split} split")
        for split in SPLITS
        if split in set(last["split"])
    )


def provenance_tables(runs: Sequence[RunFolder]) -> str:
    """Settings and environment: what all runs share, and what tells them apart."""
    settings = [run.settings() for run in runs]
    labels = labels_of(settings)
    parts = []
    of_all = " of all runs" if len(runs) > 1 else ""
    for name, heading, facts in (
        ("Settings", "setting", [shown_settings(run.settings(), run.path) for run in runs]),
        ("Environment", "fact", [shown_settings(run.read_environment(), run.path) for run in runs]),
    ):
        names = [key for key in dict.fromkeys(key for one in facts for key in one) if key not in _LEFT_OUT]
        told = {key: [_words(one.get(key)) for one in facts] for key in names}
        shared = {key: values[0] for key, values in told.items() if len(set(values)) == 1 and values[0]}
        own = {key: values for key, values in told.items() if len(set(values)) > 1}
        parts.append(
            html_table(pd.DataFrame({heading: list(shared), "value": list(shared.values())}), f"{name}{of_all}")
        )
        if own:
            each = {"run": labels, "seed": [one.get("seed", "–") for one in settings], **own}
            parts.append(html_table(pd.DataFrame(each), f"{name} of single runs"))
    return "".join(parts)


def _last_values(last: pd.DataFrame, num_classes: int | None) -> pd.DataFrame:
    methods = last["method"].unique()
    there = set(last["metric"])
    reference = ", ".join(map(str, sorted(reference_epochs(last))))
    groups = dict(list(last.groupby(["metric", "method"])["value"]))
    rows = []
    for name in filter(there.__contains__, METRICS):
        collapsed = METRICS[name].value_at_collapse(num_classes) if num_classes else None
        shown = f"{name} (epoch {reference})" if name in TO_REFERENCE and reference else name
        row = {"metric": shown, "at collapse": "–" if collapsed is None else f"{collapsed:.4g}"}
        row |= {
            method: spread(groups[name, method], "{:.4g}") if (name, method) in groups else "–" for method in methods
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _words(value: Any) -> str:
    """A setting or a fact in a cell; empty where there is none."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items() if one is not None)
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return "" if value is None else str(value)
