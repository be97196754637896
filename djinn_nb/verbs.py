"""Where a click becomes Python: each verb of a panel or the sidebar, and the code that repeats it.

A verb does what its code does when it is run in a cell of the notebook, through the same public
calls; a test runs both and compares. Threads and notices are `workbench`'s work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from djinn_nb import edit_verbs, vector_verbs
from djinn_nb.checks import shown, whole
from djinn_nb.connection import connect
from djinn_nb.current import Pending
from djinn_nb.handles import Breakpoint
from djinn_nb.session import Session
from djinn_nb.steps import Step
from djinn_nb.workbench import Workbench
from kernel_server.protocol.conditions import parse_condition
from kernel_server.protocol.errors import BadArgument, UnknownBreakpoint
from kernel_server.protocol.location import parse_location


def perform(bench: Workbench, verb: str, **given: Any) -> Future[Any]:
    """Carry out a verb on the workbench; returns at once.

    Raises BadArgument for an unknown verb or argument, and what is refused before anything is
    sent; the rest becomes a notice and is in the future.

        perform(workbench(), "toggle_breakpoint", location="layers.20.output").result()
    """
    step = plan(bench, verb, given)
    return bench.do(step.label, step.code, step.run, waits=step.waits)


def plan(bench: Workbench, verb: str, given: Mapping[str, Any]) -> Step:
    """What a verb would do, and the code for it; nothing is done."""
    make = VERBS.get(verb)
    if make is None:
        raise BadArgument(f"there is no verb {shown(verb)}; known: {', '.join(VERBS)}")
    try:
        return make(bench, **given)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            raise BadArgument(f"verb {verb}: {error}") from None
        raise


# -- servers and sessions -------------------------------------------------------------------------


def _connect(bench: Workbench, address: str | None = None, token: str | None = None) -> Step:
    def run() -> None:
        with bench.connecting(address):
            bench.current.use_server(connect(address, token=token))

    where = "" if address is None else repr(address)
    # the token itself is never written down
    secret = "" if token is None else ", token=os.environ['DJINN_TOKEN']"
    code = f"import djinn_nb as djinn\nserver = djinn.connect({where}{secret})"
    if token is not None:
        code = f"import os\n{code}"
    label = "connect" if address is None else f"connect to {address}"
    return Step(label, code, run, waits=True)


def _launch(
    bench: Workbench,
    prompt: str = "",
    max_new_tokens: int = 24,
    temperature: float = 0.0,
    seed: int | None = None,
) -> Step:
    if not isinstance(prompt, str) or not prompt:
        raise BadArgument("write a prompt first")
    current, server = bench.current, bench.current.need_server()
    wishes: dict[str, Any] = {"max_new_tokens": whole(max_new_tokens, "max_new_tokens", least=1)}
    if temperature:
        wishes["temperature"] = temperature
    if seed is not None:
        wishes["seed"] = seed
    pending = list(current.pending)

    def run() -> Any:
        session = server.launch(prompt, **wishes)
        try:
            for one in pending:
                one.apply(session)
        except BaseException:
            session.terminate()  # it never ran: nothing is lost
            raise
        current.bind("session", session)
        current.bind("stop", None)
        return bench.arrived(session.continue_())

    words = "".join(f", {name}={value!r}" for name, value in wishes.items())
    lines = [f"session = server.launch({prompt!r}{words})"]
    lines += [f"session.break_at({_break_words(one)})" for one in pending]
    lines += ["stop = session.continue_()"]
    return Step("launch", "\n".join(lines), run, waits=True)


def _break_words(one: Pending) -> str:
    words = [repr(_short(one.location))]
    if one.when != "any":
        words.append(f"when={one.when!r}")
    if one.condition is not None:
        words.append(f"condition={one.condition!r}")
    if one.ignore:
        words.append(f"ignore={one.ignore}")
    if one.once:
        words.append("once=True")
    return ", ".join(words)


def _short(location: str) -> int | str:
    """`layers.20.output` as 20, as people write it."""
    parts = location.split(".")
    if len(parts) == 3 and parts[0] == "layers" and parts[2] == "output" and parts[1].isdigit():
        return int(parts[1])
    return location


def _attach(bench: Workbench, session: str = "") -> Step:
    server = bench.current.need_server()

    def run() -> Any:
        found = server.attach(session)
        bench.current.bind("session", found)
        return bench.arrived(found.stop)

    code = f"session = server.attach({session!r})\nstop = session.stop"
    return Step(f"look at {session}", code, run)


def _fork(bench: Workbench, seed: int | None = None) -> Step:
    session = bench.current.need_session()

    def run() -> Any:
        child = session.fork(seed)
        bench.current.bind("session", child)
        return bench.arrived(child.stop)

    words = "" if seed is None else f"seed={seed}"
    return Step("fork", f"session = session.fork({words})\nstop = session.stop", run)


def _terminate(bench: Workbench, session: str | None = None) -> Step:
    current = bench.current
    found = _session(bench, session)

    def run() -> None:
        found.terminate()
        if current.session is not None and current.session.id == found.id:
            current.bind("stop", None)

    return Step(f"terminate {found.id}", f"{_named(bench, session)}.terminate()", run)


def _session(bench: Workbench, session: str | None) -> Session:
    """The session named, or the current one."""
    mine = bench.current.session
    if session is None or (mine is not None and mine.id == session):
        return bench.current.need_session()
    return bench.current.need_server().attach(session)


def _named(bench: Workbench, session: str | None) -> str:
    """What to write for the session named, or the current one."""
    mine = bench.current.session
    if session is None or (mine is not None and mine.id == session):
        return "session"
    return f"server.attach({session!r})"


# -- running --------------------------------------------------------------------------------------


def _running(method: str, label: str) -> Callable[..., Step]:
    def make(bench: Workbench) -> Step:
        session = bench.current.need_session()
        return Step(
            label,
            f"stop = session.{method}()",
            lambda: bench.arrived(getattr(session, method)()),
            waits=True,
        )

    return make


def _run_to(bench: Workbench, location: int | str = "") -> Step:
    session, where = bench.current.need_session(), _place(bench, location)
    return Step(
        f"run to {where}",
        f"stop = session.run_to({_short(where)!r})",
        lambda: bench.arrived(session.run_to(where)),
        waits=True,
    )


def _rewind(bench: Workbench, forward: int = -1, location: int | str = "") -> Step:
    session, where = bench.current.need_session(), _place(bench, location)
    number = whole(forward, "forward", least=0)
    return Step(
        f"back to {where}",
        f"stop = session.rewind({number}, {_short(where)!r})",
        lambda: bench.arrived(session.rewind(number, where)),
        waits=True,
    )


def _go_to(bench: Workbench, node: int = -1) -> Step:
    session, number = bench.current.need_session(), whole(node, "node", least=0)
    return Step(
        f"go to node {number}",
        f"stop = session.go_to({number})",
        lambda: bench.arrived(session.go_to(number)),
        waits=True,
    )


def _look(bench: Workbench) -> Step:
    session = bench.current.need_session()
    return Step("look again", "stop = session.stop", lambda: bench.arrived(session.stop))


def _prune(bench: Workbench, node: int = -1) -> Step:
    session, number = bench.current.need_session(), whole(node, "node", least=0)
    return Step(f"prune node {number}", f"session.prune({number})", lambda: session.prune(number))


# -- breakpoints ----------------------------------------------------------------------------------


def _place(bench: Workbench, location: int | str) -> str:
    """A location in full; raises UnknownLocation where the model has none such."""
    server = bench.current.server
    if server is None:
        return str(location) if isinstance(location, str) else f"layers.{location}.output"
    return str(parse_location(location, server.model.num_layers))


def _live(bench: Workbench) -> Session | None:
    """The current session, if it can still meet a breakpoint."""
    session = bench.current.session
    return session if session is not None and bench.current.goes_on(session) else None


def _toggle_breakpoint(bench: Workbench, location: int | str = "") -> Step:
    """Plain breakpoints there are taken away, or one is set: here and in the runs that follow."""
    where, current = _place(bench, location), bench.current
    session = _live(bench)
    here = [] if session is None else [p for p in session.breakpoints if _is_at(p, where)]
    if here:

        def remove() -> None:
            for point in here:
                _forget(bench, point)

        ids = " ".join(str(point.id) for point in here)
        return Step(f"no breakpoint at {where}", f"%djinn_breaks remove {ids}", remove)
    coming = [i for i, one in enumerate(current.pending, 1) if one.location == where]
    if coming and session is None:

        def drop() -> None:
            current.pending = [one for one in current.pending if one.location != where]

        code = f"%djinn_breaks remove {' '.join(map(str, coming))}"
        return Step(f"no breakpoint at {where}", code, drop)
    return _set_breakpoint(bench, where)


def _forget(bench: Workbench, point: Breakpoint) -> None:
    """Remove a breakpoint, also from the runs that follow."""
    point.remove()
    current = bench.current
    current.pending = [one for one in current.pending if not one.describes(point)]


def _is_at(point: Breakpoint, where: str) -> bool:
    return bool(point.kind == "breakpoint" and point.location == where)


def _set_breakpoint(
    bench: Workbench,
    location: int | str = "",
    condition: str | None = None,
    when: str = "any",
    ignore: int = 0,
    once: bool = False,
) -> Step:
    where, current, session = _place(bench, location), bench.current, _live(bench)
    if condition is not None and not condition.strip():
        condition = None
    if condition is not None:
        parse_condition(condition)
    if when not in ("any", "prefill", "decode"):
        raise BadArgument(f"when is 'any', 'prefill' or 'decode', not {shown(when)}")
    pending = Pending(where, when, condition, whole(ignore, "ignore", least=0), once)

    def run() -> Any:
        made = None if session is None else pending.apply(session)
        if pending not in current.pending:
            current.pending.append(pending)
        bench.changed()
        return made

    words = [where, *(["--when", when] if when != "any" else []), *(["--once"] if once else [])]
    words += ["--ignore", str(ignore)] if ignore else []
    words += ["--if", condition] if condition else []
    return Step(f"break at {where}", f"%djinn_break {' '.join(words)}", run)


def _point(session: Session, id: int) -> Breakpoint:
    found = {point.id: point for point in session.breakpoints}
    if id not in found:
        raise UnknownBreakpoint(f"there is no breakpoint {id}; the session has {sorted(found)}")
    return found[id]


def _enable_breakpoint(bench: Workbench, id: int = -1, enabled: bool = True) -> Step:
    session = bench.current.need_session()
    method = "enable" if enabled else "disable"
    return Step(
        f"{method} breakpoint {id}",
        f"%djinn_breaks {method} {id}",
        lambda: getattr(_point(session, id), method)(),
    )


def _remove_breakpoint(bench: Workbench, id: int = -1) -> Step:
    session = bench.current.need_session()
    return Step(
        f"remove breakpoint {id}",
        f"%djinn_breaks remove {id}",
        lambda: _forget(bench, _point(session, id)),
    )


def _clear_breakpoints(bench: Workbench) -> Step:
    session, current = _live(bench), bench.current

    def run() -> None:
        for point in [] if session is None else session.breakpoints:
            point.remove()
        current.pending.clear()
        bench.changed()

    return Step("remove all breakpoints", "%djinn_breaks clear", run)


# -- pages ----------------------------------------------------------------------


def _evict(bench: Workbench, to: str = "host", session: str | None = None) -> Step:
    found = _session(bench, session)
    code = f"{_named(bench, session)}.evict(to={to!r})"
    return Step(f"evict to {to}", code, lambda: found.evict(to=to))


def _restore(bench: Workbench, session: str | None = None) -> Step:
    found = _session(bench, session)
    return Step("restore", f"{_named(bench, session)}.restore()", found.restore)


def _pin(bench: Workbench, pinned: bool = True, session: str | None = None) -> Step:
    found = _session(bench, session)
    label = "pin" if pinned else "let go"
    code = f"{_named(bench, session)}.pin({'' if pinned else 'False'})"
    return Step(label, code, lambda: found.pin(pinned))


#: verb -> how its step is made
VERBS: dict[str, Callable[..., Step]] = {
    "connect": _connect,
    "launch": _launch,
    "attach": _attach,
    "continue": _running("continue_", "continue"),
    "next": _running("next", "next layer"),
    "step_in": _running("step_in", "next site"),
    "step_out": _running("step_out", "to the logits"),
    "step_back": _running("step_back", "previous stop"),
    "pause": _running("pause", "pause"),
    "run_to": _run_to,
    "go_to": _go_to,
    "rewind": _rewind,
    "look": _look,
    "prune": _prune,
    "fork": _fork,
    "terminate": _terminate,
    "toggle_breakpoint": _toggle_breakpoint,
    "set_breakpoint": _set_breakpoint,
    "enable_breakpoint": _enable_breakpoint,
    "remove_breakpoint": _remove_breakpoint,
    "clear_breakpoints": _clear_breakpoints,
    **edit_verbs.VERBS,
    **vector_verbs.VERBS,
    "evict": _evict,
    "restore": _restore,
    "pin": _pin,
}


def insert_cell(bench: Workbench, code: str) -> str:
    """Put code in a new cell; returns where it goes.

    By the JupyterLab extension, below the active cell; without it by the kernel, which can do so
    only after the next cell that is run.
    """
    current = bench.current
    if current.bridge is not None and current.bridge.insert_cell(code):
        return "inserted below the active cell"
    if current.shell is not None:
        current.shell.set_next_input(code, replace=False)
    return "it comes below the next cell that you run"
