"""Many prompts as one: the same breakpoints, edits and steps for each, and a table of what came.

What goes wrong with one prompt is told in its row, and the others go on; what every one of them
refuses in the same way is raised. Sessions are the server's; this file launches them, in waves when
an owner may not have as many at a time, and reads what is finished before ending it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from djinn_nb import ahead, cards
from djinn_nb.checks import shown, whole
from djinn_nb.handles import Breakpoint, Edit
from djinn_nb.metrics import Metric, metrics_on
from djinn_nb.misses import missed_by_all
from djinn_nb.progress import Progress
from djinn_nb.runs import end, error_text, last_logits, raise_if_all
from djinn_nb.stopped import Finished
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    BadArgument,
    DjinnError,
    NotFinished,
    NotStopped,
    OutOfPages,
    QuotaExceeded,
    UnknownSession,
)

if TYPE_CHECKING:
    import pandas as pd

    from djinn_nb.server import Server
    from djinn_nb.session import Session

_T = TypeVar("_T")

#: Logits kept of sessions that were ended to make room, bytes of all together.
KEPT_LOGITS_BYTES = 512 << 20


@dataclass
class _Item:
    """One prompt: its session once it is launched, what was read of it, and what went wrong."""

    prompt: Any
    session: Session | None = None
    error: DjinnError | None = None
    #: a breakpoint or an edit it was refused, and runs without
    refused: DjinnError | None = None
    #: what was read before its session was ended here
    read: Finished | None = None
    logits: npt.NDArray[np.float32] | None = None
    #: its session was ended here
    is_ended: bool = False

    @property
    def wrong(self) -> DjinnError | None:
        """What its row tells."""
        return self.error or self.refused

    @property
    def is_open(self) -> bool:
        """Whether anything can still be done with it."""
        return not self.is_ended and (self.session is None or not self.is_over)

    @property
    def is_over(self) -> bool:
        return self.session is not None and self.session.newest.status in ("finished", "failed")


class Sessions:
    """The sessions of a list of prompts; made by `server.launch([...])`.

    with server.launch(["Mary went", "John went"], max_new_tokens=8) as sessions:
        sessions.break_at(16)
        sessions.continue_().frame()
    sessions[0]                     # one of them, a Session
    """

    def __init__(
        self, server: Server, prompts: Sequence[Any], launch: Callable[[int, Any], Session]
    ) -> None:
        self._server = server
        self._launch = launch
        self._items = [_Item(prompt) for prompt in prompts]
        #: what each session gets when it is launched, in order
        self._recipe: list[Callable[[Session], object]] = []
        self._launch_first()

    # -- launching ------------------------------------------------------------------------

    def _launch_first(self) -> None:
        """Launch as many as there is room for; the others follow when some are finished."""
        for index, item in enumerate(self._items):
            try:
                item.session = self._launch(index, item.prompt)
            except QuotaExceeded as error:
                if index == 0:
                    raise
                for later in self._items[index:]:
                    later.error = error
                return
            except DjinnError as error:
                item.error = error
            except KeyboardInterrupt:
                self.terminate()
                raise
        raise_if_all(self.errors, len(self._items))

    def _require(self, item: _Item) -> Session:
        """The item's session, launched now if it was not, with all that the others have got."""
        if item.session is None:
            index = self._items.index(item)
            item.session = self._with_room(lambda: self._launch(index, item.prompt))
            for give in self._recipe:
                try:
                    give(item.session)
                except DjinnError as error:
                    item.refused = item.refused or error
        return item.session

    def _with_room(self, work: Callable[[], _T]) -> _T:
        """Do what needs room on the server, ending finished sessions of the list for it."""
        while True:
            try:
                return work()
            except (QuotaExceeded, OutOfPages):
                finished = next((i for i in self._items if i.is_over and not i.is_ended), None)
                if finished is None:
                    raise
                self._end(finished)

    def _end(self, item: _Item) -> None:
        """Read what a finished session has to show, and end it."""
        assert item.session is not None
        info = item.session.refresh()
        if info.status == "finished":
            item.read = Finished(item.session, info)
            held = sum(one.logits.nbytes for one in self._items if one.logits is not None)
            if held + 4 * self._server.model.vocab_size <= KEPT_LOGITS_BYTES:
                item.logits = item.session.logits
        end(item.session)
        item.is_ended = True

    # -- the same for each ----------------------------------------------------------------

    def break_at(self, location: int | str, **wishes: Any) -> list[Breakpoint]:
        """`session.break_at` for each; the breakpoints made."""
        return self._everywhere(lambda session: session.break_at(location, **wishes))

    def break_when(self, **watch: Any) -> list[Breakpoint]:
        """`session.break_when` for each; the breakpoints made.

        sessions.break_when(top_token=" Mary")
        """
        return self._everywhere(lambda session: session.break_when(**watch))

    def edit(self, **change: Any) -> list[Edit]:
        """`stop.edit` for each: where it is stopped, or ahead at `location` before it begins.

        sessions.edit(add=vector, alpha=2, location=16, sticky=True)
        """
        return self._everywhere(lambda session: ahead.edit(session, **change))

    def _everywhere(self, work: Callable[[Session], _T]) -> list[_T]:
        """Do it for each session that is not over, and for those still to be launched."""
        launched = [item for item in self._items if item.session is not None and item.is_open]
        waiting = [item for item in self._items if item.session is None]
        if not launched and not waiting:
            raise NotStopped("every session of the list is finished or ended: launch again")
        made: list[_T] = []

        def give(item: _Item) -> None:
            assert item.session is not None
            made.append(work(item.session))

        self._attempt(launched, give)
        for item in launched:
            item.refused = item.refused or item.error
        self._recipe.append(work)
        return made

    def _attempt(self, items: Sequence[_Item], work: Callable[[_Item], object]) -> None:
        """Do the work for each item; an error stays with its item, unless all have the same."""
        errors = []
        for item in items:
            try:
                work(item)
                item.error = None
            except DjinnError as error:
                item.error = error
                errors.append(error)
        if len(items) > 1 or len(self) == 1:  # the last one left is not all
            raise_if_all(errors, len(items))

    # -- running --------------------------------------------------------------------------

    def continue_(self, timeout: float | None = None) -> Sessions:
        """Run each on until something stops it, or it finishes; one after the other.

        timeout: seconds for each. Returns the sessions themselves, which show their table.
        """
        return self._move("continue", lambda session: session.continue_(timeout))

    def run_to(self, location: int | str, timeout: float | None = None) -> Sessions:
        """Run each until it reaches `location` next."""
        return self._move(f"to {location}", lambda session: session.run_to(location, timeout))

    def next(self, timeout: float | None = None) -> Sessions:
        """Run each to the next layer's output."""
        return self._move("next", lambda session: session.next(timeout))

    def step_out(self, timeout: float | None = None) -> Sessions:
        """Run each to the logits of its forward."""
        return self._move("step out", lambda session: session.step_out(timeout))

    def _move(self, label: str, move: Callable[[Session], object]) -> Sessions:
        moving = [item for item in self._items if item.is_open]
        if not moving:
            raise NotStopped("every session of the list is finished or ended: launch again")
        with Progress(f"{label}: {len(moving)} prompts", unit="prompt") as progress:
            done = 0

            def run(item: _Item) -> None:
                nonlocal done
                session = self._require(item)
                self._with_room(lambda: move(session))
                done += 1
                progress.at(done, len(moving))

            self._attempt(moving, run)
        return self

    def terminate(self) -> None:
        """End every session; the table goes on showing what was known of them."""
        for item in self._items:
            if item.session is not None and not item.is_ended:
                end(item.session)
                item.is_ended = True

    # -- what came ------------------------------------------------------------------------

    @property
    def errors(self) -> list[DjinnError]:
        """What went wrong last, of the prompts where something did."""
        return [item.wrong for item in self._items if item.wrong is not None]

    def frame(self, metric: object = None) -> pd.DataFrame:
        """One row per prompt: prompt, session, status, location, forward, text, tokens, …, error.

        text, tokens: what has been generated, and how many. metric: one or several of
        `djinn_nb.metrics`, of the text, or of logits: those a session stands at, else those its
        last token was drawn from. One that has no value is NaN, and the error says why.

        Raises BadArgument for a metric that no session can have.

            sessions.run_to("logits").frame(LogitDifference(" Mary", " John"))
        """
        import pandas as pd

        metrics = metrics_on(metric, self._server.model)
        self._server.sessions()  # one call for the newest of all
        rows, errors = [], []
        for item in self._items:
            row, error = self._row(item, metrics)
            rows.append(row)
            if error is not None:
                errors.append(error)
        raise_if_all(errors, len(rows))
        columns = [
            "prompt", "session", "status", "location", "forward", "text", "tokens",
            "finish_reason", *(one.name for one in metrics), "error",
        ]  # fmt: skip
        made = pd.DataFrame(rows, columns=columns)
        made.index.name = "number"
        return made

    def _row(
        self, item: _Item, metrics: Sequence[Metric]
    ) -> tuple[dict[str, Any], DjinnError | None]:
        row: dict[str, Any] = {"prompt": item.prompt, "error": error_text(item.wrong)}
        if item.session is None:
            return row | {"status": "not launched", "text": "", "tokens": 0}, None
        info = item.session.newest
        generated = info.tokens[info.num_prompt_tokens :]
        row |= {
            "session": info.id,
            "status": info.status,
            "location": info.location or "",
            "forward": info.forward,
            "tokens": len(generated),
            "finish_reason": info.finish_reason or "",
            "text": self._text(item, info, generated),
        }
        if info.error is not None and not row["error"]:
            row["error"] = f"{info.error.code}: {info.error.message}"
        for metric in metrics:
            try:
                row[metric.name] = self._value(item, metric, str(row["text"]))
            except DjinnError as error:
                row["error"] = error_text(error)
                return row, error
        return row, None

    def _text(self, item: _Item, info: m.SessionInfo, generated: tuple[int, ...]) -> str:
        if item.read is not None:
            return item.read.generated_text
        assert item.session is not None
        if info.status == "finished":
            return Finished(item.session, info).generated_text
        return item.session.client.text_of(generated) if generated else ""

    def _value(self, item: _Item, metric: Metric, text: str) -> float:
        if metric.of == "text":
            return metric(text)
        assert item.session is not None
        logits = item.logits
        if logits is None and item.is_ended:
            raise UnknownSession(
                f"session {item.session.newest.id} was ended, and its logits are not kept: run"
                " fewer prompts at a time"
            )
        if logits is None:
            logits = last_logits(item.session)
        if logits is None:
            raise NotFinished(f"session {item.session.id} has not come to logits yet: continue_()")
        return metric(logits)

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self._items)

    def __getitem__(self, number: int) -> Session:
        """The session of a prompt; one that could not be launched raises what was the matter."""
        if not -len(self) <= whole(number, "the number of a prompt") < len(self):
            raise IndexError(f"there are {len(self)} prompts, and none numbered {number}")
        item = self._items[number]
        if item.session is None:
            raise item.error or BadArgument(f"prompt {number} has not been launched yet")
        return item.session

    def __iter__(self) -> Iterator[Session]:
        """The sessions that have been launched."""
        return iter([item.session for item in self._items if item.session is not None])

    def __enter__(self) -> Sessions:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.terminate()

    def __repr__(self) -> str:
        statuses = [
            "not launched" if item.session is None else item.session.newest.status
            for item in self._items
        ]
        counts = ", ".join(f"{statuses.count(one)} {one}" for one in dict.fromkeys(statuses))
        wrong = f" · {len(self.errors)} with an error (.frame())" if self.errors else ""
        return "\n  ".join([f"Sessions of {len(self)} prompts: {counts}{wrong}", *self._missed()])

    def _repr_html_(self) -> str:
        table = str(self.frame().to_html(max_rows=60))
        return "".join([table, *map(cards.note, self._missed())])

    def _missed(self) -> list[str]:
        """Breakpoints and edits that did nothing where a session is finished."""
        infos = [item.session.newest for item in self._items if item.session is not None]
        return missed_by_all(info for info in infos if info.status == "finished")


def is_list_of_prompts(prompt: object) -> bool:
    """Whether several prompts are meant: texts, or lists of token ids. A flat list is one prompt.

    >>> is_list_of_prompts(["a", "b"]), is_list_of_prompts([[1, 2]]), is_list_of_prompts([1, 2])
    (True, True, False)
    """
    if isinstance(prompt, np.ndarray):
        return prompt.ndim > 1
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence) or not prompt:
        return False
    kinds = {isinstance(one, (str, Sequence, np.ndarray)) for one in prompt}
    if len(kinds) > 1:
        raise BadArgument(
            "a list of prompts holds texts or lists of token ids, and one prompt holds token ids:"
            f" {shown(prompt)} mixes them"
        )
    return kinds.pop()
