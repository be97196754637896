"""Tab completion of the magics: locations, breakpoint and edit ids, session names, flags.

Completing never waits long: names come from what is known here, sessions from one short call.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from IPython.core.completer import (
    CompletionContext,
    SimpleCompletion,
    SimpleMatcherResult,
    context_matcher,
)

from djinn_nb.edits import KINDS, OPTIONS
from kernel_server.protocol.errors import DjinnError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from djinn_nb.magics import DjinnMagics

#: Marks our matcher among those of a shell
_OURS = "from_djinn"
#: What the words of a magic are
_LOCATION = ("djinn_break", "djinn_run_to")
_SESSION = ("djinn_attach",)
_SWITCHES = ("zero", "mean", "swap", "sticky", "inexact")
_EDIT_WORDS = (*(f"{name}=" for name in (*KINDS, *OPTIONS) if name not in _SWITCHES),
               *(f"{name}=True" for name in _SWITCHES))  # fmt: skip


class Completer:
    """Answers IPython's completion hook for lines that start with one of our magics."""

    def __init__(self, magics: DjinnMagics) -> None:
        self._magics = magics

    def install(self, shell: InteractiveShell) -> None:
        """Add it to the shell's completer, where it speaks alone on a line of ours."""
        self.remove(shell)
        shell.Completer.custom_matchers.append(self._matcher)

    @staticmethod
    def remove(shell: InteractiveShell) -> None:
        """Take every one of these away from the shell's completer."""
        matchers = shell.Completer.custom_matchers
        matchers[:] = [one for one in matchers if not getattr(one, _OURS, False)]

    @property
    def _matcher(self) -> Any:
        @context_matcher()  # type: ignore[untyped-decorator]
        def djinn_matcher(context: CompletionContext) -> SimpleMatcherResult:
            line = context.line_with_cursor[: context.cursor_position]
            words = self.words(line, context.token)
            # without this IPython adds every keyword and built-in name
            return {
                "completions": [SimpleCompletion(text=word, type="djinn") for word in words],
                "suppress": bool(words),
                "ordered": True,
            }

        setattr(djinn_matcher, _OURS, True)
        return djinn_matcher

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
        if magic in ("djinn_edit", "djinn_preview"):
            return [*_EDIT_WORDS, *(("top_k=", "metric=") if magic == "djinn_preview" else ())]
        if magic == "djinn_debug":
            return ["on", "off"]
        if magic == "djinn_help":
            return self._magics.names_of_magics()
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
