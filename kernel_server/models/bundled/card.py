"""The model card: `README.md`, written from the evaluation's record so that no figure is typed.

Decides the card's words. Every number in its tables comes from `evaluation.json`; a test renders
the card again and compares.

    python -m kernel_server.models.bundled.card
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import train, weights_folder
from .evaluate import CONTINUATION, met
from .generator import SHARD, lexicon

_HERE = Path(__file__).parent
CARD = _HERE / "README.md"
RECORD = _HERE / "evaluation.json"

_TEXT = """\
# The bundled model

A small Llama trained from scratch for Djinn: {layers} layers, hidden {hidden}, {heads} heads of
{head_size} ({kv_heads} for keys and values), MLP {mlp}, vocabulary {vocabulary}, tied
embeddings, {parameters:.1f} million parameters, bfloat16, {megabytes:.1f} MB. It knows only the
generated English of [`generator/`](generator/): it is a thing to debug, with mechanisms that
are known to be there, not an assistant. Its context is {context} tokens; it was trained on rows
of {row}.

`weights/` is an ordinary Hugging Face folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from kernel_server.models.bundled import weights_folder

model = AutoModelForCausalLM.from_pretrained(weights_folder())
tokenizer = AutoTokenizer.from_pretrained(weights_folder())
```

{classic}

## What it can do

All cases but the last row of *Facts* are held out; the target stands where there is one.
Greedy, float32 arithmetic from the bfloat16 weights, on {device}; torch {torch}, transformers
{transformers}. Reproduce with `python -m kernel_server.models.bundled.evaluate --out
evaluation.json`.

{tables}

## What the words mean

- **Indirect object.** Two people are introduced, one acts, the other is the next word. A test
  prompt holds a pair of names that never meet in such training text, an opening never trained
  on before its event, an event never trained on before its act, and a place and an object that
  this kind of text never holds. Every *part* is known on its own. **Constructions with words it
  never saw are beyond it**: it generalises over combinations of known parts, not to new parts.
  Each scene is asked in both name orders (ABB: the first name is the answer; BAB: the second),
  so the shortcuts get half.
- **Induction.** A sequence, said again; scored is each token of the second copy after its
  first.
- **Facts.** {countries} countries × {relations} relations of a made-up world, each answer one
  token. *Constructions never trained on*: sentences that no training text holds for any fact;
  their words it does. *Combinations*: two known parts of a sentence that never meet in training
  text. *For other facts only*: the phrasing was trained on, but not with this fact. One of the
  constructions fails almost wholly and stays in the table. An earlier training with fewer
  phrasings failed on several constructions; training and test phrasings were then revised once.
- **Sentiment.** Two or three event sentences, then a feeling in {continuation} greedy tokens,
  judged by counting the {positive} positive and {negative} negative words of the lexicon;
  events use none of them. Every event sentence of a test story is held out: a known verb with a
  known object that never met. The direction is the mean difference of good and bad stories
  (trained sentences) at the words that tell (`TELLING_WORDS`); it is added at every token,
  prompt and generated, with the sign that opposes the story. *Flipped* means that words of the
  other side are in the majority. The model keeps the valence at those words and collects it
  only in its last layer, so a direction measured at the last token of the prompt does nothing
  before that; and a pushed continuation is sometimes clumsy. Layer and factor were chosen on
  stories of trained sentences; a factor of 2.5, tried first, broke the language of many good ones.

## How it was trained

`python -m kernel_server.models.bundled.train --out weights`: the tokenizer (byte-level BPE,
`<pad>`, `<s>`, `</s>`), {documents:.1f} million documents, {steps} steps of {batch} rows of
{row} tokens, AdamW, seed 0; about five minutes on one H200, start included. GPU arithmetic is
not bit-reproducible, so another training gives other weights, and head and layer numbers will
differ. The text is the same on every machine but for one thing: when these weights were
trained, the order of the words within lists of invented words was not yet seeded.

Weights: sha256 `{sha}`. Licence: Apache-2.0, as the project; no outside text went in.
"""


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["baselines"]))
    head = ["cases", "count", "score", "target", "met", *names]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in rows:
        target, reached = "", ""
        if row["target"] is not None:
            target = f"{'≤' if row['at_most'] else '≥'} {row['target']:.0%}"
            reached = "yes" if met(row) else "**no**"
        simple = [f"{row['baselines'][n]:.1%}" if n in row["baselines"] else "" for n in names]
        cells = [row["cases"], str(row["count"]), f"{row['score']:.1%}", target, reached, *simple]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render(record: dict[str, Any]) -> str:
    """Write the card's text from the record of an evaluation."""
    tables = []
    for ability in dict.fromkeys(row["ability"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["ability"] == ability]
        tables.append(f"### {ability.capitalize()}\n\n{_table(rows)}")
    config = json.loads((weights_folder() / "config.json").read_text(encoding="utf-8"))
    size = (weights_folder() / "model.safetensors").stat().st_size
    classic = record["classic"]
    return _TEXT.format(
        batch=train.BATCH,
        classic=f"> {classic['prompt']} **{classic['continuation'].strip()}**",
        context=config["max_position_embeddings"],
        continuation=CONTINUATION,
        countries=len(lexicon.COUNTRIES),
        device="the CPU" if record["device"] == "cpu" else record["device"],
        documents=train.TRAINING_SHARDS * SHARD / 1e6,
        head_size=config["head_dim"],
        heads=config["num_attention_heads"],
        hidden=config["hidden_size"],
        kv_heads=config["num_key_value_heads"],
        layers=config["num_hidden_layers"],
        megabytes=size / 1e6,
        mlp=config["intermediate_size"],
        negative=len(lexicon.NEGATIVE_WORDS),
        parameters=size / 2e6,
        positive=len(lexicon.POSITIVE_WORDS),
        relations=len(lexicon.RELATIONS),
        row=train.ROW,
        sha=record["weights_sha256"],
        steps=train.STEPS,
        tables="\n\n".join(tables),
        torch=record["torch"],
        transformers=record["transformers"],
        vocabulary=config["vocab_size"],
    )


def main() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    CARD.write_text(render(record), encoding="utf-8")


if __name__ == "__main__":
    main()
