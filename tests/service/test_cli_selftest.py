"""What `selftest` prints: the check, the model's row of sites, and the table of all families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernel_server.cli import main
from kernel_server.models import family_table
from kernel_server.models.family_table import SITES
from tests.models import tiny, zoo

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.family("llama").save_pretrained(root / "llama")
    zoo.model("bloom").save_pretrained(root / "bloom")
    return root


def test_the_row_of_the_model_is_printed_site_by_site(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selftest", "--model", str(folders / "bloom"), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    marks = {line.split()[0]: line.split()[1] for line in lines if line.split()[0] in SITES}

    assert lines[0] == "bloom (bloom, float32, Cache, stock eager)"
    assert list(marks) == list(SITES)
    assert {site for site, mark in marks.items() if mark != "✓"} == {
        "attention.q",
        "attention.pattern",
        "attention.heads",
    }


def test_the_json_report_holds_the_sites_too(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["selftest", "--model", str(folders / "llama"), "--device", "cpu", "--json"])
    report = json.loads(capsys.readouterr().out)

    assert report["attention"] == "function, stock sdpa"
    assert report["sites"]["attention.pattern"] == {"layers": [0, 1, 2, 3, 4, 5], "off": []}


def test_the_committed_table_is_printed_without_loading_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernel_server.kernel.load", None)

    assert main(["selftest", "--families"]) == 0
    assert capsys.readouterr().out == family_table.FILE.read_text(encoding="utf-8")
