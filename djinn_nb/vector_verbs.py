"""The verbs of named vectors: make one, keep one, remove one, measure one.

`verbs` lists these verbs with the others. How a vector follows from prompts is decided in
`vector_store`, what a strength curve is in `strength`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from djinn_nb.checks import whole
from djinn_nb.metrics import Probability
from djinn_nb.steps import Step, words
from kernel_server.protocol.errors import BadArgument

if TYPE_CHECKING:
    from djinn_nb.vector_store import VectorStore
    from djinn_nb.workbench import Workbench


def _named(bench: Workbench, name: str) -> VectorStore:
    if not isinstance(name, str) or not name.strip():
        raise BadArgument("write a name for the vector, such as joy")
    return bench.current.need_server().vectors


def make_vector(
    bench: Workbench,
    name: str = "",
    positive: Sequence[str] = (),
    negative: Sequence[str] = (),
    location: int | str | None = None,
    **wishes: Any,
) -> Step:
    """The direction from the negative prompts to the positive ones; location: None for the stop's.

    wishes: method, tokens, replace, as `server.vectors.from_prompts` takes them.
    """
    store = _named(bench, name)
    if not positive or not negative:
        raise BadArgument("write at least one positive and one negative prompt, one a line")
    place = store.place(bench.current.need_stop().location if location is None else location)
    given = {"location": place, **wishes}
    pair = [*positive], [*negative]
    return Step(
        f"make the vector {name}",
        f"server.vectors.from_prompts({name!r}, {pair[0]!r}, {pair[1]!r}, {words(given)})",
        lambda: store.from_prompts(name, *pair, **given),
        waits=True,
    )


def keep_vector(bench: Workbench, name: str = "", **wishes: Any) -> Step:
    """The value at the notebook's stop becomes a vector; wishes: tokens, replace."""
    store, stop = _named(bench, name), bench.current.need_stop()
    text = words(wishes)
    return Step(
        f"keep the vector {name}",
        f"server.vectors.from_stop({name!r}, stop{', ' if text else ''}{text})",
        lambda: store.from_stop(name, stop, **wishes),
    )


def remove_vector(bench: Workbench, name: str = "") -> Step:
    """A vector is removed from the server; edits made with it keep their numbers."""
    store = _named(bench, name)
    return Step(
        f"remove the vector {name}",
        f"del server.vectors[{name!r}]",
        lambda: store.__delitem__(name),
    )


def strength_curve(
    bench: Workbench,
    name: str = "",
    alphas: Sequence[float] = (),
    token: str | int | None = None,
    max_new_tokens: int = 8,
    inexact: bool = False,
) -> Step:
    """What a vector does to the current session's prompt at each strength, beside a control.

    token: whose probability is measured; None: texts alone.
    """
    store, session = _named(bench, name), bench.current.need_session()
    count = session.newest.num_prompt_tokens
    more: dict[str, Any] = {"max_new_tokens": whole(max_new_tokens, "max_new_tokens", least=1)}
    if inexact:
        more["inexact"] = True
    strengths = [*alphas]
    metric = None if token is None else Probability(token)
    measured = "" if token is None else f"Probability({token!r}), "
    lines = [] if token is None else ["from djinn_nb.metrics import Probability"]
    lines.append(
        f"curve = server.vectors[{name!r}].strength_curve([session.tokens[:{count}]],"
        f" {strengths!r}, {measured}{words(more)})"
    )

    def run() -> Any:
        prompt = list(session.newest.tokens[:count])
        return store[name].strength_curve([prompt], strengths, metric, **more)

    return Step(f"strengths of {name}", "\n".join(lines), run, waits=True)


#: verb -> how its step is made
VERBS: dict[str, Callable[..., Step]] = {
    "make_vector": make_vector,
    "keep_vector": keep_vector,
    "remove_vector": remove_vector,
    "strength_curve": strength_curve,
}
