"""Messages to bytes and back: a JSON header, then the raw buffers of its arrays. No pickle.

::

    b"DJN1"  header length (uint32, little-endian)  header (UTF-8 JSON)  buffer 0  buffer 1 ...

Long lists of whole numbers are buffers too: `{"$ints": count}` in the header. The tokens of a
session always are (`token_list`), and are passed on as they came.
Decoding allocates nothing by a length that was sent: the header must lie inside the bytes that
came, and every buffer is a view of them whose size follows from its dtype and shape.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
import sys
import types
import typing
from array import array
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from kernel_server.protocol import messages as _messages
from kernel_server.protocol.arrays import ITEM_BYTES, MAX_DIMENSIONS, Array
from kernel_server.protocol.errors import ERRORS, BadMessage, DjinnError, ServerFault
from kernel_server.protocol.messages import MESSAGES, ErrorInfo
from kernel_server.protocol.token_list import TokenList

MAGIC = b"DJN1"
MAX_DEPTH = 32
#: whole numbers that cross: those of a signed or an unsigned 64-bit integer
MIN_INT, MAX_INT = -(2**63), 2**64 - 1
_HEAD = struct.Struct("<4sI")
#: whole numbers in a row, from so many on, cross as int64 in a buffer: a tenth of JSON's time
_LONG = 64


def encode(message: Any) -> bytes:
    """The bytes of a registered message."""
    if MESSAGES.get(type(message).__name__) is not type(message):
        raise TypeError(f"{type(message).__name__} is not a message of the protocol")
    buffers: list[bytes | memoryview] = []
    tree = {"type": type(message).__name__, "body": _dump(message, buffers, 0)}
    header = _JSON.encode(tree).encode()
    return b"".join([_HEAD.pack(MAGIC, len(header)), header, *buffers])


def plain(message: Any) -> Any:
    """A registered message that holds no array as plain JSON, its lists written out."""
    return {"type": type(message).__name__, "body": _dump(message, None, 0)}


def _dump(value: Any, buffers: list[bytes | memoryview] | None, depth: int) -> Any:
    """buffers: take what crosses as bytes; None: nothing may."""
    if depth > MAX_DEPTH:
        raise BadMessage(f"message nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return _checked_int(int(value), "a whole number")
    if (names := _FIELDS().get(type(value))) is not None:
        return _dump_message(value, names, buffers, depth + 1)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, TokenList):
        if buffers is None:
            return list(value)
        buffers.append(value.on_wire())
        return {"$ints": len(value)}
    if isinstance(value, Array):
        if buffers is None:
            raise TypeError("an array is no plain JSON")
        buffers.append(value.data)
        return {"$array": value.dtype, "shape": list(value.shape)}
    if isinstance(value, (tuple, list)):
        if value and set(map(type, value)) == {int}:
            if buffers is not None and len(value) >= _LONG:  # token ids: the common long case
                with contextlib.suppress(OverflowError):
                    buffers.append(_packed(value))
                    return {"$ints": len(value)}
            _checked_ints(value, "a list")
            return list(value)
        return [_dump(item, buffers, depth + 1) for item in value]
    if isinstance(value, dict):
        return {"$dict": {str(k): _dump_plain(v, depth + 1) for k, v in value.items()}}
    raise TypeError(f"{type(value).__name__} does not cross the wire")


def _dump_message(
    value: Any, names: tuple[str, ...], buffers: list[bytes | memoryview] | None, depth: int
) -> dict[str, Any]:
    """The fields of a message; most of them are scalars, which cost no call."""
    if depth > MAX_DEPTH:
        raise BadMessage(f"message nested deeper than {MAX_DEPTH} levels")
    body = {}
    for name in names:
        item = getattr(value, name)
        kind = type(item)
        if kind is int:
            item = _checked_int(item, "a whole number")
        elif not (item is None or kind is str or kind is bool):
            item = _dump(item, buffers, depth)
        body[name] = item
    return body


def _dump_plain(value: Any, depth: int) -> Any:
    """A free value: it says nothing of its type, so it holds no message and no array."""
    if depth > MAX_DEPTH:
        raise BadMessage(f"message nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, (Array, TokenList)) or type(value) in _FIELDS():
        raise TypeError(f"{type(value).__name__} does not cross the wire inside a dict")
    if isinstance(value, (tuple, list)):
        return [_dump_plain(item, depth + 1) for item in value]
    return _dump(value, [], depth)


def _packed(values: Any) -> bytes:
    """int64, little-endian."""
    packed = array("q", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _checked_int(value: int, path: str) -> int:
    if not MIN_INT <= value <= MAX_INT:
        raise BadMessage(f"{path} is outside the 64-bit integers")
    return value


def _checked_ints(values: Any, path: str) -> None:
    if values:
        _checked_int(min(values), path)
        _checked_int(max(values), path)


def _checked_text(value: str, path: str) -> str:
    """JSON can spell half of a character pair, which no file, log or tokenizer takes."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadMessage(f"{path}: the text holds half of a surrogate pair") from None
    return value


