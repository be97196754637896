"""What `pip install djinn-nb` gives (the client alone), and what the wheel carries besides."""

from __future__ import annotations

import email.message
import email.parser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SERVER_ONLY = {"torch", "transformers", "tokenizers", "nvidia-ml-py", "triton"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.parser.Parser().parsestr(archive.read(name).decode())


def _required(metadata: email.message.Message, extra: str) -> set[str]:
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})}


def test_the_wheel_is_named_djinn_nb(wheel: Path):
    assert wheel.name == "djinn_nb-0.1.0-py3-none-any.whl"


def test_the_client_needs_neither_torch_nor_transformers(metadata: email.message.Message):
    client = _required(metadata, extra="")

    assert client & SERVER_ONLY == set()
    assert {"numpy", "rpyc", "pandas", "ipython"} <= client


def test_the_server_extra_brings_the_engine(metadata: email.message.Message):
    server = _required(metadata, extra="server")

    assert {"torch", "transformers", "safetensors"} <= server


def test_the_licence_is_apache(metadata: email.message.Message, contents: set[str]):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in contents)


def test_the_wheel_carries_every_tracked_file_of_the_packages(contents: set[str]):
    listed = subprocess.run(
        ["git", "ls-files", "djinn_nb", "kernel_server"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: nothing to compare the wheel with")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}

    assert tracked - contents == set()
    assert not any(name.startswith(("tests/", "scripts/", "notebooks/")) for name in contents)


def test_the_wheel_carries_the_bundled_model_and_the_glossary(contents: set[str]):
    bundled = {n.rpartition("/")[2] for n in contents if n.startswith("kernel_server/models/bundl")}

    assert {"config.json", "model.safetensors", "tokenizer.json"} <= bundled
    assert "kernel_server/protocol/GLOSSARY.md" in contents


def test_the_wheel_installs_the_jupyterlab_extension(contents: set[str]):
    inside = "djinn_nb-0.1.0.data/data/share/jupyter/labextensions/djinn-nb/"
    built = ROOT / "extension" / "prebuilt" / "labextensions" / "djinn-nb"
    files = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}

    assert {"package.json", "install.json", "schemas/djinn-nb/plugin.json"} <= files
    assert {inside + name for name in files} <= contents
    assert not any("node_modules" in name or name.endswith(".ts") for name in contents)


def test_the_wheel_carries_the_scripts_of_the_panels(contents: set[str]):
    static = {p.name for p in (ROOT / "djinn_nb" / "panels" / "static").iterdir()}

    assert {"layers.js", "view.css"} <= static
    assert {f"djinn_nb/panels/static/{name}" for name in static} <= contents


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_clean_client_install_works_without_torch(wheel: Path, tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)],
        check=True,
        cwd=tmp_path,
    )
    code = (
        "import importlib.util as u, djinn_nb\n"
        "assert not [m for m in ('torch', 'transformers') if u.find_spec(m)]\n"
        "import pkgutil, importlib\n"
        "for found in pkgutil.walk_packages(djinn_nb.__path__, 'djinn_nb.'):\n"
        "    importlib.import_module(found.name)\n"
        "print(djinn_nb.__version__)"
    )

    ran = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "0.1.0"
