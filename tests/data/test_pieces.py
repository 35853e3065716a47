import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft.data.pieces import pieces_of, visible
from tests.report.sets import byte_level, ids_of, sentence_piece, sequence_of

texts = st.text(st.sampled_from("ab \n汉字🙂👩‍👩‍👧é�\u200d<|im_end|>"), max_size=30)


@settings(deadline=None, max_examples=100)
@given(texts)
def test_pieces_join_to_the_text_and_never_cut_a_character(text):
    tokenizer = byte_level()
    text = f"é{text}"
    ids = ids_of(tokenizer, text)
    pieces = pieces_of(sequence_of(ids, [0.0] + [1.0] * (len(ids) - 1)), tokenizer)
    assert "".join(p.text for p in pieces) == text
    assert [i for p in pieces for i in p.ids] == ids
    assert [w for p in pieces for w in p.weights] == [0.0] + [1.0] * (len(ids) - 1)
    if "�" not in text:
        assert all("�" not in p.text for p in pieces)
        assert max(len(p.ids) for p in pieces) <= 4


def test_a_piece_is_one_token_where_it_can_be():
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "ab汉a🙂")
    pieces = pieces_of(sequence_of(ids, [1.0] * len(ids)), tokenizer)
    assert [(p.text, len(p.ids)) for p in pieces] == [("ab", 1), ("汉", 3), ("a", 1), ("🙂", 4)]


def test_text_cut_inside_a_character_loses_no_token():
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "a汉")[:-1]
    pieces = pieces_of(sequence_of(ids, [1.0] * len(ids)), tokenizer)
    assert [(p.text, len(p.ids)) for p in pieces] == [("a", 1), ("�", 2)]
    with_end = [*ids, *ids_of(tokenizer, "⟨im_end⟩a")]
    pieces = pieces_of(sequence_of(with_end, [1.0] * len(with_end)), tokenizer)
    assert [p.text for p in pieces] == ["a", "�", "<|im_end|>", "a"]


def test_blanks_survive_a_decoder_that_strips_the_first():
    tokenizer = sentence_piece()
    backend = tokenizer.backend_tokenizer
    ids = [backend.token_to_id(t) for t in ["<s>", "▁Hi", "▁you", "▁", "<0xE6>", "<0xB1>", "<0x89>", ".", "</s>"]]
    pieces = pieces_of(sequence_of(ids, [0.0] * len(ids)), tokenizer)
    assert [p.text for p in pieces][2:] == [" you", " ", "汉", ".", "</s>"]
    assert [p.is_control for p in pieces] == [True, *[False] * 5, True]


def test_control_tokens_are_told_from_the_same_letters():
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "<|im_end|>⟨im_end⟩a")
    pieces = pieces_of(sequence_of(ids, [0.0] * len(ids)), tokenizer)
    assert [p.text for p in pieces if p.is_control] == ["<|im_end|>"]
    ids += [tokenizer.backend_tokenizer.token_to_id(t) for t in ("<think>", "    ")]
    pieces = pieces_of(sequence_of(ids, [0.0] * len(ids)), tokenizer)
    assert [p.text for p in pieces if p.is_control] == ["<|im_end|>", "<think>"]  # four blanks are only blanks


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ([0, 0], "context"),
        ([1, 1], "trained"),
        ([0, 1], "trained"),
        ([0.5, 0.5], "weighted"),
        ([1, 2], "weighted"),
        ([0.5, 1], "weighted"),
    ],
)
def test_the_kind_of_a_piece_follows_from_its_weights(weights, kind):
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "aé")
    (_, piece) = pieces_of(sequence_of(ids, [0, *weights]), tokenizer)
    assert piece.kind == kind


def test_text_cannot_steer_the_terminal_or_turn_the_line_around():
    assert visible("a\x1b[31m\x00\r\x7f\x85\u202eb\n\tc") == "a␛[31m␀␍␡<U+0085><U+202E>b\n\tc"
    assert visible("👩‍👩‍👧 汉字　é\u00a0") == "👩‍👩‍👧 汉字　é\u00a0"
