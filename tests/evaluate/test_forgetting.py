"""Drift is what a plain computation from all logits says; it is 0 without a change, and batches cannot be seen."""

import collections
import dataclasses
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sft.cli import main
from jax_sft.config import DataConfig, ForgettingConfig, LevelConfig, LoraConfig, MeshConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import DataError
from jax_sft.data.dataset import tokenize
from jax_sft.data.loader import Loader
from jax_sft.data.source import parts_of
from jax_sft.evaluate.forgetting import (
    Drift,
    Sums,
    Text,
    judge,
    lines,
    make_drift_step,
    measure_drift,
    read_texts,
    reference_of,
    rows_of,
)
from jax_sft.hf.targets import adaptation
from jax_sft.model.decoder import build, random_params
from jax_sft.model.families import read_model_config
from jax_sft.model.lora import merged
from jax_sft.sharding import make_mesh, shard_params
from tests.adapted import random_factors
from tests.tiny import CHATML, WIDTHS, tiny_tokenizer, write_conversations, write_model

PLAIN = read_model_config(
    {
        "model_type": "llama",
        "vocab_size": 264,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **WIDTHS,
    }
)
PADDED = dataclasses.replace(PLAIN, tied_head=False, vocab_rows=272, logit_cap=3.0)
TEXTS = [
    Text("a", "en", "prose", "A short text, and nothing more than that."),
    Text("b", "zh", "prose", "天气很好，我们去公园走走。"),
    Text("c", "code", "python", "def f(x):\n    return x + 1\n"),
    Text("d", "en", "prose", "Another one. It is a bit longer than the first, so that rows are filled unevenly."),
    Text("e", "en", "prose", "The fifth."),
]


@functools.cache
def template():
    return ChatTemplate(tiny_tokenizer(), template=CHATML)


@functools.cache
def params_of(model, seed=0, scale=8.0):
    """Far from a uniform answer, padding rows of the vocabulary too."""
    drawn = jax.device_get(random_params(model, seed))
    return jax.tree.map_with_path(lambda path, x: x * np.float32(1 if "norm" in path[-1].key else scale), drawn)


@functools.cache
def tuned_of(model):
    """The base, somewhat displaced."""
    return jax.tree.map(lambda x, y: x + np.float32(0.3) * y, params_of(model), params_of(model, 1))


def mesh_of(data=1, fsdp=1, tensor=1):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


