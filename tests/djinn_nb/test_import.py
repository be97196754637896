"""Importing the client costs little and does nothing."""

from __future__ import annotations

import subprocess
import sys

import djinn_nb
from djinn_nb.planned import PLANNED

HEAVY = ("torch", "transformers", "IPython", "ipywidgets", "matplotlib", "pandas", "tqdm")


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def test_importing_loads_nothing_heavy_prints_nothing_and_starts_nothing():
    code = (
        "import sys, threading, djinn_nb\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert threading.active_count() == 1\n"
    )

    done = _run(code)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_using_the_api_loads_no_model_library():
    code = (
        "import sys, djinn_nb\n"
        "djinn_nb.connect, djinn_nb.Session, djinn_nb.errors, djinn_nb.Edit\n"
        "heavy = [n for n in ('torch', 'matplotlib', 'pandas') if n in sys.modules]\n"
        "assert not heavy, heavy\n"
    )

    done = _run(code)

    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_is_there():
    for name in djinn_nb.__all__:
        assert getattr(djinn_nb, name) is not None

    assert set(djinn_nb.__all__) <= set(dir(djinn_nb))
    assert not hasattr(djinn_nb, "nonsense")
    assert djinn_nb.errors.StaleStop is not None


def test_no_planned_name_is_here_already():
    for owner, names in PLANNED.items():
        for name in names:
            assert name not in vars(getattr(djinn_nb, owner)), f"{owner}.{name} is here now"
