"""Frames of a journal: how one is written, and which of those found count as good.

::

    b"DJJ1"  number (uint64)  length (uint64)  blake2b of number, length and message  message

Numbers go up by one. What does not hold together at the end was being written when the server
ended, and is torn; anywhere else it is damage. Pure functions of bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import BadMessage, BrokenJournal

_MAGIC = b"DJJ1"
_NUMBERS = struct.Struct("<QQ")
HEAD_BYTES = len(_MAGIC) + _NUMBERS.size + 16

#: record, arrays, their keys, and the bytes of the message
_Session = tuple[m.SessionRecord, tuple[Array, ...], tuple[str, ...], bytes]


@dataclass(slots=True, kw_only=True)
class Contents:
    """What a journal holds, and what is wrong with it."""

    #: equal as long as one server after the other goes on with it
    identity: str
    #: of the newest session ever made
    number: int = 0
    sessions: dict[str, _Session] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    #: sessions whose newest good frame lies before damage: there may have been a newer one
    doubtful: frozenset[str] = frozenset()
    #: sessions whose arrays are gone: their owners, and how many are
    unreadable: dict[str, tuple[str, str]] = field(default_factory=dict)
    #: byte ranges that hold no good frame, before the last good one
    damage: list[tuple[int, int]] = field(default_factory=list)
    torn_bytes: int = 0
    #: where the last good frame ends, and its number
    end: int = 0
    count: int = 0


def frame(number: int, payload: bytes) -> bytes:
    """The bytes of one frame."""
    numbers = _NUMBERS.pack(number, len(payload))
    return b"".join((_MAGIC, numbers, _digest(numbers, payload), payload))


def _digest(numbers: bytes, payload: bytes | memoryview) -> bytes:
    found = hashlib.blake2b(numbers, digest_size=16)
    found.update(payload)
    return found.digest()


def _frame_at(view: memoryview, offset: int) -> tuple[int, memoryview] | None:
    """Number and message of a good frame, or None."""
    head = view[offset : offset + HEAD_BYTES]
    if len(head) < HEAD_BYTES or head[:4] != _MAGIC:
        return None
    numbers = bytes(head[4:20])
    number, length = _NUMBERS.unpack(numbers)
    if length > len(view) - offset - HEAD_BYTES:
        return None
    payload = view[offset + HEAD_BYTES : offset + HEAD_BYTES + length]
    return (number, payload) if _digest(numbers, payload) == head[20:] else None


def good_frames(data: bytes) -> Iterator[tuple[int, int, int, memoryview]]:
    """Every good frame with a number above those before: (offset, end, number, message)."""
    view, offset, last = memoryview(data), 0, 0
    while 0 <= offset < len(data):
        found = _frame_at(view, offset)
        if found is None or found[0] <= last:
            offset = data.find(_MAGIC, offset + 1)
            continue
        last = found[0]
        end = offset + HEAD_BYTES + len(found[1])
        yield offset, end, last, found[1]
        offset = end


def read(data: bytes, name: str) -> Contents:
    """What a journal's bytes hold. name: for messages.

    Raises BrokenJournal where nothing of them is a journal's.
    """
    found = Contents(identity="")
    newest: dict[str, int] = {}
    kept: dict[str, tuple[m.JournalSession, bytes]] = {}
    for offset, end, number, payload in good_frames(data):
        if offset != found.end or number != found.count + 1:
            found.damage.append((found.end, offset))
        found.end, found.count = end, number
        try:
            message = codec.decode(payload)
        except BadMessage as error:
            # whole, and written by another version
            raise BrokenJournal(
                f"the journal {name} was written by another version of Djinn ({error}): start that"
                " one, or name another folder with --state-dir"
            ) from error
        match message:
            case m.JournalHead():
                found.identity, found.number = message.identity, message.number
            case m.JournalArray():
                found.arrays[message.key] = _own(message.value)
            case m.JournalSession():
                found.identity = message.identity
                found.number = max(found.number, message.number)
                newest[message.session_id] = offset
                if message.record is None:
                    kept.pop(message.session_id, None)
                else:
                    kept[message.session_id] = message, bytes(payload)
            case _:
                raise BrokenJournal(f"{name} holds a {type(message).__name__}: it is no journal")
    if not found.identity:
        raise BrokenJournal(
            f"{name} has {len(data)} bytes, and none of them are a journal's: move it away, or name"
            " another folder with --state-dir"
        )
    found.torn_bytes = len(data) - found.end
    last_damage = max((end for _, end in found.damage), default=0)
    found.doubtful = frozenset(i for i in kept if newest[i] < last_damage)
    for session_id, (message, payload_bytes) in kept.items():
        missing = [key for key in message.arrays if key not in found.arrays]
        assert message.record is not None
        if missing:
            lacks = f"{len(missing)} of its arrays are gone with damage to the journal"
            found.unreadable[session_id] = message.record.owner, lacks
            continue
        arrays = tuple(found.arrays[key] for key in message.arrays)
        found.sessions[session_id] = (message.record, arrays, message.arrays, payload_bytes)
    return found


def _own(array: Array) -> Array:
    """The array with bytes of its own: those of the whole file are not kept for it."""
    return Array(array.dtype, array.shape, bytes(array.data))
