"""Fields of a panel: labels of one width, columns that wrap, what is shown and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets

from djinn_nb.panels.base import NONE

#: Width of a column below which two stand one above the other.
COLUMN = "1 1 270px"
#: Labels of fields, all as wide.
LABEL = {"description_width": "72px"}


def field() -> widgets.Layout:
    """As wide as its column, and no wider than is read at a glance."""
    return widgets.Layout(width="auto", min_width="0", max_width="min(460px, 100%)")


def within(html: str) -> str:
    """A display that is no wider than its column: what is wider scrolls, pictures shrink."""
    if not html:
        return ""
    return f"<div style='width:0;min-width:100%;line-height:1.5;overflow-x:auto'>{html}</div>"


def offer(choice: widgets.Dropdown, found: Sequence[tuple[str, Any]]) -> None:
    """New choices of a list; what was chosen stays chosen as long as it is there."""
    options = [("none", NONE), *found]
    if tuple(options) != tuple(choice.options):
        held = choice.value
        choice.options = options
        choice.value = held if any(held == value for _, value in options) else NONE


def show(widget: widgets.Widget, on: bool) -> None:
    """Show a widget, or take it out of the page and the keyboard's way."""
    widget.layout.display = None if on else "none"
