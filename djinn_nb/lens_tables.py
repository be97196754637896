"""The logit lens as a table, and asking for it at many places at once.

What the lens reads is computed on the server; which places are worth a look is decided by callers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from djinn_nb.checks import listed, whole
from djinn_nb.client import COMPUTE_S
from djinn_nb.selectors import selector
from kernel_server.protocol import messages as m
from kernel_server.protocol.location import parse_location

if TYPE_CHECKING:
    import pandas as pd

    from djinn_nb.session import Session


def read_lens_map(
    session: Session, seen: int, locations: object, tokens: object, top_k: object
) -> m.LensReply:
    """Ask for the lens at any residual locations of the forward that a session stands in."""
    client = session.client
    num_layers = client.model.num_layers
    message = m.ReadLensMap(
        session_id=session.id,
        seen=seen,
        locations=tuple(str(parse_location(one, num_layers)) for one in listed(locations, "read")),
        tokens=selector(tokens),
        top_k=whole(top_k, "top_k", least=1),
    )
    return client.call(message, m.LensReply, timeout_s=COMPUTE_S)


def lens_frame(reply: m.LensReply, locations: Sequence[str] | None = None) -> pd.DataFrame:
    """One row per (place, rank), as `stop.lens()` and `session.lens()` give it.

    locations: of the rows of the answer, where it does not name them.
    """
    import pandas as pd

    ids = reply.token_ids.numpy()
    rows, ranks = ids.shape
    texts = reply.texts or (("",) * ranks,) * rows
    return pd.DataFrame(
        {
            "location": np.repeat(np.asarray(locations or reply.rows, object), ranks),
            "position": np.repeat(np.asarray(reply.positions, int), ranks),
            "rank": np.tile(np.arange(1, ranks + 1), rows),
            "token_id": ids.reshape(-1).astype(int),
            "text": [text for row in texts for text in row],
            "probability": reply.probabilities.numpy().reshape(-1).astype(float),
            "entropy_nats": np.repeat(reply.entropy.numpy().astype(float), ranks),
        }
    )
