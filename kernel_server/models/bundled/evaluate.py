"""Measure what the bundled model can do on held-out cases, beside majority and shortcut answers.

Decides how each ability is scored. Which cases exist is decided by `generator`; the model card is
written from the JSON by `card`. Greedy, float32; minutes on one CPU core.

    python -m kernel_server.models.bundled.evaluate --out evaluation.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from . import tokenizer as tokens
from . import weights_folder
from .generator import (
    CLASSIC,
    TELLING_WORDS,
    StoryCase,
    fact_cases,
    indirect_cases,
    repeat_cases,
    story_cases,
    valence_of,
)

STEERING_LAYER = 16
"""The layer whose output the direction is measured at and added to; chosen by `--sweep`."""
STEERING_FACTOR = 2.0
"""How many mean differences are added: two reflect a story, three break the language."""
CONTINUATION = 24
"""Greedy tokens in which positive and negative words are counted."""
RANDOM_DIRECTIONS = 5


@dataclass
class Row:
    """One line of the table: a share of cases, what it must reach, and simpler answers' shares."""

    ability: str
    cases: str
    count: int
    score: float
    target: float | None = None
    at_most: bool = False
    baselines: dict[str, float] = field(default_factory=dict)


class Subject:
    """The model under evaluation with its tokenizer."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.to(device).eval()
        self.device = device

    def ids(self, text: str) -> list[int]:
        """Encode one text, `<s>` first."""
        return self.tokenizer.encode(text).ids

    def token(self, word: str) -> int:
        """Give the token of ` word`, which must be a single one."""
        (token,) = self.tokenizer.encode(f" {word}", add_special_tokens=False).ids
        return token

    def batches(
        self, rows: Sequence[list[int]], size: int = 64
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (indices, ids [batch, tokens]) with equal lengths, so that nothing is padded."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            by_length[len(row)].append(index)
        for indices in by_length.values():
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                yield part, torch.tensor([rows[i] for i in part], device=self.device)

    @torch.inference_mode()
    def next_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Predict the token after each prompt."""
        answers = [0] * len(prompts)
        for part, ids in self.batches([self.ids(prompt) for prompt in prompts]):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            best = self.model.lm_head(hidden[:, -1]).argmax(-1).tolist()
            for index, token in zip(part, best, strict=True):
                answers[index] = token
        return answers

    @torch.inference_mode()
    def predictions(self, ids: Tensor) -> Tensor:
        """Predict the token after every prefix of ids [batch, tokens]."""
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden).argmax(-1)

    @torch.inference_mode()
    def mean_residuals(self, prompts: Sequence[str], layer: int, at: set[int]) -> Tensor:
        """Average one layer's output over the tokens `at` of each prompt: [prompts, hidden]."""
        found = torch.empty(len(prompts), self.model.config.hidden_size)
        kept: list[Tensor] = []
        wanted = torch.tensor(sorted(at), device=self.device)
        hook = self.model.model.layers[layer].register_forward_hook(
            lambda _module, _inputs, output: kept.append(_residual(output))
        )
        try:
            for part, ids in self.batches([self.ids(prompt) for prompt in prompts]):
                kept.clear()
                self.model.model(input_ids=ids, use_cache=False)
                here = torch.isin(ids, wanted).unsqueeze(-1)
                found[part] = ((kept[0] * here).sum(1) / here.sum(1)).cpu()
        finally:
            hook.remove()
        return found

    @torch.inference_mode()
    def continuations(
        self,
        prompts: Sequence[str],
        count: int = CONTINUATION,
        *,
        layer: int = STEERING_LAYER,
        pushes: Tensor | None = None,
    ) -> list[str]:
        """Continue each prompt greedily by `count` tokens, cut at `</s>`.

        pushes: [prompts, hidden], added to the output of `layer` at every token, if given.
        """
        texts = [""] * len(prompts)
        for part, ids in self.batches([self.ids(prompt) for prompt in prompts], 256):
            cache = transformers.DynamicCache(config=self.model.config)
            step, made = ids, []
            with self.added(layer, None if pushes is None else pushes[part].unsqueeze(1)):
                for _ in range(count):
                    output = self.model(
                        input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
                    )
                    step = output.logits[:, -1].argmax(-1, keepdim=True)
                    made.append(step)
            for index, row in zip(part, torch.cat(made, 1).tolist(), strict=True):
                end = row.index(tokens.EOS) if tokens.EOS in row else count
                texts[index] = self.tokenizer.decode(row[:end])
        return texts

    @contextmanager
    def added(self, layer: int, vectors: Tensor | None) -> Iterator[None]:
        """Add vectors [batch, 1, hidden] to a layer's output at every token, while inside."""
        if vectors is None:
            yield
            return
        vector = vectors.to(self.device)

        def add(_module: Any, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] + vector, *output[1:])
            return output + vector

        hook = self.model.model.layers[layer].register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()


