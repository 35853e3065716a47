"""The learning rate is the one promised at every step; AdamW is AdamW; who decays is decided by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_sft.config import OptimConfig
from jax_sft.optim import decays, optimizer, schedule


def rates(total_steps, **options):
    rate = schedule(OptimConfig(lr=1.0, **options), total_steps)
    return np.array([float(rate(step)) for step in range(total_steps)])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warmup_rises_in_equal_steps_and_wastes_none(kind):
    lr = rates(20, schedule=kind, warmup_steps=4)
    np.testing.assert_allclose(lr[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert (lr > 0).all()
    np.testing.assert_allclose(rates(20, schedule=kind)[0], 1.0)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_total_steps_include_the_warmup_and_the_end_is_the_final_ratio(kind):
    config = OptimConfig(lr=2.0, schedule=kind, warmup_steps=5, final_lr_ratio=0.1)
    rate = schedule(config, 25)
    assert float(rate(5)) == 2.0
    np.testing.assert_allclose(float(rate(15)), 2.0 * 0.55, rtol=1e-6)  # halfway: both are at the mean of the ends
    np.testing.assert_allclose(float(rate(25)), 0.2, rtol=1e-6)
    assert 0.2 < float(rate(24)) < 0.3


def test_a_schedule_that_ends_at_zero_still_uses_its_last_step():
    assert (rates(10, schedule="linear", final_lr_ratio=0.0) > 0).all()


def test_cosine_follows_its_formula():
    lr = rates(10, schedule="cosine", final_lr_ratio=0.2)
    np.testing.assert_allclose(lr, 0.2 + 0.8 * (1 + np.cos(np.pi * np.arange(10) / 10)) / 2, rtol=1e-6)


def test_wsd_is_flat_and_then_falls_in_a_line():
    lr = rates(20, schedule="wsd", warmup_steps=2, final_lr_ratio=0.0, decay_steps=10)
    np.testing.assert_allclose(lr[2:11], 1.0)
    np.testing.assert_allclose(lr[10:], np.arange(10, 0, -1) / 10, rtol=1e-5)
    a_fifth = rates(20, schedule="wsd", final_lr_ratio=0.0)
    np.testing.assert_allclose(a_fifth[16:], [1, 0.75, 0.5, 0.25], rtol=1e-6)


def test_constant_stays():
    np.testing.assert_allclose(rates(7, schedule="constant", final_lr_ratio=0.1), 1.0)


def test_a_warmup_as_long_as_the_run_is_an_error():
    with pytest.raises(ValueError, match=r"warmup_steps = 10, but the run has 10 steps"):
        schedule(OptimConfig(warmup_steps=10), 10)


def test_a_decay_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"decay_steps = 8 does not fit into the 7 steps"):
        schedule(OptimConfig(schedule="wsd", warmup_steps=3, decay_steps=8), 10)
    with pytest.raises(ValueError, match="belongs to optim.schedule = 'wsd', not 'cosine'"):
        schedule(OptimConfig(decay_steps=8), 10)


def test_norms_biases_and_sinks_do_not_decay_however_many_axes_they_have():
    shapes = {
        "embed_VD": (8, 4),
        "blocks": {
            "attn_norm_LD": (2, 4),
            "q_LDNH": (2, 4, 2, 2),
            "q_bias_LNH": (2, 2, 2),
            "sinks_LN": (2, 2),
            "down_bias_LED": (2, 3, 4),
            "mlp_norm_LD": (2, 4),
            "up_bias_LF": (2, 8),
            "down_LFD": (2, 8, 4),
        },
        "final_norm_D": (4,),
        "head_VD": (8, 4),
    }
    tree = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    decayed = {path[-1].key for path, _ in jax.tree.leaves_with_path(tree) if decays(path)}
    assert decayed == {"embed_VD", "q_LDNH", "down_LFD", "head_VD"}


CONFIG = OptimConfig(lr=0.1, schedule="linear", warmup_steps=2, weight_decay=0.3, clip_norm=1.0, eps=1e-6)


def tree_of(rng):
    return {
        "embed_VD": rng.normal(size=(6, 4)).astype(np.float32),
        "blocks": {"attn_norm_LD": rng.normal(size=(3, 4)).astype(np.float32)},
    }


def numpy_adamw(params, gradients, config, total_steps):
    """AdamW written out a second time, in float64 and without a line of optax."""
    decayed = {"embed_VD": 1.0, "attn_norm_LD": 0.0}
    flat = {"embed_VD": params["embed_VD"], "attn_norm_LD": params["blocks"]["attn_norm_LD"]}
    flat = {k: v.astype(np.float64) for k, v in flat.items()}
    m = {k: np.zeros_like(v) for k, v in flat.items()}
    v = {k: np.zeros_like(x) for k, x in flat.items()}
    for step, tree in enumerate(gradients):
        g = {"embed_VD": tree["embed_VD"], "attn_norm_LD": tree["blocks"]["attn_norm_LD"]}
        g = {k: x.astype(np.float64) for k, x in g.items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        if config.clip_norm is not None and norm > config.clip_norm:
            g = {k: x * config.clip_norm / norm for k, x in g.items()}
        W = config.warmup_steps
        fall = 1 - (1 - config.final_lr_ratio) * max(step - W, 0) / (total_steps - W)
        lr = config.lr * min((step + 1) / (W + 1), 1) * fall
        for k, x in g.items():
            m[k] = config.b1 * m[k] + (1 - config.b1) * x
            v[k] = config.b2 * v[k] + (1 - config.b2) * x**2
            m_hat, v_hat = m[k] / (1 - config.b1 ** (step + 1)), v[k] / (1 - config.b2 ** (step + 1))
            flat[k] -= lr * (m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * decayed[k] * flat[k])
    return flat


@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_five_steps_equal_an_independent_adamw(clip_norm):
    rng = np.random.default_rng(1)
    config = dataclasses.replace(CONFIG, clip_norm=clip_norm)
    params = tree_of(rng)
    # Some gradients are longer than clip_norm and some are shorter.
    gradients = [jax.tree.map(lambda x, s=scale: x * s, tree_of(rng)) for scale in (3.0, 0.01, 1.0, 0.1, 10.0)]
    tx = optimizer(config, 10, params)
    ours, opt_state = jax.tree.map(jnp.asarray, params), tx.init(params)
    for step, gradient in enumerate(gradients):
        updates, opt_state = tx.update(gradient, opt_state, ours, step=jnp.int32(step))
        ours = optax.apply_updates(ours, updates)
    expected = numpy_adamw(params, gradients, config, 10)
    np.testing.assert_allclose(ours["embed_VD"], expected["embed_VD"], atol=2e-6)
    np.testing.assert_allclose(ours["blocks"]["attn_norm_LD"], expected["attn_norm_LD"], atol=2e-6)


def test_the_rate_follows_the_step_given_and_not_the_number_of_updates():
    params = {"embed_VD": jnp.ones((2, 2))}
    tx = optimizer(OptimConfig(lr=1.0, schedule="linear", final_lr_ratio=0.0, clip_norm=None), 10, params)
    first, _ = tx.update(params, tx.init(params), params, step=jnp.int32(0))
    later, _ = tx.update(params, tx.init(params), params, step=jnp.int32(5))
    np.testing.assert_allclose(later["embed_VD"], 0.5 * first["embed_VD"], rtol=1e-6)


def test_constants_have_no_moments_and_without_any_the_state_is_the_plain_one_of_older_checkpoints():
    factors = {"a_LDR": jnp.ones((2, 4, 3)), "b_LRF": jnp.ones((2, 3, 8))}
    starts = {"a_start_LDR": jnp.ones((2, 4, 3)), "b_start_LRF": jnp.ones((2, 3, 8))}

    def state_of(factors):
        params = {"lora": {"blocks": {"up_LDF": factors}}}
        return optimizer(OptimConfig(lr=0.1), 10, params).init(params)

    assert sum(x.size for x in jax.tree.leaves(state_of(factors | starts))) == 2 * 2 * (12 + 24) + 1
    plain = state_of(factors)[1]
    assert isinstance(plain, optax.ScaleByAdamState)
    assert plain.mu.keys() == plain.nu.keys() == {"lora"}


def test_each_stage_has_a_whole_curve_of_its_own():
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=2, final_lr_ratio=0.1)
    rate = schedule(config, 30, stages=[(10, None), (20, 0.25)])
    first, second = schedule(config, 10), schedule(dataclasses.replace(config, lr=0.25), 20)
    for step in range(30):
        expected = first(step) if step < 10 else second(step - 10)
        assert float(rate(jnp.asarray(step))) == pytest.approx(float(expected), rel=1e-6), step
    with pytest.raises(ValueError, match="the run has 2 steps"):
        schedule(config, 12, stages=[(10, None), (2, None)])
