"""Edits, draws and figures computed on the GPU are those computed on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kernel_server.engine.sampler import sample
from kernel_server.engine.tensor_edits import apply_edits
from kernel_server.engine.variables import summarize, token_norms
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.messages import EditSpec
from kernel_server.state.instructions import EditPlan, Sampling

pytestmark = pytest.mark.gpu


def logits() -> torch.Tensor:
    return torch.randn(32000, generator=torch.Generator().manual_seed(0)) * 3


def plan(kind: Any, rows: tuple[int, ...] | None = None, **spec: Any) -> EditPlan:
    edit = EditSpec(kind=kind, location="layers.0.output", **spec)
    return EditPlan(edit_id=1, point=1, spec=edit, rows=rows, channels=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 1.0), (1.3, 0.9)])
def test_equal_logits_draw_the_same_token(dtype, temperature, top_p):
    row = logits().to(dtype)
    drawn = [
        Sampling(temperature=temperature, top_p=top_p, seed=3, position=position)
        for position in range(20)
    ]

    assert [sample(row.cuda(), one) for one in drawn] == [sample(row, one) for one in drawn]


def test_of_equal_logits_greedy_takes_the_lowest_id():
    row = torch.zeros(50000, device="cuda")
    row[[17, 900, 40000]] = 5.0

    assert sample(row, Sampling(temperature=0.0, top_p=1.0, seed=0, position=0)) == 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_edit_gives_the_same_bits(dtype):
    vector = np.random.default_rng(0).standard_normal(5120).astype(np.float32)
    matrix = np.random.default_rng(1).standard_normal((3, 5120)).astype(np.float32)
    chunks = [torch.randn(1, size, 5120).to(dtype) for size in (4, 3)]
    edits = [
        plan("scale", factor=0.9),
        plan("add", alpha=0.3, value=Array.from_numpy(vector)),
        plan("set", rows=(6, 1, 2), value=Array.from_numpy(matrix)),
        plan("zero", rows=(5,)),
    ]
    here, results = apply_edits(chunks, edits, 10)
    there, on_gpu = apply_edits([chunk.cuda() for chunk in chunks], edits, 10)

    assert all(torch.equal(one, two.cpu()) for one, two in zip(here, there, strict=True))
    for one, two in zip(results, on_gpu, strict=True):
        assert (one.positions, one.elements_changed) == (two.positions, two.elements_changed)
        assert two.norm_after == pytest.approx(one.norm_after, rel=1e-4)


def test_an_identity_edit_changes_no_bit():
    raw = torch.arange(65536, dtype=torch.int32).to(torch.int16)  # every bfloat16 there is
    chunks = [raw.view(torch.bfloat16).reshape(1, 16, 4096).cuda()]
    nothing = Array.from_numpy(np.float32(0))
    for edit in (
        plan("scale", factor=1.0),
        plan("add", value=nothing),
        plan("add", alpha=0.0, value=nothing),
    ):
        after, (result,) = apply_edits(chunks, [edit], 0)

        assert result.elements_changed == 0
        assert torch.equal(after[0].view(torch.int16), chunks[0].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_agree(dtype):
    chunks = [torch.randn(1, size, 5120).to(dtype) for size in (4, 3)]
    on_gpu = [chunk.cuda() for chunk in chunks]
    here, there = summarize(chunks, "embedding"), summarize(on_gpu, "embedding")

    assert token_norms(on_gpu) == pytest.approx(token_norms(chunks), rel=1e-5)
    assert (here.shape, here.dtype, here.minimum, here.maximum) == (
        there.shape, there.dtype, there.minimum, there.maximum,
    )  # fmt: skip
    assert there.mean == pytest.approx(here.mean, abs=1e-6)
    assert there.norm == pytest.approx(here.norm, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_norm_alone_and_among_others(dtype):
    chunk = torch.randn(1, 33, 5120).to(dtype).cuda()
    alone = [token_norms([chunk[:, row : row + 1]])[0] for row in range(33)]

    assert token_norms([chunk]) == pytest.approx(alone, rel=1e-6)
