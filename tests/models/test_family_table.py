"""The committed table family × site is what the load check finds, and holds every family."""

from __future__ import annotations

import pytest
import torch
import transformers

from kernel_server.models import family_table
from kernel_server.models.family_table import SITES, YES, Row
from scripts import families
from tests.models import tiny, zoo

torch.set_num_threads(1)

TEXT = family_table.FILE.read_text(encoding="utf-8")
ROWS = family_table.read(TEXT)
INSTALLED = f"transformers {transformers.__version__}"
#: Of another version, other families and sites are to be expected.
same_version = pytest.mark.skipif(
    family_table.versions_of(TEXT) != INSTALLED,
    reason=f"the table was made with {family_table.versions_of(TEXT)}, here is {INSTALLED}",
)
#: Families that must be served, by the attention function and by the Cache route.
BY_FUNCTION = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "opt", "mixtral"),
    *("phi3", "gpt_neox", "olmo2", "granite", "glm4", "starcoder2", "qwen3_moe", "gpt_oss"),
    *("deepseek_v3", "smollm3", "cohere2"),
)
BY_CACHE = (
    *("falcon", "falcon (multi-query)", "falcon (alibi)", "falcon (new decoder)"),
    *("bloom", "gptj", "gpt_neo", "mpt"),
)
#: A few of each kind of verdict, made again at every run.
SAMPLE = ("bloom", "cohere", "deepseek_v3", "falcon (alibi)", "mamba", "mixtral", "xlnet")


def test_the_families_that_must_be_served_are() -> None:
    assert {name: ROWS[name].route for name in BY_FUNCTION} == dict.fromkeys(
        BY_FUNCTION, "function"
    )
    assert {name: ROWS[name].route for name in BY_CACHE} == dict.fromkeys(BY_CACHE, "Cache")
    assert sum(row.route is not None for row in ROWS.values()) >= 45


def test_the_residual_points_and_what_is_added_work_in_all_that_must_be_served() -> None:
    everywhere = ("embedding", "input", "attention.output", "mlp.output", "output")
    for name in (*BY_FUNCTION, *BY_CACHE):
        marks = {site: ROWS[name].cells[site][0] for site in (*everywhere, "final_norm", "logits")}

        assert set(marks.values()) == {YES}, name


def test_a_family_that_is_refused_says_for_want_of_what() -> None:
    refused = [row for row in ROWS.values() if row.route is None]

    assert refused
    assert all(row.refusal and not row.cells for row in refused)


def test_what_a_family_lacks_has_a_reason() -> None:
    cells = [cell for row in ROWS.values() for cell in row.cells.values()]

    assert all((mark == YES) == (reason == "") for mark, reason in cells)


@same_version
def test_every_family_of_the_installed_transformers_has_its_verdict() -> None:
    not_tried = {name for name in zoo.names() if f"| {name} | " not in TEXT}

    assert not_tried == set()


@same_version
@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_is_what_the_load_check_finds_now(name: str) -> None:
    assert families.row_of(name, zoo.model(name)) == ROWS[name]


@same_version
@pytest.mark.slow
@pytest.mark.timeout(1800)  # every family, one after the other
def test_the_whole_table_is_what_the_load_check_finds_now() -> None:
    assert families.table() == TEXT


def test_reading_gives_back_what_was_rendered() -> None:
    cells = dict.fromkeys(SITES, (YES, "")) | {
        "middle": ("–", "its MLP reads something else"),
        "mlp.neurons": ("some", "a mixture of experts; of some kind"),
    }
    rows = {
        "one": Row("one", "function", cells),
        "two (odd)": Row("two (odd)", "Cache", cells),
        "three": Row("three", refusal="recurrent state"),
    }
    text = family_table.render(rows.values(), "transformers 1.2.3", {"four": "too large"})

    assert family_table.read(text) == rows
    assert family_table.versions_of(text) == "transformers 1.2.3"
    assert "| four | too large |" in text


def test_a_row_for_a_terminal_names_every_site_once() -> None:
    lines = families.row_of("llama", tiny.family("llama")).describe()

    assert [line.split()[0] for line in lines[1:]] == list(SITES)
    assert all(line.split()[1] == YES for line in lines[1:])
