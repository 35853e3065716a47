"""Every family, with each of its switches: logits and gradients are transformers', files go in and out byte by byte."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jax_sft.hf.load import load_model
from jax_sft.loss import loss_and_tally
from jax_sft.model.decoder import build
from tests.hf import family_cases
from tests.hf.family_cases import (
    BASES,
    CASES,
    GOLDEN,
    config_of,
    hf_config,
    params_of,
    state_dict_of,
    tokens_of,
    write_family,
)
from tests.hf.models import tiny_tokenizer
from tests.hf.test_save import out_over_a_mesh


def positions_of(tokens_BT: np.ndarray) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graphdef, params, tokens_BT, positions_BT, segments_BT):
    model = nnx.merge(graphdef, params)
    return model.logits(model.hidden(tokens_BT, positions_BT, segments_BT))


def our_logits(case: str, backend: str = "xla") -> np.ndarray:
    config = config_of(case)
    tokens_BT = tokens_of(config)
    graphdef = build(config, dtype="float32", attention=backend)
    return np.asarray(
        logits_of(graphdef, params_of(config), tokens_BT, positions_of(tokens_BT), np.ones_like(tokens_BT))
    )


# Of the largest logit. Its scaled cosines and sines make large scores: weights that differ by one float32 rounding move
# its logits by up to 1.1e-5, those of other cases by 1e-6 to 7e-6. XLA of jax 0.12 differs by 1.03e-5, of 0.10 by 4e-6.
NOISY = {"phi3_longrope": 2e-5}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_in_float32(case):
    wanted = np.load(GOLDEN)[case]
    np.testing.assert_allclose(our_logits(case), wanted, rtol=0, atol=NOISY.get(case, 1e-5) * np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES)
def test_recorded_logits_are_those_of_transformers(case):
    pytest.importorskip("torch")
    wanted = family_cases.transformers_logits(case)
    np.testing.assert_allclose(np.load(GOLDEN)[case], wanted, rtol=0, atol=5e-6 * np.abs(wanted).max())


def test_every_case_has_logits_of_its_own():
    golden = np.load(GOLDEN)
    assert set(golden) == set(CASES)
    # glm4 has norms that glm has not; every turned case must differ from its base, or it turns nothing.
    for case, (kind, turned) in CASES.items():
        if turned:
            base = golden[kind]
            assert golden[case].shape == base.shape
            assert np.abs(golden[case] - base).max() > 1e-3, case


# Where rows are cut is told by the tests of attention; here it is enough that a window or a cap reaches both backends.
@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "xla") for case in CASES), ("gemma2", "chunked"), ("gpt_oss", "chunked")],
)
def test_packed_rows_equal_separate_ones(case, backend):
    """Three texts in a row, one of them longer than every window and than the first context of the scaled ropes."""
    config = config_of(case)
    texts = [tokens_of(config)[0, :n] for n in (9, 23, 5)]
    graphdef, params = build(config, dtype="float32", attention=backend), params_of(config)
    packed_T = np.concatenate([*texts, np.zeros(3, np.int32)])
    positions_T = np.concatenate([*(np.arange(len(t), dtype=np.int32) for t in texts), np.arange(3, dtype=np.int32)])
    segments_T = np.repeat([1, 2, 3, 0], [9, 23, 5, 3]).astype(np.int32)
    got = logits_of(graphdef, params, packed_T[None], positions_T[None], segments_T[None])[0]
    start = 0
    for text in texts:
        alone = logits_of(graphdef, params, text[None], positions_of(text[None]), np.ones((1, len(text)), np.int32))[0]
        np.testing.assert_allclose(got[start : start + len(text)], alone, rtol=0, atol=1e-5 * np.abs(alone).max())
        start += len(text)


@pytest.mark.parametrize("case", [*BASES, "llama_yarn", "smollm3_windows", "gemma2_low_caps"])
def test_prefill_and_decode_equal_the_whole_text(case):
    config = config_of(case)
    tokens_BT = tokens_of(config)[:, :20]
    graphdef, params = build(config, dtype="float32", attention="xla"), params_of(config)
    whole = np.asarray(logits_of(graphdef, params, tokens_BT, positions_of(tokens_BT), np.ones_like(tokens_BT)))

    @jax.jit
    def prefill(params, tokens_BT, lengths_B):
        return nnx.merge(graphdef, params).prefill(tokens_BT, lengths_B, slots=20)

    @jax.jit
    def decode(params, tokens_B, cache):
        return nnx.merge(graphdef, params).decode(tokens_B, cache)

    lengths_B = np.array([4, 11], np.int32)
    got, cache = prefill(params, tokens_BT[:, :11], lengths_B)
    for step in range(9):
        last_B = lengths_B + step - 1
        np.testing.assert_allclose(got, whole[[0, 1], last_B], rtol=0, atol=1e-5 * np.abs(whole).max())
        got, cache = decode(params, tokens_BT[[0, 1], last_B + 1], cache)


@pytest.mark.parametrize(
    ("case", "sizes"), [*((case, (1, 1, 1)) for case in CASES), *((kind, (2, 2, 2)) for kind in BASES)]
)
def test_import_then_export_is_equal_byte_for_byte(case, sizes, tmp_path: pathlib.Path):
    """In bfloat16, down to the sign of a zero; also through a mesh of eight devices."""
    state = write_family(tmp_path / "in", case)
    base, out = out_over_a_mesh(tmp_path / "in", tmp_path / "out", sizes, dtype="bfloat16")
    assert out.keys() == state.keys()
    for name, wanted in state.items():
        assert out[name].dtype == wanted.dtype
        np.testing.assert_array_equal(out[name].view(np.uint16), wanted.view(np.uint16), err_msg=name)
    assert load_model(tmp_path / "out").config == base.config


@pytest.mark.parametrize(
    "case",
    [
        *("llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "glm4", "starcoder2"),
        *("mixtral", "qwen3_moe", "olmoe", "gpt_oss"),
    ],
)
def test_gradients_of_the_loss_equal_torch(case):
    torch = pytest.importorskip("torch")
    config = config_of(case)
    tokens_BT = tokens_of(config).clip(1)  # 0 is the pad: torch gives its embedding no gradient
    model = family_cases.transformers_model(case).train()
    inputs = torch.from_numpy(tokens_BT).long()
    logits = model(inputs).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.reshape(-1, config.vocab_size), inputs[:, 1:].reshape(-1)).backward()

    def loss(params):
        decoder = nnx.merge(build(config, dtype="float32", attention="xla"), params)
        h_BTD = decoder.hidden(tokens_BT, positions_of(tokens_BT), np.ones_like(tokens_BT), remat="dots")
        targets_BT = jnp.asarray(tokens_BT[:, 1:])
        ones_BT = jnp.ones(targets_BT.shape, jnp.float32)
        total, _ = loss_and_tally(
            h_BTD[:, :-1],
            decoder.head(),
            targets_BT,
            ones_BT,
            jnp.zeros_like(targets_BT),
            num_sources=1,
            chunk_tokens=16,
            logit_cap=config.logit_cap,
        )
        return total / targets_BT.size

    params = jax.tree.map(jnp.asarray, params_of(config))
    ours = state_dict_of(config, jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params)))
    theirs = family_cases.transformers_gradients(model)
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


def test_every_family_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(BASES)


def test_experts_that_are_missing_or_too_many_are_named_drawn_together(tmp_path: pathlib.Path):
    config = config_of("olmoe")  # 4 layers of 8 experts
    state = {
        name: np.resize(x, (320, 16)) if x.shape[0] == 31 else x
        for name, x in state_dict_of(config, params_of(config)).items()
    }
    for layer in range(4):
        state[f"model.layers.{layer}.mlp.experts.8.up_proj.weight"] = state[
            "model.layers.0.mlp.experts.0.up_proj.weight"
        ]
        del state[f"model.layers.{layer}.mlp.experts.2.down_proj.weight"]
        del state[f"model.layers.{layer}.mlp.experts.3.down_proj.weight"]
    (tmp_path / "config.json").write_text(json.dumps(hf_config("olmoe") | {"vocab_size": 320}))
    tiny_tokenizer().save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the weights do not fit config.json") as error:
        load_model(tmp_path)
    assert str(error.value).splitlines()[1:] == [
        "  missing: model.layers.{0-3}.mlp.experts.{2-3}.down_proj.weight",
        "  unexpected: model.layers.{0-3}.mlp.experts.8.up_proj.weight",
    ]
