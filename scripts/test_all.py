"""Run every part of the tests, print the time of each, close on one summary of them all.

`make test-all`, and what CI runs. A part that fails does not keep the others from running; a part
that finds no test of its kind says so. What a machine cannot run (no GPU) is reported as skipped.
"""

from __future__ import annotations

import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "build" / "test-reports"
BIN = Path(sys.executable).parent
NO_TESTS = 5  # pytest's exit status when nothing was collected
CANNOT_RUN = 3  # of scripts.extension and scripts.ui_tests, where node or the browser is missing


@dataclass(frozen=True)
class Part:
    """One part: a name, and either a command or the pytest selection it stands for."""

    name: str
    command: tuple[str, ...] = ()
    selection: str = ""
    #: whether the command counts tests, and takes `--report PATH` for a JUnit report of them
    counted: bool = False


PARTS = (
    Part("ruff check", (str(BIN / "ruff"), "check", ".")),
    Part("ruff format", (str(BIN / "ruff"), "format", "--check", ".")),
    Part("mypy", (str(BIN / "mypy"),)),
    Part("extension", (sys.executable, "-m", "scripts.extension", "check"), counted=True),
    Part("fast", selection="not gpu and not slow and not browser"),
    Part("slow", selection="slow and not gpu and not browser"),
    Part("browser", selection="browser and not gpu"),
    Part("extension ui", (sys.executable, "-m", "scripts.ui_tests"), counted=True),
    Part("gpu", selection="gpu"),
)


@dataclass
class Outcome:
    """What a part did: its tests by result, its seconds, and whether it went well."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    ok: bool = True
    note: str = ""

    def line(self) -> str:
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        verdict = "ok  " if self.ok else "FAIL"
        return f"{verdict}  {self.name:<12} {self.seconds:8.1f} s  {self.note or counts}"


def read_report(path: Path, outcome: Outcome) -> None:
    """Add the counts of a JUnit report to `outcome`."""
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        outcome.failed += failed
        outcome.skipped += skipped
        outcome.passed += max(tests - failed - skipped, 0)


def run(part: Part) -> Outcome:
    """Run one part with its output passing through, and say how it went."""
    outcome = Outcome(part.name)
    report = REPORTS / f"{part.name.replace(' ', '-')}.xml"
    report.unlink(missing_ok=True)
    command = list(part.command) or [
        *(sys.executable, "-m", "pytest", "-q", "-m", part.selection, f"--junitxml={report}")
    ]
    if part.counted:
        command += ["--report", str(report)]
    print(f"\n──── {part.name}: {' '.join(command)}", flush=True)
    started = time.monotonic()
    status = subprocess.run(command, cwd=ROOT).returncode
    outcome.seconds = time.monotonic() - started
    if report.exists():
        read_report(report, outcome)
    if part.selection and status == NO_TESTS:
        # An empty part is fine only where there may be nothing to run yet.
        outcome.ok = part.name != "fast"
        outcome.note = "no test of this kind"
    elif part.counted and status == CANNOT_RUN:
        outcome.note = "did NOT run: its tools are not installed here (see above)"
    else:
        outcome.ok = status == 0
        if part.command and not part.counted:
            outcome.note = "clean" if outcome.ok else f"exit status {status}"
    return outcome


def summary(outcomes: list[Outcome], seconds: float) -> str:
    """The closing line, in the words of pytest: the sum over the parts.

    A linter that failed counts as one failure, so that the line never looks green by mistake.
    """
    failed = sum(o.failed or (0 if o.ok else 1) for o in outcomes)
    counts = {
        "failed": failed,
        "passed": sum(o.passed for o in outcomes),
        "skipped": sum(o.skipped for o in outcomes),
    }
    words = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f" {words or 'no tests ran'} in {seconds:.2f}s ".center(80, "=")


def main() -> int:
    REPORTS.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcomes = [run(part) for part in PARTS]
    print("\n──── time of each part")
    for outcome in outcomes:
        print(outcome.line())
    print(summary(outcomes, time.monotonic() - started), flush=True)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
