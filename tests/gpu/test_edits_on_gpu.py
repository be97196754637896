"""Every kind of edit on one GPU: the same cases as on the CPU, and the CPU's own bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernel_server.engine.tensor_edits import apply_edits
from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.engine.edit_plans import DTYPES, bits, chunks_of, plan
from tests.kernel import edit_cases

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["bundled", "llama", "gemma2"])
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    folder = None
    if request.param != "bundled":
        folder = make_folder(request.param, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype="bfloat16", device="cuda:0", prefill_chunk=16,
        kv_memory_bytes=64 << 20,
    ) as made:  # fmt: skip
        yield made


def test_every_kind_is_undone_and_runs_alike(local: Local) -> None:
    edit_cases.every_kind_is_undone_and_runs_alike(local)


def test_a_direction_stays_out_of_every_forward(local: Local) -> None:
    edit_cases.a_direction_stays_out_of_every_forward(local)


def test_the_next_token_is_decided(local: Local) -> None:
    edit_cases.the_next_token_is_decided(local)


def test_a_patch_equals_a_hook(local: Local) -> None:
    edit_cases.a_patch_equals_a_hook(local, 0.25)


def test_a_patch_of_everything_becomes_the_other_run(local: Local) -> None:
    edit_cases.a_patch_of_everything_becomes_the_other_run(local)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edit",
    [
        plan("scale", factor=0.9),
        plan("add", alpha=0.3, value=torch.linspace(-1, 1, 300).tolist(), rows=(9, 2)),
        plan("clamp", minimum=-0.2, maximum=0.7),
        plan("project_out", value=torch.linspace(-1, 2, 300).tolist()),
        plan("mean", rows=(1, 6, 7, 11), channels=tuple(range(0, 300, 7))),
        plan("swap", rows=(11, 0)),
        plan("force", token_ids=(7,), rows=(11,)),
        plan("ban", token_ids=(1, 2), rows=(11,)),
        plan("replace", token_ids=(1, 2), rows=(11,)),
    ],
    ids=lambda edit: edit.spec.kind,
)
def test_a_gpu_gives_the_bits_of_the_cpu(dtype: torch.dtype, edit: object) -> None:
    chunks = chunks_of([7, 5], width=300, dtype=dtype)
    here, (ours,) = apply_edits(chunks, [edit], 0)  # type: ignore[list-item]
    there, (theirs,) = apply_edits([chunk.cuda() for chunk in chunks], [edit], 0)  # type: ignore[list-item]

    assert bits([chunk.cpu() for chunk in there]) == bits(here)
    assert theirs.elements_changed == ours.elements_changed > 0
    assert theirs.norm_after == pytest.approx(ours.norm_after, rel=1e-5)
