"""Which sites the layers of the served model have, and what the tensor at each looks like.

Read from the server's description of the model; nothing is asked and nothing is decided here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernel_server.protocol import messages as m
from kernel_server.protocol.location import (
    INNER_SITES,
    RESIDUAL_SITES,
    known_names,
    parse_location,
)

if TYPE_CHECKING:
    import pandas as pd

PATTERN = "attention.pattern"


def layout_at(model: m.ModelInfo, location: str) -> m.SiteLayout | None:
    """The tensor at a site inside a layer; None at other places, and where there is no such site.

    >>> layout_at(model, "layers.3.attention.heads").heads  # doctest: +SKIP
    12
    """
    place = parse_location(location, model.num_layers)
    if not place.is_inner or place.layer is None or not model.sites:
        return None
    return next((one for one in model.sites[place.layer] if one.site == place.site), None)


def axes_at(model: m.ModelInfo, location: str) -> tuple[str, ...]:
    """What the axes of the tensor at a location are called."""
    layout = layout_at(model, location)
    if layout is None or layout.heads is None:
        return ("token", "channel")
    return ("token", "head", "key" if layout.site == PATTERN else "channel")


def shape_at(model: m.ModelInfo, location: str) -> str:
    """The tensor at a location in words: `[tokens, 12 heads, 64]`."""
    layout = layout_at(model, location)
    if layout is None:
        return "[1, vocabulary]" if location == "logits" else f"[tokens, {model.hidden_size}]"
    width = "keys" if layout.site == PATTERN else str(layout.width)
    return f"[tokens, {f'{layout.heads} heads, ' if layout.heads is not None else ''}{width}]"


def is_residual(location: str, num_layers: int) -> bool:
    """Whether the tensor at a location has the residual stream's width and space."""
    place = parse_location(location, num_layers)
    return place.site != "logits" and (not place.is_inner or place.site in RESIDUAL_SITES)


def is_added(location: str, num_layers: int) -> bool:
    """Whether the tensor at a location is a part that a layer adds to the residual stream."""
    return parse_location(location, num_layers).site in ("attention.output", "mlp.output")


def locations(model: m.ModelInfo) -> list[str]:
    """Every place where this model can be stopped, in the order of a forward."""
    missing = {
        f"layers.{layer}.{site}"
        for layer in range(model.num_layers)
        for site in INNER_SITES
        if not any(one.site == site for one in (model.sites[layer] if model.sites else ()))
    }
    return [name for name in known_names(model.num_layers) if name not in missing]


def frame(model: m.ModelInfo) -> pd.DataFrame:
    """One row per layer and site: heads, width, and why it is off where it is."""
    import pandas as pd

    rows = []
    for layer in range(model.num_layers):
        for site in INNER_SITES:
            layout = layout_at(model, f"layers.{layer}.{site}")
            why = str(model.sites_off.get(site, "its layers show no such tensor"))
            rows.append(
                {
                    "layer": layer,
                    "site": site,
                    "heads": None if layout is None else layout.heads,
                    "width": None if layout is None else layout.width or "keys",
                    "off": why if layout is None else "",
                }
            )
    table = pd.DataFrame(rows, columns=["layer", "site", "heads", "width", "off"])
    return table.astype({"heads": "Int64"}).set_index(["layer", "site"])
