"""HTML tables of the page, in which every text from a folder is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd

from neuralcollapse.catalogue import METRICS, TO_REFERENCE, reference_epochs
from neuralcollapse.lab.figures.report.numbers import SPLITS
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import labels_of
from neuralcollapse.lab.results.provenance import shown_settings
from neuralcollapse.lab.results.tables import last_epoch, spread

# Facts that are not useful to readers, or are shown elsewhere on the page.
_LEFT_OUT = {"seed", "checkpoints", "reported", "environment", "runs", "num_classes", "largest_class_share"}


def html_table(table: pd.DataFrame, caption: str) -> str:
    """Return a table whose first column contains row headings; if it is wider than the page, it can be scrolled."""
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
    """Return the last value of every metric in one table per split: mean ± standard deviation over seeds.

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
    """Return tables of settings and environment: values that all runs share, and values in which they differ."""
    settings = [run.settings() for run in runs]
    labels = labels_of(settings)
    tables = []
    of_all = " of all runs" if len(runs) > 1 else ""
    for name, heading, facts in (
        ("Settings", "setting", [shown_settings(run.settings(), run.path) for run in runs]),
        ("Environment", "fact", [shown_settings(run.read_environment(), run.path) for run in runs]),
    ):
        names = [key for key in dict.fromkeys(key for of_run in facts for key in of_run) if key not in _LEFT_OUT]
        cells = {key: [_text(of_run.get(key)) for of_run in facts] for key in names}
        shared = {key: texts[0] for key, texts in cells.items() if len(set(texts)) == 1 and texts[0]}
        differing = {key: texts for key, texts in cells.items() if len(set(texts)) > 1}
        common = pd.DataFrame({heading: list(shared), "value": list(shared.values())})
        tables.append(html_table(common, f"{name}{of_all}"))
        if differing:
            single = {"run": labels, "seed": [config.get("seed", "–") for config in settings], **differing}
            tables.append(html_table(pd.DataFrame(single), f"{name} of single runs"))
    return "".join(tables)


def _last_values(last: pd.DataFrame, num_classes: int | None) -> pd.DataFrame:
    methods, measured = last["method"].unique(), set(last["metric"])
    reference = ", ".join(map(str, sorted(reference_epochs(last))))
    groups = dict(list(last.groupby(["metric", "method"])["value"]))
    rows = []
    for name in filter(measured.__contains__, METRICS):
        collapsed = METRICS[name].value_at_collapse(num_classes) if num_classes else None
        shown = f"{name} (epoch {reference})" if name in TO_REFERENCE and reference else name
        row = {"metric": shown, "at collapse": "–" if collapsed is None else f"{collapsed:.4g}"}
        row |= {
            method: spread(groups[name, method], "{:.4g}") if (name, method) in groups else "–" for method in methods
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _text(value: Any) -> str:
    """Return the text of a setting or a fact in a cell; empty for None."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)
