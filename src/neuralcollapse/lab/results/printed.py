"""Tables of groups of runs for publications, with values over seeds as text, in LaTeX (booktabs) or Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import pandas as pd

from neuralcollapse.catalogue import CORE, METRICS, REFERENCE_EPOCH, in_order
from neuralcollapse.lab.results.groups import TRAINING
from neuralcollapse.lab.results.tables import aligned, spread

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"\ensuremath{\pm}",
    "−": r"\ensuremath{-}",
    "–": "--",
} | {character: f"\\{character}" for character in "{}$&#_%"}
_VALUE = re.compile(r"(-?[\d.]+)(?:e([+-]\d+))?")


def last_values(values: pd.DataFrame, metrics: str | Sequence[str] = "core") -> pd.DataFrame:
    """Return metrics at the last epoch of each group, mean ± standard deviation (n − 1) over seeds, as text.

    Args:
        values: Table of `groups.gather_groups`.
        metrics: ``"core"``, ``"all"``, or names of metrics.

    Returns:
        Columns split, metric and one per group; the first row contains the epochs.

    Raises:
        ValueError: if a metric was not measured.
    """
    measured = values[(values["split"] != TRAINING) & (values["metric"] != REFERENCE_EPOCH)]
    last = measured[measured["epoch"] == measured.groupby("group")["epoch"].transform("max")]
    known = [*in_order(dict.fromkeys(last["metric"]))]
    names = [name for name in known if metrics == "all" or name in CORE] if isinstance(metrics, str) else [*metrics]
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"metrics must be core, all or measured metrics ({', '.join(known)}), got {missing[0]!r}")
    groups = [*dict.fromkeys(values["group"])]
    epochs = {group: f"{of_group['epoch'].iloc[0]}" for group, of_group in last.groupby("group", sort=False)}
    rows = [{"split": "", "metric": "epoch"} | epochs]
    for split in dict.fromkeys(last["split"]):
        for name in names:
            chosen = last[(last["split"] == split) & (last["metric"] == name)]
            of_groups = {group: _over_seeds(of_group["value"], name) for group, of_group in chosen.groupby("group")}
            if of_groups:
                rows.append({"split": split, "metric": name} | of_groups)
    return pd.DataFrame(rows, columns=["split", "metric", *groups]).fillna("–")


def levels_reached(epochs: pd.DataFrame) -> pd.DataFrame:
    """Return the epochs to each level, mean ± standard deviation (n − 1) over the seeds that reached it, as text.

    Args:
        epochs: Table of `statistics.epochs_to_levels`.

    Returns:
        Columns metric, level and one per group.
    """
    groups = [*dict.fromkeys(epochs["group"])]
    rows = [
        {"metric": name, "level": f"{level:g}"}
        | {
            str(group): spread(of_group["epoch"], "{:.1f}") if of_group["epoch"].notna().any() else "not reached"
            for group, of_group in of_level.groupby("group")
        }
        for (name, level), of_level in epochs.groupby(["metric", "level"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["metric", "level", *groups]).fillna("–")


def markdown(table: pd.DataFrame, note: str) -> str:
    """Return a table of texts in Markdown, with a note below it."""
    escaped = table.rename(columns=_in_markdown).map(_in_markdown)
    return f"{aligned(escaped)}\n\n{note}\n"


def booktabs(table: pd.DataFrame, note: str) -> str:
    r"""Return a table of texts as a LaTeX tabular; the document needs ``\usepackage{booktabs}``.

    Values such as ``1.2e-05 ± 3e-06`` are set as mathematics; special characters of all other texts are escaped.

    Args:
        table: The table. In a column ``split``, each text is shown once, and a rule is drawn where it changes.
        note: Comment above the table.
    """
    columns = [str(name) for name in table]
    alignment = "".join("l" if name in ("split", "metric", "level") else "r" for name in columns)
    lines = [f"% {' '.join(note.split())}", f"\\begin{{tabular}}{{{alignment}}}", r"\toprule"]
    lines += [_row([in_latex(name) for name in columns]), r"\midrule"]
    rows = [dict(zip(columns, map(str, row), strict=True)) for row in table.itertuples(index=False, name=None)]
    for before, row in pairwise([{}, *rows]):
        repeated = bool(before) and "split" in row and row["split"] == before["split"]
        if before and "split" in row and not repeated:
            lines.append(r"\midrule")
        cells = ["" if name == "split" and repeated else _cell(name, text) for name, text in row.items()]
        lines.append(_row(cells))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def in_latex(text: str) -> str:
    r"""Return a text with the special characters of LaTeX escaped, on one line.

    Examples:
        >>> print(in_latex("nc1_pinv, 50% & more"))
        nc1\_pinv, 50\% \& more
    """
    return "".join(_ESCAPES.get(character, character) for character in " ".join(str(text).split()))


def _over_seeds(values: pd.Series, name: str) -> str:
    if not values.notna().any():
        return "–"
    percent = name in METRICS and METRICS[name].scale == "percent"
    return spread(values, "{:.2%}" if percent else "{:.3g}")


def _cell(column: str, text: str) -> str:
    """Return a cell in LaTeX, with mean and deviation of a value as mathematics."""
    value, _, counted = text.partition(" (")
    parts = [part.removesuffix("%") for part in value.split(" ± ")]
    if column in ("split", "metric") or not all(_VALUE.fullmatch(part) for part in parts):
        return in_latex(text)
    formula = r" \pm ".join(_VALUE.sub(_power, part) for part in parts)
    if value.endswith("%"):
        formula = rf"({formula})\,\%" if len(parts) > 1 else rf"{formula}\,\%"
    return f"${formula}$ ({in_latex(counted)}" if counted else f"${formula}$"


def _power(value: re.Match[str]) -> str:
    mantissa, exponent = value.groups()
    return mantissa if exponent is None else rf"{mantissa} \cdot 10^{{{int(exponent)}}}"


def _row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _in_markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", " ".join(str(text).split()))
