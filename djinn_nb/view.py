"""What a display of a stop shows, as plain data: fetched here, drawn elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from djinn_nb.looking import read_capture
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import DjinnError

if TYPE_CHECKING:
    from djinn_nb.stopped import Stopped

LENS_ROWS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LensRow:
    """One candidate for the next token."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StopView:
    """All that a display of a stop shows."""

    model: m.ModelInfo
    session: m.SessionInfo
    stop: m.StopInfo
    #: texts of the tokens of this forward
    texts: tuple[str, ...]
    #: the tensor's figures in one line
    summary: str
    #: float32 [locations, tokens]
    norm: npt.NDArray[np.float32]
    norm_locations: tuple[str, ...]
    norm_first_token: int
    lens: tuple[LensRow, ...]
    lens_position: int
    #: nats
    lens_entropy: float
    #: why there is no lens here; empty when there is
    lens_refusal: str = ""


def stop_view(stopped: Stopped) -> StopView:
    """Fetch what the display of a stop needs: four small answers."""
    client = stopped.session.client
    info = stopped.session.refresh()
    summary = stopped.value.summary()
    capture = read_capture(stopped)
    lens: tuple[LensRow, ...] = ()
    position, entropy, refusal = 0, 0.0, ""
    try:
        reply = stopped._lens(LENS_ROWS, -1, None)
    except DjinnError as error:
        refusal = str(error)
    else:
        ids, probabilities = reply.token_ids.numpy()[0], reply.probabilities.numpy()[0]
        lens = tuple(
            LensRow(token_id=int(i), text=text, probability=float(p))
            for i, text, p in zip(ids, reply.texts[0], probabilities, strict=True)
        )
        position, entropy = reply.positions[0], float(reply.entropy.numpy()[0])
    assert stopped._info.stop is not None
    return StopView(
        model=client.model,
        session=info,
        stop=stopped._info.stop,
        texts=tuple(stopped._texts),
        summary=repr(summary),
        norm=capture.norm.numpy(),
        norm_locations=capture.locations,
        norm_first_token=capture.first_token,
        lens=lens,
        lens_position=position,
        lens_entropy=entropy,
        lens_refusal=refusal,
    )