@cache
def _FIELDS() -> dict[type, tuple[str, ...]]:
    """The names of the fields of every message."""
    return {cls: tuple(f.name for f in fields(cls)) for cls in MESSAGES.values()}


def decode(data: bytes | bytearray | memoryview) -> Any:
    """The message in `data`, or `BadMessage`."""
    view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
    if len(view) < _HEAD.size:
        raise BadMessage(f"a message has at least {_HEAD.size} bytes, {len(view)} came")
    magic, header_length = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise BadMessage("these bytes are not a Djinn message (wrong magic)")
    start = _HEAD.size
    if header_length > len(view) - start:
        raise BadMessage(f"header of {header_length} bytes announced, {len(view) - start} came")
    try:
        # as text: from bytes json would guess among the encodings
        header = str(view[start : start + header_length], "utf-8")
        tree = _FROM_JSON.decode(header)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"the header is not JSON: {error}") from None
    if not isinstance(tree, dict) or set(tree) != {"type", "body"}:
        raise BadMessage("the header has no type and body")
    name = tree["type"]
    cls: Any = MESSAGES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise BadMessage(f"unknown message type {str(name)[:60]!r}")
    reader = _Buffers(view[start + header_length :])
    message = _loader(cls)(tree["body"], reader, name, 0)
    reader.finish()
    return message


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# made once: `json.dumps` and `json.loads` make theirs for every message
_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_FROM_JSON = json.JSONDecoder(parse_constant=_refuse)


class _Buffers:
    """Cuts the bytes behind the header into arrays, in the order the header names them."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def take(self, dtype: Any, shape: Any) -> Array:
        known = isinstance(dtype, str) and dtype in ITEM_BYTES
        if not known or not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise BadMessage(
                f"an array needs a known dtype and a shape of at most {MAX_DIMENSIONS} dimensions"
            )
        if any(type(n) is not int or n < 0 for n in shape):
            raise BadMessage(f"array shape {str(shape)[:60]} is not a shape")
        size = math.prod(shape) * ITEM_BYTES[dtype]
        if size > len(self._view):
            raise BadMessage(f"array of {size} bytes announced, {len(self._view)} came")
        data, self._view = self._view[:size], self._view[size:]
        return Array(dtype, tuple(shape), data)

    def take_ints(self, value: dict[str, Any]) -> list[int]:
        """The whole numbers that `{"$ints": count}` stands for."""
        packed = array("q")
        packed.frombytes(self.take("int64", [value["$ints"]]).data)
        if sys.byteorder == "big":
            packed.byteswap()
        return packed.tolist()

    def finish(self) -> None:
        if len(self._view):
            raise BadMessage(f"{len(self._view)} bytes follow the last array")


_Loader = Callable[[Any, _Buffers, str, int], Any]


@cache
def _loader(kind: Any) -> _Loader:
    """A reader for one annotation, made once. Annotations end, so that only free values can be
    nested too deep."""
    origin, args = get_origin(kind), get_args(kind)
    if kind in _FIELDS():
        return _message_loader(kind)
    if kind is Array:
        return _load_array
    if kind is TokenList:
        return _load_token_list
    if origin in (Union, types.UnionType):
        return _union_loader(args)
    if origin is Literal:
        return _literal_loader(args)
    if origin is tuple:
        return _tuple_loader(args)
    if origin is dict or kind is Any:
        return _load_plain
    return _scalar_loader(kind)


def _are_ints(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"$ints"}


def _message_loader(cls: type[Any]) -> _Loader:
    hints = typing.get_type_hints(cls, vars(_messages))
    specs = fields(cls)
    loaders = {f.name: _loader(hints[f.name]) for f in specs}
    plain_kinds = {f.name: kind for f in specs if (kind := _plain_kind(hints[f.name])) is not None}
    may_lack = frozenset(f.name for f in specs if type(None) in get_args(hints[f.name]))
    required = {f.name for f in specs if f.default is MISSING and f.default_factory is MISSING}

    def load(value: Any, buffers: _Buffers, path: str, depth: int) -> Any:
        if not isinstance(value, dict):
            raise BadMessage(f"{path}: expected the fields of {cls.__name__}")
        if extra := value.keys() - loaders.keys():
            raise BadMessage(f"{path}: unknown field {sorted(extra)[0][:60]!r}")
        if missing := required - value.keys():
            raise BadMessage(f"{path}: missing field {sorted(missing)[0]!r}")
        made: dict[str, Any] = {}
        # in the order sent: buffers follow the order of the header
        for key, item in value.items():
            kind = type(item)
            if item is None and key in may_lack:
                made[key] = None
            # most fields are scalars, which cost no call and no path
            elif kind is plain_kinds.get(key) and (
                kind is bool or (item.isascii() if kind is str else MIN_INT <= item <= MAX_INT)
            ):
                made[key] = item
            else:
                made[key] = loaders[key](item, buffers, f"{path}.{key}", depth + 1)
        return cls(**made)

    return load


def _plain_kind(hint: Any) -> type | None:
    """The scalar that a field holds, if it holds one: text, a whole number, or yes and no."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    is_union = get_origin(hint) in (None, Union, types.UnionType)
    return kinds[0] if is_union and len(kinds) == 1 and kinds[0] in (str, int, bool) else None


