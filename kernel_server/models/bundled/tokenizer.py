"""The bundled model's tokenizer: byte-level BPE with 4096 entries, trained on the generated text.

Decides the vocabulary: every word of the lexicon is one token with a leading space, so a name or
an answer is one next-token prediction. The text itself is decided by `generator`.

    python -m kernel_server.models.bundled.tokenizer --out weights
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .generator import documents, lexicon, stories

VOCABULARY = 4096
CONTEXT = 1024
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
PAD, BOS, EOS = range(3)

SPACED_WORDS = tuple(
    dict.fromkeys((*lexicon.LIST_WORDS, *stories.THINGS, *stories.AGENTS, *stories.SUBJECTS))
)
"""Words that must be one token after a space."""
BARE_WORDS = (*lexicon.NAMES, *lexicon.COUNTRIES)
"""Words that begin sentences, and so must be one token without a space too."""


def _corpus(seed: int) -> Iterator[str]:
    for shard in range(3):
        yield from documents(seed, shard)
    # The lexicon once more, so that no rare word is left in two pieces.
    for _ in range(200):
        yield " " + " ".join(SPACED_WORDS)
        yield from BARE_WORDS


def train(seed: int = 0) -> Tokenizer:
    """Train the tokenizer; raise RuntimeError when a lexicon word is not one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    broken = [
        word
        for word in (*(f" {w}" for w in SPACED_WORDS), *BARE_WORDS)
        if len(tokenizer.encode(word, add_special_tokens=False).ids) != 1
    ]
    if broken or tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(
            f"{tokenizer.get_vocab_size()} entries, {len(broken)} lexicon words in pieces "
            f"({', '.join(broken[:5])}); give the lexicon more weight in the corpus"
        )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as Hugging Face expects them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model's tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save(train(arguments.seed), arguments.out)


if __name__ == "__main__":
    main()
