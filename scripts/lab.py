"""Start the embedded kernel server, then become JupyterLab on the tour.

`make lab`. The server is started through the client's own door with its defaults, so that the
`%djinn_connect` in the notebook finds the same server and not another. It outlives this process.
The lab shows the extension as this checkout has it built, whatever is installed.
The lab asks nobody for news or updates unless its user's settings say so: no request leaves the
machine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import djinn_nb
from scripts.extension import PREBUILT

ROOT = Path(__file__).parents[1]
TOUR = "notebooks/00_tour.ipynb"
#: Defaults of the lab, below the user's own settings; JupyterLab reads them from a config folder.
CONFIG = ROOT / "scripts" / "lab_config"


def main(arguments: list[str]) -> None:
    """Replace this process by `jupyter lab`, with `arguments` added to its command line."""
    with djinn_nb.connect() as server:
        print(f"kernel server: {server.address}", flush=True)
    command = [sys.executable, "-m", "jupyter", "lab"]
    # Jupyter takes one value: another folder on the command line stands instead of ours.
    if not any(argument.startswith("--ServerApp.root_dir") for argument in arguments):
        command.append(f"--ServerApp.root_dir={ROOT}")
    # The printed URL leads to the tour, not only the browser that Jupyter may open by itself.
    command.append(f"--LabApp.default_url=/lab/tree/{TOUR}")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(
        [str(PREBUILT), *filter(None, [os.environ.get("JUPYTER_PATH")])]
    )
    if os.geteuid() == 0:
        # Jupyter refuses root unless told; on a container's only user that says nothing new.
        command.append("--allow-root")
    paths = [os.environ.get("JUPYTER_CONFIG_PATH", ""), str(CONFIG)]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(path for path in paths if path)
    os.execv(sys.executable, [*command, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