def _load_array(value: Any, buffers: _Buffers, path: str, depth: int) -> Array:
    if not isinstance(value, dict) or set(value) != {"$array", "shape"}:
        raise BadMessage(f"{path}: expected an array")
    return buffers.take(value["$array"], value["shape"])


def _load_token_list(value: Any, buffers: _Buffers, path: str, depth: int) -> TokenList:
    if _are_ints(value):
        return TokenList.from_wire(buffers.take("int64", [value["$ints"]]).data)
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise BadMessage(f"{path}: expected integers")
    try:
        return TokenList(value)
    except OverflowError:
        raise BadMessage(f"{path}: a token id is outside the 64-bit integers") from None


def _union_loader(args: tuple[Any, ...]) -> _Loader:
    optional = type(None) in args
    kinds = [kind for kind in args if kind is not type(None)]
    if len(kinds) != 1:
        raise TypeError(f"unions in messages are optional values only, not {args}")
    load_value = _loader(kinds[0])

    def load(value: Any, buffers: _Buffers, path: str, depth: int) -> Any:
        if value is None and optional:
            return None
        return load_value(value, buffers, path, depth)

    return load


def _literal_loader(allowed: tuple[Any, ...]) -> _Loader:
    def load(value: Any, buffers: _Buffers, path: str, depth: int) -> Any:
        if not isinstance(value, str) or value not in allowed:
            raise BadMessage(
                f"{path}: {str(value)[:60]!r} is not one of {', '.join(map(repr, allowed))}"
            )
        return value

    return load


def _tuple_loader(args: tuple[Any, ...]) -> _Loader:
    loaders = tuple(_loader(kind) for kind in args if kind is not Ellipsis)

    def load(value: Any, buffers: _Buffers, path: str, depth: int) -> Any:
        if _are_ints(value):
            value = buffers.take_ints(value)
            if args == (int, Ellipsis):
                return tuple(value)
        if not isinstance(value, list):
            raise BadMessage(f"{path}: expected a list")
        if len(args) == 2 and args[1] is Ellipsis:
            if args[0] is int:
                if not set(map(type, value)) <= {int}:
                    raise BadMessage(f"{path}: expected integers")
                _checked_ints(value, path)
                return tuple(value)
            return tuple(loaders[0](item, buffers, path, depth + 1) for item in value)
        if len(value) != len(args):
            raise BadMessage(f"{path}: expected {len(args)} values, {len(value)} came")
        pairs = zip(value, loaders, strict=True)
        return tuple(load(item, buffers, path, depth + 1) for item, load in pairs)

    return load


def _load_plain(value: Any, buffers: _Buffers, path: str, depth: int) -> Any:
    """A free value: scalars, lists and `$dict`s of them."""
    if depth > MAX_DEPTH:
        raise BadMessage(f"message nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list):
        return [_load_plain(item, buffers, path, depth + 1) for item in value]
    if _are_ints(value):
        return buffers.take_ints(value)
    if isinstance(value, dict):
        if set(value) == {"$dict"} and isinstance(value["$dict"], dict):
            items = value["$dict"].items()
            return {
                _checked_text(key, path): _load_plain(item, buffers, path, depth + 1)
                for key, item in items
            }
        return _float(value, path)
    if isinstance(value, str):
        return _checked_text(value, path)
    if isinstance(value, float):
        return _float(value, path)
    return value if value is None or isinstance(value, bool) else _checked_int(value, path)


def _scalar_loader(kind: Any) -> _Loader:
    def load(value: Any, buffers: _Buffers, path: str, depth: int) -> Any:
        if kind is float:
            return _float(value, path)
        if type(value) is not kind:
            raise BadMessage(f"{path}: expected {kind.__name__}, not {type(value).__name__}")
        if kind is int:
            return _checked_int(value, path)
        return _checked_text(value, path) if kind is str else value

    return load


def _float(value: Any, path: str) -> float:
    if isinstance(value, dict) and value.get("$float") in ("nan", "inf", "-inf"):
        return float(value["$float"])
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        raise BadMessage(f"{path}: the number is too large for a float")
    raise BadMessage(f"{path}: expected a number")


def raise_error(info: ErrorInfo) -> typing.NoReturn:
    """Raise the error that `info` describes, by its code; an unknown code is a ServerFault."""
    raise rebuild_error(info)


def rebuild_error(info: ErrorInfo) -> DjinnError:
    """The exception that `info` describes."""
    made = ERRORS.get(info.code, ServerFault)(info.message)
    made.details.update(info.details)
    made.server_traceback = info.traceback
    return made
