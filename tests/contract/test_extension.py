"""The JupyterLab extension as it is committed: of today's contract, and built from its sources.

Needs no node. Whether a build gives exactly what is committed is checked where there is node, by
`python -m scripts.extension check`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from djinn_nb import comm_bridge
from kernel_server.protocol import snapshot, typescript
from scripts import extension

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "extension"


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _text(source: str) -> str:
    return (FOLDER / "src" / source).read_text(encoding="utf-8")


def test_the_types_are_those_of_the_contract(capsys: pytest.CaptureFixture[str]):
    assert typescript.main(["--check"]) == 0, capsys.readouterr().err


def test_types_that_are_stale_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stale = tmp_path / "protocol.ts"
    stale.write_text(typescript.protocol_ts().replace("readonly rev: number;\n", "", 1))

    assert typescript.main(["--check", str(stale)]) == 1
    assert "protocol.ts is not what the contract says" in capsys.readouterr().err


def test_every_field_of_a_snapshot_has_a_type():
    text = typescript.protocol_ts()

    for field in dataclasses.fields(snapshot.Snapshot):
        assert f"  readonly {field.name}: " in text
    assert not re.search(r"\bany\b", re.sub(r"'any'|/\*\*.*?\*/", "", text, flags=re.DOTALL))


def test_a_type_without_a_spelling_is_refused():
    with pytest.raises(TypeError, match="has no spelling in TypeScript"):
        typescript.type_of(dict[str, int])


def test_both_sides_name_the_same_targets_of_comms():
    names = dict(
        re.findall(r"^const (TARGET|HELLO_TARGET) = '(.+)';$", _text("bridge.ts"), re.MULTILINE)
    )

    assert names == {"TARGET": comm_bridge.TARGET, "HELLO_TARGET": comm_bridge.HELLO}


def test_what_is_built_was_built_from_the_sources_here():
    assert extension.built_from() == extension.digest(), "run make extension, and commit"


def test_a_changed_source_makes_the_build_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "index.ts").write_text("export default [];\n")
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    before = extension.digest()

    (tmp_path / "src" / "index.ts").write_text("export default [1];\n")

    assert extension.digest() != before


def test_the_build_has_what_jupyterlab_loads():
    built = _json(extension.BUILT / "package.json")
    load = built["jupyterlab"]["_build"]["load"]

    assert (extension.BUILT / load).is_file()
    assert (extension.BUILT / "schemas" / "djinn-nb" / "plugin.json").is_file()
    assert _json(extension.BUILT / "install.json")["packageManager"] == "python"


def test_one_version_for_the_package_and_its_extension():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', pyproject, flags=re.MULTILINE)[1]

    for path in (FOLDER / "package.json", FOLDER / "package-lock.json"):
        assert _json(path)["version"] == version


def test_no_registry_is_named():
    for path in FOLDER.rglob("package-lock.json"):
        if "node_modules" not in path.parts:
            named = [p for p in _json(path)["packages"].values() if "resolved" in p]
            assert not named, f"{path}: npm config set omit-lockfile-registry-resolved true"


def test_nothing_of_this_machine_is_in_what_is_built():
    for path in extension.BUILT.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert str(ROOT) not in text