def _residual(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


def _majority(answers: Sequence[object]) -> float:
    return round(Counter(answers).most_common(1)[0][1] / len(answers), 4)


def indirect_rows(subject: Subject, count: int) -> list[Row]:
    """Score the indirect object on held-out combinations, and on held-out pairs alone."""
    rows = []
    for title, held_out, target in (
        ("held-out pairs, combinations, places and objects", True, 0.95),
        ("held-out pairs only", False, None),
    ):
        cases = indirect_cases(count, seed=1, held_out=held_out)
        got = subject.next_tokens([case.prompt for case in cases])
        hits = [token == subject.token(case.answer) for token, case in zip(got, cases, strict=True)]
        baselines = {
            "majority": _majority([case.answer for case in cases]),
            "first name": _share([case.first_name == case.answer for case in cases]),
            "last introduced name": _share([case.second_name == case.answer for case in cases]),
        }
        rows.append(Row("indirect object", title, count, _share(hits), target, baselines=baselines))
        if held_out:
            for order in ("ABB", "BAB"):
                mine = [hit for hit, case in zip(hits, cases, strict=True) if case.order == order]
                rows.append(
                    Row(
                        "indirect object", f"of these, order {order}", len(mine), _share(mine), 0.95
                    )
                )
    return rows


def induction_rows(subject: Subject, count: int) -> list[Row]:
    """Score every token of a second copy that its first copy decides."""
    rows = []
    for title, length, invented in (
        ("5 known words", 5, False),
        ("12 known words", 12, False),
        ("20 known words", 20, False),
        ("12 invented words of several tokens", 12, True),
    ):
        texts = repeat_cases(count, length, seed=1, invented=invented)
        sequences = []
        for text in texts:
            half = text[: len(text) // 2]
            once = len(subject.ids(half)) - 1
            sequences.append((subject.ids(text), once))
        rows.append(_induction_row(subject, title, sequences))
    generator = torch.Generator().manual_seed(1)
    for length in (10, 50):
        drawn = torch.randint(
            len(tokens.SPECIAL_TOKENS), tokens.VOCABULARY, (count, length), generator=generator
        ).tolist()
        sequences = [([tokens.BOS, *ids, *ids], length) for ids in drawn]
        rows.append(_induction_row(subject, f"{length} random token ids", sequences))
    return rows


def _induction_row(subject: Subject, title: str, sequences: list[tuple[list[int], int]]) -> Row:
    hits: list[bool] = []
    answers: list[int] = []
    repeats: list[bool] = []
    chances: list[float] = []
    for part, ids in subject.batches([ids for ids, _ in sequences]):
        predicted = subject.predictions(ids).tolist()
        for index, row in zip(part, predicted, strict=True):
            sequence, once = sequences[index]
            # A text begins without a space, so its first word is another token the second time;
            # from the second copy's second token on, the first copy decides.
            for at in range(once + 2, len(sequence)):
                answers.append(sequence[at])
                hits.append(row[at - 1] == sequence[at])
                repeats.append(sequence[at - 1] == sequence[at])
                chances.append(1 / once)
    baselines = {
        "majority": _majority(answers),
        "repeat the last token": _share(repeats),
        "any token of the sequence": round(sum(chances) / len(chances), 4),
    }
    return Row("induction", title, len(hits), _share(hits), 0.95, baselines=baselines)


def fact_rows(subject: Subject, count: int | None) -> list[Row]:
    """Score facts in phrasings trained on with no fact, with other facts only, or with this one."""
    rows = []
    for title, kind, limit, target in (
        ("constructions never trained on", "unseen", count, 0.9),
        ("combinations of parts never trained on", "recombined", count or 2000, 0.9),
        ("phrasings trained on for other facts only", "unpaired", count or 1500, None),
        ("phrasings trained on", "trained", count or 1500, None),
    ):
        cases = fact_cases(kind, limit, seed=1)  # type: ignore[arg-type]
        got = subject.next_tokens([case.prompt for case in cases])
        hits = [token == subject.token(case.answer) for token, case in zip(got, cases, strict=True)]
        baselines = {
            "majority": _majority([case.answer for case in cases]),
            "majority answer of the relation": _relation_majority(cases),
        }
        rows.append(Row("facts", title, len(cases), _share(hits), target, baselines=baselines))
        if kind == "unseen":
            for phrasing in sorted({case.phrasing for case in cases}):
                mine = [h for h, c in zip(hits, cases, strict=True) if c.phrasing == phrasing]
                rows.append(Row("facts", f"of these, “{phrasing}”", len(mine), _share(mine)))
    return rows


def _relation_majority(cases: Sequence[Any]) -> float:
    groups: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        groups[case.relation].append(case.answer)
    best = sum(Counter(answers).most_common(1)[0][1] for answers in groups.values())
    return round(best / len(cases), 4)


def direction(subject: Subject, layer: int, count: int = 400) -> Tensor:
    """Measure the mean difference of good and bad stories at the words that tell: [hidden].

    The stories consist of trained event sentences; the test's are held out. The words that tell
    are those of `TELLING_WORDS`: the model keeps an event's valence there and reads it late.
    """
    stories = story_cases(count, seed=11, held_out=False)
    at = {subject.token(word) for word in TELLING_WORDS}
    residuals = subject.mean_residuals([story.prompt for story in stories], layer, at)
    good = torch.tensor([story.valence > 0 for story in stories])
    return residuals[good].mean(0) - residuals[~good].mean(0)


def judged(
    subject: Subject, stories: Sequence[StoryCase], layer: int, vectors: Tensor
) -> list[list[int]]:
    """Continue every story while a vector pushes against its valence; judge the continuations.

    vectors: [arms, hidden], zero to leave the model alone. Returns one judgement per arm and story.
    """
    signs = torch.tensor([-float(story.valence) for story in stories])
    pushes = (vectors.unsqueeze(1) * signs.view(1, -1, 1)).flatten(0, 1)
    prompts = [story.prompt for story in stories] * len(vectors)
    texts = subject.continuations(prompts, layer=layer, pushes=pushes)
    judgements = [valence_of(text) for text in texts]
    size = len(stories)
    return [judgements[arm * size : (arm + 1) * size] for arm in range(len(vectors))]


def _fits(stories: Sequence[StoryCase], judgements: Sequence[int]) -> list[bool]:
    return [got == story.valence for got, story in zip(judgements, stories, strict=True)]


def _flips(stories: Sequence[StoryCase], judgements: Sequence[int]) -> list[bool]:
    return [got == -story.valence for got, story in zip(judgements, stories, strict=True)]


def sentiment_rows(subject: Subject, count: int) -> list[Row]:
    """Score continuations of stories whose event sentences are held out, left alone and steered."""
    stories = story_cases(count, seed=1)
    vector = STEERING_FACTOR * direction(subject, STEERING_LAYER)
    generator = torch.Generator().manual_seed(1)
    others = torch.randn(RANDOM_DIRECTIONS, len(vector), generator=generator)
    others *= vector.norm() / others.norm(dim=1, keepdim=True)
    arms = torch.cat([torch.zeros_like(vector)[None], vector[None], others])
    plain, pushed, *random_arms = judged(subject, stories, STEERING_LAYER, arms)
    steered = _flips(stories, pushed)
    random_flips = [_share(_flips(stories, arm)) for arm in random_arms]
    random_fits = [_share(_fits(stories, arm)) for arm in random_arms]
    where = f"layers.{STEERING_LAYER}.output, {STEERING_FACTOR:g} × mean difference"
    return [
        Row(
            "sentiment",
            "continuation fits the story",
            count,
            _share(_fits(stories, plain)),
            baselines={
                "majority": 0.5,
                "flipped without a direction": _share(_flips(stories, plain)),
            },
        ),
        Row("sentiment", f"flipped by the direction at {where}", count, _share(steered), 0.9),
        *(
            Row(
                "sentiment",
                f"of these, {name} stories",
                sum(s.valence == valence for s in stories),
                _share([f for f, s in zip(steered, stories, strict=True) if s.valence == valence]),
            )
            for name, valence in (("good", 1), ("bad", -1))
        ),
        Row(
            "sentiment",
            f"flipped by a random direction of the same norm (worst of {RANDOM_DIRECTIONS})",
            count * RANDOM_DIRECTIONS,
            max(random_flips),
            0.2,
            at_most=True,
            baselines={"continuation still fits the story": min(random_fits)},
        ),
    ]


def sweep(subject: Subject, count: int = 60) -> None:
    """Print flip rates by layer and factor on stories of trained events, to choose from."""
    stories = story_cases(count, seed=12, held_out=False)
    factors = (1.0, 1.5, 2.0, 3.0)
    for layer in range(0, subject.model.config.num_hidden_layers, 2):
        base = direction(subject, layer)
        arms = judged(subject, stories, layer, torch.stack([f * base for f in factors]))
        rates = [
            f"×{factor:g} {_share(_flips(stories, arm)):.2f}"
            for factor, arm in zip(factors, arms, strict=True)
        ]
        print(f"layer {layer}: norm {base.norm():.1f}, {', '.join(rates)}", flush=True)


def evaluate(folder: Path, device: str = "cpu", *, small: bool = False) -> dict[str, Any]:
    """Measure every ability; `small` takes a tenth of the cases. Returns the record."""
    subject = Subject(folder, device)
    parts: tuple[Callable[[], list[Row]], ...] = (
        lambda: indirect_rows(subject, 100 if small else 1000),
        lambda: induction_rows(subject, 20 if small else 200),
        lambda: fact_rows(subject, 200 if small else None),
        lambda: sentiment_rows(subject, 30 if small else 300),
    )
    rows: list[Row] = []
    for part in parts:
        began = time.perf_counter()
        made = part()
        for row in made:
            print(line(asdict(row)), flush=True)
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)
        rows += made
    (classic,) = subject.continuations([CLASSIC])
    print(f"{CLASSIC} →{classic}", flush=True)
    return {
        "classic": {"prompt": CLASSIC, "continuation": classic},
        "device": device,
        "machine": platform.machine(),
        "rows": [asdict(row) for row in rows],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "weights_sha256": fingerprint(folder),
    }


def fingerprint(folder: Path) -> str:
    """Hash the weights, so that a record can be held against the file it describes."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def met(row: dict[str, Any]) -> bool | None:
    """Say whether a row reached its target; None when it has none."""
    if row["target"] is None:
        return None
    reached = row["score"] <= row["target"] if row["at_most"] else row["score"] >= row["target"]
    return bool(reached)


def line(row: dict[str, Any]) -> str:
    """Write one row of the record as text."""
    verdict = {None: "", True: ", met", False: ", NOT MET"}[met(row)]
    bound = (
        ""
        if row["target"] is None
        else f" (target {'≤' if row['at_most'] else '≥'} {row['target']:.0%})"
    )
    simple = "; ".join(f"{name} {score:.1%}" for name, score in row["baselines"].items())
    tail = f" [{simple}]" if simple else ""
    score = f"{row['score']:.1%} of {row['count']}"
    return f"{row['ability']}: {row['cases']}: {score}{bound}{verdict}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate the bundled model on held-out cases.")
    parser.add_argument("--model", type=Path, default=weights_folder(), help="model folder")
    parser.add_argument("--out", type=Path, help="write the record to this JSON file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a tenth of the cases")
    parser.add_argument("--sweep", action="store_true", help="also print layers and factors")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record = evaluate(arguments.model, arguments.device, small=arguments.small)
    if arguments.out is not None:
        text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    if arguments.sweep:
        sweep(Subject(arguments.model, arguments.device))


if __name__ == "__main__":
    main()
