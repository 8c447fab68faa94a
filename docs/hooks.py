"""Parts of the site that are made while it is built: tables, help texts, formulas as MathML; no request to any host."""

from __future__ import annotations

import base64
import contextlib
import html
import inspect
import io
import math
import os
import re
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

try:
    import yaml
    from latex2mathml.converter import convert
    from matplotlib.figure import Figure

    from neuralcollapse.catalogue import METRICS, Metric, OfClasses
    from neuralcollapse.cli import COMMANDS, main
    from neuralcollapse.lab.config import METHODS, RunConfig
    from neuralcollapse.lab.recipes import families, load_recipe
    from neuralcollapse.lab.settings import (
        Condition,
        Options,
        Settings,
        describe,
        schema_of,
    )
    from neuralcollapse.lab.studies import SCALES, load_study, reached_text, study_names
except ImportError as missing:
    raise SystemExit(
        f"the site needs the extra docs: pip install 'neuralcollapse[docs]' ({missing})"
    ) from None

CLAIMS = Path(__file__).parent / "claims"  # what `study` wrote of runs that were made

MOST_COLUMNS = 5  # of a table that is not folded
_MOST_POINTS = 6  # of accuracy below standard that a figure shows
MOVED = {
    "sooner": "convergence-speed",
    "choosing": "head-and-loss",
}  # former names of pages

# Material asks this host for a script when pages are opened as files; without it, search does not work there.
_ELSEWHERE = re.compile(r"https://unpkg\.com/[\w./@-]+")
_RECIPES = re.compile(r"<!-- recipes (\w+) -->")
_REFERENCE = re.compile(r"<!-- reference (\w+) -->")
_DETECTION = re.compile(r"<!-- detection ([\w-]+) -->")
_TRADE_OFF = re.compile(r"<!-- trade-off ([\w-]+) -->")
_DIFFERENCES = re.compile(r"<!-- differences ([\w-]+(?: [\w-]+)*) -->")
_GROUPS = re.compile(r"<!-- groups ([\w-]+) -->")
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)


def on_page_markdown(markdown: str, config: Any = None, **_: Any) -> str:
    """Replace the markers of a page by tables made from the code, and by help texts of commands."""
    for marker, made in (
        ("commands", _commands),
        ("studies", _studies),
        ("claims", _claims),
        ("methods", _methods),
        ("settings", _settings),
        ("metrics", metrics_table),
    ):
        if f"<!-- {marker} -->" in markdown:
            markdown = markdown.replace(f"<!-- {marker} -->", made())
    markdown = _DETECTION.sub(lambda marker: detection_table(marker[1]), markdown)
    markdown = _TRADE_OFF.sub(lambda marker: trade_off_table(marker[1]), markdown)
    markdown = _DIFFERENCES.sub(lambda marker: differences(marker[1].split()), markdown)
    markdown = _GROUPS.sub(lambda marker: groups_table(marker[1]), markdown)
    markdown = _REFERENCE.sub(lambda marker: _reference(marker[1], config), markdown)
    return _RECIPES.sub(lambda marker: _recipes(marker[1]), markdown)


