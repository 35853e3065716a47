"""Join the hand-written parts and the generated rows into demo/train.jsonl and demo/validation.jsonl.

    python demo/assemble.py

Nothing is written unless every check of rows.py passes. The order is shuffled with a fixed seed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

from generate import generate
from rows import Row, count_table, dump_rows, is_generated, is_multi_turn, load_rows, set_problems

HERE = Path(__file__).resolve().parent
SHUFFLE_SEED = 7


def hand_written(split: str) -> list[Row]:
    """The rows of every part of one split, in the order of the file names."""
    return [row for path in sorted((HERE / "parts").glob(f"*.{split}.jsonl")) for row in load_rows(path)]


def assemble() -> tuple[list[Row], list[Row]]:
    """Both splits, joined and shuffled; ValueError names everything that is wrong with them."""
    generated_train, generated_validation = generate()
    train = [*hand_written("train"), *generated_train]
    validation = [*hand_written("validation"), *generated_validation]
    if problems := set_problems(train, validation):
        raise ValueError("\n".join(problems))
    for name, split in (("train", train), ("validation", validation)):
        Random(f"{SHUFFLE_SEED}/{name}").shuffle(split)
    return train, validation


def main() -> None:
    """Check, write both files and print the counts."""
    try:
        train, validation = assemble()
    except ValueError as error:
        sys.exit(f"The demo set is not in order:\n{error}")
    for name, split in (("train", train), ("validation", validation)):
        dump_rows(split, HERE / f"{name}.jsonl")
        systems = sum(row["messages"][0]["role"] == "system" for row in split)
        print(
            f"{name}: {len(split)} rows, {sum(map(is_multi_turn, split))} multi-turn, {systems} with a system prompt, "
            f"{sum(map(is_generated, split))} generated"
        )
    print(count_table(train, validation))


if __name__ == "__main__":
    main()
