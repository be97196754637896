"""The magics of a stop: look, preview, edit, undo. Each reads its line and calls the Python API."""

# IPython's decorators carry no types
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from djinn_nb import arguments
from djinn_nb.current import Current
from djinn_nb.edits import KINDS, OPTIONS
from djinn_nb.selectors import PHASES
from kernel_server.protocol.errors import BadArgument, UnknownEdit

if TYPE_CHECKING:
    import pandas as pd

    from djinn_nb.attention import Attention
    from djinn_nb.attribution import Attribution
    from djinn_nb.previews import Preview


@magics_class
class StopMagics(Current):
    """What can be done where a session stands."""

    # -- looking and editing --------------------------------------------------------------

    @line_magic
    def djinn_edit(self, line: str) -> None:
        """Edit at the stop: scale=0.9 tokens=-1, or add=VARIABLE alpha=4, set=, zero=True, …

        All that stop.edit() takes: also clamp=(-1,1), project_out=, mean=True, swap=True, patch=,
        vector="name"; of the next token force=" Mary", ban=, replace=. Values are literals or names
        of variables; tokens=, heads= and channels= also take slices (3:7), tokens= also prompt,
        generated, all or a quoted token text. sticky=True, location=.
        """
        edit = self.need_stop().edit(**self._wishes("djinn_edit", line))
        self.say(repr(edit))

    @line_magic
    def djinn_preview(self, line: str) -> Preview:
        """What an edit would do to the next token: as %djinn_edit, and nothing is changed.

        All that %djinn_edit takes, and top_k=10, metric=VARIABLE (of djinn_nb.metrics).
        """
        wishes = self._wishes("djinn_preview", line, "top_k", "metric")
        return self.need_stop().preview(**wishes)

    def _wishes(self, magic: str, line: str, *more: str) -> dict[str, Any]:
        """The arguments of an edit that a line holds."""
        given = arguments.assignments(line)
        known = (*KINDS, *OPTIONS, *more)
        if unknown := [name for name in given if name not in known]:
            raise BadArgument(f"%{magic} has no {unknown[0]}=; known: {', '.join(known)}")
        values = {
            name: arguments.value_of(text, self.names, words=PHASES if name == "tokens" else ())
            for name, text in given.items()
            if name != "location"
        }
        if "location" in given:
            values["location"] = arguments.unquoted(given["location"])
        return values

    @magic_arguments()
    @argument("action", nargs="?", choices=("remove", "enable", "disable"))
    @argument("ids", nargs="*", type=int)
    @line_magic
    def djinn_edits(self, line: str) -> None:
        """List the session's edits; %djinn_edits remove|enable|disable ID."""
        args = self._parse(self.djinn_edits, line)
        session = self.need_session()
        known = {edit.id: edit for edit in session.edits}
        if args.action is not None and not args.ids:
            raise BadArgument(f"%djinn_edits {args.action} needs an id; %djinn_edits lists them")
        if missing := [i for i in args.ids if i not in known]:
            raise UnknownEdit(
                f"there is no edit {missing[0]}; the session has {sorted(known) or 'none'}"
            )
        for i in args.ids:
            getattr(known[i], args.action)()
        self.say("\n".join(map(repr, session.edits)) or "no edits")

    @magic_arguments()
    @line_magic
    def djinn_undo(self, line: str) -> None:
        """Undo the last edit made at this stop."""
        self._parse(self.djinn_undo, line)
        self.need_stop().undo()
        self.say("\n".join(map(repr, self.need_session().edits)) or "no edits")

    @magic_arguments()
    @argument("--top-k", type=int, default=5, metavar="K", help="candidates per row (5)")
    @argument("--tokens", default="-1", help="which tokens: -1, 3:7, prompt, ... (-1)")
    @argument("--layers", help="'all' or a list such as [0,5,10]: the last token at those layers")
    @line_magic
    def djinn_lens(self, line: str) -> pd.DataFrame:
        """Logit lens at the stop: which next tokens the residual stream already points to."""
        args = self._parse(self.djinn_lens, line)
        layers = args.layers
        if layers is not None and layers != "all":
            layers = arguments.value_of(layers, self.names)
        tokens = arguments.value_of(args.tokens, self.names, words=PHASES)
        return self.need_stop().lens(top_k=args.top_k, tokens=tokens, layers=layers)

    @magic_arguments()
    @argument("--layer", type=int, help="its number; none: the layer stopped in or after")
    @argument("--head", help="which heads: 3, 0:4 or [1,5] (all)")
    @argument("--tokens", default="all", help="which tokens: -1, 3:7, prompt, ... (all)")
    @line_magic
    def djinn_attention(self, line: str) -> Attention:
        """Attention weights of a layer of this forward, head by head."""
        args = self._parse(self.djinn_attention, line)
        head = None if args.head is None else arguments.value_of(args.head, self.names)
        tokens = arguments.value_of(args.tokens, self.names, words=PHASES)
        return self.need_stop().attention(args.layer, head, tokens)

    @magic_arguments()
    @argument("token", nargs="?", help="a text such as ' Mary', or an id; none: the largest logit")
    @argument("--against", metavar="TOKEN", help="another one: the parts of the difference")
    @line_magic
    def djinn_attribution(self, line: str) -> Attribution:
        """Which heads and MLPs make the next token's logit: %djinn_attribution [TOKEN]."""
        args = self._parse(self.djinn_attribution, line)
        token, against = (
            int(word) if word is not None and word.isdecimal() else word
            for word in (args.token, args.against)
        )
        return self.need_stop().attribution(token, against)

    def _parse(self, method: Any, line: str, texts: tuple[str, ...] = ()) -> Any:
        """The arguments of a magic's line; a mistake is one line with the usage."""
        try:
            return method.parser.parse_args(arguments.plain_words(line, texts))
        except UsageError as error:
            usage = " ".join(method.parser.format_usage().split()).lstrip(": ")
            raise UsageError(f"{error} · usage: {usage}") from None
