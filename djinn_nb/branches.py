"""The tree of a session's stops, as the user holds it: printed as a tree, or as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernel_server.protocol import messages as m

if TYPE_CHECKING:
    import pandas as pd


class Branches(list[m.NodeInfo]):
    """Where a session stood, each with what came after it; prints as a tree.

    `>` marks where it stands now, `~` a node whose forward is run again to return to it.

        session.branches().frame()
        session.go_to(session.branches()[2].number)
    """

    def __init__(self, found: m.Branches) -> None:
        super().__init__(found.nodes)
        self.session_id = found.session_id
        #: older nodes that are not listed; `rewind()` still reaches their places
        self.num_forgotten = found.num_forgotten

    def frame(self) -> pd.DataFrame:
        """A row per node: node, parent, forward, location, reason, tokens, edits, current, kept."""
        import pandas as pd

        rows = [
            {
                "node": node.number,
                "parent": node.parent,
                "forward": node.forward,
                "location": node.location,
                "reason": node.reason or node.status,
                "tokens": node.num_tokens,
                "edits": node.num_edits,
                "current": node.current,
                "kept": node.kept,
                "branch": node.branch,
            }
            for node in self
        ]
        found = pd.DataFrame(rows).set_index("node") if rows else pd.DataFrame(rows)
        if rows:
            found["parent"] = found["parent"].astype("Int64")
        return found

    def __repr__(self) -> str:
        if not self:
            return f"session {self.session_id} holds no nodes"
        children: dict[int | None, list[m.NodeInfo]] = {}
        for node in self:
            children.setdefault(node.parent, []).append(node)
        lines = [f"session {self.session_id}, {len(self)} nodes"]
        if self.num_forgotten:
            lines[0] += f", {self.num_forgotten} older ones not listed"
        # a straight way is not indented: it would leave the page; no recursion for the same reason
        waiting = [(node, 0) for node in reversed(children.get(None, []))]
        while waiting:
            node, depth = waiting.pop()
            lines.append(_line(node, depth))
            after = children.get(node.number, [])
            deeper = depth + (len(after) > 1)
            waiting += [(child, deeper) for child in reversed(after)]
        return "\n".join(lines)


def _line(node: m.NodeInfo, depth: int) -> str:
    mark = ">" if node.current else " " if node.kept else "~"
    where = f"{node.location}, forward {node.forward}" if node.location else "start"
    if node.status == "finished":
        where = f"finished, forward {node.forward}"
    elif node.status == "waiting" and node.forward:
        where = f"before forward {node.forward}"
    edits = f", {node.num_edits} edit{'s' * (node.num_edits != 1)}" if node.num_edits else ""
    why = f" ({node.reason})" if node.reason else ""
    return f"{mark} {'  ' * depth}{node.number}: {where}{why}, {node.num_tokens} tokens{edits}"
