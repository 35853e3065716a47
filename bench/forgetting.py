"""What each remedy against forgetting buys: SmolLM2-135M fine-tuned on narrow data at a high rate, and the same with a
pull by what is said, a replay of general text, a pull of the weights, an average over steps, and adapters.

Run: python bench/forgetting.py --workdirs runs/forgetting [--replay FILE] [--report]

In: a folder of workdirs, one for each way; those that hold no finished run are trained first, one after the other:
24 steps of configs/quickstart.py at twice its rate, measured every 6 on a part of its validation set and of our texts.
`--replay`, a .jsonl with a field `text` (gzipped or not), is what replay trains on beside the demo data; without it
there is none.
Out: a table in Markdown: validation loss, and how far the model has gone on general text; and how far the plain run had
gone when it came to the same validation loss, between its evaluations in a line. A remedy is worth its name where it
is nearer to the base than that. And a plot beside this file, forgetting.svg.
"""

import argparse
import gzip
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np

from jax_sft.evaluate.forgetting import read_texts

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
STEPS, EVERY, RATE = 24, 6, "1e-3"
EVERY_TEXT, VALIDATION_ROWS = 4, 30  # so that a measurement takes seconds
WAYS = {
    "plain": [],
    "base_kl": ["--config.train.base_kl=0.5"],
    "replay": [],  # see `replay_sets`
    "decay_to_base": ["--config.optim.decay_to_base=30"],
    "ema": ["--config.train.ema_decay=0.95"],
    "lora": ["--config.lora.rank=16", "--config.lora.base=float32", "--config.optim.lr=5e-3"],
    "lora_base_kl": [
        "--config.lora.rank=16",
        "--config.lora.base=float32",
        "--config.optim.lr=5e-3",
        "--config.train.base_kl=0.5",
    ],
}
COLOURS = ("#333333", "#b4541a", "#1f6fb4", "#3a8a3a", "#8a3a8a", "#a08a20", "#20a0a0", "#c03060")
NUMBERS = ("loss_rise", "kl", "agreement")


def main() -> None:
    """Train what is missing, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdirs", type=pathlib.Path, required=True)
    parser.add_argument("--replay", type=pathlib.Path, help="general text to replay")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".svg"))
    options = parser.parse_args()
    options.workdirs.mkdir(parents=True, exist_ok=True)
    texts = general_texts(options.workdirs)
    curves: dict[str, dict[int, dict[str, float]]] = {}
    for way, overrides in WAYS.items():
        workdir = (options.workdirs / way).resolve()
        if way == "replay" and not options.report:
            if options.replay is None:
                print("--replay NOT GIVEN, so nothing is said of replay", file=sys.stderr)
                continue
            overrides = replay_sets(options.replay, options.workdirs)
        if not options.report and STEPS not in curve(workdir):
            train(workdir, texts, overrides)
        if STEPS in curve(workdir):
            curves[way] = curve(workdir)
        else:
            print(f"{way}: NOT FINISHED, left out", file=sys.stderr)
    if "plain" not in curves:
        sys.exit(f"{options.workdirs}: the plain run is not finished, and all is compared with it")
    print("\n".join(table(curves)))
    options.plot.write_text(plot(curves), "utf-8")


def general_texts(folder: pathlib.Path) -> pathlib.Path:
    """Some of our own texts."""
    path = folder.resolve() / "general.jsonl"
    lines = [json.dumps({"id": t.id, "language": t.language, "text": t.text}) for t in read_texts()[::EVERY_TEXT]]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def validation(folder: pathlib.Path) -> pathlib.Path:
    """The first rows of the demo's validation set."""
    path = folder.resolve() / "validation.jsonl"
    rows = (REPOSITORY / "demo" / "validation.jsonl").read_text("utf-8").splitlines()[:VALIDATION_ROWS]
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return path


