"""A score is a mean over a conversation's own tokens; how they were packed, batched or spread cannot be seen in it."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from jax_sft.config import DataConfig, MeshConfig
from jax_sft.data.bare import Bare
from jax_sft.data.dataset import tokenize
from jax_sft.data.source import parts_of
from jax_sft.data.template import ChatTemplate
from jax_sft.evaluate.difficulty import Plan, Scorer, make_nll_step
from jax_sft.model.decoder import abstract_params, build, random_params
from jax_sft.model.families import read_model_config
from jax_sft.sharding import make_mesh, shard_params
from tests.tiny import CHATML, WIDTHS, tiny_tokenizer

HF_CONFIG = {
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
MODEL = read_model_config(HF_CONFIG)
HEADER = "<|im_start|>assistant\n"
SIZES = ((1, 1, 1), (1, 8, 1), (2, 2, 2))


def write(path, conversations):
    """Conversations as lists of texts, a question first."""
    with path.open("w", encoding="utf-8") as file:
        for i, texts in enumerate(conversations):
            roles = ("user", "assistant") * len(texts)
            messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
            file.write(json.dumps({"id": f"c{i}", "messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(tiny_tokenizer(), template=CHATML)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    conversations = [[f"count to {i}", f"{i} {'na ' * (1 + i * 7 % 23)}done"] for i in range(17)]
    conversations += [["a", "b", "count again", "one two"], ["say x", "x"], ["hm", "h" * 90, "and", "g"]]
    return write(tmp_path_factory.mktemp("difficulty") / "d.jsonl", conversations)


def set_of(path, template, **config):
    return tokenize(DataConfig(**config), parts_of((str(path),)), template, cache_dir=None, progress=False)


@pytest.fixture(scope="module")
def dataset(path, template):
    return set_of(path, template)


@pytest.fixture(scope="module")
def params():
    """Far from a uniform answer, so that what stands before a token counts."""
    drawn = jax.device_get(random_params(MODEL, seed=4))
    return jax.tree.map_with_path(lambda path, x: x * np.float32(1 if "norm" in path[-1].key else 8), drawn)


def scorer_of(dataset, template, params, *, sizes=(1, 1, 1), batch_size=4, max_length=256):
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), jax.devices()[: math.prod(sizes)])
    step = make_nll_step(build(MODEL, dtype="float32", attention="auto"), loss_chunk_tokens=64, mesh=mesh)
    placed = jax.device_put(params, shard_params(abstract_params(MODEL), mesh))
    plan = Plan.of(dataset, batch_size=batch_size, max_length=max_length)
    return Scorer(functools.partial(step, placed, {}), dataset, Bare.of(template), plan, mesh)


def scores_of(*args, **how):
    scorer = scorer_of(*args, **how)
    with jax.set_mesh(scorer.mesh):
        return [score for chunk in scorer.chunks() for score in chunk]


@pytest.fixture(scope="module")
def nll_of(params):
    """The nll of every token of a text but the first: one sequence, float64 from all logits, no batch, no segments."""
    model = nnx.merge(build(MODEL, dtype="float32", attention="auto"), params, {})
    hidden = jax.jit(model.hidden)

    def of(tokens):
        length = 320  # one shape
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(tokens)] = tokens
        h_TD = np.asarray(hidden(padded, np.arange(length, dtype=np.int32)[None], np.ones_like(padded)), np.float64)[0]
        logits_TV = h_TD @ np.asarray(params["embed_VD"], np.float64).T
        lse_T = np.log(np.exp(logits_TV - logits_TV.max(-1, keepdims=True)).sum(-1)) + logits_TV.max(-1)
        t = np.arange(len(tokens) - 1)
        return lse_T[t] - logits_TV[t, tokens[1:]]

    return of


@pytest.fixture(scope="module")
def by_hand(path, template, nll_of):
    """(loss, loss without the prompt, tokens), of texts put together here and tokenised one by one."""
    found = []
    for line in path.read_text().splitlines():
        text, loss, alone, count = "", 0.0, 0.0, 0
        for message in json.loads(line)["messages"]:
            before = text + f"<|im_start|>{message['role']}\n"
            answer = message["content"] + "<|im_end|>\n"
            text = before + answer
            if message["role"] == "assistant":
                ids, short = (template.encode(t, escaped=False).ids for t in (text, HEADER + answer))
                n = len(template.encode(answer, escaped=False).ids)
                loss += nll_of(ids)[-n:].sum()
                alone += nll_of(short)[-n:].sum()
                count += n
        found.append((loss / count, alone / count, count))
    return found


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("batch_size", [8, 16])
def test_batch_size_packing_and_mesh_do_not_move_a_score(dataset, template, params, by_hand, sizes, batch_size):
    found = scores_of(dataset, template, params, sizes=sizes, batch_size=batch_size)
    assert [score.id for score in found] == [f"c{i}" for i in range(20)]
    assert [score.tokens for score in found] == [tokens for _, _, tokens in by_hand]
    for score, (loss, alone, _) in zip(found, by_hand, strict=True):
        assert (score.loss, score.loss_without_prompt) == pytest.approx((loss, alone), rel=1e-5)
        assert score.ratio == pytest.approx(loss / alone, rel=1e-5)
    assert np.std([score.ratio for score in found]) > 0.01


def test_a_set_in_another_order_and_in_other_chunks_has_the_same_scores(path, template, params, tmp_path, monkeypatch):
    lines = path.read_text().splitlines()
    backwards = tmp_path / "b.jsonl"
    backwards.write_text("\n".join(reversed(lines)))
    once = scores_of(set_of(path, template), template, params)
    monkeypatch.setattr("jax_sft.evaluate.difficulty._BATCHES_IN_CHUNK", 1)
    monkeypatch.setattr("jax_sft.evaluate.difficulty._SHORTEST_ROW", 1)
    there = set_of(backwards, template)
    assert len(Plan.of(there, batch_size=1, max_length=256).chunk_ends) > 4
    again = scores_of(there, template, params, batch_size=1)
    for a, b in zip(once, reversed(again), strict=True):
        assert (a.id, a.tokens) == (b.id, b.tokens)
        assert (a.loss, a.loss_without_prompt) == pytest.approx((b.loss, b.loss_without_prompt), rel=1e-5)


def test_a_scoring_that_goes_on_gives_the_same_numbers(dataset, template, params, monkeypatch):
    monkeypatch.setattr("jax_sft.evaluate.difficulty._BATCHES_IN_CHUNK", 1)
    scorer = scorer_of(dataset, template, params, batch_size=1)
    told = []
    with jax.set_mesh(scorer.mesh):
        whole = list(scorer.chunks())
        assert list(scorer.chunks(2, told.append)) == whole[2:]
    assert len(whole) > 3
    assert told == sorted(told)
    assert sum(map(len, whole[:2])) < told[0] <= told[-1] == 20


def test_a_conversation_cut_into_answers_is_one_score_over_all_of_them(path, template, params, nll_of):
    dataset = set_of(path, template, mask="turns")
    assert len(dataset) > 20
    found = scores_of(dataset, template, params)
    assert [score.id for score in found] == [f"c{i}" for i in range(20)]
    mine = [i for i in range(len(dataset)) if dataset.ids[i].startswith("c17#")]
    nll = [nll_of([*dataset[i].tokens_T[:1], *dataset[i].targets_T])[dataset[i].weights_T > 0] for i in mine]
    assert len(nll) == 2
    assert found[17].loss == pytest.approx(np.concatenate(nll).mean(), rel=1e-5)


def test_weights_of_messages_and_sets_do_not_move_a_score(dataset, template, params):
    halved = dataclasses.replace(dataset, weights_M=dataset.weights_M * np.float32(0.5))
    assert scores_of(halved, template, params) == scores_of(dataset, template, params)


def test_texts_without_a_prompt_have_a_loss_alone(tmp_path, template, params, nll_of):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one"}\n{"text": "the sky is blue"}\n')
    found = scores_of(set_of(path, template, format="text"), template, params)
    ids = template.encode("one<|im_end|>", escaped=False).ids
    assert found[0].loss == pytest.approx(nll_of(ids).mean(), rel=1e-5)
    assert [(s.loss_without_prompt, s.ratio) for s in found] == [(None, None)] * 2


def test_an_answer_of_one_token_has_a_score(tmp_path, template, params, nll_of):
    path = tmp_path / "t.jsonl"
    path.write_text('{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]}\n')
    (score,) = scores_of(set_of(path, template), template, params)
    alone = nll_of([template.tokenizer.eos_token_id, 4])[0]
    loss = nll_of([1, 2, 3, 4])[-1]
    assert score.tokens == 1
    assert (score.loss, score.loss_without_prompt, score.ratio) == pytest.approx((loss, alone, loss / alone), rel=1e-5)


def test_a_loss_that_is_not_finite_is_told_with_the_conversation(dataset, template, params):
    broken = jax.tree.map_with_path(lambda p, x: x * np.float32("nan") if "embed" in p[-1].key else x, params)
    with pytest.raises(ValueError, match=r"c0: the model's loss is not finite \(nan, .*set model.dtype = 'float32'"):
        scores_of(dataset, template, broken)


def test_rows_are_no_longer_than_the_data_need(dataset):
    plan = Plan.of(dataset, batch_size=4, max_length=8192)
    assert plan.length == 512
    assert Plan.of(dataset, batch_size=4, max_length=128).length == 192  # the longest has 140 or so


def test_scores_are_those_of_transformers(dataset, template, params, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    from jax_sft.hf.save import save_model

    save_model(
        tmp_path / "m",
        config=MODEL,
        params=jax.tree.map(jax.numpy.asarray, params),
        tokenizer=template.tokenizer,
        hf_config={"architectures": ["LlamaForCausalLM"], **HF_CONFIG},
        generation_config={},
        chat_template=CHATML,
        stop_ids=(template.tokenizer.eos_token_id,),
        dtype="float32",
        max_shard_size="5GB",
        facts={},
    )
    model = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()

    def loss_of(sequence):
        tokens = torch.tensor([[int(sequence.tokens_T[0]), *sequence.targets_T.tolist()]])
        labels = torch.tensor([[-100, *np.where(sequence.weights_T > 0, sequence.targets_T, -100).tolist()]])
        with torch.no_grad():
            return model(input_ids=tokens, labels=labels).loss.item()

    bare = Bare.of(template)
    for i, score in enumerate(scores_of(dataset, template, params)):
        assert score.loss == pytest.approx(loss_of(dataset[i]), rel=1e-5)
        twins = bare.twins(dataset[i])
        sizes = [np.count_nonzero(twin.weights_T) for twin in twins]
        alone = np.average([loss_of(twin) for twin in twins], weights=sizes)
        assert score.loss_without_prompt == pytest.approx(alone, rel=1e-5)
