"""What adapters reach and what they forget: full fine-tuning and LoRA on the demo data, three seeds each.

Run: python bench/lora_quality.py --workdirs runs/lora_quality [--text FILE] [--report]

In: a folder of workdirs, named full_5e-4_s0 to _s2 and lora_5e-3_s0 to _s2. Those that hold no finished run are
trained first, one after the other: configs/quickstart.py with the rate in the name, validated every 6 steps; LoRA has
rank 16 on all linear maps and ten times the rate. `--report` trains nothing and takes what is finished. With `--text`,
a plain file (gzipped or not), also the loss on windows of 510 of its tokens, of the untrained model and of each
trained one; what was measured is kept in the folder and not measured again.
Out: a table in Markdown, and a plot of the validation losses beside this file, lora_quality.svg.
"""

import argparse
import gzip
import hashlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import jax
import numpy as np

from jax_sft.assistant import Assistant, load_assistant
from jax_sft.batch import Batch
from jax_sft.loss import Tally
from jax_sft.train_step import make_eval_step

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
WAYS = {
    "full": ("5e-4", []),
    "lora": ("5e-3", ["--config.lora.rank=16", "--config.lora.base=float32", "--config.export.format=merged"]),
}
COLOURS = {"full": "#b4541a", "lora": "#1f6fb4"}
STEPS = 36
WINDOW, ROWS = 510, 2  # tokens of a text at a time; windows at a time


