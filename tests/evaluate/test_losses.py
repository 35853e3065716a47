"""The losses of a set are means over its trained tokens; how they were batched, packed or spread cannot be seen."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from jax_sft.config import DataConfig, MeshConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.dataset import tokenize
from jax_sft.data.loader import Loader
from jax_sft.data.source import parts_of
from jax_sft.evaluate.losses import evaluate_losses
from jax_sft.loss import Tally
from jax_sft.model.decoder import abstract_params, build, random_params
from jax_sft.model.families import read_model_config
from jax_sft.sharding import make_mesh, shard_params
from jax_sft.train_step import make_eval_step
from tests.tiny import CHATML, WIDTHS, tiny_tokenizer, write_conversations

MODEL = read_model_config(
    {
        "model_type": "llama",
        "vocab_size": 264,
        "num_hidden_layers": 1,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **WIDTHS,
    }
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = write_conversations(tmp_path_factory.mktemp("losses") / "d.jsonl", 11)
    template = ChatTemplate(tiny_tokenizer(), template=CHATML)
    return tokenize(DataConfig(), parts_of((str(path),)), template, cache_dir=None, progress=False)


@pytest.fixture(scope="module")
def params():
    """Far from a uniform answer, so that tokens differ in their loss and some are hit."""
    drawn = jax.device_get(random_params(MODEL, seed=4))
    return jax.tree.map_with_path(lambda path, x: x * np.float32(1 if "norm" in path[-1].key else 8), drawn)


@pytest.fixture(scope="module")
def by_hand(dataset, params):
    """Source, nll and hit of every trained token: a sequence a row, float64, all logits at once, one device."""
    model = nnx.merge(build(MODEL, dtype="float32", attention="auto"), params, {})
    count, length = len(dataset), int(dataset.lengths_N.max())
    tokens_BT = np.zeros((count, length), np.int32)
    for i in range(count):
        tokens_BT[i, : len(dataset[i].tokens_T)] = dataset[i].tokens_T
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BT.shape)
    h_BTD = np.asarray(jax.jit(model.hidden)(tokens_BT, positions_BT, np.ones_like(tokens_BT)), np.float64)
    logits_BTV = h_BTD @ np.asarray(params["embed_VD"], np.float64).T
    found = []
    for i in range(count):
        for t in np.flatnonzero(dataset[i].weights_T):
            logits_V, target = logits_BTV[i, t], dataset[i].targets_T[t]
            nll = np.log(np.exp(logits_V - logits_V.max()).sum()) + logits_V.max() - logits_V[target]
            found.append((dataset[i].source, nll, logits_V.argmax() == target))
    return found


def losses_of(dataset, params, *, sizes, batch_size, packing=True, sources=("even", "odd")):
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), jax.devices()[: math.prod(sizes)])
    loader = Loader(dataset, batch_size=batch_size, max_length=256, packing=packing, sources=sources, seed=None)
    graphdef = build(MODEL, dtype="float32", attention="auto")
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shard_params(abstract_params(MODEL), mesh))
        step = make_eval_step(graphdef, num_sources=len(sources), loss_chunk_tokens=64, mesh=mesh)
        return evaluate_losses(step, placed, frozen={}, loader=loader, mesh=mesh, sources=sources)


@pytest.mark.parametrize(
    ("sizes", "batch_size", "packing"),
    [((1, 1, 1), 1, True), ((1, 8, 1), 8, False), ((2, 2, 2), 4, True)],
)
def test_batch_size_packing_and_mesh_do_not_move_the_mean_over_tokens(
    dataset, params, by_hand, sizes, batch_size, packing
):
    losses = losses_of(dataset, params, sizes=sizes, batch_size=batch_size, packing=packing)
    assert losses.tokens == len(by_hand)
    assert losses.loss == pytest.approx(np.mean([nll for _, nll, _ in by_hand]), rel=1e-5)
    assert losses.accuracy == pytest.approx(np.mean([hit for _, _, hit in by_hand]), rel=1e-9)
    assert losses.accuracy > 0
    for source in ("even", "odd"):
        mine = [(nll, hit) for name, nll, hit in by_hand if name == source]
        part = losses.by_source[source]
        assert part["tokens"] == len(mine)
        assert (part["loss"], part["accuracy"]) == pytest.approx(tuple(np.mean(mine, axis=0)), rel=1e-5)


@pytest.fixture(scope="module")
def losses(dataset, params):
    return losses_of(dataset, params, sizes=(1, 1, 1), batch_size=4)


def test_the_total_weighs_tokens_and_not_sources_or_rows(losses):
    even, odd = losses.by_source["even"], losses.by_source["odd"]
    assert even["tokens"] != odd["tokens"]
    together = even["loss"] * even["tokens"] + odd["loss"] * odd["tokens"]
    assert losses.loss == pytest.approx(together / losses.tokens, rel=1e-9)


def test_a_source_of_the_run_that_the_set_lacks_is_left_out_and_moves_no_other(dataset, params, losses):
    found = losses_of(dataset, params, sizes=(1, 1, 1), batch_size=4, sources=("absent", "even", "odd")).by_source
    assert found.keys() == {"even", "odd"}
    for source, part in found.items():
        assert part == pytest.approx(losses.by_source[source], rel=1e-6)


def test_the_sums_of_many_batches_lose_no_digit(dataset):
    """2**24 + 1 does not exist in float32."""
    values = iter([2.0**24] + [1.0] * 10)

    def eval_step(params, frozen, batch):
        return Tally(*(np.full(1, x, np.float32) for x in (next(values), 1, 1, 1, 0)))

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    one = dataclasses.replace(dataset, sources=("all",), source_ids_N=np.zeros_like(dataset.source_ids_N))
    loader = Loader(one, batch_size=1, max_length=256, packing=False, sources=("all",), seed=None)
    losses = evaluate_losses(eval_step, {}, frozen={}, loader=loader, mesh=mesh, sources=("all",))
    assert losses.loss * 11 == pytest.approx(2**24 + 10, rel=1e-12)


def test_losses_are_plain_json(losses):
    report = json.loads(json.dumps(losses.to_dict()))
    assert report["by_source"]["odd"]["loss"] == losses.by_source["odd"]["loss"]
    assert report.keys() == {"loss", "accuracy", "tokens", "by_source"}
