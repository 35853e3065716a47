"""Two small SentencePiece vocabularies, of the shapes of Gemma's and Llama 2's, and what sentencepiece makes of texts.

Run `python -m tests.hf.sentencepiece_cases` (with `pip install sentencepiece`) to train them and to record
tests/golden/sentencepiece.json again.
"""

import io
import json
import pathlib
import random
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # llama.cpp's types of tokens
GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "sentencepiece.json"
Piece = tuple[str, float, int]  # its text, score and type

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the other dogs look at the fox.",
    "the cat thought that the weather there was rather bad",
    "aa aaa aaaa banana papaya",
    "def add(first, second):\n\t\treturn first + second\n",
    "\t\tif there:\n\t\t\treturn the\tother\n",
    "In 2024 there were 366 days; in 2023 there were 365.",
    "今天天气很好，我们今天去公园。你好，世界！",
    "我们的世界很大，今天的天气很好。",
    "naïve café, déjà vu",
] * 4
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "the cat there",
    " the cat",
    "  the   cat    sat ",
    "today's weather: 23 degrees, 1999 and 20244",
    "你好，世界！今天天气很好。",
    "我们的猫很懒 lazy",
    "🦙 and 🚀🚀, no piece of ours",
    "naïve café déjà vu ﬁn",
    "def f(a):\n\t\treturn a\n\n\n\ttab",
    "<table><td>cell</table> <b>",
    "\n",
    " ",
    "     ",
    "        eight, and a ▁ of its own ▁▁ twice",
    "aaaaaaa bananana papapaya",
    "<0x0A> is no byte, <unk> no token",
    "",
]
KINDS: dict[str, dict[str, Any]] = {
    "gemma": {
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
        "add_dummy_prefix": False,
        "control_symbols": ["<start_of_turn>", "<end_of_turn>"],
        "user_defined_symbols": ["\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>", "</table>"],
    },
    "llama": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "add_dummy_prefix": True},
}


def train(kind: str) -> Any:
    """A sentencepiece model of the kind of Gemma's or Llama's."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=256 + 200,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
        **KINDS[kind],
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def pieces_of(processor: Any, kind: str) -> list[Piece]:
    """Piece, score and type of each id; sentencepiece's own class cannot tell user-defined ones."""

    def type_of(i: int) -> int:
        if processor.is_unknown(i):
            return UNKNOWN
        if processor.is_control(i):
            return CONTROL
        if processor.is_byte(i):
            return BYTE
        return USER_DEFINED if processor.id_to_piece(i) in KINDS[kind].get("user_defined_symbols", ()) else NORMAL

    ids = range(processor.get_piece_size())
    return [(processor.id_to_piece(i), processor.get_score(i), type_of(i)) for i in ids]


def some_texts(pieces: list[Piece], count: int = 100) -> list[str]:
    """Random texts of pieces and of runs of few characters, where another order of merges would show."""
    draw = random.Random(0)
    words = [text.replace("▁", " ") for text, _, kind in pieces if kind in (NORMAL, USER_DEFINED)]
    words += [*"aaaathe \n\t天气🦙ﬁé▁", " ", "  ", "   "]
    mixed = ["".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(count)]
    return mixed + ["".join(draw.choices("a \n\t▁", k=draw.randint(2, 24))) for _ in range(count // 2)]


def recorded(kind: str) -> tuple[list[Piece], dict[str, list[int]]]:
    """The pieces of a vocabulary, and the ids of each text."""
    said = json.loads(GOLDEN.read_text(encoding="utf-8"))[kind]
    return [tuple(piece) for piece in said["pieces"]], said["ids"]


if __name__ == "__main__":
    found = {}
    for name in KINDS:
        model = train(name)
        learned = pieces_of(model, name)
        ids = {text: model.encode(text) for text in TEXTS + some_texts(learned)}
        assert all(model.decode(i) == text.replace("▁", " ") for text, i in ids.items())
        found[name] = {"pieces": learned, "ids": ids}
    GOLDEN.write_text(json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
