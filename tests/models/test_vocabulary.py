"""What single token ids read as, for byte-level BPE and sentencepiece-like tokenizers."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kernel_server.models.vocabulary import Vocabulary
from kernel_server.protocol.errors import BadPrompt


def byte_level() -> PreTrainedTokenizerFast:
    words = ["a", "b", "c", "to", "Ġto", "Ġ", "Ġa", "Ġb", "Ġc", "Ġkey", "<s>", "Ċ"]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("Ġ", "a"), ("Ġ", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def sentencepiece() -> PreTrainedTokenizerFast:
    words = ["<unk>", "▁a", "▁b", "▁c", "▁to", "to", "▁key", "▁"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_a_leading_space_is_part_of_the_text(make) -> None:
    tokenizer = make()
    words = tokenizer.get_vocab()
    spaced = words.get("Ġto", words.get("▁to"))
    vocabulary = Vocabulary(tokenizer)

    assert vocabulary.text(spaced) == " to"
    assert vocabulary.text(words["to"]) == "to"
    assert vocabulary.ids(" to") == (spaced,)
    assert vocabulary.ids("to") == (words["to"],)
    assert vocabulary.ids("nowhere") == ()


def test_texts_are_made_when_asked_for_and_once() -> None:
    vocabulary = Vocabulary(byte_level())
    assert vocabulary._texts == {}
    vocabulary.text(4)

    assert vocabulary._texts == {4: " to"}
    assert vocabulary._ids is None


def test_ids_without_a_token_and_models_without_a_tokenizer_have_no_text() -> None:
    assert Vocabulary(byte_level(), 50).text(49) == ""
    assert Vocabulary(byte_level()).text(-1) == ""
    assert Vocabulary(None).text(3) == ""
    assert Vocabulary(None).ids(" to") == ()


TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant speak here') }}{% endif %}"
    "{{ '<s>' + m.role[0] + ' ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>a' }}{% endif %}"
)


def chatting() -> Vocabulary:
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    return Vocabulary(tokenizer)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_a_conversation_is_written_as_the_models_template_says() -> None:
    words = byte_level().get_vocab()
    ids = chatting().encode_chat([{"role": "assistant", "content": "b"}, user("a")])

    assert chatting().has_chat_template
    assert ids.count(words["<s>"]) == 3  # the template's own, and no other
    assert ids[-2:] == [words["<s>"], words["a"]]


def test_an_unfinished_turn_of_the_assistant_is_gone_on_with() -> None:
    words = byte_level().get_vocab()
    ids = chatting().encode_chat([user("a"), {"role": "assistant", "content": "b"}])

    assert ids.count(words["<s>"]) == 2
    assert ids[-1] == words["Ġb"]


def test_what_the_template_refuses_is_a_bad_prompt_in_its_words() -> None:
    with pytest.raises(BadPrompt, match="these 1 messages: only user and assistant speak here"):
        chatting().encode_chat([{"role": "system", "content": "a"}])


def test_a_tokenizer_without_a_template_says_so() -> None:
    assert not Vocabulary(byte_level()).has_chat_template
    assert not Vocabulary(None).has_chat_template
