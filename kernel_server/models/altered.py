"""Models whose weights are not plain numbers of their own: quantised ones, and adapters.

Refuses them by name before a weight is read, and says how to make plain weights of them. A model
object whose linear maps carry adapters in floating point is a model like any other and is judged by
the load check; one that holds quantised weights is refused here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kernel_server.protocol.errors import BrokenModel, UnsupportedModel

ADAPTER = "adapter_config.json"
#: Fields of a configuration that say the weights are packed.
_PACKED = ("quantization_config", "compression_config")


def refuse_adapter(folder: Path) -> None:
    """Raise UnsupportedModel if the folder holds an adapter (LoRA and its like).

    transformers would add it to the weights, or pass it over, depending on what is installed.
    """
    file = folder / ADAPTER
    if not file.is_file():
        return
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        kind, base = str(raw.get("peft_type", "unknown")), raw.get("base_model_name_or_path")
    except (ValueError, OSError, AttributeError) as error:
        raise BrokenModel(f"{file} cannot be read as JSON: {type(error).__name__}") from error
    raise UnsupportedModel(
        f"{folder.name}: holds a {kind} adapter of {base or 'a model it does not name'}, not merged"
        " weights; merge it first: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
        ".save_pretrained(new_folder), and serve that folder",
        feature="adapter",
        adapter=kind,
        base=base,
    )


def refuse_quantised(raw: dict[str, Any]) -> None:
    """Raise UnsupportedModel if a configuration, or a part of it, has quantised weights."""
    kind = str(raw.get("model_type"))
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for name in _PACKED:
            if found := part.get(name):
                _refuse(kind, *_method(found))


def refuse_quantised_model(model: PreTrainedModel) -> None:
    """The same for a model in memory."""
    config = model.config.to_dict()
    refuse_quantised(config)
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        _refuse(model.config.model_type, "unknown method", None)
    for name, parameter in model.named_parameters():
        # eight bits and fewer are packed, whatever their dtype is called
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            dtype = str(parameter.dtype).removeprefix("torch.")
            _refuse(model.config.model_type, f"{name} is {dtype}", None)


def _method(found: Any) -> tuple[str, int | None]:
    """Name and bits of a quantisation, as far as it says."""
    if not isinstance(found, dict):
        return str(found), None
    bits = found.get("bits")
    for count in (8, 4):
        if found.get(f"load_in_{count}bit") or found.get(f"_load_in_{count}bit"):
            bits = count
    return str(found.get("quant_method", "unknown method")), bits


def _refuse(kind: str, method: str, bits: int | None) -> None:
    width = f", {bits}-bit" if bits else ""
    how = "model.dequantize()"
    if method == "mxfp4":
        how = "from_pretrained(…, quantization_config=Mxfp4Config(dequantize=True))"
    raise UnsupportedModel(
        f"{kind}: the weights are quantised ({method}{width}), and Djinn checks and edits plain"
        f" floats; dequantise them with transformers ({how}, then save_pretrained) and"
        " serve that folder, or a float16, bfloat16 or float32 checkpoint",
        family=kind,
        feature="quantised weights",
        method=method,
    )
