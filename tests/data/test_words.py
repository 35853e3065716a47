"""Texts are encoded out of a cache exactly as the tokenizer encodes them, whatever it cuts them by."""

import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jax_sft.data import words
from jax_sft.data.words import Encoded, Words

GPT2, *OTHERS = sorted(words._KNOWN, key=len)
END = "<|end|>"
CORPUS = [
    "Plants take up carbon dioxide, don't they? We'll see: it's 1,234.5 kg/h (about 20 %).\n\nYes!\n\n\n- a\n- b\n",
    "def f(x):\n    if x == 10:\n        return x / 2\n\t\treturn  \n \n  \n to//5 a/\n/b ,\n/c\r\n\r\n HTTPServer",
    "la la  la   la    la \n la \n\n la 5  5   5 \n5\t 5 é e\u0301 你好。 你 好,好 😀 😀\xa0x\x1c y \x85 z a\n 7 b\n 7",
]
ALPHABET = "aabBzé你😀019  \n\t\r,./'\"(-_!<|" + "\u0301\xa0\x1c\x85\u2028\0"
WORDS = [
    "'s",
    "'LL",
    " the",
    "The",
    "HTTPServer",
    "\n\n",
    "   ",
    " \n",
    ",\n",
    "/\n",
    "1,234",
    END,
    "e\u0301",
    "a",
    " 5",
]


def tokenizer(name: str, *, nfc: bool = False, trim: bool = False) -> Tokenizer:
    """A tokenizer whose merges reach over everything that its expression does not cut."""
    backend = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "bytes":
        backend.pre_tokenizer = plain
    elif name.startswith("digits"):
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(name == "digits one by one"), plain])
    else:
        split = pre_tokenizers.Split(Regex(name), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if nfc:
        backend.normalizer = normalizers.NFC()
    if trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800, min_frequency=1, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken(END, special=True, normalized=False)])
    return backend


NAMES = ["bytes", "digits", "digits one by one", GPT2, *OTHERS]
CASES = [(name, nfc, trim) for name in NAMES for nfc, trim in ((False, False), (True, True))]


def check(encoder: Words, text: str) -> None:
    encoding = encoder._backend.encode(text, add_special_tokens=False)
    whole, found = Encoded(encoding.ids, encoding.offsets), encoder.encode(text)
    assert found.ids == whole.ids
    trims = encoder._backend.post_processor is not None
    for i in range(len(text) + 1):
        # The tokenizer gives a token of blanks that are trimmed no place; cut, it lies in its piece.
        around = text[max(0, i - 1) : i + 1]
        if not trims or around == around.strip():
            assert found.ending_by(i) == whole.ending_by(i)
            assert found.starting_before(i) == whole.starting_before(i)


@pytest.mark.parametrize(("name", "nfc", "trim"), CASES)
def test_ids_and_places_are_those_of_the_tokenizer(name, nfc, trim, monkeypatch):
    monkeypatch.setattr(words, "_USUAL", 10**9)  # cut everything
    encoder = Words(tokenizer(name, nfc=nfc, trim=trim))
    assert encoder.cuts
    for text in CORPUS:
        check(encoder, text)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(ALPHABET, max_size=4)), max_size=12).map("".join))
    @example("\n 5 \t 5  5   5")
    @example("a\n 7")
    @example("a,\n/b a/\n5 word's 1,23.4")
    def any_text(text: str) -> None:
        check(encoder, text)

    any_text()
    assert len(encoder._known) > 1


def test_what_is_remembered_has_an_end_and_does_not_travel(monkeypatch):
    encoder = Words(tokenizer("bytes"))
    monkeypatch.setattr(words, "_MOST", 20)
    for text in CORPUS * 2:
        check(encoder, text)
        assert 1 < len(encoder._known) <= 20
    assert set(pickle.loads(pickle.dumps(encoder))._known) == {END}
    encoder.encode("x" * 100 + " y")
    assert "x" * 100 not in encoder._known


def changed(name: str) -> Tokenizer:
    backend = tokenizer("bytes")
    match name:
        case "prefix space":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        case "metaspace":
            backend.pre_tokenizer = pre_tokenizers.Metaspace()
        case "none":
            backend.pre_tokenizer = None  # type: ignore[assignment]
        case "other expression":
            split = pre_tokenizers.Split(Regex(r"\s\S+"), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        case "lower case":
            backend.normalizer = normalizers.Lowercase()
        case "a token that takes blanks":
            backend.add_tokens([AddedToken("<mask>", lstrip=True)])
        case "tokens of two goes":
            backend.add_tokens([AddedToken("<mask>", normalized=True)])
        case "dropout":
            backend.model.dropout = 0.1  # type: ignore[union-attr]
    return backend


@pytest.mark.parametrize(
    "name",
    ["prefix space", "metaspace", "none", "other expression", "lower case", "a token that takes blanks",
     "tokens of two goes", "dropout"],
)  # fmt: skip
def test_other_tokenizers_are_asked_for_each_text(name):
    encoder = Words(changed(name))
    assert not encoder.cuts
    if name != "dropout":
        for text in CORPUS:
            check(encoder, text)


def test_a_text_without_spaces_is_not_cut():
    encoder = Words(tokenizer("bytes"))
    check(encoder, "植物通过叶子上的小孔吸收二氧化碳。" * 10)
    assert set(encoder._known) == {END}


def test_half_a_character_is_an_error_as_of_the_tokenizer():
    encoder = Words(tokenizer("bytes"))
    with pytest.raises((UnicodeEncodeError, TypeError)):
        encoder.encode("a b \ud83d c")
    assert encoder.encode("a b").ids