def main() -> None:
    """Train what is missing, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdirs", type=pathlib.Path, required=True)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--text", type=pathlib.Path, help="a text to measure forgetting on")
    parser.add_argument("--windows", type=int, default=200, help="of the text, from its beginning; 200")
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".svg"))
    options = parser.parse_args()
    names = {f"{way}_{rate}_s{seed}": (way, seed) for way, (rate, _) in WAYS.items() for seed in SEEDS}
    curves: dict[str, dict[int, float]] = {}
    for name, (way, seed) in names.items():
        workdir = options.workdirs / name
        if not options.report and STEPS not in validation_losses(workdir):
            train(workdir, way, seed)
        curves[name] = validation_losses(workdir)
        if STEPS not in curves[name]:
            print(f"{name}: NOT FINISHED, left out", file=sys.stderr)
            del curves[name]
    if not curves:
        sys.exit(f"{options.workdirs}: no finished run")
    texts: dict[str, float] = {}
    if options.text is None or not options.text.is_file():
        why = "NOT GIVEN" if options.text is None else f"{options.text}: NO SUCH FILE"
        print(f"--text {why}, so nothing is said of what is forgotten", file=sys.stderr)
    else:
        texts = text_losses(options.workdirs, list(curves), options.text, options.windows)
    print("\n".join(table(curves, texts, {name: names[name][0] for name in curves})))
    options.plot.write_text(plot(curves, {name: names[name][0] for name in curves}), "utf-8")


def train(workdir: pathlib.Path, way: str, seed: int) -> None:
    """One run of the quickstart, in a process of its own; one that was interrupted goes on."""
    rate, overrides = WAYS[way]
    command = [sys.executable, "-m", "jax_sft", "train", "--config", "configs/quickstart.py", "--workdir"]
    command += [str(workdir.resolve()), f"--config.seed={seed}", f"--config.optim.lr={rate}", *overrides]
    command += ["--config.evaluate.every_steps=6", "--config.evaluate.prompts=()", "--config.export.certify=false"]
    command += ["--config.evaluate.probes=None", "--config.evaluate.forgetting.texts=None"]
    subprocess.run(command, cwd=REPOSITORY, check=True)


def validation_losses(workdir: pathlib.Path) -> dict[int, float]:
    """Validation loss by step, as far as a run got."""
    file = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
    return {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}


def text_losses(workdirs: pathlib.Path, names: list[str], text: pathlib.Path, windows: int) -> dict[str, float]:
    """Loss on a text, nats per token, of each run at its last checkpoint, and under "" of the untrained model."""
    content = text.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    key = f"{hashlib.sha256(content).hexdigest()[:16]} {windows} x {WINDOW}"
    store = workdirs / "text_losses.json"
    kept = json.loads(store.read_text("utf-8")) if store.is_file() else {}
    known: dict[str, float] = kept.setdefault(key, {})
    base = json.loads((workdirs / names[0] / "manifest.json").read_text("utf-8"))["config"]["model"]["path"]
    for name in ["", *names]:
        if name in known:
            continue
        if not name:
            known[name] = text_loss(load_assistant(base), content.decode("utf-8"), windows)
        else:
            with tempfile.TemporaryDirectory() as place:
                model = pathlib.Path(place) / "model"
                form = ["--format", "merged"] if name.startswith("lora") else []
                command = [sys.executable, "-m", "jax_sft", "export", "--workdir", str(workdirs / name), *form]
                command += ["--out", str(model), "--dtype", "float32", "--no-certificate"]
                subprocess.run(command, check=True, stdout=sys.stderr)
                known[name] = text_loss(load_assistant(str(model)), content.decode("utf-8"), windows)
        store.write_text(json.dumps(kept, indent=1), "utf-8")
    return known


def text_loss(model: Assistant, text: str, windows: int) -> float:
    """Mean over all tokens but the first of each window; a last part that fills no window is left out."""
    ids = np.array(model.base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)
    rows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)[:windows]
    step = make_eval_step(model.graphdef, num_sources=1, loss_chunk_tokens=1024, mesh=model.mesh)
    total = Tally.zeros(1)
    with jax.set_mesh(model.mesh):
        for first in range(0, len(rows), ROWS):
            total += jax.device_get(step(model.params, {}, window_batch(rows[first : first + ROWS])))
    return total.mean()["loss"]


def window_batch(tokens_BT: np.ndarray) -> Batch:
    """Every token but the first is predicted; rows that are missing have no weight."""
    tokens_BT = np.pad(tokens_BT, [(0, ROWS - len(tokens_BT)), (0, 0)], constant_values=-1)
    places_BT = np.broadcast_to(np.arange(WINDOW, dtype=np.int32), tokens_BT.shape)
    weights_BT = ((places_BT < WINDOW - 1) & (tokens_BT >= 0)).astype(np.float32)
    tokens_BT = np.maximum(tokens_BT, 0)
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=np.roll(tokens_BT, -1, axis=1),
        weights_BT=weights_BT,
        segments_BT=np.ones_like(tokens_BT),
        positions_BT=places_BT,
        sources_BT=np.zeros_like(tokens_BT),
        predict_BP=np.where(places_BT < WINDOW - 1, places_BT, WINDOW),
    )


def table(curves: dict[str, dict[int, float]], texts: dict[str, float], ways: dict[str, str]) -> list[str]:
    """A row for each run, and one for the mean of each way."""
    steps = sorted(next(iter(curves.values())))
    lines = [
        f"| run | {' | '.join(f'step {step}' for step in steps)} | best | text |",
        f"|:--|{'--:|' * (len(steps) + 2)}",
    ]
    if "" in texts:
        lines.append(f"| untrained |{' |' * len(steps)} | {texts['']:.4f} |")

    def row(name: str, losses: list[float], best: float, text: float | None) -> str:
        said = "" if text is None else f"{text:.4f} ({text / texts[''] - 1:+.1%})"
        return f"| {name} | {' | '.join(f'{loss:.4f}' for loss in losses)} | {best:.4f} | {said} |"

    best: dict[str, dict[str, float]] = {}  # of each way, by seed
    for way in dict.fromkeys(ways.values()):
        own = [name for name in curves if ways[name] == way]
        for name in own:
            losses = [curves[name][step] for step in steps]
            lines.append(row(name, losses, min(losses), texts.get(name)))
        means = [statistics.mean(curves[name][step] for name in own) for step in steps]
        best[way] = {name.rsplit("_", 1)[1]: min(curves[name].values()) for name in own}
        found = [texts[name] for name in own if name in texts]
        lines.append(
            row(
                f"{way}, mean of {len(own)}",
                means,
                statistics.mean(best[way].values()),
                statistics.mean(found) if found else None,
            )
        )
    if seeds := sorted(best.get("full", {}).keys() & best.get("lora", {}).keys()):
        full, lora = (statistics.mean(best[way][seed] for seed in seeds) for way in ("full", "lora"))
        lines += ["", f"Best validation loss over {', '.join(seeds)}: LoRA {lora / full - 1:+.1%} against full."]
    return lines


def plot(curves: dict[str, dict[int, float]], ways: dict[str, str]) -> str:
    """The validation losses as an SVG: a line for each run, a colour for each way."""
    width, height, left, top, right, bottom = 640, 360, 56, 16, 16, 44
    values = [loss for curve in curves.values() for loss in curve.values()]
    low, high = np.floor(min(values) * 10) / 10, np.ceil(max(values) * 10) / 10

    def x(step: float) -> float:
        return left + step / STEPS * (width - left - right)

    def y(loss: float) -> float:
        return top + (high - loss) / (high - low) * (height - top - bottom)

    def text(at: tuple[float, float], what: str, anchor: str = "middle", colour: str = "#333") -> str:
        return f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}" fill="{colour}">{what}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for loss in np.arange(low, high + 0.05, 0.1):
        parts.append(f'<path d="M{left} {y(loss):.1f}H{width - right}" stroke="#ddd"/>')
        parts.append(text((left - 6, y(loss) + 4), f"{loss:.1f}", "end"))
    for step in sorted(next(iter(curves.values()))):
        parts.append(text((x(step), height - bottom + 18), str(step)))
    parts.append(text(((left + width - right) / 2, height - 8), "step; validation loss of each seed, nats per token"))
    for name, curve in curves.items():
        points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in sorted(curve.items()))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[ways[name]]}" stroke-width="1.5"/>')
    for i, way in enumerate(dict.fromkeys(ways.values())):
        label = {"full": "full fine-tuning, 5e-4", "lora": "LoRA, rank 16, 5e-3"}[way]
        parts.append(text((width - right - 8, top + 20 + 18 * i), label, "end", COLOURS[way]))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
