"""How results show themselves in a notebook: small tables, every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(title: str, rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """A caption and rows of cells as an HTML table; texts are data, never markup.

    Args:
        title: the caption.
        rows: cells, shown by ``str``.
        header: names of the columns, or none.
    """
    style = ' style="text-align:left"'
    head = "<tr>" + "".join(f"<th{style}>{escape(name)}</th>" for name in header) + "</tr>" if header else ""
    body = "".join("<tr>" + "".join(f"<td{style}>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption{style}><b>{escape(title)}</b></caption>{head}{body}</table>"
