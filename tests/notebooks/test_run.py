"""A run writes down all it measured, and its verdict ends the notebook when it must."""

from __future__ import annotations

import json

import pytest

from notebooks import evaluate
from notebooks.harness import Run, VerdictFailed, hardware
from notebooks.harness.records import read_lines

CLAIM = "Stopping changes no bit."


@pytest.fixture
def run(tmp_path):
    return Run("09_example", CLAIM, "smoke", results=tmp_path)


def judged(run, value=0, control=41):
    run.require("logits that differ", value, "==", 0)
    run.control("zeroed page", criterion="logits that differ", changed=512, value=control)
    return run


def test_the_header_says_what_the_run_was_made_on(run):
    (header,) = read_lines(run.path)

    assert header["claim"] == CLAIM and header["size"] == "smoke"
    assert header["hardware"]["device"] == "cpu"
    assert {"python", "torch", "transformers"} <= set(header["hardware"]["versions"])
    assert run.path.parent.name == header["hardware"]["slug"]


def test_a_record_keeps_every_repetition_with_median_and_spread(run):
    assert run.record("restore", [3.0, 1.0, 2.0, 10.0, 2.0], "ms", "wall clock", layer=20) == 2.0

    line = read_lines(run.path)[1]
    assert line["values"] == [3.0, 1.0, 2.0, 10.0, 2.0]
    assert (line["value"], line["spread"], line["repetitions"]) == (2.0, [2.0, 3.0], 5)
    assert (line["unit"], line["source"], line["conditions"]) == ("ms", "wall clock", {"layer": 20})


def test_the_table_is_read_back_from_the_file(run):
    run.record("differ", 0, "logits", "count", layer=3, dtype="float32")
    run.record("other", 1, "logits", "count")

    found = run.table("differ")

    assert found[["layer", "dtype", "value"]].values.tolist() == [[3, "float32", 0]]


@pytest.mark.parametrize(
    ("values", "source"), [([], "count"), ([1.0, float("nan")], "count"), (1.0, "guess")]
)
def test_a_record_without_a_figure_or_a_known_source_is_refused_and_not_written(
    run, values, source
):
    with pytest.raises(ValueError, match="record 'x'"):
        run.record("x", values, "ms", source)

    assert len(read_lines(run.path)) == 1


def test_a_control_must_name_a_criterion_stated_before(run):
    with pytest.raises(ValueError, match="no criterion is named"):
        run.control("zeroed page", criterion="nothing", changed=1, value=1)


def test_a_criterion_is_stated_once(run):
    run.require("figure", 1, "==", 1)

    with pytest.raises(ValueError, match="stated twice"):
        run.require("figure", 0, "==", 1)


def test_a_passing_verdict_is_printed_and_written(run, capsys):
    judged(run).verdict()

    assert "PASS on" in capsys.readouterr().out
    assert [line["kind"] for line in read_lines(run.path)] == [
        "header", "criterion", "control", "verdict",
    ]  # fmt: skip
    assert read_lines(run.path)[-1]["verdict"] == "pass"


@pytest.mark.parametrize(("value", "control"), [(1, 41), (0, 0)])
def test_a_failing_verdict_raises_after_it_was_written(run, value, control):
    with pytest.raises(VerdictFailed):
        judged(run, value, control).verdict()

    assert read_lines(run.path)[-1]["verdict"] == "fail"


def test_a_run_without_a_results_folder_writes_to_a_temporary_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    run = Run("09_example", CLAIM, "smoke")

    assert "results" not in run.path.parts
    assert not any(tmp_path.iterdir())


def test_a_full_run_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    with pytest.raises(RuntimeError, match="CUDA"):
        hardware.device_for("full")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("cpu Intel(R) Xeon(R) Processor @ 2.60GHz", "cpu-intel-xeon"),
        ("cpu AMD EPYC 9B14", "cpu-amd-epyc-9b14"),
    ],
)
def test_results_lie_under_a_name_of_the_hardware(name, folder):
    assert hardware.slug(name) == folder


def test_the_summary_holds_every_criterion_and_control_of_the_run(run, tmp_path):
    judged(run).verdict()

    entry = evaluate.entry(run.path, "09_example", "smoke", 1.0, None)

    assert entry["verdict"] == "pass" and entry["claim"] == CLAIM
    assert [c["name"] for c in entry["criteria"]] == ["logits that differ"]
    assert [c["outcome"] for c in entry["controls"]] == ["caught"]


def test_a_notebook_that_died_before_its_verdict_has_failed(run):
    entry = evaluate.entry(run.path, "09_example", "smoke", 1.0, "DeadKernelError: Kernel died")
    silent = evaluate.entry(run.path, "09_example", "smoke", 1.0, None)

    assert entry["verdict"] == "fail" and entry["why"] == ["DeadKernelError: Kernel died"]
    assert silent["verdict"] == "fail" and "without a verdict" in silent["why"][0]


def test_a_summary_keeps_the_entries_of_notebooks_that_were_left_out(tmp_path):
    evaluate.write_summary(tmp_path, "smoke", {"02_b": {"verdict": "pass"}})
    path = evaluate.write_summary(tmp_path, "smoke", {"01_a": {"verdict": "fail"}})

    summary = json.loads(path.read_text())

    assert {name: e["verdict"] for name, e in summary["notebooks"].items()} == {
        "01_a": "fail",
        "02_b": "pass",
    }
    assert summary["format"] == evaluate.SUMMARY_FORMAT


def test_what_cannot_be_evaluated_is_said_in_one_line_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    unknown = evaluate.main(["--only", "77", "--results", str(tmp_path)])
    no_gpu = evaluate.main(["--size", "full", "--results", str(tmp_path)])

    assert (unknown, no_gpu) == (2, 2)
    assert capsys.readouterr().err.count("\n") == 2 and not any(tmp_path.iterdir())


def test_what_is_left_open_is_written_with_its_reason_and_saves_no_verdict(run, capsys):
    judged(run)
    run.leave_open("pageable is slower", "not applicable", "there is no GPU")
    run.verdict()

    found = evaluate.entry(run.path, "09_example", "smoke", 1.0, None)
    assert found["unjudged"] == [
        {"name": "pageable is slower", "outcome": "not applicable", "why": "there is no GPU"}
    ]
    assert "pageable is slower: not applicable (there is no GPU)" in capsys.readouterr().out


def test_nothing_but_what_is_left_open_is_no_verdict(run):
    run.leave_open("pageable is slower", "not run", "there is no GPU")

    with pytest.raises(VerdictFailed, match="no criterion was judged"):
        run.verdict()
