"""Panels of the notebook: sessions, breakpoints, layers, edits, …; linked by one workbench.

They are widgets, so they work in any Jupyter client; a saved notebook shows their static form.
What a click does is `verbs`' matter: each is Python that the panel shows and a cell can repeat.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from djinn_nb.checks import shown
from kernel_server.protocol.errors import BadArgument

if TYPE_CHECKING:
    from djinn_nb.panels.base import Panel
    from djinn_nb.workbench import Workbench

#: name -> class, in the order shown; each in the module of its name
PANELS = {
    "sessions": "SessionsPanel",
    "breakpoints": "BreakpointsPanel",
    "tokens": "TokensPanel",
    "layers": "LayersPanel",
    "attention": "AttentionPanel",
    "activation": "ActivationPanel",
    "edit": "EditPanel",
    "branches": "BranchesPanel",
    "memory": "MemoryPanel",
}


def panel(*names: str) -> Any:
    """Panels of this notebook by name, or all of them linked; shown as the last line of a cell.

    names: those of `PANELS`, such as "sessions" or "edit". Raises BadArgument for another name, and
    outside IPython.

        djinn.panel()
        djinn.panel("edit")
    """
    from djinn_nb.workbench import workbench

    return panels_on(workbench(), names)


def panels_on(bench: Workbench, names: Sequence[str]) -> Any:
    """Panels of a workbench; all of them without names."""
    from djinn_nb.panels.base import Panels

    if unknown := [name for name in names if name not in PANELS]:
        raise BadArgument(f"there is no panel {shown(unknown[0])}; known: {', '.join(PANELS)}")
    made = [_class(name)(bench) for name in names or PANELS]
    return made[0] if len(made) == 1 else Panels(made)


def _class(name: str) -> type[Panel]:
    module = importlib.import_module(f"djinn_nb.panels.{name}")
    found: type[Panel] = getattr(module, PANELS[name])
    return found
