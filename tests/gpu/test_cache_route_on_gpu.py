"""The Cache route on one GPU: exact at every point, and the same bits however it is stopped."""

from __future__ import annotations

import pytest
import torch

from kernel_server.engine.loading import resume
from tests.engine.bookkeeper import walk
from tests.models import tiny, zoo
from tests.models.test_cache_route import FAMILIES

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_outside_the_attention_interface_is_exact(name: str, dtype: torch.dtype) -> None:
    model, _, report = resume(zoo.model(name).to("cuda", dtype))

    assert report.passed
    assert model.cache is not None


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", ["bloom", "falcon (alibi)", "gptj", "mpt"])
def test_stops_forks_moves_and_company_change_no_bit(name: str, dtype: torch.dtype) -> None:
    model = resume(zoo.model(name).to("cuda", dtype))[0]
    _, different = walk(model, range(tiny.LAYERS + 3), 6, 21, 4)

    assert different == []
