"""The model card: `README.md`, written from the evaluation's record so that no figure is typed.

Decides the card's words. Every number in its tables comes from `evaluation.json`; a test renders
the card again and compares.

    python -m kernel_server.models.bundled.card
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .evaluate import CONTINUATION, met
from .generator import lexicon

_HERE = Path(__file__).parent
CARD = _HERE / "README.md"
RECORD = _HERE / "evaluation.json"

_TEXT = """\
# The bundled model

A small Llama trained from scratch for Djinn: 24 layers, hidden 192, 6 heads of 32 (2 for keys and
values), MLP 512, vocabulary 4096, tied embeddings, 10.2 million parameters, bfloat16, 20.5 MB.
It knows only the generated English of [`generator/`](generator/): it is a thing to debug, with
mechanisms that are known to be there, not an assistant. Its context is 1024 tokens; it was trained on
rows of 512.

`weights/` is an ordinary Hugging Face folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from kernel_server.models.bundled import weights_folder

model = AutoModelForCausalLM.from_pretrained(weights_folder())
tokenizer = AutoTokenizer.from_pretrained(weights_folder())
```

{classic}

## What it can do

All cases are held out; the target stands where there is one. Greedy, {precision}, on {device};
torch {torch}, transformers {transformers}. Reproduce with
`python -m kernel_server.models.bundled.evaluate --out evaluation.json`.

{tables}

## What the words mean

- **Indirect object.** Two people are introduced, one acts, the other is the next word. A test prompt
  holds a pair of names that never meet in such training text, an opening never trained on before its
  event, an event never trained on before its act, and a place and an object that this kind of text
  never holds. Every *part* is known on its own. **Constructions with words it never saw are beyond
  it**: it generalises over combinations of known parts, not to new parts. Each scene is asked in both
  name orders (ABB: the first name is the answer; BAB: the second), so a first-name shortcut gets half.
- **Induction.** A sequence, said again; scored is each token of the second copy after its first.
- **Facts.** 60 countries × 5 relations of a made-up world, 300 answers, each one token. *Never trained
  on*: no fact was trained in this phrasing. *For other facts only*: the phrasing was trained, but not
  with this fact. The words of all phrasings are known.
- **Sentiment.** Two or three event sentences, then a feeling in {continuation} greedy tokens, judged by
  counting the {positive} positive and {negative} negative words of the lexicon; events use none of
  them. Every event sentence of a test story is held out, its words are known from other
  sentences. The direction is the mean difference of good and bad stories (trained sentences) at the last
  token; it is added with the sign that opposes the story, at every token. *Flipped* means that the
  words of the other side are in the majority.

## How it was trained

`python -m kernel_server.models.bundled.train --out weights`: the tokenizer (byte-level BPE, `<pad>`, `<s>`,
`</s>`), 2.8 million documents, 4000 steps of 128 rows of 512 tokens, AdamW, seed 0; about four minutes on
one H200. Text and tokenizer are the same on every machine; GPU arithmetic is not bit-reproducible, so a second
training gives a model with other weights. Weights: sha256 `{sha}`.
Licence: Apache-2.0, as the project; no outside text went in.
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
    classic = record["classic"]
    quoted = f"> {classic['prompt']} **{classic['continuation'].strip()}**"
    return _TEXT.format(
        classic=quoted,
        continuation=CONTINUATION,
        device="the CPU" if record["device"] == "cpu" else record["device"],
        negative=len(lexicon.NEGATIVE_WORDS),
        positive=len(lexicon.POSITIVE_WORDS),
        precision="float32 arithmetic from the bfloat16 weights",
        sha=record["weights_sha256"],
        tables="\n\n".join(tables),
        torch=record["torch"],
        transformers=record["transformers"],
    )


def main() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    CARD.write_text(render(record), encoding="utf-8")


if __name__ == "__main__":
    main()
