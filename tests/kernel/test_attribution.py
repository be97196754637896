"""Models of which a logit has no parts: refused by name, not divided wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from kernel_server.protocol.errors import NotSupported
from notebooks.harness.inprocess import local_kernel
from tests.models import tiny


def test_a_projection_after_the_final_norm_is_refused_by_name(tmp_path: Path) -> None:
    fields = {"hidden_size": 64, "word_embed_proj_dim": 32, "ffn_dim": 96, "num_hidden_layers": 2}
    config = AutoConfig.for_model("opt", num_attention_heads=4, vocab_size=97, **fields)
    tiny.random_model(config).save_pretrained(tmp_path / "opt")
    with local_kernel(
        model=tmp_path / "opt", dtype="float32", device="cpu", prefill_chunk=16
    ) as made:
        stop = made.server.launch([5, 6, 7, 8], max_new_tokens=2).run_to("logits")

        with pytest.raises(NotSupported, match="projection from 64 to 32 channels"):
            stop.attribution(5)
