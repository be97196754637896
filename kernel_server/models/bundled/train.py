"""Train the bundled model from scratch: fixed seed, fixed steps, text from `generator`.

Decides the architecture, the packing of documents into rows and the optimiser. The text is
decided by `generator`, the vocabulary by `tokenizer`, the verdict by `evaluate`.
Minutes on one GPU; on a CPU only a dry run (`--steps 2 --batch 2 --shards 1 --no-compile`).

    python -m kernel_server.models.bundled.train --out weights
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from . import tokenizer as tokens
from .generator import documents

STEPS = 3000
BATCH = 128
"""Rows in one step."""
ROW = 512
"""Tokens in one training row."""
TRAINING_SHARDS = 100
"""Shards of 20 000 documents: 2 million documents, about 75 million tokens."""
FIRST_SHARD = 100
"""Shards below this one are left to the tokenizer and the tests."""
RANDOM_ROWS = 12
"""One row in so many more is a repeated sequence of random token ids."""


def config() -> LlamaConfig:
    """Describe the architecture: 24 layers of width 192, 10.2 million parameters."""
    return LlamaConfig(
        vocab_size=tokens.VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokens.CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=tokens.PAD,
        bos_token_id=tokens.BOS,
        eos_token_id=tokens.EOS,
    )


def pack(shard: int, folder: Path, seed: int) -> NDArray[np.int16]:
    """Pack one shard into rows [rows, 512] of whole documents, `<s>` text `</s>`, padded."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows: list[list[int]] = [[]]
    for encoding in tokenizer.encode_batch(list(documents(seed, shard))):
        document = [*encoding.ids, tokens.EOS]
        if len(rows[-1]) + len(document) > ROW:
            rows.append([])
        rows[-1] += document[:ROW]
    packed = np.full((len(rows), ROW), tokens.PAD, np.int16)
    for row, ids in zip(packed, rows, strict=True):
        row[: len(ids)] = ids
    return packed


def random_rows(count: int, seed: int) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Make rows of repeated random ids, and how many leading ids of each nobody can predict."""
    rng = np.random.default_rng(seed)
    rows = np.empty((count, ROW), np.int16)
    periods = rng.integers(4, 130, count)
    for row, period in zip(rows, periods, strict=True):
        once = rng.integers(len(tokens.SPECIAL_TOKENS), tokens.VOCABULARY, period)
        row[0] = tokens.BOS
        row[1:] = np.resize(once, ROW - 1)
    return rows, (periods + 1).astype(np.int16)


def data(folder: Path, shards: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make the training rows [rows, 512] and the number of unscored leading tokens of each."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    wanted = range(FIRST_SHARD, FIRST_SHARD + shards)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        packed = np.concatenate(pool.map(partial(pack, folder=folder, seed=seed), wanted))
    extra, unscored = random_rows(max(1, len(packed) // RANDOM_ROWS), seed)
    rows = torch.from_numpy(np.concatenate([packed, extra]))
    ignored = np.concatenate([np.zeros(len(packed), np.int16), unscored])
    return rows, torch.from_numpy(ignored)


def build(seed: int) -> LlamaForCausalLM:
    """Make the untrained model; projections into the residual start small, as depth asks."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config())
    scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Give the learning rate of one step: linear warm-up, then a cosine down to 1 % of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: LlamaForCausalLM,
    rows: Tensor,
    ignored: Tensor,
    *,
    steps: int,
    batch: int,
    seed: int,
    peak: float = 2e-3,
    compiled: bool = True,
) -> None:
    """Train in place with AdamW under bfloat16 autocast, on the device the model is on.

    rows: [rows, 512] token ids. ignored: [rows] unscored leading tokens.
    """
    device = model.device
    rows, ignored = rows.to(device), ignored.to(device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    order = torch.Generator().manual_seed(seed)
    index = torch.empty(0, dtype=torch.long)
    position = torch.arange(ROW, device=device)
    warm_up = min(200, steps // 10 + 1)
    began = time.perf_counter()
    for step in range(steps):
        if len(index) < batch:
            index = torch.cat([index, torch.randperm(len(rows), generator=order)])
        chosen, index = index[:batch].to(device), index[batch:]
        ids = rows[chosen].long()
        unscored = (ids == tokens.PAD) | (position < ignored[chosen][:, None])
        labels = ids.masked_fill(unscored, -100)[:, 1:]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak, warm_up)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            spent = time.perf_counter() - began
            print(f"step {step} of {steps}: loss {loss.item():.4f}, {spent:.1f} s", flush=True)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write `model.safetensors` in bfloat16 beside its configuration."""
    model.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of 512 tokens per step")
    parser.add_argument("--shards", type=int, default=TRAINING_SHARDS)
    parser.add_argument("--no-compile", action="store_true", help="for dry runs")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    began = time.perf_counter()
    tokens.save(tokens.train(), arguments.out)
    rows, ignored = data(arguments.out, arguments.shards, arguments.seed)
    print(f"{len(rows)} rows after {time.perf_counter() - began:.1f} s", flush=True)
    model = build(arguments.seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    train(
        model,
        rows,
        ignored,
        steps=arguments.steps,
        batch=arguments.batch,
        seed=arguments.seed,
        compiled=not arguments.no_compile,
    )
    save(model, arguments.out)


if __name__ == "__main__":
    main()
