"""Run the tour without a browser and print it cell by cell, as one would have seen it.

`make demo`. The notebook runs in a real kernel of this environment; a failing cell, a notebook
without code or a kernel that dies ends the command with a non-zero status. Nothing is written back,
and the embedded server the notebook starts ends with the demo.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from scripts.private_runtime import private_runtime

TOUR = Path(__file__).parents[1] / "notebooks" / "00_tour.ipynb"
RULE = "─" * 80


def text_of(output: dict[str, Any]) -> str:
    """What a terminal can show of one cell output: streams, text/plain, or the error."""
    kind = output["output_type"]
    if kind == "stream":
        return str(output["text"])
    if kind == "error":
        return "\n".join(output["traceback"]) or f"{output['ename']}: {output['evalue']}"
    return str(output.get("data", {}).get("text/plain", ""))


def show(label: str, text: str) -> None:
    """Print `text` behind `label`, the following lines indented to match."""
    first, *rest = text.rstrip().splitlines() or [""]
    print(f"{label}{first}")
    for line in rest:
        print(f"{' ' * len(label)}{line}".rstrip())


def run(path: Path, timeout_s: float) -> int:
    """Execute the notebook at `path`, printing as it goes. Returns the exit status."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    kernel_environment = {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1"}
    client = NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        # What a kernel warns of at its start is no part of the tour.
        extra_arguments=["--log-level=ERROR"],
    )
    started = time.monotonic()
    cells = 0
    print(f"{RULE}\n{path.name}\n{RULE}", flush=True)
    with client.setup_kernel(env=kernel_environment):
        for index, cell in enumerate(notebook.cells):
            print()
            if cell.cell_type != "code":
                print(cell.source, flush=True)
                continue
            if not cell.source.strip():
                continue
            cells += 1
            show(f"In [{cells}]: ", cell.source)
            sys.stdout.flush()
            failure = None
            try:
                client.execute_cell(cell, index)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                failure = error
            for output in cell.outputs:
                label = f"Out[{cells}]: " if output["output_type"] == "execute_result" else "    "
                if text := text_of(output).rstrip():
                    show(label, text)
            sys.stdout.flush()
            if failure is not None:
                print(f"{RULE}\nfailed in code cell {cells}: {type(failure).__name__}")
                return 1
    if cells == 0:
        print(f"{path} has no code cell: nothing was shown")
        return 1
    print(f"{RULE}\n{cells} cells ran in {time.monotonic() - started:.1f} s")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.demo", description=__doc__)
    parser.add_argument("notebook", nargs="?", type=Path, default=TOUR)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one cell")
    chosen = parser.parse_args(arguments)
    if not chosen.notebook.is_file():
        print(f"no notebook at {chosen.notebook}", file=sys.stderr)
        return 2
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    with private_runtime():
        return run(chosen.notebook, chosen.timeout)


if __name__ == "__main__":
    sys.exit(main())