@functools.cache
def text_rows(batch_size=2, max_length=128):
    return rows_of(TEXTS, template(), max_length=max_length, batch_size=batch_size)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Conversations, of which the answers are compared; some weigh more."""
    path = write_conversations(tmp_path_factory.mktemp("drift") / "d.jsonl", 11)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["messages"][1]["weight"] = 1 + i % 3
    path.write_text("\n".join(map(json.dumps, rows)))
    return tokenize(DataConfig(), parts_of((str(path),)), template(), cache_dir=None, progress=False)


def drift_of(
    model, base, tuned, loader, *, sizes=(1, 1, 1), chunk=64, dtype="float32", bytes_by_source=None, max_batches=None
):
    """Of full fine-tuning, whose base is gone when the drift is measured."""
    mesh = mesh_of(*sizes)
    graphdef = build(model, dtype=dtype, attention="auto")
    with jax.set_mesh(mesh):
        placed = jax.device_put(base, shard_params(base, mesh))
        reference = reference_of(graphdef, placed, {}, loader=loader, mesh=mesh, max_batches=max_batches)
        jax.tree.map(lambda x: x.delete(), placed)
        step = make_drift_step(graphdef, num_sources=len(loader.sources), loss_chunk_tokens=chunk, mesh=mesh)
        return measure_drift(
            step,
            jax.device_put(tuned, shard_params(tuned, mesh)),
            frozen={},
            reference=reference,
            loader=loader,
            mesh=mesh,
            sources=loader.sources,
            bytes_by_source=bytes_by_source,
        )


def by_hand(model, base, tuned, dataset):
    """The means of a Drift in float64, a sequence at a time, from all logits."""
    graphdef = build(model, dtype="float32", attention="xla")

    @jax.jit
    def logits_of(params, tokens_1T):
        positions_1T = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
        decoder = nnx.merge(graphdef, params, {})
        return decoder.logits(decoder.hidden(tokens_1T, positions_1T, jnp.ones_like(tokens_1T)))[0]

    sums: dict[str, float] = collections.defaultdict(float)
    for i in range(len(dataset)):
        sequence = dataset[i]
        # One shape, so that it is compiled once: what comes behind a token does not matter to it.
        tokens_1T = np.zeros((1, int(dataset.lengths_N.max())), np.int32)
        tokens_1T[0, : len(sequence.tokens_T)] = sequence.tokens_T
        logits = [np.asarray(logits_of(p, tokens_1T), np.float64) for p in (tuned, base)]
        model_TV, base_TV = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
        for t in np.flatnonzero(sequence.weights_T):
            weight, target = float(sequence.weights_T[t]), sequence.targets_T[t]
            sums["loss"] -= weight * model_TV[t, target]
            sums["base_loss"] -= weight * base_TV[t, target]
            sums["kl"] += weight * (np.exp(base_TV[t]) * (base_TV[t] - model_TV[t])).sum()
            sums["reverse_kl"] += weight * (np.exp(model_TV[t]) * (model_TV[t] - base_TV[t])).sum()
            sums["agreement"] += weight * (model_TV[t].argmax() == base_TV[t].argmax())
            sums["weight"] += weight
    return {name: value / sums["weight"] for name, value in sums.items() if name != "weight"}


def means(drift):
    return {name: getattr(drift, name) for name in ("loss", "base_loss", "kl", "reverse_kl", "agreement")}


# --- the numbers ---


@pytest.mark.parametrize("model", [PLAIN, PADDED], ids=["tied", "padded, capped"])
def test_drift_on_texts_is_what_all_logits_say(model):
    base, tuned, rows = params_of(model), tuned_of(model), text_rows()
    drift = drift_of(model, base, tuned, rows.loader, chunk=48)
    wanted = by_hand(model, base, tuned, rows.loader.dataset)
    assert means(drift) == pytest.approx(wanted, rel=1e-4)
    assert 0 < drift.agreement < 1
    assert drift.kl > 0.01
    assert drift.kl != pytest.approx(drift.reverse_kl, rel=1e-2)
    assert drift.tokens == rows.loader.dataset.trained_N.sum()


def test_drift_on_answers_weighs_their_tokens_and_leaves_prompts_out(answers):
    loader = Loader(answers, batch_size=4, max_length=256, packing=True, sources=("even", "odd"), seed=None)
    drift = drift_of(PLAIN, params_of(PLAIN), tuned_of(PLAIN), loader)
    assert len(np.unique(answers.weights_M)) > 2
    assert means(drift) == pytest.approx(by_hand(PLAIN, params_of(PLAIN), tuned_of(PLAIN), answers), rel=1e-4)
    assert drift.loss_per_byte is drift.base_loss_per_byte is None
    assert drift.by_source.keys() == {"even", "odd"}


@pytest.mark.parametrize(("model", "dtype"), [(PLAIN, "float32"), (PADDED, "bfloat16")], ids=["tied", "bfloat16"])
def test_a_model_that_nothing_was_done_to_has_not_drifted(model, dtype):
    drift = drift_of(model, params_of(model), params_of(model), text_rows().loader, dtype=dtype)
    assert abs(drift.kl) <= 1e-6
    assert abs(drift.reverse_kl) <= 1e-6
    assert drift.agreement == 1
    assert drift.loss_rise == pytest.approx(0, abs=1e-6)


@functools.cache
def padded_drift(sizes, batch_size, chunk):
    rows = text_rows(batch_size)
    known = rows.bytes_by_source
    return drift_of(
        PADDED, params_of(PADDED), tuned_of(PADDED), rows.loader, sizes=sizes, chunk=chunk, bytes_by_source=known
    )


@pytest.mark.parametrize(
    ("sizes", "batch_size", "chunk"),
    [((1, 1, 1), 1, 7), ((8, 1, 1), 8, 64), ((1, 8, 1), 16, 64), ((1, 1, 4), 3, 100), ((2, 2, 2), 4, 33)],
)
def test_batch_size_mesh_and_chunks_do_not_move_the_drift(sizes, batch_size, chunk):
    one = padded_drift((1, 1, 1), 2, 64)
    other = padded_drift(sizes, batch_size, chunk)
    assert means(other) == pytest.approx(means(one), rel=1e-4)
    for language, part in one.by_source.items():
        assert other.by_source[language] == pytest.approx(part, rel=1e-4)


def test_the_sources_add_up_to_the_whole():
    rows, drift = text_rows(), padded_drift((1, 1, 1), 2, 64)
    assert drift.by_source.keys() == {"en", "zh", "code"}
    for name in ("loss", "kl", "agreement"):
        total = sum(part[name] * part["tokens"] for part in drift.by_source.values())
        assert total == pytest.approx(getattr(drift, name) * drift.tokens, rel=1e-6)
    per_byte = sum(part["loss_per_byte"] * rows.bytes_by_source[name] for name, part in drift.by_source.items())
    assert per_byte == pytest.approx(drift.loss_per_byte * sum(rows.bytes_by_source.values()), rel=1e-6)
    assert per_byte == pytest.approx(drift.loss * drift.tokens, rel=1e-6)


def test_sums_of_many_batches_lose_no_digit():
    """2**24 + 1 does not exist in float32."""
    loader = text_rows(batch_size=1).loader
    mesh, graphdef = mesh_of(), build(PLAIN, dtype="float32", attention="auto")
    reference = reference_of(graphdef, params_of(PLAIN), {}, loader=loader, mesh=mesh)
    assert loader.total_steps > 1
    values = iter([2.0**24] + [1.0] * loader.total_steps)

    def step(params, frozen, batch, h_BPX, head_VX):
        return Sums(*(np.array([x, 0, 0], np.float32) for x in (next(values), 1, 1, 1, 1, 1, 1)))

    drift = measure_drift(step, {}, frozen={}, reference=reference, loader=loader, mesh=mesh, sources=loader.sources)
    assert drift.loss * loader.total_steps == pytest.approx(2**24 + loader.total_steps - 1, rel=1e-12)


WORKER = """
import json, sys
import jax
rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
from tests.evaluate.test_forgetting import PADDED, drift_of, params_of, text_rows, tuned_of
for sizes in json.loads(sys.argv[3]):
    drift = drift_of(PADDED, params_of(PADDED), tuned_of(PADDED), text_rows(4).loader, sizes=sizes)
    print("RESULT", json.dumps(drift.to_dict()))