def replay_sets(source: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """The demo data, and passages of the source that have a fifth of the weight."""
    opener = gzip.open if source.suffix == ".gz" else open
    with opener(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    passages = [{"id": f"g{i}", "text": row["text"][:1200]} for i, row in enumerate(rows[:400])]
    path = folder.resolve() / "replay.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in passages), "utf-8")
    sets = {
        "demo": {"paths": [str(REPOSITORY / "demo" / "train.jsonl")], "weight": 4.0},
        "general": {"paths": [str(path)], "weight": 1.0},
    }
    return ["--config.data.train=()", f"--config.data.sets={sets}"]


def train(workdir: pathlib.Path, texts: pathlib.Path, overrides: list[str]) -> None:
    """One run in a process of its own; one that was interrupted goes on."""
    command = [sys.executable, "-m", "jax_sft", "train", "--config", "configs/quickstart.py", "--workdir", str(workdir)]
    command += [f"--config.optim.lr={RATE}", f"--config.train.steps={STEPS}", f"--config.evaluate.every_steps={EVERY}"]
    command += ["--config.evaluate.prompts=()", "--config.evaluate.probes=None", "--config.export.certify=false"]
    command += [f"--config.evaluate.forgetting.texts={texts}", "--config.evaluate.forgetting.task_batches=0"]
    command += [f"--config.data.validation={validation(workdir.parent)}", "--config.checkpoint.every_steps=24"]
    command += ["--config.export.format=adapter"] if any("lora.rank" in o for o in overrides) else []
    subprocess.run([*command, *overrides], cwd=REPOSITORY, check=True)


def curve(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """By step, the validation loss and how far the model has gone, as far as a run got."""
    file, found = workdir / "metrics.jsonl", {}
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        values = json.loads(line)
        for key, name in (("validation/loss", "loss"), *((f"forgetting/{n}", n) for n in NUMBERS)):
            if key in values:
                found.setdefault(values["step"], {})[name] = values[key]
    return {step: point for step, point in found.items() if len(point) == 1 + len(NUMBERS)}


def table(curves: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """A row for each way, as it ended."""
    lines = [
        "| way | validation loss | loss on general text | KL(base \\|\\| model) | same likeliest token | "
        "KL of the plain run at this loss | of it |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for way, points in curves.items():
        last = points[max(points)]
        plain = plain_kl_at(last["loss"], curves["plain"])
        lines.append(
            f"| {way} | {last['loss']:.3f} | {last['loss_rise']:+.3f} | {last['kl']:.3f} | {last['agreement']:.1%} | "
            + ("not reached | |" if plain is None else f"{plain:.3f} | {last['kl'] / plain:.0%} |")
        )
    return lines


def plain_kl_at(loss: float, plain: dict[int, dict[str, float]]) -> float | None:
    """How far the plain run had gone when it first came to a validation loss; None: it never did."""
    steps = sorted(plain)
    for before, after in itertools.pairwise(steps):
        high, low = plain[before]["loss"], plain[after]["loss"]
        if low <= loss <= high:
            share = (high - loss) / (high - low)
            return float(plain[before]["kl"] + share * (plain[after]["kl"] - plain[before]["kl"]))
    return None


def plot(curves: dict[str, dict[int, dict[str, float]]]) -> str:
    """KL over validation loss, a line for each way: what is learned against what is forgotten."""
    points = [point for of in curves.values() for point in of.values()]
    losses, kls = ([point[name] for point in points] for name in ("loss", "kl"))
    width, height, left, bottom = 640, 400, 60, 40
    low, high, top = min(losses), max(losses), max(kls) or 1.0

    def place(point: dict[str, float]) -> str:
        x = left + (high - point["loss"]) / (high - low or 1) * (width - left - 150)
        return f"{x:.1f},{height - bottom - point['kl'] / top * (height - bottom - 20):.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    parts.append(f'<text x="{left}" y="{height - 10}" font-size="12">validation loss, {high:.2f} to {low:.2f} →</text>')
    parts.append(f'<text x="10" y="14" font-size="12">KL(base || model) on general text, to {top:.2f}</text>')
    for number, (way, of) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(place(of[step]) for step in sorted(of))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x, y = np.array(place(of[max(of)]).split(","), float)
        parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>')
        parts.append(f'<text x="{width - 145}" y="{30 + 16 * number}" font-size="12" fill="{colour}">{way}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
