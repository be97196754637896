"""A small public door: what `djinn_nb` exports is what its `__all__` says, and no more."""

from __future__ import annotations

import inspect
import types

import djinn_nb

PROMISED = {"connect", "Server", "Session", "Stopped", "Finished", "DjinnError"}
#: modules a user may name, and what IPython looks for
BESIDES = {"errors", "__version__", "load_ipython_extension", "unload_ipython_extension"}


def test_every_name_of_all_can_be_imported():
    missing = [name for name in djinn_nb.__all__ if not hasattr(djinn_nb, name)]

    assert missing == []
    assert dir(djinn_nb) == sorted(djinn_nb.__all__)


def test_nothing_of_ours_is_public_without_being_in_all():
    ours = {
        name
        for name, value in vars(djinn_nb).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", "").partition(".")[0] in ("djinn_nb", "kernel_server")
    }

    assert ours - set(djinn_nb.__all__) == set()


def test_the_promised_names_are_exported():
    assert set(djinn_nb.__all__) >= PROMISED


def test_every_export_explains_itself():
    silent = [
        name
        for name in set(djinn_nb.__all__) - BESIDES
        if not (getattr(djinn_nb, name).__doc__ or "").strip()
    ]

    assert silent == []


def test_every_public_member_of_an_exported_class_explains_itself():
    classes = [
        kind for name in djinn_nb.__all__ if inspect.isclass(kind := getattr(djinn_nb, name))
    ]
    silent = [
        f"{kind.__name__}.{name}"
        for kind in classes
        for name, value in vars(kind).items()
        if not name.startswith("_")
        and (callable(value) or isinstance(value, property))
        and not inspect.getdoc(value)
    ]

    assert len(classes) > 8
    assert silent == []