def metrics_table() -> str:
    """Return all metrics of the catalogue as a Markdown table."""
    rows = [
        f"| `{metric.name}` | {metric.formula} | {_values(metric)} | {metric.center}; {metric.cost} | {metric.source} |"
        for metric in METRICS.values()
    ]
    return "\n".join(
        [
            "| name | formula | range, value at collapse | centre; cost | source |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def _values(metric: Metric) -> str:
    """Return the range of a metric, its value at collapse, and the better direction."""
    low, high = metric.range
    interval = (
        f"[{_written(low)}, ∞)"
        if high == math.inf
        else f"[{_written(low)}, {_written(high)}]"
    )
    if metric.at_collapse is None:
        return interval
    better = "" if metric.better is None else f" ({metric.better} is better)"
    return f"{interval}, {_written(metric.at_collapse)}{better}"


def _written(value: float | OfClasses) -> str:
    if isinstance(value, OfClasses):
        return value.formula
    names = {-math.log(2): "−log 2", 0.5: "½"}
    return names[value] if value in names else f"{value:g}".replace("-", "−")


def _methods() -> str:
    """Return the methods of training as a Markdown table."""
    lines = [
        "| method | classifier | bias, the default first | settings |",
        "|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        settings = ", ".join(
            f"`{option}`"
            for option in method.options.values()
            if option in RunConfig.model_fields
        )
        lines.append(
            f"| `{name}` | {method.text} | {', '.join(method.biases)} | {settings or '–'} |"
        )
    return "\n".join(lines)


def _reference(package: str, config: Any) -> str:
    """Return a table of the public names of a package, one section per page of its reference."""
    lines = []
    for title, path in _pages(config["nav"]):
        if path.startswith(f"reference/{package}/"):
            names = re.findall(
                r"^::: (\S+)$",
                (Path(config["docs_dir"]) / path).read_text(),
                re.MULTILINE,
            )
            lines += ["", f"## [{title}]({path.removeprefix('reference/')})", ""]
            if names:
                lines += ["| name | description |", "|---|---|"]
                lines += [
                    f"| {_reference_link(name)} | {_summary(name)} |" for name in names
                ]
    return "\n".join(lines)


def _pages(nav: list[Any]) -> list[tuple[str, str]]:
    """Return titles and paths of the pages in a navigation, in their order."""
    pages = []
    for item in nav:
        for title, content in item.items() if isinstance(item, dict) else ():
            pages += (
                _pages(content) if isinstance(content, list) else [(title, content)]
            )
    return pages


def _reference_link(path: str) -> str:
    """Return a public name as a link; a module has no heading of its own to link to."""
    code = f"`{path.split('.')[-1]}`"
    return code if inspect.ismodule(resolve_name(path)) else f"[{code}][{path}]"


def _summary(path: str) -> str:
    """Return the first line of the docstring of a public name, or the items of a tuple."""
    value = resolve_name(path)
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    documented = inspect.getdoc(value) or ""
    return documented.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _settings() -> str:
    """Return every setting of `RunConfig` as Markdown, one table per section, with those of nested options."""
    lines, written = [], set()
    for section in reversed(RunConfig.__bases__):
        lines += ["", f"## {_first_line(section)}", "", *_settings_table(section)]
        for field in section.model_fields.values():
            for options in (
                note for note in field.metadata if isinstance(note, Options)
            ):
                for kind in options.kinds:
                    if kind not in written:
                        written.add(kind)
                        lines += [
                            "",
                            f"### {_first_line(kind)}",
                            "",
                            *_settings_table(kind),
                        ]
    return "\n".join(lines)


def _first_line(section: type[Settings]) -> str:
    return str(section.__doc__).split("\n")[0].rstrip(".")


def _settings_table(section: type[Settings]) -> list[str]:
    """Return the lines of a table of settings: values, default, condition and meaning."""
    lines = [
        "| setting | values | default | has an effect with | meaning |",
        "|---|---|---|---|---|",
    ]
    for name, field in section.model_fields.items():
        conditions = [
            note.text for note in field.metadata if isinstance(note, Condition)
        ]
        default = field.get_default(call_default_factory=True)
        shown = (
            "not set"
            if default is None
            else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        )
        cells = [
            f"`{name}`",
            describe(schema_of(field.annotation)),
            shown,
            conditions[0] if conditions else "–",
            " ".join(str(field.description).split()),
        ]
        lines.append(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        )
    return lines


def _commands() -> str:
    return "\n".join(map(_help, COMMANDS))


def _recipes(paper: str) -> str:
    """Return the families of a paper, each with its published result, its cost and a table of its recipes."""
    lines = []
    for family in families():
        if family.name.startswith(paper):
            lines += [f"### {family.name}", "", f"{family.title}. {family.source}.", ""]
            lines += [
                f"- **Published**: {family.published}",
                f"- **Cost**: {family.cost}",
            ]
            lines += [f"- {note}" for note in family.notes]
            lines += ["", "| recipe | reproduces | our choices |", "|---|---|---|"]
            recipes = map(load_recipe, family.recipes)
            lines += [
                f"| `{recipe.name}` | {recipe.reproduces} | {recipe.choices} |"
                for recipe in recipes
            ]
            lines.append("")
    return "\n".join(lines)


def _studies() -> str:
    lines = ["| study | shows | small scale | full scale |", "|---|---|---|---|"]
    for study in map(load_study, study_names()):
        small, full = (
            (study.scales[scale].cost if scale in study.scales else "–")
            for scale in SCALES
        )
        lines.append(
            f"| `{study.name}` | {study.title} ({study.source}) | {small} | {full} |"
        )
    return "\n".join(lines)


def _claims() -> str:
    records = [
        yaml.safe_load(path.read_text()) for path in sorted(CLAIMS.glob("*.yaml"))
    ]
    lines = ["| study | claim | verdict |", "|---|---|---|"]
    for record in records:
        lines += [f"| [{record['study']}](#{record['study']}) | {one['claim']} | **{one['verdict']}** |"
                  for one in record["claims"]]  # fmt: skip
    for record in records:
        lines += [
            "",
            f"## {record['study']}",
            "",
            f"{record['title'][0].upper()}{record['title'][1:]}. {record['source']}.",
        ]
        reduced = f"Reduced: {record['reduced']}." if record["reduced"] else ""
        lines += [reduced + reached_text(record), ""]
        for one in record["claims"]:
            published = f" Published: {one['published']}." if "published" in one else ""
            lines += [
                f"**{one['verdict']}**: {one['claim']} ({one['measure']}).{published}",
                "",
            ]
            lines += [f"- {numbers}" for numbers in one["numbers"]] + [""]
        commits = ", ".join(
            re.sub(r"^(\w{10})\w*", r"\1", one)
            for one in str(record["git_commit"]).split(", ")
        )
        lines += [f"`{record['command']}`, seeds {', '.join(map(str, record['seeds']))}, commit "
                  f"{commits}, {record['accelerator'] or record['machine']}, "
                  f"{record['training_minutes']} minutes of training, {str(record['finished'])[:10]}.", ""]  # fmt: skip
        if (
            picture := CLAIMS.parent / "figures" / f"study-{record['study']}.png"
        ).exists():
            lines.append(f"![{record['title']}](figures/{picture.name})")
    return "\n".join(lines)


def detection_table(study: str) -> str:
    """Return the last AUROC of each score with each head of a study of detection as a Markdown table."""
    rows = yaml.safe_load((CLAIMS / f"{study}.yaml").read_text())["detection"]
    lines = [
        '<details class="table" markdown="1" open>',
        f"<summary>AUROC of each score, train NC1 and accuracies of each run: {study}</summary>",
        "",
    ]
    lines += [
        "| AUROC | " + " | ".join(row["run"] for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    last = {
        "linear_probe": ("linear probe on the held-out classes, accuracy", "{:.3f}"),
        "nc1_quotient": ("train NC1 (`nc1_quotient`)", "{:.2g}"),
        "accuracy": ("test accuracy", "{:.3f}"),
    }
    for quantity in (name for name in rows[0] if name not in ("run", *last)):
        greatest = max(row[quantity][0] for row in rows)
        cells = [
            f"{mean:.3f} ± {half:.3f}" for mean, half in (row[quantity] for row in rows)
        ]
        marked = [
            f"**{cell}**" if row[quantity][0] == greatest else cell
            for cell, row in zip(cells, rows, strict=True)
        ]
        lines.append(f"| {quantity.replace(' ', ': ', 1)} | {' | '.join(marked)} |")
    lines += [
        f"| {words} | {' | '.join(form.format(row[quantity][0]) for row in rows)} |"
        for quantity, (words, form) in last.items()
        if quantity in rows[0]
    ]
    lines += ["", "</details>"]
    return "\n".join(lines)


def groups_table(study: str) -> str:
    """Return the last test accuracy and train NC1 of each group of classes in a long-tail study as Markdown."""
    rows = yaml.safe_load((CLAIMS / f"{study}.yaml").read_text())["groups"]
    tables = []
    for metric, words, form in (
        ("accuracy", "test accuracy, %", _percent),
        (
            "nc1_quotient",
            "train NC1 (`nc1_quotient`)",
            lambda mean, half: f"{mean:.3g} ± {half:.2g}",
        ),
    ):
        names = [f"{metric}_{group}" for group in ("many", "medium", "few")] + [metric]
        lines = [f"| {words} | many | medium | few | all |", "|---|---|---|---|---|"]
        lines += [
            f"| {row['run']} | {' | '.join(form(*row[name]) for name in names)} |"
            for row in rows
        ]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def trade_off_table(study: str) -> str:
    """Return the last accuracy and collapse of each run of a study as Markdown, compared with standard if it was."""
    record = yaml.safe_load((CLAIMS / f"{study}.yaml").read_text())
    seeds, rows = len(record["seeds"]), record["trade_off"]
    collapse = ("nc1_quotient", "nc2_etf_means", "nc3_duality")
    is_compared = "difference" in rows[0]
    names = ["run", "rate", "accuracy, %", "NC1", "NC2", "NC3"]
    summary = f"Last values: {study}"
    if is_compared:
        names[2:3] = ["to accuracy", "to NC1", "to NC2", "to NC3", "accuracy, %", "− standard"]  # fmt: skip
        summary = f"Share of the epochs to the last values of standard, and last values: {study}"
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row["run"], f"{record['rates'][row['run']]:g}"]
        if is_compared:
            for mean, reached in (
                row[f"share_{name}"] for name in ("accuracy", *collapse)
            ):
                some = f" ({reached} of {seeds})" if 0 < reached < seeds else ""
                cells.append("never" if mean is None else f"{mean:.2f}{some}")
        cells.append(_percent(*row["accuracy"]))
        if is_compared:
            cells.append(_percent(*row["difference"], sign="+"))
        cells += [f"{row[name][0]:.2g}" for name in collapse]
        lines.append(f"| {' | '.join(cells)} |")
    return _folded(summary, lines)


def differences(studies: list[str]) -> str:
    """Return a figure and a table of accuracy minus that of standard, of all runs in several studies, as Markdown."""
    records = [
        yaml.safe_load((CLAIMS / f"{study}.yaml").read_text()) for study in studies
    ]
    of_studies = [
        {
            _without_average(row["run"], record): (
                row["difference"],
                row["nc1_quotient"][0],
            )
            for row in record["trade_off"]
        }
        for record in records
    ]
    runs = list(dict.fromkeys(run for of_study in of_studies for run in of_study))
    lines = [
        f"| run | {' | '.join(studies)} |",
        "|---" * (len(studies) + 1) + "|",
    ]
    for run in runs:
        cells = [
            f"{_percent(*of_study[run][0], sign='+')}; {of_study[run][1]:.2g}"
            if run in of_study
            else "–"
            for of_study in of_studies
        ]
        lines.append(f"| {run} | {' | '.join(cells)} |")
    table = _folded("Test accuracy minus that of standard, in points; train NC1", lines)
    return f"{_picture(_difference_figure(studies, of_studies, runs))}\n\n{table}"


def _folded(summary: str, table: list[str]) -> str:
    """Return the lines of a Markdown table as a part of a page that is opened by a click on its summary."""
    return "\n".join(
        [
            '<details class="table" markdown="1">',
            f"<summary>{summary}</summary>",
            "",
            *table,
            "",
            "</details>",
        ]
    )


def _without_average(run: str, record: dict[str, Any]) -> str:
    """Return the name of a run without the suffix "-average", unless another run of the study differs only in it."""
    name = run.removesuffix("-average")
    others = [row["run"] for row in record["trade_off"]]
    return run if name in others or name.endswith("-no") else name


def _difference_figure(
    studies: list[str],
    of_studies: list[dict[str, tuple[list[float], float]]],
    runs: list[str],
) -> Figure:
    figure = Figure(
        figsize=(2.1 + 1.7 * len(studies), 0.6 + 0.2 * len(runs)), layout="constrained"
    )
    panels = figure.subplots(1, len(studies), sharey=True, squeeze=False)[0]
    for panel, study, of_study in zip(panels, studies, of_studies, strict=True):
        for place, run in enumerate(runs):
            if run in of_study:
                mean, half = (100 * number for number in of_study[run][0])
                panel.errorbar(
                    mean, place, xerr=half, fmt="o", markersize=3, color="C0"
                )
        panel.axvline(0, color="black", linewidth=0.7)
        panel.set_xlim(left=max(panel.get_xlim()[0], -_MOST_POINTS))
        panel.set_title(
            study.removeprefix("convergence-").replace("convergence", "digits"),
            fontsize=8,
        )
        panel.set_xlabel("accuracy − standard,\npoints", fontsize=7)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3, linewidth=0.5)
    panels[0].set_yticks(range(len(runs)), runs)
    panels[0].invert_yaxis()
    return figure


def _picture(figure: Figure) -> str:
    """Return a figure as an HTML image that contains its data."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="Test accuracy minus that of standard" src="data:image/svg+xml;base64,{data}">'


def _percent(mean: float, half: float, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f} ± {100 * half:.1f}".replace("-", "−")


def _help(command: str) -> str:
    os.environ["COLUMNS"] = "88"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return f"## {command}\n\n```text\n{text.getvalue()}```\n"


def on_page_content(content: str, **_: Any) -> str:
    """Replace each formula that the Markdown extension marked, and label the cells of tables for narrow screens."""
    return _TABLE.sub(_stacked, _FORMULA.sub(_mathml, content))


def _stacked(table: re.Match[str]) -> str:
    """Return a table of three to five columns whose cells have the name of their column; others as they are."""
    names = [
        re.sub(r"<[^>]+>", "", cell).strip()
        for cell in re.findall(r"<th\b[^>]*>(.*?)</th>", table[0], re.DOTALL)
    ]
    if not 3 <= len(names) <= MOST_COLUMNS:
        return table[0]

    def labelled(row: re.Match[str]) -> str:
        labels = iter(names)
        return re.sub(
            r"<td\b",
            lambda _: f'<td data-label="{next(labels, "")}"'.replace(
                ' data-label=""', ""
            ),
            row[0],
        )

    return re.sub(
        r"<tr\b.*?</tr>",
        labelled,
        table[0].replace("<table>", "<table data-stacked>", 1),
        flags=re.DOTALL,
    )


def _mathml(match: re.Match[str]) -> str:
    formula = convert(
        html.unescape(match[3]), display="block" if match[2] == "[" else "inline"
    )
    return formula.replace(
        "<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>'
    )  # ‖ as high at both ends


def on_post_build(config: Any, **_: Any) -> None:
    """Leave no address of another host in the scripts; send former addresses of pages to their new ones."""
    for script in Path(config.site_dir).glob("assets/javascripts/bundle.*.js"):
        script.write_text(_ELSEWHERE.sub("data:text/javascript,", script.read_text()))
    for former, name in MOVED.items():
        refresh = f'<meta http-equiv="refresh" content="0; url={name}.html">'
        page = f'<!doctype html>{refresh}<a href="{name}.html">{name}</a>'
        (Path(config.site_dir) / f"{former}.html").write_text(page + "\n")
