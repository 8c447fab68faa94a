"""HTML of tables, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """Return a table; the first column is aligned to the left, the others to the right. All texts are escaped.

    Args:
        caption: Text above the table.
        head: Headings of the columns.
        rows: Rows with one cell per column; a row with a single cell is a heading of the following rows.
        notes: Lines below the table.

    Examples:
        >>> html_table("two", ["name", "value"], [["a<b", 1]]).count("a&lt;b")
        1
    """
    left, right = 'style="text-align:left"', 'style="text-align:right"'

    def cells(tag: str, row: Sequence[object]) -> str:
        if len(row) == 1 != len(head):
            return f'<th colspan="{len(head)}" {left}>{escape(str(row[0]))}</th>'
        texts = [escape(str(cell)) for cell in row]
        return "".join(f"<{tag} {right if column else left}>{text}</{tag}>" for column, text in enumerate(texts))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    title = f'<caption style="text-align:left;white-space:nowrap"><b>{escape(caption)}</b></caption>'
    return f"<table>{title}<thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>{below}"
