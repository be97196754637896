"""Stops and ended generations as HTML, from plain data, and how a stop is shown on arrival."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from djinn_nb.cards import CARD, CURSOR, HIT, MONO, MUTED, TOKEN, image
from djinn_nb.cards import text_html as text_html
from djinn_nb.handles import edit_line
from djinn_nb.lines import (
    MAX_SHOWN_TOKENS,
    away_line,
    edits_here,
    ended_ids,
    finished_line,
    headline,
    hits_line,
    hits_of,
    inside_line,
    origin,
    quoted,
    stop_text,
)
from djinn_nb.misses import missed_lines
from djinn_nb.plots import norm_heat_map, visible
from djinn_nb.progress import in_notebook
from djinn_nb.view import StopView
from kernel_server.protocol import messages as m
from kernel_server.protocol.location import parse_location

if TYPE_CHECKING:
    from djinn_nb.stopped import Stopped


def show_stop(stopped: Stopped) -> None:
    """Display a stop: as a panel in a notebook, as text elsewhere."""
    view = stopped.view()
    if in_notebook():
        from IPython.display import display

        display(stopped)  # type: ignore[no-untyped-call]
    else:
        print(stop_text(view))


def stop_html(view: StopView) -> str:
    """A stop as a panel: tokens, where it stands, norms, lens; every colour has a legend."""
    parts = [
        f"<div><b>{escape(headline(view.stop, view.model))}</b>"
        f"<span style='{MUTED}'>{escape(origin(view.model, view.session))}"
        f" · {escape(view.model.name)}</span></div>",
    ]
    if view.stop.error is not None:
        error = f"{view.stop.error.code}: {view.stop.error.message}"
        parts.append(f"<div role='alert'>⚠ {escape(error)}</div>")
    if view.stop.hit_breakpoints:
        parts.append(f"<div style='{MUTED}'>{escape(hits_line(view))}</div>")
    if inside := inside_line(view.stop, view.model, view.session):
        parts.append(f"<div style='{MUTED}'>{escape(inside)}</div>")
    if away := away_line(view.session):
        parts.append(f"<div style='{MUTED}'>{escape(away)}</div>")
    parts += [
        _ladder(view.stop, view.model.num_layers),
        _token_strip(view),
        f"<div style='{MONO}'>{escape(view.summary)}</div>",
        _heat_map(view),
        _lens_table(view),
    ]
    if here := edits_here(view):
        edits = "".join(f"<li>{escape(edit_line(edit))}</li>" for edit in here)
        parts.append(f"<div>edits<ul style='margin:0'>{edits}</ul></div>")
    label = escape(f"Djinn: {headline(view.stop, view.model)}", quote=True)
    return f"<div role='region' aria-label='{label}' style='{CARD}'>{''.join(parts)}</div>"


def finished_html(
    model: m.ModelInfo, info: m.SessionInfo, texts: tuple[str, str], notes: Sequence[str] = ()
) -> str:
    """The end of a generation: prompt plain, continuation in bold."""
    head = finished_line(model, info)
    missed = "".join(f"<div>{escape(line)}</div>" for line in (*notes, *missed_lines(info)))
    if any(texts):
        prompt, made = texts
        shown = f"<span style='{MUTED}'>{escape(prompt)}</span><b>{escape(made)}</b>"
    else:
        shown = escape(ended_ids(info))
    return (
        f"<div style='{CARD}'><div><b>{escape(head)}</b></div>"
        f"<div style='{MONO};white-space:pre-wrap'>{shown}</div>{missed}</div>"
    )


def _ladder(stop: m.StopInfo, num_layers: int) -> str:
    """One cell per layer: filled ones have run in this forward, a dashed one in part; the cursor
    stands behind them."""
    done = stop.layers_executed
    inside = parse_location(stop.location, num_layers).is_inner
    cells = []
    for layer in range(num_layers):
        fill = "rgba(31,119,180,.75)" if layer < done else "transparent"
        line = "dashed" if inside and layer == done else "solid"
        cells.append(
            f"<span title='layer {layer}' style='display:inline-block;width:8px;height:12px;"
            f"margin-right:1px;border:1px {line} rgba(128,128,128,.8);background:{fill}'></span>"
        )
    cursor = "<span style='font-weight:bold'>▲</span>"
    cells.insert(done + inside, cursor)
    part = " · dashed: run in part" if inside else ""
    return (
        f"<div aria-label='{done} of {num_layers} layers run' style='margin:4px 0'>"
        f"layers {''.join(cells)} <span style='{MUTED}'>filled: run in this forward{part} ·"
        f" ▲ {escape(stop.location)}</span></div>"
    )


def _token_strip(view: StopView) -> str:
    first, total = view.stop.first_token, len(view.texts)
    hidden = max(0, total - MAX_SHOWN_TOKENS)
    ids = view.session.tokens[first : view.stop.end_token]
    hits = set(hits_of(view))
    spans = []
    for i in range(hidden, total):
        style = TOKEN
        if first + i in hits:
            style += f";{HIT}"
        if i == total - 1:
            style += f";{CURSOR}"
        text = visible(view.texts[i]) if view.texts[i] else str(ids[i])
        title = f"position {first + i}, id {ids[i]}"
        spans.append(f"<span style='{style}' title='{title}'>{escape(text)}</span>")
    legend = "outlined: the last token fed"
    if hits:
        legend = (
            f"<span style='{HIT}'>shaded, underlined</span>: a breakpoint held there · {legend}"
        )
    more = f"<span style='{MUTED}'>… {hidden} earlier tokens </span>" if hidden else ""
    return (
        f"<div style='{MONO}'>{more}{''.join(spans)}</div>"
        f"<div style='{MUTED};font-size:11px'>{legend}</div>"
    )


def _heat_map(view: StopView) -> str:
    if not view.norm.size:
        return ""
    positions = range(view.norm_first_token, view.norm_first_token + view.norm.shape[1])
    texts = view.texts if len(view.texts) == view.norm.shape[1] else None
    figure = norm_heat_map(
        view.norm, view.norm_locations, positions, texts,
        title=f"norm of each token's vector, forward {view.stop.forward}",
    )  # fmt: skip
    return image(
        figure,
        f"Heat map of L2 norms: {view.norm.shape[0]} locations by {view.norm.shape[1]} tokens",
    )


def _lens_table(view: StopView) -> str:
    if not view.lens:
        refusal = f"no lens: {view.lens_refusal}" if view.lens_refusal else ""
        return f"<div style='{MUTED}'>{escape(refusal)}</div>" if refusal else ""
    rows = "".join(
        f"<tr><td style='text-align:left;{MONO};white-space:pre'>{escape(quoted(row))}</td>"
        f"<td style='text-align:right'>{row.token_id}</td>"
        f"<td style='text-align:right'>{row.probability:.3f}</td>"
        f"<td style='text-align:left'><span style='display:inline-block;height:9px;"
        f"width:{max(1, round(120 * row.probability))}px;background:rgba(31,119,180,.75)'>"
        "</span></td></tr>"
        for row in view.lens
    )
    kind = "next token" if view.stop.location == "logits" else "logit lens"
    return (
        f"<table style='margin:4px 0'><caption style='text-align:left;caption-side:top'>{kind} at"
        f" position {view.lens_position}, entropy {view.lens_entropy:.2f} nats</caption>"
        "<thead><tr><th style='text-align:left'>token</th><th>id</th><th>probability</th>"
        f"<th style='text-align:left'>0 to 1</th></tr></thead><tbody>{rows}</tbody></table>"
    )
