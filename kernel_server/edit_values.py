"""Puts numbers where an edit names them: an upload, a named vector, the value at another stop.

Done before the state sees the edit, which stands alone afterwards: the other session may move on or
end, the vector may be replaced. The name stays, for the edit's description. Whether the numbers fit
is decided by the state.
"""

from __future__ import annotations

import dataclasses
import math

from kernel_server.loop import Loop
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.codec import raise_error
from kernel_server.protocol.errors import BadEdit, ServerFault
from kernel_server.transfers import MAX_CHUNK, Transfers
from kernel_server.vectors import Vectors

#: The ways to say a value, as the client's own words.
_WAYS = {
    "value": "numbers",
    "upload_id": "an upload",
    "vector": "a named vector",
    "source": "the value at a stop",
}


def with_value(
    edit: m.EditSpec, owner: str, *, loop: Loop, transfers: Transfers, vectors: Vectors
) -> m.EditSpec:
    """The edit with its numbers in it.

    Raises BadEdit when it says its value in two ways, and what looking it up raises: UnknownVector,
    WrongModel, UnknownTransfer, UnknownSession, StaleStop, NotStopped, BadSelector.
    """
    ways = [words for name, words in _WAYS.items() if getattr(edit, name) is not None]
    if len(ways) > 1:
        raise BadEdit(f"the edit's value is given as {' and as '.join(ways)}: give one of them")
    if edit.upload_id is not None:
        value = transfers.take(owner, edit.upload_id)
        return dataclasses.replace(edit, value=value, upload_id=None)
    if edit.vector is not None:
        entry = vectors.get(owner, edit.vector, inexact=edit.inexact)
        foreign = vectors.is_foreign(entry.info)
        label = edit.vector
        if foreign:
            label += f" (of {entry.info.model or 'another model'})"
        elif entry.info.location != edit.location:
            label += f" (made at {entry.info.location})"
        return dataclasses.replace(edit, value=Array.from_numpy(entry.array), vector=label)
    if edit.source is not None:
        value = value_at_stop(edit.source, owner, loop=loop, transfers=transfers)
        if edit.sticky and value.shape[0] == 1:
            value = Array(value.dtype, value.shape[1:], value.data)  # one row for every forward
        return dataclasses.replace(edit, value=value, source=_placed(edit.source, owner, loop))
    return edit


def _placed(source: m.PatchSource, owner: str, loop: Loop) -> m.PatchSource:
    """The source with its location, as long as the session stands there."""
    found = loop.request(owner, m.Describe(session_id=source.session_id))
    location = ""
    if isinstance(found, m.SessionReply) and found.session.stop_number == source.seen:
        location = found.session.location or ""
    return dataclasses.replace(source, location=location)


def value_at_stop(source: m.PatchSource, owner: str, *, loop: Loop, transfers: Transfers) -> Array:
    """The value at a stop `[tokens, channels]`, heads flattened, in the dtype it has there."""
    request = m.ReadValue(
        session_id=source.session_id,
        seen=source.seen,
        what="tensor",
        tokens=source.tokens,
        heads=source.heads,
        channels=source.channels,
    )
    reply = loop.request(owner, request)
    if isinstance(reply, m.ErrorReply):
        raise_error(reply.error)
    if not isinstance(reply, m.TensorReply):
        raise ServerFault(f"a value was asked for, and {type(reply).__name__} came")
    shape = (reply.shape[0], math.prod(reply.shape[1:]))
    if reply.data is not None:
        return Array(reply.dtype, shape, reply.data.data)
    assert reply.transfer_id is not None
    try:
        parts = []
        for offset in range(0, reply.nbytes, MAX_CHUNK):
            parts.append(bytes(transfers.read(owner, reply.transfer_id, offset, MAX_CHUNK)))
    finally:
        transfers.cancel(owner, reply.transfer_id)
    return Array(reply.dtype, shape, b"".join(parts))
