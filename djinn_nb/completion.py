"""Tab completion of the magics: locations, breakpoint and edit ids, session names, flags.

Completing never waits long: names come from what is known here, sessions from one short call.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kernel_server.protocol.errors import DjinnError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from djinn_nb.magics import DjinnMagics

#: What the words of a magic are
_LOCATION = ("djinn_break", "djinn_run_to")
_SESSION = ("djinn_attach",)
_EDIT_WORDS = ("scale=", "add=", "set=", "zero=True", "alpha=", "tokens=", "channels=",
               "sticky=True", "location=")  # fmt: skip


class Completer:
    """Answers IPython's completion hook for lines that start with one of our magics."""

    def __init__(self, magics: DjinnMagics) -> None:
        self._magics = magics

    def install(self, shell: InteractiveShell) -> None:
        """Hook into the shell's completer."""
        shell.set_hook(  # type: ignore[no-untyped-call]
            "complete_command", self._hook, re_key=re.compile(r"^\s*%{1,2}djinn_")
        )

    def _hook(self, shell: Any, event: Any) -> list[str]:
        return self.words(event.line, event.symbol)

    def words(self, line: str, symbol: str) -> list[str]:
        """What may stand where `symbol` is being typed."""
        found = re.match(r"\s*%{1,2}(djinn_\w+)\s?(.*)$", line, re.DOTALL)
        if not found:
            return []
        magic = found[1]
        before = found[2][: len(found[2]) - len(symbol)] if symbol else found[2]
        previous = before.split()[-1] if before.split() else ""
        return [
            word for word in self._candidates(magic, symbol, previous) if word.startswith(symbol)
        ]

    def _candidates(self, magic: str, symbol: str, previous: str) -> list[str]:
        if symbol.startswith("-"):
            return self._magics.flags_of(magic)
        if previous == "--when":
            return ["any", "prefill", "decode"]
        if magic in _LOCATION:
            return self._locations()
        if magic == "djinn_breaks":
            return ["remove", "enable", "disable", "clear", *self._breakpoint_ids()]
        if magic == "djinn_edits":
            return ["remove", "enable", "disable", *self._edit_ids()]
        if magic in _SESSION:
            return self._sessions()
        if magic == "djinn_edit":
            return list(_EDIT_WORDS)
        if magic == "djinn_debug":
            return ["on", "off"]
        return []

    def _locations(self) -> list[str]:
        server = self._magics.server
        return (
            server.model.locations if server is not None else ["embedding", "final_norm", "logits"]
        )

    def _breakpoint_ids(self) -> list[str]:
        session = self._magics.session
        ids = [str(point.id) for point in session.newest.breakpoints] if session else []
        return ids or [str(i + 1) for i in range(len(self._magics.pending))]

    def _edit_ids(self) -> list[str]:
        session = self._magics.session
        return [str(edit.id) for edit in session.newest.edits] if session else []

    def _sessions(self) -> list[str]:
        server = self._magics.server
        try:
            return server.session_names() if server is not None else []
        except DjinnError:  # completion is not the place to tell of a lost connection
            return []
