"""Workdirs of made-up runs, as training would leave them."""

import json
import math
import pathlib

import numpy as np

from jax_sft.config import RunConfig

BEHAVIOURS = ("answers", "stops", "no_loop", "language")
HOSTILE = "</script><img src=x onerror=alert(1)>\u202egnp.exe\x1b[31m \" ' --> $title"
TOPICS = ("tides", "bread", "bridges", "comets", "chess", "rivers", "glass", "moss")


def put_lines(path: pathlib.Path, rows) -> None:
    """JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def add_evaluation(workdir: pathlib.Path, step: int, skill: float, *, prompts: int = 40, seed: int = 0) -> None:
    """An evaluation of a model that does well on a prompt with the probability `skill`, and its predictions."""
    rng, rows = np.random.default_rng(seed), []
    hard = rng.random((prompts, 8))  # the same at every step: what is hard stays hard

    def said(i, good):
        topic = TOPICS[i % len(TOPICS)]
        whole = f"In short: {topic} depend on {TOPICS[(i + 3) % 8]}, and number {i} is no exception."
        return whole if good else f"Tell me about {topic}.\nTell me about {topic}.\n" * 2

    for i in range(prompts):
        good = hard[i] < skill
        messages = [{"role": "user", "content": f"Tell me about {TOPICS[i % 8]} ({i})."}]
        if i % 5 == 0:
            messages.insert(0, {"role": "system", "content": "Answer in one sentence."})
        told = {"prompt": messages, "reference": None, "stopped": bool(good[1]), "tokens": 20 + i}
        scores = {name: float(good[b]) for b, name in enumerate(BEHAVIOURS)}
        rows.append({"id": f"probes/p{i}", **told, "prediction": said(i, good[0]), "scores": scores})
        followed = {f"length:words/{n}": float(good[4 + n]) for n in range(1 + i % 2)}
        rows.append({"id": f"rules/{i}", **told, "prediction": said(i + 1, good[4]), "scores": followed})
        exact = float(good[6])
        task = told | {"reference": f"The answer is {i}."}
        text = f"The answer is {i if exact else i + 1}."
        rows.append(
            {"id": f"sums/r{i}", **task, "prediction": text, "scores": {"exact_match": exact, "chrf": 100 * exact}}
        )
    of = {kind: [row for row in rows if row["id"].startswith(kind)] for kind in ("probes", "rules", "sums")}
    probes = {"count": float(prompts), "tokens": 30.0}
    for name in BEHAVIOURS:
        share = float(np.mean([row["scores"][name] for row in of["probes"]]))
        probes |= {
            name: share,
            f"{name}/count": float(prompts),
            f"kind=recall/{name}": share,
            f"kind=recall/{name}/count": 9.0,
        }
    every = [v for row in of["rules"] for v in row["scores"].values()]
    whole = float(np.mean([all(row["scores"].values()) for row in of["rules"]]))
    rules = {
        "prompts": prompts,
        "instructions": len(every),
        "prompt_strict": whole,
        "prompt_loose": min(1.0, whole + 0.05),
    }
    single = float(np.mean(every))
    rules |= {"instruction_strict": single, "instruction_loose": min(1.0, single + 0.04)}
    rules["by_kind"] = {"length:words": {"count": len(every), "strict": single, "loose": single}}
    exact = float(np.mean([row["scores"]["exact_match"] for row in of["sums"]]))
    metrics = {
        "exact_match": {
            "value": exact,
            "interval": [max(0, exact - 0.1), min(1, exact + 0.1)],
            "scale": 1,
            "notes": [],
        },
        "chrf": {"value": 90 * exact + 3, "interval": [80 * exact, 95 * exact + 5], "scale": 100, "notes": []},
    }
    forgotten = skill / 20
    forgetting = {
        "loss": 2.4 + forgotten,
        "base_loss": 2.4,
        "loss_per_byte": 0.6 + forgotten / 4,
        "base_loss_per_byte": 0.6,
    }
    forgetting |= {
        "kl": forgotten,
        "agreement": 1 - forgotten,
        "task_kl": 4 * forgotten,
        "task_agreement": 1 - 3 * forgotten,
    }
    told = {"step": step, "probes": probes, "rules": rules, "metrics": {"sums": metrics}, "forgetting": forgetting}
    folder = workdir / "evaluations"
    put_lines(folder / f"{step:08d}.predictions.jsonl", rows)
    (folder / f"{step:08d}.json").write_text(json.dumps(told), encoding="utf-8")


def manifest_of(steps: int, *, validation="aaaa", **config) -> dict:
    """A manifest of a run with a few keys of its own."""
    told = RunConfig().to_dict()
    for key, value in {"model.path": "models/small", "data.train": ["a.jsonl"], "optim.lr": 1e-4, **config}.items():
        *parts, last = key.split(".")
        section = told
        for part in parts:
            section = section[part]
        section[last] = value
    account = {"read": 1000, "kept": 950, "held_out": 20, "dropped": {"too long": 28, "empty answer: dots": 2}}
    return {
        "command": "jax-sft train --config c.py --workdir w",
        "seed": 7,
        "config": told,
        "data": {"train": "tttt", "validation": validation, "accounts": {"train": account}},
        "mfu": {"formula": "f", "peak_flops": 9.9e14, "peak_from": "data sheet"},
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "devices": ["H100", "H100"],
        "processes": 1,
        "total_steps": steps,
        "starts": [{"at": "2026-02-03T04:05:06+00:00", "from_step": 0, "command": "c"}],
    }


def make_run(
    workdir: pathlib.Path, *, steps=40, every=10, skill=0.9, evaluated=True, manifest=None, **config
) -> pathlib.Path:
    """A whole workdir: the loss falls, evaluations at 0, `every` and so on."""
    workdir.mkdir(parents=True)
    told = manifest_of(steps, **config) | (manifest or {})
    (workdir / "manifest.json").write_text(json.dumps(told), encoding="utf-8")
    rng, lines, samples = np.random.default_rng(3), [], []
    for step in range(steps + 1):
        loss = 1.2 + 1.5 * math.exp(-4 * step / steps)
        if step:
            noise = float(rng.normal()) / 20
            line = {
                "step": step,
                "loss": loss + noise,
                "accuracy": 0.8 - loss / 5 + noise / 5,
                "lr": 1e-4 * (1 - step / (steps + 1)),
            }
            line |= {
                "grad_norm": 1 + abs(noise) * 9,
                "tokens_per_s": 21000 + 900 * noise,
                "trained_tokens_per_s": 9000 + 400 * noise,
            }
            line |= {"mfu": 0.41, "padding_share": 0.03, "seconds_per_step": 0.5, "stage": float(step > steps // 2)}
            lines.append(
                line | {"loss/books": loss + 0.1, "loss/chat": loss - 0.1, "share/books": 0.25, "share/chat": 0.75}
            )
        if step % every == 0:
            value = loss + 0.15 + 0.3 * max(0.0, step / steps - 0.6)
            of_sets = {"validation/loss/sums": value - 0.1, "validation/loss/talk": value + 0.1}
            lines.append({"step": step, "validation/loss": value, "validation/accuracy": 0.77 - value / 5, **of_sets})
            answer = "A tide is the sea's daily rise and fall." if step else HOSTILE * 2
            samples.append(
                {"step": step, "prompt": f"Say a word. {HOSTILE}", "answer": answer, "tokens": 9, "stopped": step > 0}
            )
            if evaluated:
                add_evaluation(workdir, step, 0.1 + (skill - 0.1) * step / steps)
    put_lines(workdir / "metrics.jsonl", lines)
    put_lines(workdir / "samples.jsonl", samples)
    alarm = {
        "step": every * 3,
        "kind": "overfitting",
        "level": "alarm",
        "text": "validation loss rises while training loss falls",
    }
    put_lines(workdir / "alarms.jsonl", [alarm])
    return workdir
