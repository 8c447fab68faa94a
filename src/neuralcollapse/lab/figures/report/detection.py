"""Section of the page about the detection of unknown inputs: a table and embedded figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape

import pandas as pd

from neuralcollapse.lab.figures.detection import detection
from neuralcollapse.lab.figures.report.numbers import MAX_GROUPS
from neuralcollapse.lab.figures.report.tables import html_table
from neuralcollapse.lab.results.files import read_file
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.lab.results.resuming import is_folder_name
from neuralcollapse.lab.results.tables import spread
from neuralcollapse.metrics.figures.panels import draw_page, thin_ticks, without_latex

_HEADINGS = {"auroc": "AUROC", "fpr95": "FPR at 95% TPR", "aupr_in": "AUPR in", "aupr_out": "AUPR out"}
_PNG = b"\x89PNG\r\n\x1a\n"


def detection_section(runs: RunGroups) -> str:
    """Return the section as HTML; empty if no run has detection rates."""
    rates = runs.detection
    if rates.empty:
        return ""
    caption = "Test images against unknown inputs, at the last evaluated epoch"
    figures = [_against_nc1(runs), *_distributions(runs)]
    return (
        '\n<section id="detection"><h2>Detection of unknown inputs</h2>\n'
        '<p class="words">Scores are fitted to the train split. Over several seeds: mean ± standard deviation.</p>\n'
        f"{html_table(detection_table(rates), caption)}{''.join(figures)}</section>\n"
    )


def detection_table(rates: pd.DataFrame) -> pd.DataFrame:
    """Return one row per group, set and score with the rates of the last epoch, mean ± standard deviation over seeds.

    Args:
        rates: Columns method, seed, epoch, set, score, metric, value.
    """
    keys = ["method", "set", "score"]
    last = rates[rates["epoch"] == rates.groupby([*keys, "seed"], dropna=False)["epoch"].transform("max")]
    rows = []
    for (method, name, score), of_score in last.groupby(keys, sort=False):
        row = {"set": name, "score": score, "run": method, "epoch": ", ".join(map(str, of_score["epoch"].unique()))}
        for rate, heading in _HEADINGS.items():
            values = of_score[of_score["metric"] == rate]["value"]
            row[heading] = spread(values, "{:.4f}") if values.notna().any() else "–"
        rows.append(row)
    table = pd.DataFrame(rows)
    return table if table["run"].nunique() > 1 else table.drop(columns="run")


@without_latex()
def _against_nc1(runs: RunGroups) -> str:
    page = draw_page("AUROC against NC1 of the train split, epoch by epoch", detection(runs), 3)
    thin_ticks(page)
    content = io.BytesIO()
    page.savefig(content, format="png", dpi=120)
    return _figure(content.getvalue(), "AUROC of each score against NC1, one panel per set of unknown inputs")


def _distributions(runs: RunGroups) -> Iterator[str]:
    """Yield the figures of score distributions that `detect` wrote to the folder of the first run of each group."""
    rates = runs.detection
    for label, group in [*runs.groups.items()][:MAX_GROUPS]:
        for name in rates[rates["method"] == label]["set"].unique():
            path = group[0].figures / f"scores-{name}.png"
            if not is_folder_name(name) or not path.exists():
                continue
            content = read_file(path)
            if content.startswith(_PNG):
                yield _figure(content, f"Distributions of the scores, {label}: test images and {name}")


def _figure(content: bytes, text: str) -> str:
    source = base64.b64encode(content).decode("ascii")
    words = escape(text)
    return (
        f'<figure><figcaption>{words}</figcaption><img src="data:image/png;base64,{source}" alt="{words}"></figure>\n'
    )
