"""The verbs that change values: edits, ablations and patches, and previews of them.

A preview takes the verb and the arguments of a click, so that what is shown before is what Apply
does. `verbs` lists these verbs with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from djinn_nb.checks import shown, whole
from djinn_nb.previews import Preview
from djinn_nb.runs import ended
from djinn_nb.session import Session
from djinn_nb.sites import axes_at
from djinn_nb.steps import Step, words
from djinn_nb.stopped import Stopped
from djinn_nb.variables import Variable
from kernel_server.protocol.errors import BadArgument, NotStopped, UnknownNode

if TYPE_CHECKING:
    from djinn_nb.workbench import Workbench

#: Verbs that change the value at the stop, and can be previewed.
CHANGES = ("edit", "ablate", "patch")
#: argument of an ablation -> the site it empties
_ABLATED = {"heads": "attention.heads", "neurons": "mlp.neurons"}


def edit(bench: Workbench, **wishes: Any) -> Step:
    """`stop.edit(**wishes)` at the notebook's stop; wishes hold plain values only."""
    stop = bench.current.need_stop()
    text = words(wishes)
    return Step(f"edit: {text}", f"stop.edit({text})", lambda: stop.edit(**wishes))


def ablate(bench: Workbench, **wishes: Any) -> Step:
    """`stop.ablate(**wishes)`: heads or neurons of a layer ahead."""
    stop = bench.current.need_stop()
    text = words(wishes)
    return Step(f"ablate: {text}", f"stop.ablate({text})", lambda: stop.ablate(**wishes))


def patch(
    bench: Workbench,
    session: str | None = None,
    node: int | None = None,
    rows: Any = None,
    **wishes: Any,
) -> Step:
    """An edit with the value of another place: of a session that is stopped, or of a node.

    rows: absolute positions of that place's tokens, None for those of `tokens`.
    """
    stop = bench.current.need_stop()
    source = _Source(bench, stop, session, node, rows, wishes)
    text = words(wishes)
    last = f", {text}" if text else ""
    line = f"stop.edit(patch={source.code}{last})"

    def run() -> Any:
        with source.value() as value:
            return stop.edit(patch=value, **wishes)

    code = line if node is None else f"other = session.fork()\n{line}\nother.terminate()"
    return Step(f"patch from {source.name}", code, run, waits=node is not None)


def preview(
    bench: Workbench, stop: Stopped, verb: str, given: Mapping[str, Any], *, top_k: int
) -> Preview:
    """What a verb of `CHANGES` would do to the next token; changes nothing.

    preview(workbench(), stop, "edit", {"scale": 0.5, "tokens": -1}, top_k=8).kl
    """
    wishes = dict(given)
    if verb == "edit":
        return stop.preview(**wishes, top_k=top_k)
    if verb == "ablate":
        return stop.preview(**_as_edit(wishes), top_k=top_k)
    if verb != "patch":
        raise BadArgument(f"{shown(verb)} cannot be previewed; {', '.join(CHANGES)} can")
    places = {name: wishes.pop(name, None) for name in ("session", "node", "rows")}
    source = _Source(bench, stop, **places, wishes=wishes)
    with source.value() as value:
        return stop.preview(patch=value, **wishes, top_k=top_k)


def _as_edit(wishes: dict[str, Any]) -> dict[str, Any]:
    """An ablation in the words of `stop.edit()`."""
    made = {name: value for name, value in wishes.items() if name in ("tokens", "sticky")}
    for name, site in _ABLATED.items():
        if name in wishes:
            made["location"] = f"layers.{wishes.get('layer')}.{site}"
            made["heads" if name == "heads" else "channels"] = wishes[name]
    return {"mean" if wishes.get("mean") else "zero": True, **made}


