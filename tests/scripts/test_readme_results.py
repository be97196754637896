"""The results section is a function of the records, and names what was missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from notebooks.evaluate import _bare
from notebooks.harness.verdict import Control, Criterion, Unjudged
from scripts.readme_results import END, START, replaced, section

HARDWARE = {"name": "Some CPU", "versions": {"torch": "2.13.0", "transformers": "5.23.0"}}


def _write(folder: Path, name: str, content: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def _summary() -> dict:
    control = Control("a zeroed page", "kv", "bits that differ", changed=8, value=5, caught=True)
    return {
        "format": 1,
        "hardware": HARDWARE,
        "notebooks": {
            "01_resume_is_exact": {
                "verdict": "pass",
                "claim": "Stopping anywhere changes nothing.",
                "size": "smoke",
                "date": "2026-11-20T20:00:00",
                "criteria": [_bare(Criterion("bits that differ", 0, "==", 0).line())],
                "controls": [_bare(control.line())],
            }
        },
    }


def _benchmarks(passed: bool) -> dict:
    row = {"name": "decode ÷ stock", "value": 1.0712, "low": 1.05, "high": 1.09, "unit": ""}
    row |= {"comparison": "<=", "limit": 1.15, "repetitions": 30, "passed": passed}
    return {"format": 1, "hardware": HARDWARE, "date": "2026-11-20T20:00:00", "benchmarks": [row]}


def test_verdicts_and_criteria_are_shown_with_the_command_that_reproduces_them(tmp_path: Path):
    _write(tmp_path / "cpu", "summary.json", _summary())

    text = section(tmp_path)

    assert "**Some CPU, torch 2.13.0, transformers 5.23.0** (`make evaluate`)" in text
    assert "`01_resume_is_exact`, size smoke, 2026-11-20: **pass**." in text
    assert "1 of 1 planted faults caught" in text
    assert "| bits that differ | 0 | = 0 |" in text


def test_what_was_not_judged_is_shown_with_the_reason_and_not_as_passed(tmp_path: Path):
    summary = _summary()
    line = Unjudged("pageable memory is slower", "not applicable", "there is no GPU").line()
    summary["notebooks"]["01_resume_is_exact"]["unjudged"] = [_bare(line)]
    _write(tmp_path / "cpu", "summary.json", summary)

    text = section(tmp_path)

    assert "| pageable memory is slower | not applicable: there is no GPU | – |" in text


def test_long_tables_are_folded_but_for_what_was_missed(tmp_path: Path):
    summary = _summary()
    lines = [Criterion(f"met {n}", n, ">=", 0).line() for n in range(20)]
    late = Criterion("copies", 0.5, ">=", 0.95).line()
    summary["notebooks"]["01_resume_is_exact"]["criteria"] = [_bare(line) for line in lines]
    _write(tmp_path / "cpu", "summary.json", summary)
    assert "<details><summary>20 criteria</summary>" in section(tmp_path)
    summary["notebooks"]["01_resume_is_exact"]["criteria"].append(_bare(late))
    _write(tmp_path / "cpu", "summary.json", summary)

    shown, _, folded = section(tmp_path).partition("<details><summary>20 other criteria</summary>")
    assert "| copies | 0.5 | ≥ 0.95 (missed) |" in shown and "| copies" not in folded
    assert "| met 19 | 19 | ≥ 0 |" in folded and "| met" not in shown


@pytest.mark.parametrize(("passed", "aim"), [(True, "≤ 1.15 |"), (False, "≤ 1.15 (missed) |")])
def test_a_benchmark_is_shown_with_its_spread_and_whether_it_missed(
    tmp_path: Path, passed: bool, aim: str
):
    _write(tmp_path / "cpu", "benchmarks.json", _benchmarks(passed))

    text = section(tmp_path)

    assert f"| decode ÷ stock | 1.071 | 1.05 – 1.09 | 30 | {aim}" in text


def test_a_figure_without_an_aim_shows_a_dash(tmp_path: Path):
    record = _benchmarks(passed=True)
    record["benchmarks"][0] |= {"comparison": None, "limit": None}
    _write(tmp_path / "cpu", "benchmarks.json", record)

    assert "| 30 | – |" in section(tmp_path)


def test_only_the_text_between_the_markers_is_replaced():
    readme = f"before\n{START}\nold\n{END}\nafter\n"

    assert replaced(readme, "new") == f"before\n{START}\nnew\n{END}\nafter\n"


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="results:start"):
        replaced("no markers", "new")
