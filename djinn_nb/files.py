"""Arrays from the user's own files: numpy's `.npy`, and `.safetensors`. Nothing is unpickled.

Which numbers are wanted is the caller's; a file with several tensors needs to be told which.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from djinn_nb.checks import shown
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import BadArgument

#: Dtypes of safetensors that an `Array` has, by its name.
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
}  # fmt: skip


def read_array(path: str | Path, name: str | None = None) -> npt.NDArray[Any]:
    """The array in a file; bfloat16 becomes float32, which holds it exactly.

    name: of the tensor, in a `.safetensors` file that holds several. Raises BadArgument for a file
    that is not there or is neither of the two.

        read_array("joy.npy")
        read_array("layers.safetensors", "layers.16.output")
    """
    file = Path(path).expanduser()
    if file.suffix not in (".npy", ".safetensors"):
        raise BadArgument(f"{shown(str(path))} is neither a .npy nor a .safetensors file")
    try:
        return _read_npy(file, name) if file.suffix == ".npy" else _read_safetensors(file, name)
    except OSError as error:
        raise BadArgument(
            f"{file} cannot be read ({error.strerror or type(error).__name__}): look for it in"
            f" {file.parent.absolute()}"
        ) from None


def _read_npy(file: Path, name: str | None) -> npt.NDArray[Any]:
    if name is not None:
        raise BadArgument(f"{file.name} holds one array without a name: leave {name!r} out")
    try:
        found: npt.NDArray[Any] = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadArgument(f"{file.name} is no array of plain numbers: {error}") from None
    return found


def _read_safetensors(file: Path, name: str | None) -> npt.NDArray[Any]:
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            name = _named(file, list(opened.keys()), name)
            part = opened.get_slice(name)
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
            if dtype not in _DTYPES:
                raise BadArgument(f"{name} in {file.name} is of dtype {dtype}: save it as F32")
            if dtype != "BF16":  # which numpy does not have
                found: npt.NDArray[Any] = opened.get_tensor(name)
                return found
        read: Any = safetensors.deserialize  # it has no types
        tensors = dict(read(file.read_bytes()))
        return Array(_DTYPES[dtype], shape, bytes(tensors[name]["data"])).numpy()
    except safetensors.SafetensorError as error:
        raise BadArgument(f"{file.name} is torn or no safetensors file: {error}") from None


def _named(file: Path, names: list[str], name: str | None) -> str:
    if name in names:
        return name
    shown_names = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "")
    if name is not None:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {shown_names or 'none'}"
        raise BadArgument(f"{file.name} has no tensor {shown(name)}: {hint}")
    if len(names) != 1:
        raise BadArgument(
            f"{file.name} holds {len(names)} tensors ({shown_names}): say which, as (path, name)"
        )
    return names[0]