class _Source:
    """The value of another place, as a patch takes it, and how it is written."""

    def __init__(
        self,
        bench: Workbench,
        stop: Stopped,
        session: str | None,
        node: int | None,
        rows: Any,
        wishes: Mapping[str, Any],
    ) -> None:
        if (session is None) == (node is None):
            raise BadArgument("a patch comes from a session or from a node: choose one of the two")
        self._stop, self._server = stop, bench.current.need_server()
        self._session, self._node = session, node
        location, first = self._place()
        tokens = wishes.get("tokens") if rows is None else rows
        chosen = [_rows(tokens, first)]
        if "head" in axes_at(self._server.client.model, location):
            chosen.append(_part(wishes.get("heads")))
        chosen.append(_part(wishes.get("channels")))
        while chosen and chosen[-1] == slice(None):
            chosen.pop()
        self._key = tuple(chosen)
        place = f"other.go_to({node})" if session is None else f"server.attach({session!r}).stop"
        index = ", ".join(_index(one) for one in chosen)
        self.code = f"{place}.value" + (f"[{index}]" if index else "")
        self.name = f"node {node}" if session is None else f"session {session}"

    def _place(self) -> tuple[str, int]:
        """The location there, and the absolute position of its tensor's first row."""
        if self._session is not None:
            client = self._server.client
            info = client.mirror.newest(self._session) or client.describe(self._session)
            if info.stop is None or info.status != "stopped":
                raise NotStopped(
                    f"session {self._session} is {info.status}: a patch comes from one that is"
                    " stopped; run it to a place first"
                )
            last_only = info.stop.location == "logits"
            return info.stop.location, (
                info.stop.end_token - 1 if last_only else info.stop.first_token
            )
        session, number = self._stop.session, whole(self._node, "node", least=0)
        found = next((n for n in session.branches() if n.number == number), None)
        if found is None:
            raise UnknownNode(f"session {session.id} has no node {number}")
        if found.location is None:
            raise NotStopped(f"node {number} stands nowhere: choose one at a location")
        first = session.newest.num_prompt_tokens + found.forward - 1
        whole_prompt = found.forward == 0 and found.location != "logits"
        return found.location, 0 if whole_prompt else first

    @contextmanager
    def value(self) -> Iterator[Variable]:
        """The value, as long as it is needed: a node is gone to in a fork, ended afterwards."""
        if self._session is not None:
            yield self._of(self._server.attach(self._session).stop)
            return
        assert self._node is not None
        with ended(self._stop.session.fork(name="patch")) as other:
            yield self._of(_at(other, self._node))

    def _of(self, there: Stopped | None) -> Variable:
        if there is None:
            raise NotStopped(f"{self.name} is not stopped any more: choose another source")
        return there.value[self._key] if self._key else there.value


def _at(session: Session, node: int) -> Stopped | None:
    found = session.go_to(node)
    return found if isinstance(found, Stopped) else None


def _rows(tokens: Any, first: int) -> Any:
    """Rows of a tensor whose row 0 is token `first`, of absolute positions."""
    if tokens is None or tokens == "all":
        return slice(None)
    if tokens in ("prompt", "generated"):
        raise BadArgument(
            f"say which tokens of the source are taken: {tokens!r} may be others there"
        )
    if isinstance(tokens, slice):
        return slice(_row(tokens.start, first), _row(tokens.stop, first), tokens.step)
    if isinstance(tokens, (list, tuple)):
        return [_row(one, first) for one in tokens]
    return _row(tokens, first)


def _row(position: Any, first: int) -> Any:
    if type(position) is not int or position < 0:
        return position
    if position < first:
        raise BadArgument(
            f"token {position} was fed before the place the patch comes from, which has tokens"
            f" from {first} on"
        )
    return position - first


def _part(chosen: Any) -> Any:
    return slice(None) if chosen is None or chosen == "all" else chosen


def _index(one: Any) -> str:
    """A part of an index as it is written.

    >>> _index(slice(3, None)), _index([0, 2])
    ('3:', '[0, 2]')
    """
    if not isinstance(one, slice):
        return repr(list(one) if isinstance(one, tuple) else one)
    bounds = ["" if bound is None else str(bound) for bound in (one.start, one.stop)]
    return ":".join(bounds if one.step is None else [*bounds, str(one.step)])


# -- edits that are made already ----------------------------------------------------------------


def undo(bench: Workbench) -> Step:
    """The last edit made at this stop is taken back."""
    stop = bench.current.need_stop()
    return Step("undo the last edit", "stop.undo()", stop.undo)


def enable_edit(bench: Workbench, id: int = -1, enabled: bool = True) -> Step:
    """An edit is switched on or off."""
    return _on_edit(bench, id, "enable" if enabled else "disable")


def remove_edit(bench: Workbench, id: int = -1) -> Step:
    """An edit is taken out of the list."""
    return _on_edit(bench, id, "remove")


def _on_edit(bench: Workbench, id: int, method: str) -> Step:
    session = bench.current.need_session()
    found = next((one for one in session.edits if one.id == id), None)
    if found is None:
        raise BadArgument(f"there is no edit {id}; %djinn_edits lists them")
    return Step(
        f"{method} edit {id}",
        f"next(e for e in session.edits if e.id == {id}).{method}()",
        getattr(found, method),
    )


#: verb -> how its step is made
VERBS: dict[str, Callable[..., Step]] = {
    "edit": edit,
    "ablate": ablate,
    "patch": patch,
    "undo": undo,
    "enable_edit": enable_edit,
    "remove_edit": remove_edit,
}
