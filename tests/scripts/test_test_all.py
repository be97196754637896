"""`make test-all`: every test is in exactly one part; the last line is never green by mistake."""

from __future__ import annotations

import itertools
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from scripts.test_all import CANNOT_RUN, PARTS, REPORTS, Outcome, Part, read_report, run, summary

MARKERS = ("gpu", "slow", "notebook", "browser")


@pytest.mark.parametrize("marks", list(itertools.product([False, True], repeat=len(MARKERS))))
def test_a_test_with_any_marks_belongs_to_exactly_one_part(marks: tuple[bool, ...]):
    names = dict(zip(MARKERS, marks, strict=True))
    parts = [p.name for p in PARTS if p.selection and eval(p.selection, {}, names)]

    assert len(parts) == 1


def test_the_summary_adds_the_parts_up_in_pytests_words():
    line = summary([Outcome("fast", passed=10, skipped=2), Outcome("slow", passed=5)], 61.5)

    assert re.fullmatch(r"=+ 15 passed, 2 skipped in 61\.50s =+", line)


def test_a_failed_linter_shows_in_the_summary():
    line = summary([Outcome("mypy", ok=False), Outcome("fast", passed=10)], 1.0)

    assert "1 failed, 10 passed" in line


def test_a_report_is_counted_by_result(tmp_path: Path):
    suite = ElementTree.Element("testsuite", tests="9", failures="1", errors="2", skipped="3")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.ElementTree(root).write(tmp_path / "report.xml")
    outcome = Outcome("fast")

    read_report(tmp_path / "report.xml", outcome)

    assert (outcome.passed, outcome.failed, outcome.skipped) == (3, 3, 3)


def test_a_command_that_counts_tests_adds_to_the_sum():
    report = (
        "import sys; open(sys.argv[-1], 'w').write("
        '\'<testsuites><testsuite tests="4" failures="1" skipped="1"/></testsuites>\');'
        "sys.exit(1)"
    )

    REPORTS.mkdir(parents=True, exist_ok=True)
    outcome = run(Part("counting", (sys.executable, "-c", report), counted=True))

    assert (outcome.passed, outcome.failed, outcome.skipped) == (2, 1, 1)
    assert not outcome.ok
    assert "2 passed, 1 failed, 1 skipped" in outcome.line()


def test_a_part_whose_tools_are_missing_says_that_it_did_not_run():
    command = (sys.executable, "-c", f"import sys; sys.exit({CANNOT_RUN})")

    outcome = run(Part("counting", command, counted=True))

    assert outcome.ok
    assert "did NOT run" in outcome.line()
