"""Pieces of HTML: escaped text, tables, figures with a drawing for wide and for narrow screens and a table behind it."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NARROW, WIDE = 312, 520
"""Widths in pixels that a figure is drawn in: on a phone of 360 pixels, and in a card of a page with two columns."""

Drawing = Callable[[int], str]
"""Width in pixels → the inside of an SVG, after its size: `svg.Plot.whole`."""


def text(value: object) -> str:
    """Escaped, for content and for attributes."""
    return html.escape(str(value), quote=True)


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def render(self, kind: str = "scroll") -> str:
        """A table in a box of its own that scrolls sideways, `scroll` downwards, too; cells that are numbers stand at the right."""
        right = [bool(self.rows) and all(_number(r[i]) for r in self.rows) for i in range(len(self.head))]

        def row(cells: Sequence[str], tag: str) -> str:
            made = (
                f"<{tag}{' class=n' if n else ''}{' scope=col' if tag == 'th' else ''}>{text(c)}</{tag}>"
                for c, n in zip(cells, right, strict=True)
            )
            return f"<tr>{''.join(made)}</tr>"

        return f"<div class={kind} tabindex=0><table><thead>{row(self.head, 'th')}</thead><tbody>{''.join(row(r, 'td') for r in self.rows)}</tbody></table></div>"


def _number(cell: str) -> bool:
    return bool(re.match(r"[-+−±×]?\d", cell)) or cell in ("–", "")


@dataclass(frozen=True)
class Figure:
    """`draw` makes the SVG's inside for a width; `said` tells in words what is seen; `legend`: (what, class of its mark)."""

    title: str
    said: str
    draw: Drawing
    table: Table
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""

    def render(self, key: str) -> str:
        note = f"<p>{text(self.note)}</p>" if self.note else ""
        both = "".join(self._svg(f"{key}{kind[0]}", kind, width) for kind, width in (("wide", WIDE), ("narrow", NARROW)))
        return (
            f"<figure><figcaption><h3>{text(self.title)}</h3>{note}{legend(self.legend)}</figcaption><div class=plot>{both}</div>"
            f"<details><summary>Table: {text(self.title[0].lower() + self.title[1:])}</summary>{self.table.render()}</details></figure>"
        )

    def _svg(self, key: str, kind: str, width: int) -> str:
        inside = self.draw(width)
        height, _, marks = inside.partition("|")
        return (
            f'<svg class={kind} viewBox="0 0 {width} {height}" role=img aria-labelledby="{key}t {key}d"><title id={key}t>{text(self.title)}</title>'
            f"<desc id={key}d>{text(self.said)}</desc>{marks}</svg>"
        )


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """What each mark is. A class that begins with `k` or `ref` is a line, one with `f` or `ring` a dot, `zone` and `band` are areas."""
    if not entries:
        return ""

    def mark(kind: str) -> str:
        if kind.startswith(("k", "ref")):
            return f'<line x1=1 x2=21 y1=6 y2=6 class="line {kind}"/>'
        if kind.startswith(("f", "ring")):
            return f'<circle cx=11 cy=6 r=4.5 class="{kind}"/>'
        return f'<rect x=1 width=20 height=12 class="{kind}"/>'

    items = (f'<li><svg viewBox="0 0 22 12" aria-hidden=true>{mark(kind)}</svg>{text(name)}</li>' for name, kind in entries)
    return f"<ul class=legend>{''.join(items)}</ul>"
