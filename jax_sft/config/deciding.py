"""Which number of metrics.jsonl decides which step is the best, and whether less or more of it is better.

In: `evaluate.best`. Out: a name; the loop goes by it, and so does the report.
"""


def deciding_key(best: str | None) -> str:
    """The name: itself, of a validation set that of its loss, or of None that of all of them."""
    return "validation/loss" if best is None else best if "/" in best else f"validation/loss/{best}"


def is_better_low(key: str) -> bool:
    """Whether less of it is better: of losses and divergences; of shares and scores more is.

    By its beginning and its end: between them stands the name of a set, and one may be called glossary.
    """
    kind, _, name = key.partition("/")
    if kind == "validation":
        return not name.startswith("accuracy")
    return kind == "forgetting" and not name.endswith("agreement")
