"""Pieces of HTML that displays are made of: a card, a figure, a table. No script, no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from djinn_nb.plots import on_any_page, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours are given with the page's own text colour and translucent fills, so both themes read.
CARD = (
    "border:1px solid rgba(128,128,128,.45);border-radius:4px;padding:8px 12px;margin:2px 0;"
    "font-size:13px;line-height:1.5;color:inherit;background:transparent"
)
MONO = "font-family:var(--jp-code-font-family,monospace);font-size:12px"
TOKEN = (
    "display:inline-block;white-space:pre;border:1px solid rgba(128,128,128,.35);"
    "border-radius:3px;padding:0 2px;margin:1px"
)
HIT = "background:rgba(255,165,0,.35);text-decoration:underline"
CURSOR = "outline:2px solid rgb(31,119,180)"
MUTED = "opacity:.75"


def text_html(text: str) -> str:
    """Plain text in a card."""
    return f"<div style='{CARD}'><pre style='margin:0;color:inherit'>{escape(text)}</pre></div>"


def card(label: str, *parts: str) -> str:
    """Parts in a frame; the label is for those who do not see it."""
    return (
        f"<div role='region' aria-label='{escape(label, quote=True)}' style='{CARD}'>"
        f"{''.join(parts)}</div>"
    )


def heading(text: str, muted: str = "") -> str:
    """The first line of a card."""
    after = f"<span style='{MUTED}'> · {escape(muted)}</span>" if muted else ""
    return f"<div><b>{escape(text)}</b>{after}</div>"


def note(text: str) -> str:
    """A line beside what is shown."""
    return f"<div style='{MUTED};font-size:12px'>{escape(text)}</div>"


def image(figure: Figure, description: str) -> str:
    """A figure inside the page, as PNG. Takes the figure's paper away, see `on_any_page`."""
    data = base64.b64encode(png(on_any_page(figure))).decode()
    return (
        f"<div><img alt='{escape(description, quote=True)}'"
        f" style='max-width:100%' src='data:image/png;base64,{data}'></div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of texts: the first column to the left, numbers to the right."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f"<{tag} style='text-align:{'right' if i else 'left'};{MONO};white-space:pre'>"
            f"{escape(text)}</{tag}>"
            for i, text in enumerate(texts)
        )

    above = (
        f"<caption style='text-align:left;caption-side:top'>{escape(caption)}</caption>"
        if caption
        else ""
    )
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f"<table style='margin:4px 0'>{above}<thead><tr>{cells('th', head)}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
