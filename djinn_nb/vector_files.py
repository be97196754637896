"""A vector from a file: one of ours, which says how it was made, or plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from djinn_nb.files import read_array
from kernel_server.protocol import vector_file
from kernel_server.protocol.errors import BadArgument, BrokenVector
from kernel_server.protocol.messages import VectorInfo


def read(path: Path, name: str) -> tuple[npt.NDArray[Any], VectorInfo | None]:
    """The numbers `[channels]`, and what the file says of them under the name given.

    Raises BadArgument for a file that does not hold one vector, BrokenVector for one of ours that
    was changed.
    """
    metadata = _metadata(path)
    ours = vector_file.WORDS in metadata
    array = read_array(path, vector_file.TENSOR if ours else None)
    if array.ndim != 1 or array.dtype.kind not in "fiu" or array.size > vector_file.MAX_WIDTH:
        raise BadArgument(
            f"{path.name} holds {array.dtype} {list(array.shape)}: a vector is up to"
            f" {vector_file.MAX_WIDTH} numbers in one dimension"
        )
    if not ours:
        return array, None
    try:
        return array, vector_file.info_of(name, metadata, np.asarray(array))
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenVector(f"{path.name} was changed since it was saved: {error}") from error


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            found: dict[str, str] = opened.metadata() or {}
            return found
    except (OSError, safetensors.SafetensorError):
        return {}  # what is wrong with it is said when it is read
