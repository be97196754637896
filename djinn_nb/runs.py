"""Sessions made for one answer: run, read, and ended whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from djinn_nb.checks import shown
from djinn_nb.metrics import Metric
from djinn_nb.selectors import plain_array, selector
from djinn_nb.stopped import Finished, Stopped
from kernel_server.protocol.errors import (
    BadArgument,
    BadSelector,
    ConnectionFailed,
    DjinnError,
    UnknownSession,
)

if TYPE_CHECKING:
    from djinn_nb.session import Session

_T = TypeVar("_T")


@contextmanager
def ended(session: Session) -> Iterator[Session]:
    """The session, terminated at the end, also after an error or an interrupt.

    with ended(server.launch("Mary", max_new_tokens=1)) as session:
        session.continue_()
    """
    try:
        yield session
    finally:
        end(session)


def end(session: Session) -> None:
    """Terminate a session that may be gone already, or whose server cannot be reached."""
    with suppress(UnknownSession, ConnectionFailed):
        session.terminate()


def error_text(error: DjinnError | None) -> str:
    """An error as a table shows it; empty without one."""
    return "" if error is None else f"{error.code}: {error}"


def told(error: DjinnError, where: str) -> DjinnError:
    """The same error, which says where it happened."""
    return type(error)(f"{where}: {error.message}", **error.details)


def each(items: Sequence[_T], work: Callable[[_T], Any]) -> dict[int, DjinnError]:
    """Do the work for each item and return the errors, by index.

    What every item of several refuses in the same way is no matter of one item: it is raised.
    """
    errors: dict[int, DjinnError] = {}
    for index, item in enumerate(items):
        try:
            work(item)
        except DjinnError as error:
            errors[index] = error
    raise_if_all(list(errors.values()), len(items))
    return errors


def raise_if_all(errors: Sequence[DjinnError], count: int) -> None:
    """Raise the first of the errors if there are as many as items, and all of one kind."""
    if errors and len(errors) == count and len({error.code for error in errors}) == 1:
        raise errors[0]


def first_logits(session: Session) -> npt.NDArray[np.float32]:
    """Run a session to the logits of its prompt, before a token is drawn: float32 [vocabulary]."""
    stop = session.run_to("logits")
    while isinstance(stop, Stopped) and stop.location != "logits":
        stop = session.run_to("logits")  # a breakpoint on the way
    assert isinstance(stop, Stopped)
    return stop.value.numpy().reshape(-1)


def last_logits(session: Session) -> npt.NDArray[np.float32] | None:
    """Logits of the forward it stands in, at a stop at `logits`; else of the last finished one."""
    stop = session.stop if session.newest.status == "stopped" else None
    if stop is not None and stop.location == "logits":
        return stop.value.numpy().reshape(-1)
    return session.logits


def run_out(session: Session) -> Finished:
    """Run a session to its end, past every breakpoint."""
    found = session.continue_()
    while isinstance(found, Stopped):
        found = session.continue_()
    return found


def values_of(
    metrics: Sequence[Metric], logits: npt.NDArray[Any] | None, text: str
) -> dict[str, float]:
    """Each metric by name, of the logits or the text, whichever it is of."""
    found = {}
    for metric in metrics:
        if metric.of == "text":
            found[metric.name] = metric(text)
        elif logits is not None:
            found[metric.name] = metric(logits)
    return found


# -- the rows of a stop -------------------------------------------------------------------------


def rows_at(stop: Stopped, tokens: object) -> npt.NDArray[np.float32]:
    """The values of some tokens at a stop, `[rows, channels]`, heads flattened.

    tokens: a selector as of `stop.edit`, or several texts, of which any will do. Raises BadSelector
    when none of this forward's tokens is selected.
    """
    if stop.location == "logits":
        if selector(tokens) != selector(-1):
            raise BadSelector("at logits there is the last token's row only: leave tokens at -1")
        return stop.value.numpy().reshape(1, -1)
    rows = _selected_rows(stop, tokens)
    return np.asarray(stop.value[rows].numpy()).reshape(len(rows), -1)


def _selected_rows(stop: Stopped, tokens: object) -> list[int]:
    here = stop.tokens
    texts = _texts(tokens)
    if texts is not None:
        rows = [row for row, token in enumerate(here) if token.text in texts]
        if not rows:
            names = ", ".join(repr(text) for text in sorted(texts)[:5])
            raise BadSelector(f"none of the {len(here)} tokens has the text {names}")
        return rows
    wanted = selector(tokens)
    length, first = here[-1].position + 1, here[0].position
    prompt = stop.session.newest.num_prompt_tokens
    if wanted.kind == "indices":
        positions = [i + length if i < 0 else i for i in wanted.indices]
        if missing := [i for i in positions if not first <= i < length]:
            raise BadSelector(
                f"position {missing[0]} was not fed in this forward ({first} to {length - 1})"
            )
    elif wanted.kind == "slice":
        chosen = range(length)[slice(wanted.start, wanted.stop, wanted.step)]
        positions = [i for i in chosen if i >= first]
    else:
        limits = {"all": (0, length), "prompt": (0, prompt), "generated": (prompt, length)}
        start, end_ = limits[wanted.kind]
        positions = [token.position for token in here if start <= token.position < end_]
    if not positions:
        raise BadSelector(f"{shown(tokens)} selects none of the tokens of this forward")
    return [position - first for position in positions]


def _texts(tokens: object) -> frozenset[str] | None:
    """The texts meant, if texts are meant: one that is no phase, or several."""
    if isinstance(tokens, str):
        return None if selector(tokens).kind != "text" else frozenset({tokens})
    tokens = plain_array(tokens)
    if not isinstance(tokens, (list, tuple, set, frozenset)) or not tokens:
        return None
    texts = [one for one in tokens if isinstance(one, str)]
    if not texts:
        return None
    if len(texts) != len(tokens):
        raise BadArgument("tokens are positions or texts, not both in one list")
    return frozenset(texts)
