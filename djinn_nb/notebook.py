"""What `%load_ext djinn_nb` adds to IPython, and takes back: magics, completion, short errors."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from djinn_nb.waiting import Interrupted
from kernel_server.protocol.errors import DjinnError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from djinn_nb.magics import DjinnMagics

_DEBUG = "DJINN_DEBUG"


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics, their completion, and the one-line form of our errors."""
    from djinn_nb.completion import Completer
    from djinn_nb.magics import DjinnMagics

    magics = DjinnMagics(shell)
    shell.register_magics(magics)
    for event, told in _events(magics):
        shell.events.register(event, told)
    Completer(magics).install(shell)
    if getattr(shell, "kernel", None) is not None:
        from djinn_nb.comm_bridge import CommBridge
        from djinn_nb.workbench import workbench

        magics.bridge = CommBridge(workbench(shell))
    _show_figures(shell)
    for kind in (DjinnError, Interrupted):
        # IPython asks an exception for this name; see `_OneLine`
        kind._render_traceback_ = _OneLine()  # type: ignore[union-attr]


def _events(magics: DjinnMagics) -> tuple[tuple[str, Callable[..., None]], ...]:
    return (("pre_run_cell", magics.runs_a_cell), ("post_run_cell", magics.ran_a_cell))


def _show_figures(shell: InteractiveShell) -> None:
    """Show figures as pictures; `%matplotlib inline` does the same, later and instead."""
    from djinn_nb.plots import png

    if shell.display_formatter is None:
        return
    formatter = shell.display_formatter.formatters["image/png"]
    figure = ("matplotlib.figure", "Figure")
    if figure not in formatter.deferred_printers:
        formatter.for_type_by_name(*figure, png)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Disconnect, and take back magics, completion and the form of errors."""
    from djinn_nb.completion import Completer

    Completer.remove(shell)
    magics = shell.magics_manager.registry.pop("DjinnMagics", None)
    if magics is not None:
        for event, told in _events(magics):
            with contextlib.suppress(ValueError):
                shell.events.unregister(event, told)
        magics.close()
    for table in shell.magics_manager.magics.values():
        for name in [name for name in table if name.startswith("djinn")]:
            del table[name]
    for kind in (DjinnError, Interrupted):
        if "_render_traceback_" in vars(kind):
            del kind._render_traceback_  # type: ignore[union-attr]


def debugging() -> bool:
    """Whether errors are to show their whole trace."""
    return os.environ.get(_DEBUG, "").strip().lower() not in ("", "0", "off", "no", "false")


def set_debugging(on: bool) -> None:
    """Show whole traces from now on, or one line again."""
    if on:
        os.environ[_DEBUG] = "1"
    else:
        os.environ.pop(_DEBUG, None)


class _OneLine:
    """`_render_traceback_` of our errors; absent while debugging, so that IPython shows the trace.

    A descriptor, because IPython decides by `hasattr`.
    """

    def __get__(self, error: BaseException | None, owner: type) -> Any:
        if error is None:
            return self
        if debugging():
            _print_server_trace(error)
            raise AttributeError("_render_traceback_")
        return lambda: [error_line(error)]


def error_line(error: BaseException) -> str:
    """The error's class, its message, and where in the cell it came from."""
    name = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
    line = _cell_line(error.__traceback__)
    where = f" (line {line} of the cell)" if line is not None and line > 1 else ""
    return f"{name}: {error}{where}"


def _cell_line(trace: TracebackType | None) -> int | None:
    """The line of the user's cell that led here; None outside a cell."""
    for frame, line in traceback.walk_tb(trace):
        filename = frame.f_code.co_filename
        if "ipykernel_" in filename or filename.startswith("<ipython-input"):
            return line
    return None


def _print_server_trace(error: BaseException) -> None:
    trace = getattr(error, "server_traceback", None)
    if trace:
        print(f"--- on the server ---\n{trace}---------------------", file=sys.stderr)
