"""Djinn's client: stop a running transformer at a layer, look, edit, continue.

The public names, and nothing else: importing this module loads neither torch nor IPython, prints
nothing and starts nothing. Each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djinn_nb import logs, metrics
    from djinn_nb.alignment import Alignment, Pair, align
    from djinn_nb.connection import connect
    from djinn_nb.handles import Breakpoint, Edit
    from djinn_nb.logs import Logpoint
    from djinn_nb.notebook import load_ipython_extension, unload_ipython_extension
    from djinn_nb.panels import panel
    from djinn_nb.prompts import Sessions
    from djinn_nb.server import Server
    from djinn_nb.session import Session
    from djinn_nb.stopped import Finished, Stopped
    from djinn_nb.vectors import Vector
    from kernel_server.protocol import errors
    from kernel_server.protocol.errors import DjinnError

__version__ = "0.1.0"

#: public name -> module that holds it
_HOMES = {
    "Alignment": "djinn_nb.alignment",
    "Breakpoint": "djinn_nb.handles",
    "DjinnError": "kernel_server.protocol.errors",
    "Edit": "djinn_nb.handles",
    "Finished": "djinn_nb.stopped",
    "Logpoint": "djinn_nb.logs",
    "Pair": "djinn_nb.alignment",
    "Server": "djinn_nb.server",
    "Session": "djinn_nb.session",
    "Sessions": "djinn_nb.prompts",
    "Stopped": "djinn_nb.stopped",
    "Vector": "djinn_nb.vectors",
    "align": "djinn_nb.alignment",
    "connect": "djinn_nb.connection",
    "errors": "kernel_server.protocol",
    "load_ipython_extension": "djinn_nb.notebook",
    "logs": "djinn_nb",
    "panel": "djinn_nb.panels",
    "metrics": "djinn_nb",
    "unload_ipython_extension": "djinn_nb.notebook",
}

#: public names that are modules
_MODULES = ("errors", "logs", "metrics")

__all__ = [
    "Alignment",
    "Breakpoint",
    "DjinnError",
    "Edit",
    "Finished",
    "Logpoint",
    "Pair",
    "Server",
    "Session",
    "Sessions",
    "Stopped",
    "Vector",
    "__version__",
    "align",
    "connect",
    "errors",
    "load_ipython_extension",
    "logs",
    "metrics",
    "panel",
    "unload_ipython_extension",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'djinn_nb' has no attribute {name!r}")
    if name in _MODULES:
        value: Any = importlib.import_module(f"{home}.{name}")
    else:
        value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
