"""Run the evaluation notebooks and write down every verdict.

    python -m notebooks.evaluate --size smoke|full [--only 01] [--results DIR]

Writes, under `results/<hardware>/`: `<notebook>.jsonl` (raw records), `executed/<notebook>.ipynb`
and `summary.json`. The summary is

    {"format": 1, "hardware": {…}, "notebooks": {"01_resume_is_exact": {
        "verdict": "pass" | "fail", "claim": …, "size": …, "date": …, "seconds": …, "why": […],
        "criteria": [{"name", "value", "comparison", "limit", "unit", "passed"}, …],
        "controls": [{"name", "group", "criterion", "changed", "value", "caught", "outcome"}, …],
        "unjudged": [{"name", "outcome": "not run" | "not applicable", "why"}, …],
        "records": "01_resume_is_exact.jsonl", "executed": "executed/01_resume_is_exact.ipynb"}}}

Notebooks left out by --only keep the entry they had. Exits 1 if a notebook that ran did not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SUMMARY_FORMAT = 1


def evaluation_notebooks(folder: Path = HERE, only: str | None = None) -> list[Path]:
    """Every notebook that carries a verdict, in order: all numbered ones but the tour, 00."""
    found = sorted(p for p in folder.glob("[0-9][0-9]_*.ipynb") if not p.name.startswith("00_"))
    return [path for path in found if only is None or path.stem.startswith(only)]


def evaluate(path: Path, size: str, results: Path, timeout_s: float) -> dict[str, Any]:
    """Execute one notebook and return its entry of the summary."""
    import papermill

    from notebooks.harness import hardware

    folder = results / hardware.describe(hardware.device_for(size))["slug"]
    record_file = folder / f"{path.stem}.jsonl"
    record_file.unlink(missing_ok=True)  # what is read below must be of this run
    executed = folder / "executed" / path.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    problem = None
    try:
        papermill.execute_notebook(
            path,
            executed,
            # Relative, so that no folder of this machine gets into the executed copy.
            parameters={"size": size, "results": os.path.relpath(results, path.parent)},
            kernel_name="python3",
            cwd=str(path.parent),
            progress_bar=False,
            execution_timeout=timeout_s,
            # What a kernel warns of at its start is no part of the evaluation.
            extra_arguments=["--log-level=ERROR"],
        )
    except papermill.PapermillExecutionError as error:
        problem = f"{error.ename}: {error.evalue}".splitlines()[0]
    except Exception as error:  # a dead kernel, a time limit: the entry says so
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    _forget_folders(executed)
    return entry(record_file, path.stem, size, time.monotonic() - began, problem)


def entry(
    record_file: Path, notebook: str, size: str, seconds: float, problem: str | None
) -> dict[str, Any]:
    """The summary of one run, from its record file; without a verdict line it has failed."""
    from notebooks.harness.records import read_lines

    lines = read_lines(record_file) if record_file.exists() else []
    header = next((line for line in lines if line["kind"] == "header"), {})
    last = next((line for line in reversed(lines) if line["kind"] == "verdict"), None)
    why = list(last["why"]) if last else []
    if problem is not None and not why:
        why = [problem]
    if last is None and problem is None:
        why = ["the notebook ended without a verdict"]
    return {
        "verdict": "pass" if last and last["verdict"] == "pass" and not why else "fail",
        "claim": header.get("claim", ""),
        "size": size,
        "date": header.get("date", ""),
        "seconds": round(seconds, 1),
        "why": why,
        "criteria": [_bare(line) for line in lines if line["kind"] == "criterion"],
        "controls": [_bare(line) for line in lines if line["kind"] == "control"],
        "unjudged": [_bare(line) for line in lines if line["kind"] == "unjudged"],
        "records": record_file.name,
        "executed": f"executed/{notebook}.ipynb",
    }


def write_summary(results: Path, size: str, entries: dict[str, dict[str, Any]]) -> Path:
    """Put the entries into the summary of this hardware, beside those of other notebooks."""
    from notebooks.harness import hardware

    described = hardware.describe(hardware.device_for(size))
    path = results / described["slug"] / "summary.json"
    kept = json.loads(path.read_text())["notebooks"] if path.exists() else {}
    summary = {
        "format": SUMMARY_FORMAT,
        "hardware": described,
        "notebooks": dict(sorted((kept | entries).items())),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _bare(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "kind"}


def _forget_folders(executed: Path) -> None:
    """Take from an executed notebook where on this machine it lay."""
    if not executed.exists():
        return
    notebook = json.loads(executed.read_text(encoding="utf-8"))
    told = notebook["metadata"].get("papermill", {})
    for key in ("input_path", "output_path"):
        if told.get(key):
            told[key] = Path(told[key]).name
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    # a traceback names the files it went through
    executed.write_text(text.replace(f"{HERE.parent}/", ""), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; the exit status is 0 only if all of it passed."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.evaluate")
    parser.add_argument("--size", choices=("smoke", "full"), default="smoke")
    parser.add_argument("--only", help="the beginning of a notebook's name, such as 01")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one cell")
    chosen = parser.parse_args(arguments)
    # A kernel started below must not see another thread count than a plain run.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    from notebooks.harness.hardware import device_for

    paths = evaluation_notebooks(only=chosen.only)
    if not paths:
        print(f"no evaluation notebook begins with {chosen.only!r}", file=sys.stderr)
        return 2
    try:
        device_for(chosen.size)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    entries: dict[str, dict[str, Any]] = {}
    for path in paths:
        print(f"{path.stem}, size {chosen.size} …", flush=True)
        found = evaluate(path, chosen.size, chosen.results.resolve(), chosen.timeout)
        entries[path.stem] = found
        print(f"  {found['verdict']} in {found['seconds']} s")
        for reason in found["why"]:
            print(f"  {reason}")
    summary = write_summary(chosen.results.resolve(), chosen.size, entries)
    print(f"written: {os.path.relpath(summary)}")
    return 0 if all(found["verdict"] == "pass" for found in entries.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
