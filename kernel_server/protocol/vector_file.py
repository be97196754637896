"""How a named vector says in its file what it is: the words beside the numbers, and a checksum.

The file itself is one of safetensors, with the tensor `vector`; whoever has that library reads and
writes it. Server and client agree here on its metadata, so that a saved vector can be read back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kernel_server.protocol.messages import VectorInfo

#: The tensor's name in the file.
TENSOR = "vector"
#: Keys of the file's metadata.
WORDS, CHECKSUM = "djinn", "sha256"
#: Elements of the longest vector: as many float32 as fit into one piece of a transfer.
MAX_WIDTH = 1 << 18
#: Longest provenance of one vector, bytes of JSON.
MAX_PROVENANCE_BYTES = 256 << 10
#: A larger file holds no vector of ours.
MAX_FILE_BYTES = MAX_WIDTH * 4 + 2 * MAX_PROVENANCE_BYTES


def metadata_of(info: VectorInfo, array: npt.NDArray[np.float32]) -> dict[str, str]:
    """The metadata of the file that holds `array` `[width]`.

    Raises ValueError when the provenance holds what JSON cannot, or is too long.
    """
    told = {
        "name": info.name,
        "location": info.location,
        "model": info.model,
        "weights": info.weights,
        "provenance": info.provenance,
    }
    try:
        words = json.dumps(told, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the provenance of {info.name!r} holds what JSON cannot ({error}): give plain texts,"
            " numbers and lists"
        ) from None
    if len(words) > MAX_PROVENANCE_BYTES:
        raise ValueError(
            f"the provenance of {info.name!r} has {len(words)} bytes, more than"
            f" {MAX_PROVENANCE_BYTES}: keep a hash of the prompts instead"
        )
    return {WORDS: words, CHECKSUM: _checksum(words, array)}


def header_of(content: bytes) -> dict[str, str]:
    """The metadata of a whole file; empty when it has none. Raises ValueError."""
    # the library reads metadata from files only, and these are bytes
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no table")
    return metadata


def info_of(name: str, metadata: Mapping[str, Any], array: npt.NDArray[Any]) -> VectorInfo:
    """What a file says of its vector, held against the checksum.

    Raises ValueError, KeyError or TypeError for what is torn or none of ours.
    """
    words = metadata[WORDS]
    if array.dtype != np.float32 or array.ndim != 1:
        raise ValueError(f"it holds {array.dtype} {list(array.shape)}")
    if _checksum(words, array) != metadata[CHECKSUM]:
        raise ValueError("its checksum does not fit")
    told = json.loads(words)
    return VectorInfo(
        name=name,
        width=len(array),
        norm=norm_of(array),
        location=str(told["location"]),
        model=str(told["model"]),
        weights=str(told["weights"]),
        provenance=dict(told["provenance"]),
    )


def norm_of(array: npt.NDArray[Any]) -> float:
    """L2 norm, added up in float64."""
    return float(np.linalg.norm(array.astype(np.float64)))


def _checksum(words: str, array: npt.NDArray[np.float32]) -> str:
    return hashlib.sha256(words.encode() + array.astype("<f4").tobytes()).hexdigest()
