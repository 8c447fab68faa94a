"""Tables of groups for papers, in LaTeX and Markdown."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from matplotlib.mathtext import MathTextParser

from neuralcollapse.lab.results.printed import booktabs, in_latex, last_values, levels_reached, markdown

STRANGE = r"50% & $x_1$ #2 {a}~^<|>\ name"
VALUES = pd.DataFrame(
    [
        (group, seed, epoch, split, metric, scale * value + 0.1 * seed)
        for group, scale in (("plain", 1.0), (STRANGE, 1e-5))
        for seed in (0, 1)
        for epoch in ((1, 3) if group == "plain" else (1, 2))
        for split in ("train", "test", "training")
        for metric, value in (("accuracy", 0.8), ("nc1_pinv", 0.25 * epoch), ("loss", 3.0))
    ],
    columns=["group", "seed", "epoch", "split", "metric", "value"],
)


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of a tabular, split where an ampersand is not escaped."""
    body = [line for line in text.split("\n") if line.endswith(r" \\")]
    return [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in body]


def test_a_tabular_has_one_cell_per_column_and_its_formulas_parse():
    text = booktabs(last_values(VALUES), "a note")
    lines = text.strip().split("\n")
    assert lines[0] == "% a note"
    assert lines[1] == r"\begin{tabular}{llrr}"
    assert [line for line in lines if line.startswith("\\") and "rule" in line] == [
        r"\toprule",
        *[r"\midrule"] * 3,  # below the head, before each of the two splits
        r"\bottomrule",
    ]
    assert lines[-1] == r"\end{tabular}"
    rows = rows_of(text)
    assert {len(row) for row in rows} == {4}
    formulas = [cell for row in rows[1:] for cell in row[2:] if "$" in cell]
    for formula in formulas:
        MathTextParser("path").parse(formula)
    assert len(formulas) == 2 * 5


def test_special_characters_are_escaped_once():
    escaped = in_latex(STRANGE)
    commands = r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar){}|\\[%&$_#{}]"
    assert not set(re.sub(commands, "", escaped)) & set("\\%&$_#{}~^<|>")
    assert len(re.findall(commands, escaped)) == sum(STRANGE.count(character) for character in "\\%&$_#{}~^<|>")
    header = rows_of(booktabs(last_values(VALUES), ""))[0]
    assert header[-1] == escaped


def test_values_are_those_of_the_last_epoch_of_each_group_over_seeds():
    table = last_values(VALUES, "all").set_index(["split", "metric"])
    assert table.loc[("", "epoch")].tolist() == ["3", "2"]
    assert table.loc[("train", "nc1_pinv")].tolist() == ["0.8 ± 0.0707", "0.05 ± 0.0707"]
    assert table.loc[("test", "accuracy"), "plain"] == "85.00% ± 7.07%"
    assert ("train", "loss") in table.index
    assert ("train", "loss") not in last_values(VALUES).set_index(["split", "metric"]).index
    assert "training" not in table.index.get_level_values("split")


def test_undefined_and_missing_values_are_a_dash():
    values = VALUES.copy()
    values.loc[values["metric"] == "accuracy", "value"] = float("nan")
    values = values[(values["metric"] != "nc1_pinv") | (values["group"] == "plain")]
    table = last_values(values).set_index(["split", "metric"])
    assert table.loc[("train", "accuracy")].tolist() == ["–", "–"]
    assert table.loc[("train", "nc1_pinv")].tolist() == ["0.8 ± 0.0707", "–"]
    assert rows_of(booktabs(last_values(values), ""))[3][2:] == ["--", "--"]


def test_a_metric_that_was_not_measured_is_named():
    with pytest.raises(ValueError, match="got 'nc9'"):
        last_values(VALUES, ["nc1_pinv", "nc9"])


def test_a_markdown_table_has_the_same_cells():
    text = markdown(last_values(VALUES[VALUES["group"] == "plain"]), "a note")
    head, rule, *rows = text.split("\n\n")[0].split("\n")
    assert {line.count("|") for line in (head, rule, *rows)} == {4}
    assert [cell.strip() for cell in rows[1].strip("|").split("|")] == ["train", r"nc1\_pinv", "0.8 ± 0.0707"]
    assert text.endswith("\n\na note\n")
    strange = markdown(last_values(VALUES), "").split("\n")[0]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", strange)) == 5


def test_epochs_to_levels_count_the_seeds_that_reached_them():
    epochs = pd.DataFrame(
        [("a", 0, "accuracy", 0.9, 2.0), ("a", 1, "accuracy", 0.9, None), ("b", 0, "accuracy", 0.9, None)],
        columns=["group", "seed", "metric", "level", "epoch"],
    )
    assert levels_reached(epochs).to_numpy().tolist() == [["accuracy", "0.9", "2.0 (1 of 2)", "not reached"]]
    assert rows_of(booktabs(levels_reached(epochs), ""))[1] == ["accuracy", "$0.9$", "$2.0$ (1 of 2)", "not reached"]
