"""The panel of tokens: prompt and continuation as a strip, coloured by a measure; one is chosen."""

from __future__ import annotations

from html import escape

import numpy as np

from djinn_nb.cards import MONO, MUTED
from djinn_nb.panels.canvas import CanvasPanel
from djinn_nb.panels.tokens_model import TokensModel
from djinn_nb.plots import visible

#: Tokens of the static form; of a longer session the last ones.
MOST_STATIC = 400


class TokensPanel(CanvasPanel):
    """A strip of tokens; one chosen is chosen in every panel."""

    name, title = "tokens", "Tokens"
    picture_class = TokensModel

    def figure_html(self) -> str:
        assert isinstance(self.picture, TokensModel)
        return strip_html(self.picture, self.bench.snapshot().selection.token)


def strip_html(picture: TokensModel, chosen: int | None) -> str:
    """The strip without a script: each token on its colour, and what the colours mean."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shown, values = picture.shown, picture.values()
    finite = values[np.isfinite(values)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    colours = colormaps["viridis"]
    hidden = max(0, len(values) - MOST_STATIC)
    spans = []
    for position in range(hidden, len(values)):
        text = visible(shown["tokens"][position]) or str(shown["ids"][position])
        value = float(values[position])
        if np.isfinite(value):
            share = (value - least) / (most - least) if most > least else 0.5
            red, green, blue, _ = colours(share)
            light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.49
            style = f"background:{to_hex((red, green, blue))};color:{'#000' if light else '#fff'}"
            title = f"position {position}: {value:.4g}"
        else:
            style, title = "opacity:.75", f"position {position}: {shown['missing']}"
        # around the token, in the page's ink: that of the token may be the page's own colour
        ring = "outline:2px solid currentColor;outline-offset:1px" if position == chosen else ""
        kind = ";font-weight:bold" if position >= shown["prompt"] else ""
        spans.append(
            f"<span title='{escape(title, quote=True)}' style='display:inline-block;margin:1px;"
            f"{ring}'><span style='display:inline-block;white-space:pre;border-radius:2px;"
            f"border:1px solid rgba(128,128,128,.4);padding:0 2px;{style}{kind}'>"
            f"{escape(text)}</span></span>"
        )
    bar = ",".join(to_hex(colours(i / 8)) for i in range(9))
    unit = f"{shown['unit']}, at {shown['location']}"
    if shown["measure"] == "difference":
        unit += f", node {shown['other']}"
    legend = (
        f"<div style='font-size:12px;margin:4px 0'>{least:.4g} <span role='img' aria-label='colours"
        f" from {least:.4g} to {most:.4g}: {escape(unit, quote=True)}' style='display:inline-block;"
        f"width:110px;height:10px;vertical-align:middle;border:1px solid rgba(128,128,128,.5);"
        f"background:linear-gradient(90deg,{bar})'></span> {most:.4g} {escape(unit)}</div>"
        f"<div style='{MUTED};font-size:12px'>bold: generated · outlined: chosen"
        f"{'' if finite.size == len(values) else ' · without colour: ' + escape(shown['missing'])}"
        "</div>"
    )
    more = f"<span style='{MUTED}'>… {hidden} earlier tokens </span>" if hidden else ""
    return f"{legend}<div style='{MONO};line-height:1.8'>{more}{''.join(spans)}</div>"
