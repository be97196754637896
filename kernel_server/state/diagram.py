"""Draws STATUS.md from the table of moves: `python -m kernel_server.state.diagram`."""

from __future__ import annotations

from pathlib import Path

from kernel_server.protocol.messages import STATUSES
from kernel_server.state.sessions import MEANINGS, MOVES

PATH = Path(__file__).with_name("STATUS.md")


def status_diagram() -> str:
    """The page about session status, drawn from the table of moves."""
    lines = [
        "# Status of a session",
        "",
        "Drawn from `MOVES` in `sessions.py` by `python -m kernel_server.state.diagram`;",
        "a test fails when the two differ. Terminate ends a session in any status.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> waiting: launch",
    ]
    lines += [f"    {status}: {status}<br/>{MEANINGS[status]}" for status in STATUSES]
    lines += [f"    {start} --> {end}: {cause}" for (start, end), cause in MOVES.items()]
    lines += ["```", "", "A fork starts in its parent's status: waiting, stopped or finished.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PATH.write_text(status_diagram(), encoding="utf-8")
