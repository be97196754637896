"""Imports point one way, and the check that says so catches an import that does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.directions import violations

ROOT = Path(__file__).parents[2]

LIGHT = ("djinn_nb", "kernel_server", "kernel_server.protocol", "kernel_server.state")
HEAVY = ("torch", "transformers", "safetensors", "triton")


def _plant(root: Path, path: str, source: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")


def test_imports_point_one_way():
    found = violations(ROOT)

    assert found == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("djinn_nb/session.py", "from kernel_server.engine import engine\n"),
        ("djinn_nb/session.py", "from kernel_server import engine\n"),
        ("djinn_nb/session.py", "def f():\n    import kernel_server.state.sessions\n"),
        ("djinn_nb/session.py", "def f():\n    import torch.nn\n"),
        ("djinn_nb/panels/a.py", "from importlib import import_module as g\n"
         "import importlib\nimportlib.import_module('kernel_server.engine')\n"),
        ("kernel_server/__init__.py", "from kernel_server.protocol import errors\n"),
        ("kernel_server/protocol/codec.py", "from ..state import events\n"),
        ("kernel_server/protocol/codec.py", "from transformers import AutoModel\n"),
        ("kernel_server/state/sessions.py", "from kernel_server.engine import kv_cache\n"),
        ("kernel_server/state/sessions.py", "import time\n"),
        ("kernel_server/engine/batch.py", "from kernel_server.state.sessions import Session\n"),
        ("kernel_server/engine/batch.py", "from kernel_server.state import sessions\n"),
        ("kernel_server/models/registry.py", "from kernel_server.engine import kv_cache\n"),
        ("kernel_server/service.py", "from kernel_server.loop import Loop\n"),
        ("kernel_server/engine/batch.py", "import pickle\n"),
        ("djinn_nb/session.py", "def f():\n    from marshal import loads\n"),
        ("kernel_server/newcomer.py", "x = 1\n"),
    ],
)  # fmt: skip
def test_a_planted_import_is_found(tmp_path: Path, path: str, source: str):
    _plant(tmp_path, path, source)

    found = violations(tmp_path)

    assert len(found) == 1
    assert path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") in found[0].replace(
        "/", "."
    )


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("djinn_nb/session.py", "from kernel_server.protocol.errors import DjinnError\n"),
        ("djinn_nb/session.py", "from djinn_nb.transport import Transport\n"),
        ("djinn_nb/panels/a.py", "from ..session import Session\n"),
        ("kernel_server/engine/batch.py", "from kernel_server.state.events import Finished\n"),
        ("kernel_server/engine/batch.py", "from .segments import Segments\nimport torch\n"),
        ("kernel_server/server.py", "from kernel_server.engine.engine import Engine\n"),
    ],
)
def test_an_allowed_import_is_left_alone(tmp_path: Path, path: str, source: str):
    _plant(tmp_path, path, source)

    assert violations(tmp_path) == []


@pytest.mark.parametrize("module", LIGHT)
def test_module_loads_without_torch(module: str):
    code = (
        f"import sys, pkgutil, importlib, {module} as package\n"
        # every module of it, but only the package itself for kernel_server, which holds the engine
        f"deep = {module != 'kernel_server'}\n"
        "for found in pkgutil.walk_packages(getattr(package, '__path__', []), "
        "package.__name__ + '.') if deep else []:\n"
        "    importlib.import_module(found.name)\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )

    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr


def test_importing_the_client_prints_nothing_and_loads_no_widgets():
    code = (
        "import sys, djinn_nb\nsys.exit(any(m in sys.modules for m in ('ipywidgets', 'anywidget')))"
    )

    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
