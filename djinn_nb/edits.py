"""Edits as a user writes them, and the methods of a stop that make, ablate and undo them.

Only form is checked here, before anything is sent; whether an edit fits is decided by the server. A
patch from a stop of the same server names that stop, so that its numbers do not travel; any other
value is sent along.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from djinn_nb.checks import flag, shown, whole
from djinn_nb.client import CHUNK_BYTES, Opened
from djinn_nb.files import read_array
from djinn_nb.handles import Edit
from djinn_nb.selectors import number, plain_array, selector, value_array
from djinn_nb.variables import Variable
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import BadArgument, BadEdit
from kernel_server.protocol.location import parse_location

if TYPE_CHECKING:
    from djinn_nb.session import Session

#: What an edit does, by the argument that says so; exactly one is given.
KINDS: dict[str, m.EditKind] = {
    "scale": "scale", "add": "add", "set": "set", "zero": "zero", "clamp": "clamp",
    "project_out": "project_out", "mean": "mean", "swap": "swap", "patch": "set", "vector": "add",
    "force": "force", "ban": "ban", "replace": "replace",
}  # fmt: skip
#: What else an edit may be told.
OPTIONS = ("alpha", "tokens", "heads", "channels", "sticky", "location", "inexact")
_SWITCHES = ("zero", "mean", "swap")
_OF_NEXT_TOKEN = ("force", "ban", "replace")


class Place(Protocol):
    """A stop, as far as edits are concerned."""

    session: Session

    @property
    def number(self) -> int: ...

    @property
    def location(self) -> str: ...


class Editing:
    """The part of a stop that changes it."""

    def edit(
        self: Place,
        *,
        scale: object = None,
        add: object = None,
        set: object = None,
        zero: bool = False,
        clamp: object = None,
        project_out: object = None,
        mean: bool = False,
        swap: bool = False,
        patch: object = None,
        vector: str | None = None,
        force: object = None,
        ban: object = None,
        replace: object = None,
        alpha: float = 1.0,
        tokens: object = "all",
        heads: object = None,
        channels: object = None,
        sticky: bool = False,
        location: int | str | None = None,
        inexact: bool = False,
    ) -> Edit:
        """Change the value here, or at a `location` still ahead; exactly one of these:

        scale: a factor. add: a number, vector `[channels]` or `[tokens, channels]`, times `alpha`;
        or the name of a vector on the server, as `vector` is. set: likewise, instead of the value.
        zero: True. clamp: (least, largest), None for no bound. project_out: a direction
        `[channels]`, several `[directions, channels]`, or a vector's name. mean: True, the mean
        over the tokens. swap: True, two tokens change places. patch: a value of another stop, an
        array, a .npy or .safetensors path or (path, name): as many rows as tokens.
        Of the next token, at the logits: force: a token id or text. ban: one or several. replace:
        (token, the one instead).

        tokens: absolute positions (integer, slice, list; negative from the end), "prompt",
        "generated", "all" or a token's text. heads, channels: integer, slice or list. sticky: apply
        in later forwards too, without stopping. inexact: take a vector made on another model.

        Computed in float32 and rounded once. Raises BadEdit, BadSelector, StaleStop, UnknownVector;
        nothing is changed then.

            stop.edit(scale=0.9, tokens=-1)
            stop.edit(add=direction, alpha=4, tokens=" Mary", sticky=True)
            stop.edit(patch=other.hidden_states[-1], tokens=-1)
        """
        with Opened(self.session.client) as opened:
            spec = edit_spec(
                self,
                opened,
                scale=scale,
                add=add,
                set=set,
                zero=zero,
                clamp=clamp,
                project_out=project_out,
                mean=mean,
                swap=swap,
                patch=patch,
                vector=vector,
                force=force,
                ban=ban,
                replace=replace,
                alpha=alpha,
                tokens=tokens,
                heads=heads,
                channels=channels,
                sticky=sticky,
                location=location,
                inexact=inexact,
            )
            return _made(self, spec)

    def ablate(
        self: Place,
        *,
        layer: int,
        heads: object = None,
        neurons: object = None,
        mean: bool = False,
        tokens: object = "all",
        sticky: bool = False,
    ) -> Edit:
        """Take attention heads or neurons of a layer out: an edit of what they pass on.

        heads: of `attention.heads`; neurons: of `mlp.neurons`; one of the two, as integer, slice or
        list. mean: put their mean over the tokens there, instead of 0. The layer is ahead, or its
        site is where the session stands.

        Raises BadEdit where the layer has passed, NotSupported where a model has no such site.

            stop.ablate(layer=9, heads=[1, 4])
            stop.ablate(layer=9, neurons=slice(0, 64), mean=True, tokens="prompt")
        """
        if (heads is None) == (neurons is None):
            raise BadEdit("an ablation takes heads= or neurons=, one of the two")
        site = "mlp.neurons" if heads is None else "attention.heads"
        spec = m.EditSpec(
            kind="mean" if flag(mean, "mean") else "zero",
            location=_location(self, f"layers.{whole(layer, 'layer')}.{site}"),
            tokens=selector(tokens),
            heads=selector(heads, name="heads"),
            channels=selector(neurons, name="neurons"),
            sticky=flag(sticky, "sticky"),
        )
        return _made(self, spec)

    def undo(self: Place) -> None:
        """Undo the last edit made at this stop, exactly; raises UndoRefused when there is none.

        stop.edit(zero=True)
        stop.undo()
        """
        self.session.edit_call(m.UndoEdit(session_id=self.session.id, seen=self.number))


def edit_spec(stop: Place, opened: Opened, **wishes: Any) -> m.EditSpec:
    """What the arguments of `stop.edit()` mean, as the contract's plain data.

    A large value is sent ahead in chunks, once the rest is known to be in order; `opened` closes
    the transfer. Raises BadEdit, BadSelector, BadArgument.

        with Opened(session.client) as opened:
            spec = edit_spec(stop, opened, add=direction, alpha=4, tokens=-1)
    """
    if unknown := [name for name in wishes if name not in (*KINDS, *OPTIONS)]:
        raise BadArgument(f"an edit has no {unknown[0]}=; it has {', '.join((*KINDS, *OPTIONS))}")
    given = [
        name
        for name in KINDS
        if (wish := wishes.get(name)) is not None and not (name in _SWITCHES and wish is False)
    ]
    if len(given) != 1:
        raise BadEdit(
            f"an edit is exactly one of {', '.join(f'{name}=' for name in KINDS)}; "
            + (f"got {' and '.join(given)}" if given else "none was given")
        )
    (name,) = given
    kind, location = KINDS[name], wishes.get("location")
    alpha = number(wishes.get("alpha", 1.0), name="alpha")
    if kind != "add" and alpha != 1.0:
        raise BadEdit(f"alpha goes with add=; {name} takes none")
    if location is None:
        location = "logits" if kind in _OF_NEXT_TOKEN else stop.location
    spec = m.EditSpec(
        kind=kind,
        location=_location(stop, location),
        tokens=selector(wishes.get("tokens")),
        heads=selector(wishes.get("heads"), name="heads"),
        channels=selector(wishes.get("channels"), name="channels"),
        alpha=alpha,
        sticky=flag(wishes.get("sticky", False), "sticky"),
        inexact=flag(wishes.get("inexact", False), "inexact"),
    )
    spec = _with_argument(stop, spec, name, wishes[name])
    if spec.value is None or spec.value.nbytes <= CHUNK_BYTES:
        return spec
    label = f"{name} {list(spec.value.shape)}"
    upload_id = stop.session.client.upload(spec.value, label, opened)
    return replace(spec, value=None, upload_id=upload_id)


def _made(stop: Place, spec: m.EditSpec) -> Edit:
    message = m.AddEdit(session_id=stop.session.id, seen=stop.number, edit=spec)
    reply = stop.session.edit_call(message)
    assert reply.edit is not None
    return Edit(stop.session, reply.edit)


def _location(stop: Place, location: int | str) -> str:
    return str(parse_location(location, stop.session.client.model.num_layers))


def _with_argument(stop: Place, spec: m.EditSpec, name: str, wish: object) -> m.EditSpec:
    """The edit with what its one argument says."""
    if name in _SWITCHES:
        if wish is not True:
            raise BadEdit(f"{name} is True or left out, not {shown(wish)}")
        return spec
    if name == "scale":
        return replace(spec, factor=number(wish, name=name))
    if name == "clamp":
        least, most = _bounds(wish)
        return replace(spec, minimum=least, maximum=most)
    if name in _OF_NEXT_TOKEN:
        return _with_tokens(spec, name, wish)
    if name == "patch":
        return _with_patch(stop, spec, wish)
    if isinstance(wish, str):
        return replace(spec, vector=wish)
    if name == "vector":
        raise BadEdit(f"vector is the name of one on the server, not {shown(wish)}: use add=")
    return replace(spec, value=value_array(_flattened(wish), name=name))


def _bounds(wish: object) -> tuple[float | None, float | None]:
    wish = plain_array(wish)
    bounds = [*wish] if isinstance(wish, Iterable) and not isinstance(wish, str) else []
    if len(bounds) != 2:
        raise BadEdit(f"clamp is (least, largest), None for no bound, not {shown(wish)}")
    if bounds == [None, None]:
        raise BadEdit("clamp between None and None changes nothing: give a bound")
    least, most = (None if b is None else number(b, name="clamp") for b in bounds)
    return least, most


# --- the next token ---------------------------------------------------------------------------


def _with_tokens(spec: m.EditSpec, name: str, wish: object) -> m.EditSpec:
    wish = plain_array(wish)
    several = isinstance(wish, (Iterable, np.ndarray)) and not isinstance(wish, str)
    if isinstance(wish, np.ndarray) and not wish.ndim:
        wish, several = wish.item(), False
    named: list[Any] = [*wish] if several else [wish]  # type: ignore[misc]
    if name == "replace" and len(named) != 2:
        raise BadEdit(f"replace is (token, the one instead), ids or texts, not {shown(wish)}")
    if name == "force" and (several or not named):
        raise BadEdit(f"force is one token, its id or its text, not {shown(wish)}")
    if not named:
        raise BadEdit("ban names no token: give ids or texts")
    texts = [one for one in named if isinstance(one, str)]
    if texts and len(texts) != len(named):
        raise BadEdit(f"{name} takes ids or texts of tokens, not both: {shown(wish)}")
    if texts:
        return replace(spec, token_texts=tuple(texts))
    try:
        ids = tuple(whole(one, "a token id") for one in named)
    except BadArgument as error:
        raise BadEdit(f"{name}: {error}; a token is told by its id or its text") from None
    return replace(spec, token_ids=ids)


# --- values -----------------------------------------------------------------------------------


def _with_patch(stop: Place, spec: m.EditSpec, wish: object) -> m.EditSpec:
    """A `set` of as many rows as tokens: by the name of its stop, or by its numbers."""
    if isinstance(wish, Variable) and _on_same_server(stop, wish):
        return replace(spec, source=wish.as_patch())
    if isinstance(wish, (str, Path)):
        wish = read_array(wish)
    elif isinstance(wish, tuple) and len(wish) == 2 and isinstance(wish[0], (str, Path)):
        wish = read_array(wish[0], str(wish[1]))
    array = value_array(_flattened(wish), name="patch")
    if not array.shape:
        raise BadEdit("a patch is a vector [channels] or [tokens, channels]; set= takes a number")
    if len(array.shape) == 1 and not spec.sticky:
        array = Array(array.dtype, (1, *array.shape), array.data)
    return replace(spec, value=array)


def _on_same_server(stop: Place, value: Variable) -> bool:
    there = value._source.client.identity
    return there == stop.session.client.identity


def _flattened(value: object) -> object:
    """Heads and channels as one axis, after that of the tokens if there is one."""
    array = plain_array(value)
    if not isinstance(array, np.ndarray):
        return array
    if isinstance(value, Variable) and len(value._source.axes) == 3:
        return array.reshape(len(array), -1) if value._keep[0] else array.reshape(-1)
    return array.reshape(len(array), -1) if array.ndim == 3 and array.size else array
