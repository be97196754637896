"""One forward of one session as data: enough to go on, in this process or another. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from kernel_server.models.recording import Recording
from kernel_server.protocol.location import NOT_STARTED, Point, is_inner, site_of


@dataclass(slots=True)
class ForwardState:
    """One forward of one session: all that is needed to go on, besides its pages.

    token_ids: the tokens fed. start: tokens of the session computed before them.
    bounds: chunks as half-open ranges of this forward's tokens.
    residual: the residual stream at `point`, one [1, tokens, hidden] per chunk; inside a layer that
        layer's input; at the final norm and the logits still that of the last layer.
    final_norm: likewise, None where not computed. logits: [vocabulary], of the last token.
    site_value: at a point inside a layer its value, [1, tokens, channels] per chunk.
    injected: edited values by site of the layer the forward stands in; they are put in place when
        the layer runs again, and are gone once it is finished.
    layer_runs: runs of layers so far in this forward, each over all its chunks; a run that ended at
        a site counts as one. Those beyond the layers finished are replays.
    recording: a cache; `drop_cache` forgets it.

    Tensors are never written to; whoever changes a value puts new ones in their place.
    """

    token_ids: tuple[int, ...]
    start: int
    bounds: tuple[tuple[int, int], ...]
    point: Point = NOT_STARTED
    residual: list[Tensor] = field(default_factory=list)
    final_norm: list[Tensor | None] = field(default_factory=list)
    logits: Tensor | None = None
    site_value: list[Tensor] | None = None
    #: what the layer itself computed there, kept to see an edit undone
    unedited: list[Tensor] | None = None
    injected: dict[str, list[Tensor]] = field(default_factory=dict)
    layer_runs: int = 0
    recording: Recording | None = None

    def fork(self) -> ForwardState:
        """The same forward for another session; the tensors are shared."""
        return replace(
            self,
            residual=list(self.residual),
            final_norm=list(self.final_norm),
            site_value=None if self.site_value is None else list(self.site_value),
            unedited=None if self.unedited is None else list(self.unedited),
            injected={site: list(chunks) for site, chunks in self.injected.items()},
        )

    def drop_cache(self) -> None:
        """Forget what can be computed again from ids and positions."""
        self.recording = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that cannot be computed again."""
        return sum(tensor.nbytes for tensor in {id(t): t for t in self.tensors()}.values())

    def tensors(self) -> list[Tensor]:
        """The tensors that cannot be computed again, some of them twice."""
        kept = [*self.residual, *self.final_norm, self.logits, *(self.site_value or [])]
        put = list(self.injected.values())
        kept += [*(self.unedited or []), *(chunk for chunks in put for chunk in chunks)]
        return [tensor for tensor in kept if tensor is not None]

    def arrive(self, point: Point, value: list[Tensor]) -> None:
        """Stand at a point inside a layer, where the layer computed `value`."""
        self.point = point
        self.site_value, self.unedited = list(value), list(value)

    def put(self, chunks: list[Tensor]) -> None:
        """Take `chunks` for the value inside the layer; the unedited ones undo every edit of it."""
        assert self.unedited is not None and is_inner(self.point)
        site = site_of(self.point)
        self.site_value = chunks
        if all(a is b for a, b in zip(chunks, self.unedited, strict=True)):
            self.injected.pop(site, None)
        else:
            self.injected[site] = chunks

    def leave_layer(self) -> None:
        """The layer is finished: nothing inside it is of this forward any more."""
        self.site_value = self.unedited = None
        self.injected = {}
