"""What holds a model back: a divergence in the loss, a decay towards its start, a moving average of its weights."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_sft.config import OptimConfig
from jax_sft.model.decoder import abstract_params
from jax_sft.optim import optimizer
from tests.test_train_step import MODEL, params_of, run_of, uneven_batch

PLAIN = OptimConfig(lr=1e-2, schedule="constant", clip_norm=None, eps=1e-3)


def trained(steps, *, kl=None, ema=None, optim=PLAIN, sizes=(1,), accumulation=1, batch=None):
    """The state after some steps, on the host, and the last metrics."""
    kl = 0.0 if kl is None and optim.decay_to_base else kl
    run = run_of(*sizes, accumulation=accumulation, optim=optim, kl=kl, ema_decay=ema)
    state, placed, origin = run.init(), run.put(uneven_batch() if batch is None else batch), params_of()
    for _ in range(steps):
        state, metrics = run.step(state, {}, placed, origin)
    return jax.device_get(state), jax.device_get(metrics)


def distance(a, b):
    return float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))))


def test_the_first_step_is_not_drawn_anywhere_and_the_later_ones_are():
    (pulled, first), (free, _) = trained(1, kl=5.0), trained(1)
    assert first.tally.kl.sum() == pytest.approx(0, abs=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), pulled.params, free.params)
    (pulled, last), (free, _) = trained(6, kl=5.0), trained(6)
    assert last.tally.kl.sum() > 0.1
    assert distance(pulled.params, params_of()) < 0.9 * distance(free.params, params_of())


@pytest.mark.parametrize(("sizes", "accumulation"), [((1,), 4), ((2, 2, 2), 1)])
def test_a_pull_is_the_same_over_micro_batches_and_devices(sizes, accumulation):
    (one, first), (other, second) = trained(3, kl=1.0), trained(3, kl=1.0, sizes=sizes, accumulation=accumulation)
    np.testing.assert_allclose(first.tally.kl, second.tally.kl, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one.params, other.params)


def test_decay_to_the_base_takes_its_share_of_the_way_back():
    """Once Adam has nothing to say: a batch without any weight moves nothing at all, so the gradient is made 0."""
    optim = dataclasses.replace(PLAIN, decay_to_base=0.5)
    tx = optimizer(optim, 10, abstract_params(MODEL))
    start = params_of()
    away = jax.tree.map(lambda x: x + np.float32(1), start)
    zeros = jax.tree.map(np.zeros_like, start)
    updates, _ = tx.update(zeros, tx.init(away), away, step=np.int32(0), origin=start)
    # lr 0.01 x 0.5 of a distance of 1, of norms as of matrices.
    jax.tree.map(lambda u: np.testing.assert_allclose(u, -0.005, rtol=1e-4), updates)


def test_decay_to_the_base_keeps_a_model_nearer_to_it():
    (drawn, _), (free, _) = trained(6, optim=dataclasses.replace(PLAIN, decay_to_base=20.0)), trained(6)
    assert distance(drawn.params, params_of()) < 0.9 * distance(free.params, params_of())


def test_the_average_follows_closely_at_first_and_never_changes_what_is_trained():
    expected = params_of()
    for n in range(1, 5):
        state, _ = trained(n, ema=0.4)
        kept = np.float32(min(0.4, (1 + n) / (10 + n)))
        expected = jax.tree.map(lambda mean, x, kept=kept: x + kept * (mean - x), expected, state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, expected)
    free, _ = trained(4)
    jax.tree.map(np.testing.assert_array_equal, state.params, free.params)
    assert state.weights is state.ema and free.weights is free.params


def test_a_step_that_is_skipped_leaves_the_average_too():
    batch = uneven_batch()
    nothing = batch._replace(weights_BT=np.zeros_like(batch.weights_BT))
    state, _ = trained(2, ema=0.4, batch=nothing)
    jax.tree.map(np.testing.assert_array_equal, state.ema, params_of())
