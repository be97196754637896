"""Start the embedded kernel server, then become JupyterLab on the tour.

`make lab`. The server is started through the client's own door with its defaults, so that the
`%djinn_connect` in the notebook finds the same server and not another. It outlives this process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import djinn_nb

ROOT = Path(__file__).parents[1]
TOUR = "notebooks/00_tour.ipynb"


def main(arguments: list[str]) -> None:
    """Replace this process by `jupyter lab`, with `arguments` added to its command line."""
    with djinn_nb.connect() as server:
        print(f"kernel server: {server.address}", flush=True)
    command = [sys.executable, "-m", "jupyter", "lab", f"--ServerApp.root_dir={ROOT}"]
    # The printed URL leads to the tour, not only the browser that Jupyter may open by itself.
    command.append(f"--LabApp.default_url=/lab/tree/{TOUR}")
    if os.geteuid() == 0:
        # Jupyter refuses root unless told; on a container's only user that says nothing new.
        command.append("--allow-root")
    os.execv(sys.executable, [*command, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
