"""Generate the computed part of the demo set: questions whose answers are worked out by the program that asks them.

    python demo/generate.py --split train --out FILE

The kinds of question live in tasks/, one module per source. Each phrasing is used once; names and numbers come from
the seed. Standard library only, and the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from rows import GENERATED_PREFIX, LANGUAGES, Row, dump_rows
from tasks import classification, code, extraction, question_answering, reasoning
from tasks.draft import Draft, Kind

SEED = 20250101
KINDS: dict[str, tuple[Kind, ...]] = {
    "reasoning": reasoning.KINDS,
    "extraction": extraction.KINDS,
    "classification": classification.KINDS,
    "code": code.KINDS,
    "question-answering": question_answering.KINDS,
}
# How many drafts of each source are held out for validation, in the order of LANGUAGES; the others are for training.
HELD_OUT = {
    "reasoning": (3, 2),
    "extraction": (3, 1),
    "classification": (1, 1),
    "code": (1, 1),
    "question-answering": (1, 1),
}


def drafts_of(source: str, seed: int) -> list[Draft]:
    """All drafts of a source; each kind has its own stream of numbers, so that editing one leaves the others alone."""
    return [draft for kind in KINDS[source] for draft in kind(Random(f"{seed}/{source}/{kind.__name__}"))]


def generate(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """The generated training and validation rows, numbered through."""
    splits: dict[str, list[tuple[str, Draft]]] = {"train": [], "validation": []}
    for source, held_out in HELD_OUT.items():
        drafts = drafts_of(source, seed)
        chooser = Random(f"{seed}/{source}/validation")
        places: set[int] = set()
        for language, count in zip(LANGUAGES, held_out, strict=True):
            own = [place for place, draft in enumerate(drafts) if draft.language == language]
            places.update(chooser.sample(own, count))
        for place, draft in enumerate(drafts):
            splits["validation" if place in places else "train"].append((source, draft))
    rows: list[Row] = [
        {
            "id": f"{GENERATED_PREFIX}-{number:04d}",
            "source": source,
            "language": draft.language,
            "messages": draft.messages(),
        }
        for number, (source, draft) in enumerate([*splits["train"], *splits["validation"]], start=1)
    ]
    return rows[: len(splits["train"])], rows[len(splits["train"]) :]


def main() -> None:
    """Write one split to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    train, validation = generate(args.seed)
    rows = train if args.split == "train" else validation
    dump_rows(rows, args.out)
    print(f"{len(rows)} rows -> {args.out}")


if __name__ == "__main__":
    main()
