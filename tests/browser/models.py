"""The bundled model, altered: told that it may see more tokens, or never to end a text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from kernel_server.models.registry import BUNDLED


def altered_model(folder: Path, **changes: Any) -> Path:
    """A copy of the bundled model in whose configuration these values stand."""
    shutil.copytree(BUNDLED, folder)
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        config = json.loads(file.read_text())
        config |= {key: value for key, value in changes.items() if key in config}
        file.write_text(json.dumps(config))
    return folder
