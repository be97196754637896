"""What a frame may say: a strict subset of rpyc's brine, with small shapes and no references.

Stock brine builds whatever the peer describes: 2^25 one-byte items from a 32 MiB frame, integers
of four million digits. Ours knows None, int, str, bytes and tuples of at most four of them, nested
at most `MAX_DEPTH` deep, so a frame costs the reader its own length and no more.
"""

from __future__ import annotations

from typing import Any

from rpyc.core import brine

from .frames import BrokenFrame

MAX_DEPTH = 8
MAX_INT_DIGITS = 19

_TUPLES = {brine.TAG_EMPTY_TUPLE: 0, brine.TAG_TUP1: 1, brine.TAG_TUP2: 2}
_TUPLES |= {brine.TAG_TUP3: 3, brine.TAG_TUP4: 4}
_SHORT_BYTES = {brine.TAG_EMPTY_STR: 0, brine.TAG_STR1: 1, brine.TAG_STR2: 2}
_SHORT_BYTES |= {brine.TAG_STR3: 3, brine.TAG_STR4: 4}


def is_plain(value: object) -> bool:
    """Whether `value` may cross: exact types only, so no subclass brings its own behaviour."""
    if type(value) is tuple:
        return len(value) <= 4 and all(is_plain(item) for item in value)
    if type(value) is int:
        return abs(value) < 10 ** (MAX_INT_DIGITS - 1)
    return value is None or type(value) in (str, bytes)


def dump(message: int, sequence: int, value: Any) -> tuple[bytes, bytes]:
    """Encode a message as (head, payload): its last value, when bytes, is not copied."""
    rest, payload = _split_tail(value)
    head = bytes([message]) + brine.dump((sequence, rest))
    if payload is None:
        return head, b""
    # The last thing encoded is the empty bytes standing in for the payload: one tag.
    return head[:-1] + brine.TAG_STR_L4 + brine.I4.pack(len(payload)), payload


def load(frame: memoryview) -> tuple[int, int, Any]:
    """Decode a frame to (message, sequence, value), or raise `BrokenFrame`."""
    if not len(frame):
        raise BrokenFrame("an empty frame")
    value, end = _load(frame, 1, 0)
    if end != len(frame):
        raise BrokenFrame(f"{len(frame) - end} bytes after the end of a message")
    if type(value) is not tuple or len(value) != 2 or type(value[0]) is not int:
        raise BrokenFrame("a message is not a pair of sequence number and content")
    return frame[0], value[0], value[1]


def _split_tail(value: Any) -> tuple[Any, bytes | None]:
    if type(value) is bytes:
        return b"", value
    if type(value) is tuple and value:
        last, payload = _split_tail(value[-1])
        if payload is not None:
            return (*value[:-1], last), payload
    return value, None


def _load(frame: memoryview, at: int, depth: int) -> tuple[Any, int]:
    if depth > MAX_DEPTH:
        raise BrokenFrame(f"values nested more than {MAX_DEPTH} deep")
    tag = bytes(frame[at : at + 1])
    at += 1
    if tag in brine.IMM_INTS_LOADER:
        return brine.IMM_INTS_LOADER[tag], at
    if tag in _TUPLES:
        items = []
        for _ in range(_TUPLES[tag]):
            item, at = _load(frame, at, depth + 1)
            items.append(item)
        return tuple(items), at
    if tag == brine.TAG_NONE:
        return None, at
    if tag == brine.TAG_UNICODE:
        raw, at = _load(frame, at, depth + 1)
        if type(raw) is not bytes:
            raise BrokenFrame("a text that is not made of bytes")
        try:
            return raw.decode(), at
        except UnicodeDecodeError as error:
            raise BrokenFrame("a text that is not UTF-8") from error
    if tag in _SHORT_BYTES:
        return _take(frame, at, _SHORT_BYTES[tag])
    if tag == brine.TAG_STR_L1:
        size, at = _take(frame, at, 1)
        return _take(frame, at, size[0])
    if tag == brine.TAG_STR_L4:
        size, at = _take(frame, at, 4)
        return _take(frame, at, int.from_bytes(size, "big"))
    if tag == brine.TAG_INT_L1:
        size, at = _take(frame, at, 1)
        digits, at = _take(frame, at, size[0])
        if len(digits) > MAX_INT_DIGITS or not digits.lstrip(b"-").isdigit():
            raise BrokenFrame("an integer out of range")
        return int(digits), at
    raise BrokenFrame(f"a value of a kind that does not cross (tag 0x{tag.hex()})")


def _take(frame: memoryview, at: int, size: int) -> tuple[bytes, int]:
    if at + size > len(frame):
        raise BrokenFrame(f"a value of {size} bytes runs past the end of its frame")
    return bytes(frame[at : at + size]), at + size
