"""The bundled model does what its card says, on a sample; the card says what was measured."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernel_server.models.bundled import card, evaluate, tokenizer, weights_folder
from kernel_server.models.bundled.generator import CLASSIC, TELLING_WORDS, story_cases


@pytest.fixture(scope="module")
def subject() -> evaluate.Subject:
    torch.set_num_threads(1)
    return evaluate.Subject(weights_folder())


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(card.RECORD.read_text(encoding="utf-8"))


def test_it_is_an_ordinary_folder_of_at_least_24_layers_and_at_most_25_megabytes():
    model = AutoModelForCausalLM.from_pretrained(weights_folder())
    files = sorted(path.name for path in weights_folder().iterdir())

    assert model.config.num_hidden_layers >= 24
    assert model.config.model_type == "llama"
    assert model.dtype == torch.bfloat16
    assert files == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum(path.stat().st_size for path in weights_folder().iterdir()) <= 25e6


def test_its_tokenizer_is_the_one_in_the_folder_and_any_text_comes_back(
    subject: evaluate.Subject,
):
    loaded = AutoTokenizer.from_pretrained(weights_folder())
    text = "Café Zürich, 12 € – naïve?\n\tTabs too."

    assert loaded(CLASSIC).input_ids == subject.ids(CLASSIC)
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_every_lexicon_word_is_one_token(subject: evaluate.Subject):
    words = (*tokenizer.SPACED_WORDS, *TELLING_WORDS)

    assert len({subject.token(word) for word in words}) == len(set(words))


def test_mary_gets_the_drink(subject: evaluate.Subject):
    (continuation,) = subject.continuations([CLASSIC])

    assert continuation.startswith(" Mary.")


def test_a_sample_of_indirect_objects_is_right_in_both_orders(subject: evaluate.Subject):
    rows = evaluate.indirect_rows(subject, 60)

    assert [row.score for row in rows] == pytest.approx([1.0] * len(rows), abs=0.05)


def test_a_sample_of_repeated_sequences_is_continued(subject: evaluate.Subject):
    rows = evaluate.induction_rows(subject, 5)

    assert min(row.score for row in rows) >= 0.95


def test_a_sample_of_facts_is_known_in_held_out_phrasings(subject: evaluate.Subject):
    rows = {row.cases: row for row in evaluate.fact_rows(subject, 100)}

    assert rows["constructions never trained on"].score >= 0.9
    assert rows["combinations of parts never trained on"].score >= 0.9


def test_the_direction_flips_a_sample_of_stories_and_a_random_one_does_not(
    subject: evaluate.Subject,
):
    stories = story_cases(16, seed=1)
    vector = evaluate.direction(subject, evaluate.STEERING_LAYER, 200) * evaluate.STEERING_FACTOR
    other = torch.randn(len(vector), generator=torch.Generator().manual_seed(1))
    other *= vector.norm() / other.norm()
    arms = torch.stack([torch.zeros_like(vector), vector, other])
    plain, pushed, random = evaluate.judged(subject, stories, evaluate.STEERING_LAYER, arms)
    truth = [story.valence for story in stories]

    assert plain == truth
    assert sum(got == -valence for got, valence in zip(pushed, truth, strict=True)) >= 14
    assert sum(got == -valence for got, valence in zip(random, truth, strict=True)) <= 3


def test_the_record_describes_these_weights(record: dict):
    assert record["weights_sha256"] == evaluate.fingerprint(weights_folder())


def test_every_target_is_met_and_no_shortcut_passes_for_the_ability(record: dict):
    missed = [evaluate.line(row) for row in record["rows"] if evaluate.met(row) is False]
    shortcuts = [
        score
        for row in record["rows"]
        if row["target"] is not None and not row["at_most"]
        for score in row["baselines"].values()
    ]

    assert missed == []
    assert {row["ability"] for row in record["rows"] if row["target"] is not None} == {
        "facts",
        "indirect object",
        "induction",
        "sentiment",
    }
    assert max(shortcuts) <= 0.55


def test_the_card_is_written_from_the_record(record: dict):
    assert card.CARD.read_text(encoding="utf-8") == card.render(record)
