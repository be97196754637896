"""The table family × site: where each family can be looked into, as the load check found it.

Turns load reports into rows, rows into the committed `FAMILIES.md` and back. What a family can do
is found by the load check; which families are tried is the generating script's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernel_server.models.selftest import LoadReport
from kernel_server.models.site_check import SiteSupport
from kernel_server.protocol.errors import UnsupportedModel
from kernel_server.protocol.location import INNER_SITES

#: The committed table.
FILE = Path(__file__).with_name("FAMILIES.md")
#: Points of the residual stream: a model without one of them is refused.
_BEFORE, _AFTER = ("embedding", "input"), ("output", "final_norm", "logits")
SITES = (*_BEFORE, *INNER_SITES, *_AFTER)
YES, SOME, NO = "✓", "some", "–"
#: What differs from one machine to the next is left out of a reason.
_NUMBERS = re.compile(r"[:,]? *\(?(?:allowed )?\d+(?:\.\d+|e[+-]?\d+|\.\d+e[+-]?\d+)\)?")


@dataclass(frozen=True, slots=True)
class Row:
    """One family: its route, and by site `✓`, or `some` or `–` with the reason.

    route: None where the family is refused; then `refusal` says by which feature.
    """

    family: str
    route: str | None = None
    cells: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    refusal: str = ""

    def describe(self) -> list[str]:
        """The row in lines for a terminal, a site on each."""
        lines = [f"  {'site':<18} {self.family}, {self.route}"]
        for site in SITES:
            mark, reason = self.cells[site]
            lines.append(f"  {site:<18} {mark:<4} {reason}".rstrip())
        return lines


def row(family: str, report: LoadReport) -> Row:
    """The row of a family that passed the load check."""
    whole = SiteSupport()
    cells = {site: _cell(report.sites.get(site, whole)) for site in SITES}
    return Row(family, report.attention.partition(",")[0], cells)


def refused(family: str, refusal: UnsupportedModel) -> Row:
    """The row of a family that was refused, with the feature each route lacks."""
    details = refusal.details
    features = [str(details.get("feature"))]
    if "cache_route" in details:
        features.append(f"by the Cache route: {details['cache_route'].get('feature')}")
    return Row(family, refusal="; ".join(features))


def _cell(support: SiteSupport) -> tuple[str, str]:
    if not support.off:
        return YES, ""
    reasons = "; ".join(dict.fromkeys(_NUMBERS.sub("", reason) for reason in support.off))
    return (SOME if support.layers else NO), reasons


# -- the file --------------------------------------------------------------------------------------


def render(rows: Iterable[Row], versions: str, unbuilt: Mapping[str, str]) -> str:
    """The whole file, families in order.

    versions: of the libraries the rows were made with. unbuilt: families of which no tiny model
    could be made, with what happened.
    """
    ordered = sorted(rows, key=lambda row: row.family)
    served = [row for row in ordered if row.route is not None]
    notes: dict[str, int] = {}
    body = [_line(row, notes) for row in served]
    out = [
        "# Families",
        "",
        f"Made by `python -m scripts.families` with {versions}, never by hand. Every family is a",
        "tiny random model that the load check compared with stock `transformers`.",
        "",
        f"{YES}: in every layer. {SOME}: in some layers. {NO}: nowhere. A number names the reason.",
        "",
        f"## Served ({len(served)})",
        "",
        _cells(["family", "route", *SITES]),
        _cells(["---"] * (2 + len(SITES))),
        *body,
        "",
        *(f"{number}. {reason}" for reason, number in notes.items()),
        "",
        f"## Refused by name ({len(ordered) - len(served)})",
        "",
        _cells(["family", "for want of"]),
        _cells(["---"] * 2),
        *(_cells([row.family, row.refusal]) for row in ordered if row.route is None),
        "",
        f"## Not tried ({len(unbuilt)})",
        "",
        "No tiny model could be made of these.",
        "",
        _cells(["family", "why"]),
        _cells(["---"] * 2),
        *(_cells([family, why]) for family, why in sorted(unbuilt.items())),
    ]
    return "\n".join(out) + "\n"


def versions_of(text: str) -> str:
    """The versions a rendered file was made with."""
    found = re.search(r"with ([^,]+), never by hand", text)
    return found[1] if found else ""


def read(text: str) -> dict[str, Row]:
    """The rows of a rendered file by family; `read(render(rows, …))` gives them back."""
    notes = dict(re.findall(r"(?m)^(\d+)\. (.*)$", text))
    rows: dict[str, Row] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 2 + len(SITES) and cells[0] not in ("family", "---"):
            marks = [cell.split() for cell in cells[2:]]
            found = {
                site: (mark[0], notes[mark[1]] if len(mark) > 1 else "")
                for site, mark in zip(SITES, marks, strict=True)
            }
            rows[cells[0]] = Row(cells[0], cells[1], found)
    refusals = text.partition("## Refused by name")[2].partition("## Not tried")[0]
    for family, why in re.findall(r"(?m)^\| (\S+) \| (.*) \|$", refusals):
        if family not in ("family", "---"):
            rows[family] = Row(family, refusal=why)
    return rows


def _line(row: Row, notes: dict[str, int]) -> str:
    shown = []
    for site in SITES:
        mark, reason = row.cells[site]
        if reason:
            mark += f" {notes.setdefault(reason, len(notes) + 1)}"
        shown.append(mark)
    return _cells([row.family, str(row.route), *shown])


def _cells(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"
