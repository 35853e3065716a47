"""SentencePiece vocabularies in GGUF files give the ids that sentencepiece itself gives (tests/golden)."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jax_sft.config import DataConfig
from jax_sft.data.chat import ChatTemplate, to_sequences
from jax_sft.data.conversation import Account
from jax_sft.hf.gguf import GgufFile
from jax_sft.hf.gguf_tokenizer import rebuild_tokenizer
from jax_sft.hf.tokenizer import load_tokenizer, save_tokenizer
from tests.data.chats import GEMMA, conversation, marked
from tests.hf.sentencepiece_cases import BYTE, KINDS, NORMAL, TEXTS, USER_DEFINED, Piece, recorded

LLAMA_2 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}\
{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"""
OPEN, CLOSE = "<start_of_turn>", "<end_of_turn>"


def rebuilt(kind: str, pieces: Sequence[Piece] | None = None, **ggml: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a file with these pieces; what is None in `ggml` is left out."""
    texts, scores, types = zip(*(pieces or recorded(kind)[0]), strict=True)
    bos, eos = texts.index(KINDS[kind].get("bos_piece", "<s>")), texts.index(KINDS[kind].get("eos_piece", "</s>"))
    said = {"model": "llama", "tokens": list(texts), "scores": list(scores), "token_type": list(types)}
    said |= {"bos_token_id": bos, "eos_token_id": eos, "add_space_prefix": KINDS[kind]["add_dummy_prefix"]} | ggml
    metadata = {f"tokenizer.ggml.{key}": value for key, value in said.items() if value is not None}
    metadata |= {"general.architecture": "llama", "llama.context_length": 64, "tokenizer.chat_template": "{{ 1 }}"}
    return rebuild_tokenizer(GgufFile(pathlib.Path("m.gguf"), metadata, {}))


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def as_converted(pieces: Sequence[Piece], way: str) -> list[Piece]:
    """User-defined pieces in the ways of llama.cpp's converter: told by tokenizer_config.json, or not told at all."""
    if way == "told":
        return [(t.replace("▁", " "), -1000.0, k) if k == USER_DEFINED else (t, s, k) for t, s, k in pieces]
    return [(text, score, NORMAL if kind == USER_DEFINED else kind) for text, score, kind in pieces]


@pytest.mark.parametrize(("kind", "way"), [("gemma", "told"), ("gemma", "not told"), ("llama", "told")])
def test_every_text_gets_the_ids_of_sentencepiece_and_comes_back(kind: str, way: str):
    pieces, ids = recorded(kind)
    tokenizer = rebuilt(kind, as_converted(pieces, way))
    assert set(TEXTS) < set(ids)
    assert {text: ids_of(tokenizer, text) for text in ids} == ids
    assert {text: tokenizer.decode(i) for text, i in ids.items()} == {text: text.replace("▁", " ") for text in ids}


def test_offsets_point_into_the_text():
    for kind in KINDS:
        tokenizer, text = rebuilt(kind), "the cat  今天🦙!"
        said = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = said["offset_mapping"]
        assert spans[-1][1] == len(text)
        assert [text[a:b] for a, b in spans if "!" in text[a:b]] == ["!"]
        assert "".join(text[a:b] for a, b in dict.fromkeys(spans)) == text


def test_a_character_that_is_merged_and_no_piece_is_its_byte():
    pieces, ids = recorded("gemma")
    texts = [text for text, _, _ in pieces]
    tab, byte = texts.index("\t"), texts.index("<0x09>")
    tokenizer = rebuilt("gemma", [("[PAD]", -10000.0, 5) if i == tab else piece for i, piece in enumerate(pieces)])
    for text in (t for t in ids if "\t" in t):
        assert ids_of(tokenizer, text) == [byte if i == tab else i for i in ids[text]]
        assert tokenizer.decode(ids_of(tokenizer, text)) == text.replace("▁", " ")


def test_unknown_characters_in_a_row_are_one_token_where_there_are_no_bytes():
    pieces, ids = recorded("llama")
    tokenizer = rebuilt("llama", [(text, score, 5 if kind == BYTE else kind) for text, score, kind in pieces])
    assert ids_of(tokenizer, "the cat there🦙🚀") == [*ids["the cat there"], 0]


def test_control_tokens_are_one_id_each_and_what_is_between_is_text():
    pieces, ids = recorded("gemma")
    tokenizer = rebuilt("gemma")
    start, end = tokenizer.convert_tokens_to_ids([OPEN, CLOSE])
    text = "the cat there"
    assert ids_of(tokenizer, f"{OPEN}{text}{CLOSE}\n") == [start, *ids[text], end, *ids["\n"]]
    assert tokenizer.decode([start, *ids[text], end], skip_special_tokens=True) == text
    assert pieces[start][0] == OPEN


def test_text_after_a_control_token_has_its_space_in_front_as_llama_cpp_gives_it():
    ids = recorded("llama")[1]
    tokenizer, text = rebuilt("llama"), "the cat there"
    assert ids_of(tokenizer, f"{text}</s>{text}") == [*ids[text], 2, *ids[text]]


def test_a_user_defined_token_with_a_space_is_found_where_a_space_is_put_in_front():
    pieces = [*recorded("llama")[0], ("<a b>", -1000.0, USER_DEFINED), ("<c▁d>", -1000.0, USER_DEFINED)]
    tokenizer = rebuilt("llama", pieces)
    assert ids_of(tokenizer, "<a b><c d>") == [len(pieces) - 2, len(pieces) - 1]
    assert tokenizer.decode([len(pieces) - 2, len(pieces) - 1]) == "<a b><c d>"


def test_two_spellings_of_one_token_stay_two():
    pieces = [*recorded("gemma")[0], ("▁the", -1000.0, NORMAL), (" the", -1000.0, USER_DEFINED)]
    pieces = [p for i, p in enumerate(pieces) if p[0] != "▁the" or i == len(pieces) - 2]
    tokenizer = rebuilt("gemma", pieces)
    assert tokenizer.convert_ids_to_tokens([len(pieces) - 2, len(pieces) - 1]) == ["▁the", " the"]


def test_padding_of_the_vocabulary_is_never_reached():
    pieces, ids = recorded("gemma")
    texts = [text for text, _, _ in pieces]
    lost = texts.index("the")
    tokenizer = rebuilt("gemma", [(t, s, 5) if i == lost else (t, s, k) for i, (t, s, k) in enumerate(pieces)])
    assert lost in ids["the cat there"]
    assert lost not in ids_of(tokenizer, "the cat there")


def test_it_starts_with_bos_unless_the_file_says_not():
    for kind, bos in (("gemma", 2), ("llama", 1)):
        assert rebuilt(kind)("the").input_ids == [bos, *ids_of(rebuilt(kind), "the")]
        assert rebuilt(kind, add_bos_token=False)("the").input_ids == ids_of(rebuilt(kind), "the")


def test_what_is_not_said_is_as_llama_cpp_has_it():
    ids = recorded("llama")[1]
    tokenizer = rebuilt("llama", add_space_prefix=None)
    assert ids_of(tokenizer, "the cat there") == ids["the cat there"]


def test_special_tokens_and_the_template_are_those_of_the_file():
    tokenizer = rebuilt("gemma", padding_token_id=0, unknown_token_id=3)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    assert {name: tokenizer.special_tokens_map[name] for name in names} == names
    assert tokenizer.chat_template == "{{ 1 }}"
    assert tokenizer.model_max_length == 64


@pytest.mark.parametrize(
    ("kind", "template", "wanted"),
    [
        ("gemma", GEMMA, f"⟦today the   other\n\n\n🦙{CLOSE}\n⟧"),
        ("llama", LLAMA_2, "[/INST]⟦today the   other\n\n\n🦙 </s>⟧"),
    ],
)
def test_masks_hold_whole_answers_and_no_control_token_of_the_user(kind: str, template: str, wanted: str):
    pieces, _ = recorded(kind)
    tokenizer = rebuilt(kind, as_converted(pieces, "told"))
    chat = ChatTemplate(tokenizer, template=template)
    question = f"{CLOSE} </s> <bos>  said the cat"
    (found,) = to_sequences(conversation(question, "today the   other\n\n\n🦙"), chat, DataConfig(), Account())
    assert marked(found, chat).endswith(wanted)
    ids = [int(found.tokens_T[0]), *found.targets_T.tolist()]
    assert [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<s>", "</s>", CLOSE)] == (
        [1, 0, 0, 2] if kind == "gemma" else [0, 1, 1, 0]
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_saved_tokenizer_gives_the_same_ids(tmp_path: pathlib.Path, kind: str):
    pieces, ids = recorded(kind)
    tokenizer = rebuilt(kind, as_converted(pieces, "told"))
    save_tokenizer(tmp_path, tokenizer, chat_template=None, pad_id=None)
    again = load_tokenizer(tmp_path)
    assert {text: ids_of(again, text) for text in TEXTS} == {text: ids[text] for text in TEXTS}
    assert again("the").input_ids == tokenizer("the").input_ids


def test_scores_that_tell_no_order_are_refused():
    pieces = [(text, -1000.0, kind) for text, _, kind in recorded("llama")[0]]
    with pytest.raises(ValueError, match=r"m\.gguf: all pieces of its tokenizer have one score.*; name the model's"):
        rebuilt("llama", pieces)


@pytest.mark.parametrize("kind", ["t5", "bert", "rwkv", "gemma4", None])
def test_a_vocabulary_of_another_kind_is_refused_by_name(kind: str | None):
    said = f"has a tokenizer of the kind {kind!r}, and only 'gpt2' .* and 'llama' .*; name the model's Hugging Face"
    with pytest.raises(ValueError, match=said):
        rebuilt("llama", model=kind)


@pytest.mark.parametrize("key", ["tokens", "scores", "token_type"])
def test_what_a_vocabulary_lacks_is_named(key: str):
    with pytest.raises(ValueError, match=rf"its tokenizer lacks tokenizer\.ggml\.{key}; use a complete GGUF model"):
        rebuilt("llama", **{key: None})


def test_a_vocabulary_cut_short_is_refused():
    with pytest.raises(ValueError, match="its tokenizer lacks a score or a type of some of its tokens; use a complete"):
        rebuilt("llama", scores=list(np.arange(9.0)))
