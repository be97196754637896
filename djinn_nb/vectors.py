"""A named vector as the user holds it: its numbers, how it was made, and adding it to a run.

How one is made is decided in `vector_store`; `strength` measures what one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from djinn_nb.checks import flag
from djinn_nb.handles import Edit
from djinn_nb.selectors import number, selector
from djinn_nb.stopped import Finished, Stopped
from kernel_server.protocol import messages as m
from kernel_server.protocol import vector_file
from kernel_server.protocol.errors import BadArgument, NotStopped, WrongModel

if TYPE_CHECKING:
    from djinn_nb.session import Session
    from djinn_nb.strength import StrengthCurve
    from djinn_nb.vector_store import VectorStore


class Vector:
    """A direction with how it was made; from `server.vectors`.

    joy = server.vectors["joy"]
    joy.apply(session, alpha=2, tokens="all")
    joy.strength_curve(prompts, alphas=[-2, 0, 2], metric=Probability(" happy")).frame
    """

    def __init__(
        self, store: VectorStore, info: m.VectorInfo, array: npt.NDArray[np.float32]
    ) -> None:
        self._store = store
        self.info = info
        self._array = array

    @property
    def name(self) -> str:
        """What it is kept under: `server.vectors[name]`."""
        return self.info.name

    @property
    def location(self) -> str:
        """Where its values come from, such as `layers.16.output`."""
        return self.info.location

    @property
    def norm(self) -> float:
        """Its L2 norm."""
        return self.info.norm

    @property
    def shape(self) -> tuple[int]:
        """`[channels]`."""
        return (self.info.width,)

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was made: method, prompts or their hash, tokens, date, version of Djinn."""
        return dict(self.info.provenance)

    @property
    def is_of_this_model(self) -> bool:
        """Whether it was made on the weights that the server has loaded."""
        return self.info.weights == self._store.weights

    def numpy(self, *, inexact: bool = False) -> npt.NDArray[np.float32]:
        """Its numbers `[channels]`, your own copy.

        Raises WrongModel when it was made on other weights, unless `inexact`.
        """
        self._check_model(inexact)
        return self._array.copy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        values = self.numpy()
        return values if dtype is None else values.astype(dtype)

    def __len__(self) -> int:
        return self.info.width

    def apply(
        self,
        where: Session | Stopped,
        alpha: float = 1.0,
        *,
        tokens: object = "all",
        location: int | str | None = None,
        sticky: bool = True,
        inexact: bool = False,
    ) -> Edit:
        """Add it, times `alpha`, to the values at its location, from where the session stands on.

        where: a stop, or a session that is stopped or has not begun. location: elsewhere than where
        it was made. sticky: in later forwards too. inexact: use one of another model, if as wide;
        the edit says so.

        Raises WrongModel, UnknownVector, BadEdit, BadSelector, StaleStop.

            edit = server.vectors["joy"].apply(session, alpha=2)
        """
        if isinstance(where, Finished):
            raise NotStopped(f"session {where.session.id} is finished: launch again, apply, run")
        self._check_model(inexact)
        self._check_newest()
        session = where.session if isinstance(where, Stopped) else where
        seen = where.number if isinstance(where, Stopped) else session.refresh().stop_number
        spec = m.EditSpec(
            kind="add",
            location=self.location if location is None else self._store.place(location),
            tokens=selector(tokens),
            alpha=number(alpha, name="alpha"),
            vector=self.name,
            inexact=inexact,
            sticky=flag(sticky, "sticky"),
        )
        reply = session.edit_call(m.AddEdit(session_id=session.id, seen=seen, edit=spec))
        assert reply.edit is not None
        return Edit(session, reply.edit)

    def strength_curve(
        self,
        prompts: Sequence[Any],
        alphas: Sequence[float],
        metric: object = None,
        *,
        max_new_tokens: int = 24,
        tokens: object = "all",
        location: int | str | None = None,
        seed: int = 0,
        inexact: bool = False,
    ) -> StrengthCurve:
        """What it does at each strength, beside a random direction of the same norm as control.

        metric: one or several of `djinn_nb.metrics`, of the logits of the prompt's last token, or
        of the text that follows. seed: of the random direction; generation is greedy.

        Raises what `apply` and `launch` raise; what goes wrong in some runs only is in their rows.

            curve = joy.strength_curve(prompts, [-2, 0, 2], Probability(" happy"))
            curve.frame, curve.plot()
        """
        from djinn_nb.strength import measure

        return measure(
            self,
            self._store.server,
            prompts,
            alphas,
            metric,
            max_new_tokens=max_new_tokens,
            tokens=tokens,
            location=location,
            seed=seed,
            inexact=inexact,
        )

    def save(self, path: str | Path) -> Path:
        """Write it, with how it was made, to a file of safetensors, and return the path.

        A file that is there is replaced in one step.
        """
        from safetensors.numpy import save

        target = Path(path).expanduser()
        if target.suffix != ".safetensors":
            target = target.with_name(target.name + ".safetensors")
        metadata = vector_file.metadata_of(self.info, self._array)
        draft = target.with_name(f".{target.name}.draft")
        try:
            draft.write_bytes(save({vector_file.TENSOR: self._array}, metadata=metadata))
            draft.replace(target)
        except OSError as error:
            raise BadArgument(f"{target} cannot be written: {error.strerror or error}") from error
        return target

    def _check_model(self, inexact: bool) -> None:
        if self.is_of_this_model or flag(inexact, "inexact"):
            return
        raise WrongModel(
            f"vector {self.name!r} was made on {self.info.model or 'a model not told'} (weights"
            f" {self.info.weights[:12] or 'unknown'}), this server has {self._store.model}"
            f" (weights {self._store.weights[:12]}): make it anew here, or pass inexact=True to use"
            " it as numbers"
        )

    def _check_newest(self) -> None:
        """What is applied is the vector the server has: it must be the one that is held here."""
        newest = self._store[self.name]
        if newest.info != self.info or not np.array_equal(newest._array, self._array):
            raise BadArgument(
                f"vector {self.name!r} has been replaced on the server since this one was read:"
                f" take server.vectors[{self.name!r}] again"
            )

    def __repr__(self) -> str:
        return vector_line(self.info, self._store.weights)


def vector_line(info: m.VectorInfo, weights: str) -> str:
    """A vector in one line."""
    if info.broken is not None:
        return f"vector {info.name!r}: {info.broken}"
    parts = [f"vector {info.name!r} [{info.width}]", f"norm {info.norm:.4g}", info.location]
    if method := info.provenance.get("method"):
        parts.append(str(method).replace("_", " "))
    if note := note_of(info, weights):
        parts.append(note)
    return " · ".join(part for part in parts if part)


def note_of(info: m.VectorInfo, weights: str) -> str:
    if info.broken is not None:
        return info.broken
    return "" if info.weights == weights else f"made on {info.model or 'another model'}"
