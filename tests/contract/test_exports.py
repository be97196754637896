"""A small public door: what `djinn_nb` exports is what its `__all__` says, and no more."""

from __future__ import annotations

import types

import djinn_nb

PROMISED = {"connect", "Server", "Session", "Stopped", "Finished", "DjinnError"}


def test_all_is_what_the_package_exports():
    public = {
        name
        for name, value in vars(djinn_nb).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    # IPython's entry point, and what `from __future__` leaves behind
    public -= {"load_ipython_extension", "unload_ipython_extension", "annotations"}
    exported = set(djinn_nb.__all__) - {"__version__", "errors"}

    assert public - exported == set()
    assert {name for name in djinn_nb.__all__ if not hasattr(djinn_nb, name)} == set()


def test_the_promised_names_are_exported():
    assert set(djinn_nb.__all__) >= PROMISED


def test_every_export_explains_itself():
    silent = [
        name
        for name in djinn_nb.__all__
        if not name.startswith("_") and not (getattr(djinn_nb, name).__doc__ or "").strip()
    ]

    assert silent == []
