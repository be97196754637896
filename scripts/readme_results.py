"""Write the results section of the README from committed records, so that no number is typed.

    python -m scripts.readme_results          # rewrites the section
    python -m scripts.readme_results --check  # exits 1 if the section is not what the records say

Reads, for every hardware folder under `notebooks/results/`:

- `summary.json`, written by `make evaluate` or `make evaluate-gpu` (form: `notebooks/evaluate.py`);
- `benchmarks.json`, written by `make bench`:
  `{"format": 1, "hardware": {"name": …, "versions": {…}}, "date": …, "benchmarks": [{"name": …,
  "value": …, "low": …, "high": …, "unit": …, "comparison": "<=", "limit": …, "repetitions": …,
  "passed": …}]}` where value is a median and low…high its quartiles; comparison and limit are null
  for a figure that has no aim.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "notebooks" / "results"
#: Longer tables of what was met are folded; what was missed is always in sight.
MOST_ROWS = 16
_TABLE = ("| criterion | value | must be |", "| --- | ---: | ---: |")
START, END = "<!-- results:start -->", "<!-- results:end -->"


def number(value: Any) -> str:
    """A figure for a table: counts whole, others with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def bound(entry: dict[str, Any]) -> str:
    """`<= 1.15`, in typography; a dash where nothing was aimed at."""
    if entry["comparison"] is None:
        return "–"
    sign = {"<=": "≤", ">=": "≥", "==": "=", "!=": "≠"}.get(entry["comparison"])
    return f"{sign or entry['comparison']} {number(entry['limit'])}"


def with_unit(text: str, entry: dict[str, Any]) -> str:
    unit = entry.get("unit") or ""
    return f"{text} {unit}".rstrip()


def heading(hardware: dict[str, Any], command: str) -> str:
    versions = hardware.get("versions", {})
    named = [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    return f"**{', '.join([hardware['name'], *named])}** (`{command}`)"


def evaluation(summary: dict[str, Any]) -> list[str]:
    """Verdicts of the notebooks, and every criterion with what it had to be."""
    notebooks = summary["notebooks"]
    full = any(entry["size"] == "full" for entry in notebooks.values())
    lines = [heading(summary["hardware"], "make evaluate-gpu" if full else "make evaluate"), ""]
    for name, entry in notebooks.items():
        controls = entry["controls"]
        caught = sum(control["outcome"] == "caught" for control in controls)
        lines += [
            f"`{name}`, size {entry['size']}, {entry['date'][:10]}: **{entry['verdict']}**."
            f" {entry['claim'].rstrip('.')}."
            f" {caught} of {len(controls)} planted faults caught.",
            "",
        ]
        missed, met = [], []
        for item in entry["criteria"]:
            value, aim = with_unit(number(item["value"]), item), bound(item)
            if item["passed"]:
                met.append(f"| {item['name']} | {value} | {aim} |")
            else:
                missed.append(f"| {item['name']} | {value} | {aim} (missed) |")
        met += [
            f"| {item['name']} | {item['outcome']}: {item['why']} | – |"
            for item in entry.get("unjudged", ())
        ]
        if missed:
            lines += [*_TABLE, *missed, ""]
        folded = len(met) > MOST_ROWS
        if folded:
            lines += [
                f"<details><summary>{len(met)} {'other ' if missed else ''}criteria</summary>",
                "",
            ]
        lines += [*_TABLE, *met, ""] if met else []
        lines += ["</details>", ""] if folded else []
    return lines


def benchmarks(record: dict[str, Any]) -> list[str]:
    """Medians with their spread, against what was aimed at."""
    lines = [
        heading(record["hardware"], "make bench BENCH_FLAGS=--write") + f", {record['date'][:10]}",
        "",
        "| benchmark | median | spread | repetitions | aim |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for item in record["benchmarks"]:
        spread = f"{number(item['low'])} – {number(item['high'])}"
        missed = "" if item["passed"] else " (missed)"
        lines.append(
            f"| {item['name']} | {with_unit(number(item['value']), item)} | {spread}"
            f" | {item['repetitions']} | {bound(item)}{missed} |"
        )
    return [*lines, ""]


def section(results: Path = RESULTS) -> str:
    """The text between the markers."""
    lines: list[str] = []
    for path in sorted(results.glob("*/summary.json")):
        lines += evaluation(json.loads(path.read_text(encoding="utf-8")))
    for path in sorted(results.glob("*/benchmarks.json")):
        lines += benchmarks(json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(lines).strip() or "No records yet."


def replaced(readme: str, text: str) -> str:
    """`readme` with `text` between the markers; ValueError if they are not there once each."""
    if readme.count(START) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must hold {START} and {END} once each")
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{text}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.readme_results")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    chosen = parser.parse_args(arguments)
    readme = README.read_text(encoding="utf-8")
    fresh = replaced(readme, section())
    if fresh == readme:
        return 0
    if chosen.check:
        print("README.md is stale: run python -m scripts.readme_results", file=sys.stderr)
        return 1
    README.write_text(fresh, encoding="utf-8")
    print("README.md: results section rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