"""


@pytest.mark.slow
def test_every_process_gets_the_drift_that_one_alone_finds():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = json.dumps([(2, 1, 2), (1, 4, 1), (1, 1, 4)])  # rows in both processes, in both, and all in each
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(port), sizes],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": ".", "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_NUM_CPU_DEVICES": "2"},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    said = [
        [json.JSONDecoder().raw_decode(part)[0] for part in out.split("RESULT ")[1:]]  # gloo writes there too
        for out, _ in outputs
    ]
    assert said[0] == said[1]
    assert len(said[0]) == 3
    one = padded_drift((1, 1, 1), 2, 64)
    for drift in said[0]:
        assert {name: drift[name] for name in means(one)} == pytest.approx(means(one), rel=1e-4)


# --- adapters ---


@functools.cache
def lora_of(targets, model=PLAIN):
    return adaptation(LoraConfig(rank=3, targets=targets), model)


def drift_of_adapters(targets, factors, *, sizes=(1, 1, 1), model=PLAIN):
    lora, mesh, loader = lora_of(targets, model), mesh_of(*sizes), text_rows(4).loader
    graphdef = build(model, dtype="float32", attention="auto", lora=lora)
    with jax.set_mesh(mesh):
        frozen = jax.device_put(params_of(model), shard_params(params_of(model), mesh))
        base = build(model, dtype="float32", attention="auto")
        reference = reference_of(base, {}, frozen, loader=loader, mesh=mesh)
        head = frozen["embed_VD" if model.tied_head else "head_VD"]
        assert reference.head_VX is head, "a frozen head is not copied"
        step = make_drift_step(graphdef, num_sources=3, loss_chunk_tokens=64, mesh=mesh)
        placed = jax.device_put(factors, shard_params(factors, mesh))
        return measure_drift(
            step, placed, frozen=frozen, reference=reference, loader=loader, mesh=mesh, sources=loader.sources
        )


TARGETS = [("all-linear",), ("all-linear", "head")]


@pytest.mark.parametrize("targets", TARGETS, ids=["layers", "head too"])
def test_fresh_adapters_have_not_drifted(targets):
    factors = jax.tree.map_with_path(
        lambda path, x: x * np.float32(not path[-1].key.startswith("b_")),
        random_factors(lora_of(targets), params_of(PLAIN), PLAIN),
    )
    drift = drift_of_adapters(targets, factors)
    assert abs(drift.kl) <= 1e-6
    assert drift.agreement == 1


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("targets", TARGETS, ids=["layers", "head too"])
def test_adapters_drift_as_far_as_the_weights_that_they_make(targets, sizes):
    factors = random_factors(lora_of(targets), params_of(PLAIN), PLAIN)
    drift = drift_of_adapters(targets, factors, sizes=sizes)
    whole = jax.device_get(merged(lora_of(targets), jax.tree.map(jnp.array, params_of(PLAIN)), factors["lora"]))
    untied = dataclasses.replace(PLAIN, tied_head=False)
    base = {**params_of(PLAIN), "head_VD": params_of(PLAIN)["embed_VD"]}
    wanted = drift_of(untied, base, {"head_VD": base["head_VD"], **whole}, text_rows(4).loader)
    assert means(drift) == pytest.approx(means(wanted), rel=1e-4)
    assert drift.kl > 1e-3


def test_a_base_that_has_an_adapter_itself_is_taken_with_it():
    targets = TARGETS[1]
    factors = random_factors(lora_of(targets), params_of(PLAIN), PLAIN)
    graphdef = build(PLAIN, dtype="float32", attention="auto", lora=lora_of(targets))
    mesh, loader = mesh_of(), text_rows().loader
    placed = jax.tree.map(jnp.array, factors)
    reference = reference_of(graphdef, placed, params_of(PLAIN), loader=loader, mesh=mesh)
    jax.tree.map(lambda x: x.delete(), placed)
    step = make_drift_step(graphdef, num_sources=3, loss_chunk_tokens=64, mesh=mesh)
    measure = functools.partial(
        measure_drift, step, frozen=params_of(PLAIN), reference=reference, loader=loader, mesh=mesh
    )
    same = measure(factors, sources=loader.sources)
    assert abs(same.kl) <= 1e-6
    assert same.agreement == 1
    assert measure(jax.tree.map(lambda x: 2 * x, factors), sources=loader.sources).kl > 1e-3


# --- the reference ---


def test_the_reference_keeps_hidden_states_of_predicted_positions_in_the_computing_dtype():
    loader = text_rows().loader
    graphdef = build(PLAIN, dtype="bfloat16", attention="auto")
    reference = reference_of(graphdef, params_of(PLAIN), {}, loader=loader, mesh=mesh_of(data=2))
    shape = (2, loader.predict_capacity, 32)
    assert {(h.shape, h.dtype) for h in reference.hidden} == {(shape, jnp.dtype("bfloat16"))}
    assert reference.host_bytes == loader.total_steps * math.prod(shape) * 2
    assert reference.head_VX.dtype == jnp.bfloat16


def test_full_logits_never_exist():
    loader = text_rows(8).loader
    graphdef, mesh = build(PLAIN, dtype="float32", attention="auto"), mesh_of()
    step = make_drift_step(graphdef, num_sources=3, loss_chunk_tokens=64, mesh=mesh)
    h_BPX = np.zeros((8, loader.predict_capacity, 32), np.float32)
    text = step.lower(params_of(PLAIN), {}, loader.batch(0), h_BPX, params_of(PLAIN)["embed_VD"]).as_text()
    assert "8x8x264xf32" in text
    assert f"8x{loader.predict_capacity}x264" not in text


def test_some_batches_may_be_compared_alone_and_bytes_are_not_known_then():
    rows = text_rows(batch_size=1)
    drift = drift_of(
        PLAIN,
        params_of(PLAIN),
        tuned_of(PLAIN),
        rows.loader,
        max_batches=1,
        bytes_by_source=rows.bytes_by_source,
    )
    assert 0 < drift.tokens < rows.loader.dataset.trained_N.sum()
    assert drift.loss_per_byte is None


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        ([dataclasses.replace(text, text=text.text.swapcase()) for text in TEXTS], "batch 0 holds other tokens"),
        (TEXTS[:1], "it has 2 batches, the loader 1"),
    ],
)
def test_a_reference_of_other_batches_is_refused(texts, fault):
    loader, mesh = text_rows(batch_size=1).loader, mesh_of()
    graphdef = build(PLAIN, dtype="float32", attention="auto")
    reference = reference_of(graphdef, params_of(PLAIN), {}, loader=loader, mesh=mesh)
    other = rows_of(texts, template(), max_length=128, batch_size=1).loader
    step = make_drift_step(graphdef, num_sources=3, loss_chunk_tokens=64, mesh=mesh)
    with pytest.raises(ValueError, match=rf"{fault}.*make it anew with the loader"):
        measure_drift(
            step,
            params_of(PLAIN),
            frozen={},
            reference=reference,
            loader=other,
            mesh=mesh,
            sources=loader.sources,
        )


# --- rows ---


def sequences_of(text, **options):
    rows = rows_of([Text("x", "zh", "k", text)], template(), **{"max_length": 64, "batch_size": 1} | options)
    return rows, rows.loader.dataset[0]


def test_every_token_of_a_text_but_the_first_is_predicted_and_nothing_is_added():
    rows, sequence = sequences_of("abc de")
    assert template().decode([sequence.tokens_T[0], *sequence.targets_T]) == "abc de"
    assert sequence.weights_T.tolist() == [1.0] * 5
    assert rows.bytes_by_source == {"zh": 5}
    assert rows.cut == 0


def test_behind_a_bos_the_first_token_is_predicted_too():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    with_bos = ChatTemplate(tokenizer, template=CHATML)
    with_bos.__dict__["_adds_bos"] = True
    rows = rows_of([Text("x", "en", "k", "天ab")], with_bos, max_length=64, batch_size=1)
    assert rows.loader.dataset.trained_N.tolist() == [5]
    assert rows.bytes_by_source == {"en": 5}


def test_bytes_of_chinese_are_those_of_utf8():
    """A character is three bytes, here three tokens; the two that are predicted of the first have a part in it."""
    rows, sequence = sequences_of("天气很好")
    assert len(sequence.targets_T) == 11
    assert rows.bytes_by_source == {"zh": 12}


def test_a_long_text_is_cut_and_so_are_its_bytes():
    rows, sequence = sequences_of("ab天气" * 30, max_length=20)
    assert len(sequence.tokens_T) == rows.loader.max_length == 20
    assert rows.cut == 1
    assert rows.bytes_by_source == {"zh": len(("ab天气" * 30).encode()[1:21])}
    kept, _ = sequences_of("ab天气" * 30, max_length=240)
    assert kept.cut == 0
    assert kept.bytes_by_source == {"zh": 239}


def test_texts_of_less_than_two_tokens_are_refused_and_broken_ones_named():
    with pytest.raises(DataError, match="none of the 1 general texts has two tokens.*give longer ones"):
        sequences_of("a")
    with pytest.raises(DataError, match="x: .*surrogate.*repair"):
        sequences_of("a\ud800b")


# --- our texts, and those of others ---


def script_share(text):
    letters = [c for c in text if c.isalpha()]
    return sum("\u4e00" <= c <= "\u9fff" for c in letters) / len(letters)


def test_our_texts_are_many_and_of_many_kinds():
    texts = read_texts()
    counts = collections.Counter(text.language for text in texts)
    assert len(texts) >= 60
    assert counts.keys() == {"en", "zh", "code"}
    assert 0.55 <= counts["en"] / len(texts) <= 0.65
    assert 0.25 <= counts["zh"] / len(texts) <= 0.35
    assert len({text.id for text in texts}) == len(texts)
    prose = {"encyclopaedia", "narrative", "news", "letter", "instructions", "science", "dialogue", "poetry"}
    for language in ("en", "zh"):
        assert {text.kind for text in texts if text.language == language} >= prose | {"arithmetic"}
    assert len({text.kind for text in texts if text.language == "code"}) >= 5


def test_each_of_our_texts_is_of_its_language_and_of_a_fit_length():
    for text in read_texts():
        match text.language:
            case "zh":
                assert script_share(text.text) > 0.9, text.id
                assert 120 <= len("".join(text.text.split())) <= 300, text.id
            case "en":
                assert text.text.isascii(), text.id
                assert 60 <= len(text.text.split()) <= 150, text.id
            case _:
                assert text.text.isascii(), text.id
                assert text.text.count("\n") > 10, text.id


def test_none_of_our_texts_repeats_another():
    texts = [" ".join(text.text.split()) for text in read_texts()]
    for i, text in enumerate(texts):
        assert not any(text in other for other in texts[:i] + texts[i + 1 :])
        begun = {other[:40] for other in texts[:i]}
        assert text[:40] not in begun


def test_a_users_texts_are_read(tmp_path):
    jsonl = tmp_path / "t.jsonl"
    jsonl.write_text('{"text": "One."}\n\n{"id": "b", "language": "fr", "kind": "k", "text": "Deux."}\n', "utf-8")
    assert read_texts(str(jsonl)) == [Text(f"{jsonl}:1", "text", "text", "One."), Text("b", "fr", "k", "Deux.")]
    plain = tmp_path / "t.txt"
    plain.write_text("\nOne\nline.\n\n \nTwo.\n", "utf-8")
    assert [text.text for text in read_texts(str(plain))] == ["One\nline.", "Two."]
    assert {text.language for text in read_texts(str(plain))} == {"text"}


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("absent.jsonl", None, r"absent\.jsonl: the general texts cannot be read .*correct the path"),
        ("latin.txt", b"caf\xe9", r"latin\.txt: .*cannot be read .*UTF-8"),
        ("a.csv", b"text", r"a\.csv: is neither \.jsonl .* nor \.txt .*convert it"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: has no text; write some passages"),
        ("a.txt", b" \n\n", r"a\.txt: has no text; write some passages"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', r"a\.jsonl:2: the field 'text' is missing, there are 'txt'; name"),
        ("a.jsonl", b"{}", r"a\.jsonl:1: the field 'text' is missing, there are none"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: field 'text' is 3; give a text"),
        ("a.jsonl", b'{"text": " "}', r"a\.jsonl:1: field 'text' is \" \"; give a text"),
        ("a.jsonl", b'{"text": "a", "language": 1}', r"a\.jsonl:1: field 'language' is 1; give a text, or leave it"),
        ("a.jsonl", b'["a"]', r'a\.jsonl:1: is \["a"\]; write one JSON object a line'),
        ("a.jsonl", b"text", r"a\.jsonl:1: is no JSON .*write one object a line"),
    ],
)
def test_a_file_without_texts_says_where_and_what(tmp_path, name, content, fault):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=fault):
        read_texts(str(tmp_path / name))


# --- limits and words ---

DRIFT = Drift(
    loss=2.5,
    base_loss=2.25,
    loss_per_byte=0.75,
    base_loss_per_byte=0.7,
    kl=0.125,
    reverse_kl=0.0625,
    agreement=0.8,
    tokens=1234,
    by_source={},
)
NONE = ForgettingConfig(loss_rise=LevelConfig(), kl=LevelConfig(), agreement=LevelConfig())


@pytest.mark.parametrize(
    ("limits", "level", "text"),
    [
        ({"loss_rise": LevelConfig(alarm=0.2)}, "alarm", r"risen by 0\.2500 nats .*limit \(alarm\) is 0\.2:"),
        ({"loss_rise": LevelConfig(alarm=0.1, stop=0.2)}, "stop", r"0\.2500 .*limit \(stop\) is 0\.2:"),
        ({"kl": LevelConfig(alarm=0.1, stop=0.2)}, "alarm", r"KL\(base \|\| model\) is 0\.1250 .*\(alarm\) is 0\.1:"),
        ({"kl": LevelConfig(stop=0.1)}, "stop", r"0\.1250 .*\(stop\) is 0\.1:"),
        (
            {"agreement": LevelConfig(alarm=0.9, stop=0.5)},
            "alarm",
            r"agree .* 0\.8000 only, the least allowed \(alarm\) is 0\.9",
        ),
        (
            {"agreement": LevelConfig(alarm=0.9, stop=0.85)},
            "stop",
            r"0\.8000 only, the least allowed \(stop\) is 0\.85",
        ),
    ],
)
def test_a_limit_that_is_passed_alarms_with_number_limit_and_ways_out(limits, level, text):
    (alarm,) = judge(DRIFT, dataclasses.replace(NONE, **limits))
    assert alarm.level == level
    assert re.search(text, alarm.text)
    for way in ("optim.lr", "fewer steps", "replay", "towards the base", "at export"):
        assert way in alarm.text


def test_a_drift_at_its_limits_or_without_any_alarms_nobody():
    at = ForgettingConfig(
        loss_rise=LevelConfig(alarm=0.25), kl=LevelConfig(alarm=0.125), agreement=LevelConfig(alarm=0.8)
    )
    assert judge(DRIFT, at) == judge(DRIFT, NONE) == []
    better = dataclasses.replace(DRIFT, loss=1.0, kl=0.0, agreement=1.0)
    assert judge(better, ForgettingConfig()) == []


def test_numbers_that_are_not_finite_pass_every_limit():
    broken = dataclasses.replace(DRIFT, loss=math.nan, kl=math.inf, agreement=math.nan)
    limits = ForgettingConfig(
        loss_rise=LevelConfig(stop=9.0), kl=LevelConfig(stop=9.0), agreement=LevelConfig(stop=0.0)
    )
    assert [alarm.level for alarm in judge(broken, limits)] == ["stop"] * 3


def test_a_drift_is_told_in_plain_lines():
    first, second = lines(DRIFT)
    assert first == "general text: loss 2.5000 nats a token, base 2.2500 (+0.2500); a byte 0.7500, base 0.7000"
    assert second.endswith("the same likeliest token at 80.0% of 1,234 tokens")
    part = {"loss": 2.0, "base_loss": 2.5, "kl": 1e-5, "agreement": 0.5, "tokens": 10.0}
    several = lines(dataclasses.replace(DRIFT, loss_per_byte=None, by_source={"en": part, "zh": part}), of="answers")
    assert several[0] == "answers: loss 2.5000 nats a token, base 2.2500 (+0.2500)"
    assert several[3] == "  zh: loss 2.0000, base 2.5000 (-0.5000), KL 1.0e-05, 50.0% of 10 tokens"


def test_a_drift_is_plain_json():
    report = json.loads(json.dumps(dataclasses.replace(DRIFT, by_source={"en": {"loss": 1.0}}).to_dict()))
    assert report["loss_rise"] == 0.25
    assert report["by_source"] == {"en": {"loss": 1.0}}


@pytest.fixture(scope="module")
def of_eval(tmp_path_factory):
    """A model, one that was made of it, an adapter of nothing, and texts."""
    folder = tmp_path_factory.mktemp("eval")
    write_model(folder / "base")
    write_model(folder / "other", seed=1)
    (folder / "texts.txt").write_text("The boats lay in the mud.\n\n她把信放在桌上。\n")
    return folder


def test_eval_tells_how_far_a_model_has_gone_from_another(of_eval, capsys):
    out = of_eval / "out.json"
    model, base, texts = (str(of_eval / name) for name in ("other", "base", "texts.txt"))
    assert main(["eval", "--model", model, "--against", base, "--forgetting", texts, "--out", str(out)]) == 0
    assert f"{model} against {base}" in (said := capsys.readouterr().out) and "KL(base || model)" in said
    found = json.loads(out.read_text())["forgetting"]
    assert found["kl"] > 0 and found["tokens"] > 20 and found["loss_rise"] == found["loss"] - found["base_loss"]
    same = of_eval / "same"
    same.symlink_to(of_eval / "base")
    assert main(["eval", "--model", str(same), "--against", base, "--forgetting", texts, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["forgetting"]
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["agreement"] == 1


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--forgetting"], "--forgetting compares with what the model was made of; name that with --against"),
        (["--forgetting", "nowhere.txt", "--against", "BASE"], "nowhere.txt: the general texts cannot be read"),
        (["--limit", "3", "--probes"], "--limit belongs to --tasks, which is not set"),
        (["--num-fewshot", "0", "--probes"], "--num-fewshot belongs to --tasks"),
    ],
)
def test_eval_refuses_what_it_cannot_compare_before_it_loads_a_model(of_eval, capsys, flags, fault):
    flags = [str(of_eval / "base") if flag == "BASE" else flag for flag in flags]
    assert main(["eval", "--model", str(of_eval / "other"), *flags]) == 1
    assert fault in capsys.readouterr().err


def test_models_of_other_vocabularies_are_not_compared(of_eval, capsys):
    write_model(of_eval / "words", words=("boat",))
    flags = ["--against", str(of_eval / "base"), "--forgetting", str(of_eval / "texts.txt")]
    assert main(["eval", "--model", str(of_eval / "words"), *flags]) == 1
    assert "has another vocabulary than" in capsys.readouterr().err
