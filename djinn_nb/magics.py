"""The magics: each reads its line and calls the Python API. Anything they do, Python can do.

What they act on (the notebook's server, session and stop) is kept by `current.Current`.
"""

# IPython's decorators carry no types
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import ast
import contextlib
import inspect
from typing import TYPE_CHECKING, Any

from IPython.core.magic import cell_magic, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from djinn_nb.checkpoints import is_checkpoint
from djinn_nb.connection import connect
from djinn_nb.current import Pending
from djinn_nb.handles import Breakpoint
from djinn_nb.notebook import debugging, set_debugging
from djinn_nb.session import Session
from djinn_nb.stop_magics import StopMagics
from kernel_server.protocol.conditions import parse_condition
from kernel_server.protocol.errors import (
    BadArgument,
    DjinnError,
    UnknownBreakpoint,
)
from kernel_server.protocol.location import parse_location

if TYPE_CHECKING:
    import pandas as pd


@magics_class
class DjinnMagics(StopMagics):
    """Stop a running transformer at a layer, look, edit, continue."""

    # -- connecting -----------------------------------------------------------------------

    @magic_arguments()
    @argument("address", nargs="?", help="host:port or unix:/path; none: the embedded server")
    @argument("--model", help="a local folder or hub id (starts an embedded server with it)")
    @argument("--device", help="cpu, cuda:0, ...")
    @argument("--dtype", help="float32, bfloat16 or float16")
    @argument("--token", help="access token; otherwise $DJINN_TOKEN or this user's token file")
    @argument("--option", action="append", default=[], metavar="NAME=VALUE",
              help="an option of the embedded server, such as kv_memory=2GiB")  # fmt: skip
    @line_magic
    def djinn_connect(self, line: str) -> None:
        """Connect to a server: %djinn_connect [ADDRESS]; without one, to the embedded server."""
        args = self._parse(self.djinn_connect, line)
        options: dict[str, Any] = {}
        for word in args.option:
            name, equals, text = word.partition("=")
            if not equals:
                raise BadArgument(f"--option takes NAME=VALUE, not {word!r}")
            options[name] = _literal(text)
        self._connect(
            args.address, token=args.token, model=args.model, device=args.device,
            dtype=args.dtype, **options,
        )  # fmt: skip

    @magic_arguments()
    @argument("model", help="a local folder or hub id, or a checkpoint that %%djinn_save wrote")
    @argument("--device", help="cpu, cuda:0, ...")
    @argument("--dtype", help="float32, bfloat16 or float16")
    @argument("--inexact", action="store_true",
              help="a checkpoint: also under another execution fingerprint")  # fmt: skip
    @line_magic
    def djinn_load(self, line: str) -> None:
        """Debug another model, in an embedded server that serves it; or go on with a checkpoint."""
        args = self._parse(self.djinn_load, line)
        if is_checkpoint(args.model):
            self._use(self.need_server().load(args.model, inexact=args.inexact))
            return
        self._connect(None, model=args.model, device=args.device, dtype=args.dtype)

    def _connect(self, address: str | None, **wishes: Any) -> None:
        with self.connecting(address):
            server = connect(address, **wishes)
        self.use_server(server)
        self.say(repr(server))

    # -- breakpoints ----------------------------------------------------------------------

    @magic_arguments()
    @argument("location", help="a layer number, or a name such as layers.3.input or logits")
    @argument(
        "--if",
        dest="condition",
        nargs="+",
        metavar="CONDITION",
        help="stop only if it holds for a token fed, e.g. 'token == \" to\" and norm > 30'",
    )
    @argument("--when", choices=("any", "prefill", "decode"), default="any",
              help="in which forwards (any)")  # fmt: skip
    @argument("--once", action="store_true", help="disable it after its first stop")
    @argument("--ignore", type=int, default=0, metavar="N", help="let the first N hits pass")
    @line_magic
    def djinn_break(self, line: str) -> None:
        """Stop at a location: in the current session, if it goes on, and in runs that follow."""
        args = self._parse(self.djinn_break, line, texts=("--if",))
        condition = " ".join(args.condition) if args.condition else None
        if condition is not None:
            parse_condition(condition)
        if args.ignore < 0:
            raise BadArgument(f"--ignore is a whole number from 0, not {args.ignore}")
        location = args.location
        if (server := self.server) is not None:
            location = str(parse_location(location, server.model.num_layers))
        pending = Pending(location, args.when, condition, args.ignore, args.once)
        session = self.session
        goes_on = session is not None and self.goes_on(session)
        if session is not None and goes_on:
            self.say(f"{pending.apply(session)!r} · in session {session.id} and later runs")
        else:
            parts = [f"break at {location}", *([f"if {condition}"] if condition else [])]
            self.say(" ".join(parts) + " · in runs that follow")
        if pending not in self.pending:
            self.pending.append(pending)

    @magic_arguments()
    @argument("action", nargs="?", choices=("remove", "enable", "disable", "clear"))
    @argument("ids", nargs="*", type=int, help="ids of breakpoints of the session")
    @line_magic
    def djinn_breaks(self, line: str) -> pd.DataFrame:
        """List breakpoints; %djinn_breaks remove|enable|disable ID, %djinn_breaks clear."""
        import pandas as pd

        args = self._parse(self.djinn_breaks, line)
        session = self.session
        points = session.breakpoints if session is not None and self.goes_on(session) else None
        if args.action is not None:
            self._change_breakpoints(args.action, args.ids, points)
            if points is not None and session is not None:
                points = session.breakpoints
        if points is None:
            rows = [
                {"id": i + 1, "location": p.location, "when": p.when, "if": p.condition or "",
                 "ignore": p.ignore, "once": p.once}
                for i, p in enumerate(self.pending)
            ]  # fmt: skip
            columns = ["id", "location", "when", "if", "ignore", "once"]
        else:
            infos = [point.info for point in points]
            rows = [
                {"id": i.id, "location": i.location, "when": i.when, "if": i.condition or "",
                 "ignore": i.ignore, "once": i.once, "enabled": i.enabled, "hits": i.hits,
                 "held": i.held, "stops": i.stops}
                for i in infos
            ]  # fmt: skip
            columns = ["id", "location", "when", "if", "ignore", "once", "enabled", "hits",
                       "held", "stops"]  # fmt: skip
        return pd.DataFrame(rows, columns=columns).set_index("id")

    def _change_breakpoints(
        self, action: str, ids: list[int], points: list[Breakpoint] | None
    ) -> None:
        if action == "clear":
            for point in points or ():
                point.remove()
            self.pending.clear()
            return
        if not ids:
            raise BadArgument(f"%djinn_breaks {action} needs an id; %djinn_breaks lists them")
        if points is None:
            self._change_pending(action, ids)
            return
        known = {point.id: point for point in points}
        if missing := [i for i in ids if i not in known]:
            raise UnknownBreakpoint(
                f"there is no breakpoint {missing[0]}; the session has {sorted(known) or 'none'}"
            )
        for i in ids:
            getattr(known[i], action)()
            if action == "remove":
                self.pending = [p for p in self.pending if not p.describes(known[i])]

    def _change_pending(self, action: str, ids: list[int]) -> None:
        if action != "remove":
            raise BadArgument(f"{action} needs a session; %djinn_breaks remove ID works now")
        if missing := [i for i in ids if not 1 <= i <= len(self.pending)]:
            raise UnknownBreakpoint(
                f"there is no breakpoint {missing[0]}; {len(self.pending)} are listed"
            )
        self.pending = [p for i, p in enumerate(self.pending) if i + 1 not in ids]

    # -- running --------------------------------------------------------------------------

    @magic_arguments()
    @argument("--max-new-tokens", type=int, default=32, metavar="N", help="(32)")
    @argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    @argument("--top-p", type=float, default=1.0, help="(1)")
    @argument("--seed", type=int, help="of the sampler")
    @argument("--name", help="a name for the session")
    @argument("--ids", action="store_true", help="the cell holds token ids: [1, 15, 8]")
    @argument("--no-special-tokens", action="store_true", help="add no BOS and the like")
    @argument("--stop-on-entry", action="store_true", help="stop after the embedding")
    @argument("--timeout", type=float, metavar="S", help="wait at most so many seconds")
    @cell_magic
    def djinn_run(self, line: str, cell: str) -> None:
        """Launch the cell's text with the breakpoints set, and run to the first stop."""
        args = self._parse(self.djinn_run, line)
        server = self.need_server()
        # Jupyter ends a cell with a line end that is not part of the prompt
        prompt: Any = cell.removesuffix("\n")
        if args.ids:
            prompt = _literal(prompt.strip())
        session = server.launch(
            prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            name=args.name,
            add_special_tokens=not args.no_special_tokens,
            stop_on_entry=args.stop_on_entry,
        )
        try:
            for pending in self.pending:
                pending.apply(session)
        except DjinnError:
            session.terminate()  # it never ran: nothing is lost
            raise
        self.bind("session", session)
        self.bind("stop", None)
        self.say(repr(session))
        if args.stop_on_entry:
            self.arrived(session.wait(timeout=args.timeout))
        else:
            self.arrived(session.continue_(timeout=args.timeout))

    @magic_arguments()
    @argument("--timeout", type=float, metavar="S", help="wait at most so many seconds")
    @line_magic
    def djinn_continue(self, line: str) -> None:
        """Run on until something stops the session, or it finishes."""
        args = self._parse(self.djinn_continue, line)
        self.arrived(self.need_session().continue_(timeout=args.timeout))

    @magic_arguments()
    @line_magic
    def djinn_next(self, line: str) -> None:
        """Run to the next layer's output."""
        self._parse(self.djinn_next, line)
        self.arrived(self.need_session().next())

    @magic_arguments()
    @line_magic
    def djinn_in(self, line: str) -> None:
        """Run to the next site, inside the layer or at its end."""
        self._parse(self.djinn_in, line)
        self.arrived(self.need_session().step_in())

    @magic_arguments()
    @line_magic
    def djinn_out(self, line: str) -> None:
        """Run to this forward's logits, before the next token is sampled."""
        self._parse(self.djinn_out, line)
        self.arrived(self.need_session().step_out())

    @magic_arguments()
    @argument("node", nargs="?", type=int, help="a node of session.branches() (the previous stop)")
    @line_magic
    def djinn_back(self, line: str) -> None:
        """Return to the previous stop, or to a node: %djinn_back [NODE]."""
        args = self._parse(self.djinn_back, line)
        session = self.need_session()
        stop = session.step_back() if args.node is None else session.go_to(args.node)
        if stop is None:
            self.say(repr(session))
        else:
            self.arrived(stop)

    @magic_arguments()
    @argument("location", help="a layer number or a name")
    @line_magic
    def djinn_run_to(self, line: str) -> None:
        """Run until a location is reached next."""
        args = self._parse(self.djinn_run_to, line)
        self.arrived(self.need_session().run_to(args.location))

    @magic_arguments()
    @line_magic
    def djinn_pause(self, line: str) -> None:
        """Stop a running session at the next layer boundary."""
        self._parse(self.djinn_pause, line)
        self.arrived(self.need_session().pause())

    @magic_arguments()
    @argument("--timeout", type=float, metavar="S", help="wait at most so many seconds")
    @line_magic
    def djinn_wait(self, line: str) -> None:
        """Wait for a session that runs, after an interrupt or a timeout."""
        args = self._parse(self.djinn_wait, line)
        self.arrived(self.need_session().wait(timeout=args.timeout))

    # -- sessions -------------------------------------------------------------------------

    @magic_arguments()
    @argument("--seed", type=int, help="another seed for the copy's sampler")
    @argument("--name", help="a name for the copy")
    @line_magic
    def djinn_fork(self, line: str) -> None:
        """Copy the session as it stands; the copy becomes the current one."""
        args = self._parse(self.djinn_fork, line)
        child = self.need_session().fork(args.seed, name=args.name)
        self._use(child)

    @magic_arguments()
    @argument("path", help="a folder that is not there yet")
    @line_magic
    def djinn_save(self, line: str) -> None:
        """Save the current session as a checkpoint, a folder on this machine."""
        args = self._parse(self.djinn_save, line)
        self.say(f"saved as {self.need_session().save(args.path)}")

    @magic_arguments()
    @argument("session", help="id or name; %%djinn_sessions lists them")
    @line_magic
    def djinn_attach(self, line: str) -> None:
        """Make a session of the server the current one."""
        args = self._parse(self.djinn_attach, line)
        self._use(self.need_server().attach(args.session))

    def _use(self, session: Session) -> None:
        self.bind("session", session)
        self.bind("stop", session.stop)
        self.say(repr(session))

    @magic_arguments()
    @line_magic
    def djinn_terminate(self, line: str) -> None:
        """End the current session and free what it holds."""
        self._parse(self.djinn_terminate, line)
        session = self.need_session()
        session.terminate()
        self.say(repr(session))

    @magic_arguments()
    @line_magic
    def djinn_sessions(self, line: str) -> pd.DataFrame:
        """List your sessions on this server."""
        self._parse(self.djinn_sessions, line)
        return self.need_server().sessions()

    @magic_arguments()
    @line_magic
    def djinn_memory(self, line: str) -> pd.DataFrame:
        """Where the server's memory is."""
        self._parse(self.djinn_memory, line)
        return self.need_server().memory()

    @magic_arguments()
    @line_magic
    def djinn_story(self, line: str) -> None:
        """What happened to the current session, line by line."""
        self._parse(self.djinn_story, line)
        self.say(repr(self.need_session().story()))

    @magic_arguments()
    @argument("names", nargs="*", help="tokens, sessions, edit, memory, … (all)")
    @line_magic
    def djinn_panel(self, line: str) -> Any:
        """Open panels: run, break, edit and go back with buttons; they follow the notebook."""
        from djinn_nb.panels import panels_on
        from djinn_nb.workbench import workbench

        return panels_on(workbench(self.shell), self._parse(self.djinn_panel, line).names)

    # -- help -----------------------------------------------------------------------------

    @magic_arguments()
    @argument("state", nargs="?", choices=("on", "off"))
    @line_magic
    def djinn_debug(self, line: str) -> None:
        """Show whole traces of errors (on), or one line (off)."""
        args = self._parse(self.djinn_debug, line)
        if args.state is not None:
            set_debugging(args.state == "on")
        self.say(f"whole traces: {'on' if debugging() else 'off'}")

    @line_magic
    def djinn_help(self, line: str) -> None:
        """List the magics; %djinn_help NAME tells of one."""
        name = line.strip().lstrip("%").removeprefix("djinn_")
        if not name:
            rows = [(call, _first_line(method)) for call, method in self._calls()]
            width = max(len(call) for call, _ in rows)
            self.say("\n".join(f"{call:<{width}}  {text}" for call, text in rows))
            return
        method = getattr(self, f"djinn_{name}", None)
        if method is None:
            raise BadArgument(f"there is no magic %djinn_{name}; %djinn_help lists them")
        parser = getattr(method, "parser", None)
        help_text = parser.format_help() if parser is not None else inspect.getdoc(method) or ""
        self.say(help_text.lstrip(":\n ").rstrip())

    def _calls(self) -> list[tuple[str, Any]]:
        """`%djinn_break` → its method, in the order written."""
        names = [name for owner in (DjinnMagics, StopMagics) for name in vars(owner)]
        return [
            (("%%" if name in self.magics["cell"] else "%") + name, getattr(self, name))
            for name in names
            if name.startswith("djinn_")
        ]

    def names_of_magics(self) -> list[str]:
        """What %djinn_help can tell of, for completion."""
        return [call.lstrip("%").removeprefix("djinn_") for call, _ in self._calls()]

    def flags_of(self, magic: str) -> list[str]:
        """The flags of a magic, for completion."""
        parser = getattr(getattr(self, magic, None), "parser", None)
        actions = parser._actions if parser is not None else []
        flags = [flag for action in actions for flag in action.option_strings]
        return sorted(flag for flag in flags if flag.startswith("--") and flag != "--help")


# the decorator lists the magics of one class only
for _kind, _names in StopMagics.magics.items():
    DjinnMagics.magics[_kind] |= _names


def _first_line(method: Any) -> str:
    """What a magic says of itself in one line."""
    parser = getattr(method, "parser", None)
    # IPython puts the usage before the docstring of a magic that has a parser
    text = parser.description if parser is not None else method.__doc__
    return str(text).strip().splitlines()[0]


def _literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text
