"""Generation: greedy against uncached logits, samplers against numpy, and rows that do not know each other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sft import generate as generate_module
from jax_sft.config import MeshConfig
from jax_sft.generate import Sampling, candidates, generate, penalize
from jax_sft.model.decoder import build
from jax_sft.sharding import make_mesh, shard_params
from tests.model.llama_cases import config_of, params_of

CONFIG = config_of("untied")
GRAPHDEF = build(CONFIG, dtype="float32", attention="auto")
PARAMS = params_of(CONFIG)
PROMPTS = [[5, 9, 2, 30, 7, 7, 1], [3], [11, 12, 13, 4]]
GREEDY = Sampling()
WARM = Sampling(temperature=1.5, seed=3)


@pytest.fixture(autouse=True)
def short_buckets(monkeypatch):
    monkeypatch.setattr(generate_module, "SHORTEST_BUCKET", 8)


def answers(prompts=PROMPTS, *, max_new_tokens=6, stop_ids=(), sampling=GREEDY, **more):
    return generate(
        GRAPHDEF, PARAMS, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, pad_id=0, sampling=sampling, **more
    )


def tokens(*args, **kwargs) -> list[list[int]]:
    return [answer.tokens for answer in answers(*args, **kwargs)]


@functools.cache
def next_logits(length: int):
    @jax.jit
    def run(tokens_BT):
        model = nnx.merge(GRAPHDEF, jax.tree.map(jnp.asarray, PARAMS))
        positions_BT = jnp.arange(length, dtype=jnp.int32)[None, :]
        return model.logits(model.hidden(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))[0]

    return run


def by_hand(prompt: list[int], steps: int, *, penalty: float = 1.0) -> list[int]:
    """Greedy with no cache: the whole text again for each token."""
    text = list(prompt)
    for _ in range(steps):
        padded = np.array([text + [0] * (16 - len(text))], np.int32)
        logits_V = np.array(next_logits(16)(padded)[len(text) - 1])
        for token in set(text):
            logits_V[token] *= penalty if logits_V[token] < 0 else 1 / penalty
        text.append(int(logits_V.argmax()))
    return text[len(prompt) :]


def test_greedy_is_the_argmax_of_uncached_logits_step_by_step():
    assert tokens() == [by_hand(prompt, 6) for prompt in PROMPTS]


def test_greedy_with_a_repetition_penalty_is_the_one_by_hand():
    penalized = tokens(sampling=Sampling(repetition_penalty=1.7))
    assert penalized == [by_hand(prompt, 6, penalty=1.7) for prompt in PROMPTS]
    assert penalized != tokens()


@pytest.mark.parametrize(
    "sampling", [GREEDY, WARM, Sampling(repetition_penalty=1.5)], ids=["greedy", "warm", "penalty"]
)
def test_a_row_does_not_depend_on_the_other_rows_or_on_padding(sampling):
    alone = tokens([PROMPTS[0]], sampling=sampling)[0]
    for others in ([[1]], [[4] * 15, [2, 3]]):  # the longest one moves row 0 into a larger bucket
        assert tokens([PROMPTS[0], *others], sampling=sampling)[0] == alone


def test_what_fills_the_padding_changes_nothing():
    both = [
        generate(GRAPHDEF, PARAMS, PROMPTS, max_new_tokens=6, stop_ids=[], pad_id=pad, sampling=WARM) for pad in (0, 30)
    ]
    assert both[0] == both[1]


def test_max_new_tokens_is_respected_and_is_a_prefix():
    long = tokens(max_new_tokens=6)
    for count in (1, 2, 5):
        assert tokens(max_new_tokens=count) == [row[:count] for row in long]
    assert not any(answer.stopped for answer in answers())


def test_a_stop_id_ends_its_row_alone_and_is_not_in_the_answer():
    free = tokens(max_new_tokens=6)
    stop = free[0][2]
    stopped = answers(max_new_tokens=6, stop_ids=[stop, 29])
    assert stopped[0].stopped
    for row, answer in enumerate(stopped):
        cut = next((i for i, t in enumerate(free[row]) if t in (stop, 29)), None)
        assert answer.tokens == free[row][:cut]
        assert answer.stopped == (cut is not None)
    assert {answer.stopped for answer in stopped} == {True, False}


def test_an_answer_may_be_empty():
    first = tokens([PROMPTS[0]], max_new_tokens=1)[0][0]
    assert answers([PROMPTS[0]], stop_ids=[first]) == [generate_module.Generated([], True)]


def test_top_k_of_one_is_greedy():
    assert tokens(sampling=Sampling(temperature=2.0, top_k=1)) == tokens()


def test_a_tiny_top_p_is_greedy():
    assert tokens(sampling=Sampling(temperature=2.0, top_p=1e-6)) == tokens()


def test_a_seed_reproduces_and_another_does_not():
    assert tokens(sampling=WARM) == tokens(sampling=WARM)
    assert tokens(sampling=WARM) != tokens(sampling=Sampling(temperature=1.5, seed=4))


def test_equal_prompts_in_a_batch_are_sampled_apart():
    rows = tokens([PROMPTS[0]] * 4, sampling=WARM)
    assert len({tuple(row) for row in rows}) > 1


def kept(logits_V: np.ndarray, sampling: Sampling) -> set[int]:
    ids_BC, logits_BC = candidates(jnp.asarray(logits_V)[None], sampling)
    return set(np.asarray(ids_BC)[0][np.asarray(logits_BC)[0] > -np.inf].tolist())


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 100])
def test_filters_keep_exactly_what_numpy_keeps(top_k, top_p):
    for seed in range(5):
        logits_V = np.random.default_rng(seed).normal(0, 3, 50).astype(np.float32)
        order = np.argsort(-logits_V / 0.7)[: top_k or None]
        shares = np.exp(logits_V[order].astype(np.float64) / 0.7)
        shares /= shares.sum()
        before = np.cumsum(shares) - shares
        wanted = set(order[(before < top_p) | (top_p == 1)].tolist())
        assert kept(logits_V, Sampling(temperature=0.7, top_k=top_k, top_p=top_p)) == wanted


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.6), (7, 1.0), (9, 0.8)])
def test_filters_keep_what_transformers_keeps(top_k, top_p):
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed in range(5):
        logits_V = np.random.default_rng(seed).normal(0, 2, 50).astype(np.float32)
        scores = TemperatureLogitsWarper(1.3)(None, torch.tensor(logits_V)[None])
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores)
        wanted = set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
        assert kept(logits_V, Sampling(temperature=1.3, top_k=top_k, top_p=top_p)) == wanted


def test_samples_follow_the_softmax_of_the_candidates():
    logits_BV = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.25, 0.2, 0.05]))[None], (4000, 4))
    sampling = Sampling(temperature=1.0, top_p=0.9)
    drawn_B = generate_module._choose(logits_BV, jnp.zeros(4000, jnp.int32), jnp.arange(4000), jnp.uint32(0), sampling)
    shares = np.bincount(np.asarray(drawn_B), minlength=4) / 4000
    np.testing.assert_allclose(shares, np.array([0.5, 0.25, 0.2, 0]) / 0.95, atol=0.03)


def test_every_token_of_a_row_is_a_new_draw():
    logits_BV = jnp.zeros((1, 1000))
    drawn = [
        generate_module._choose(logits_BV, jnp.array([count]), jnp.array([0]), jnp.uint32(0), WARM)[0]
        for count in range(5)
    ]
    assert len({int(token) for token in drawn}) == 5


def test_repetition_penalty_equals_transformers():
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    random = np.random.default_rng(0)
    logits_BV = random.normal(0, 2, (3, 20)).astype(np.float32)
    tokens_BS = random.integers(0, 20, (3, 6)).astype(np.int32)
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(tokens_BS).long(), torch.tensor(logits_BV)).numpy()
    got = penalize(jnp.asarray(logits_BV), jnp.asarray(tokens_BS), jnp.ones((3, 6), bool), 1.3)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_repetition_penalty_does_not_count_what_a_row_does_not_hold():
    logits_BV = jnp.ones((1, 4))
    got = penalize(logits_BV, jnp.array([[1, 2, 3]]), jnp.array([[True, True, False]]), 2.0)
    np.testing.assert_array_equal(got, [[1, 0.5, 0.5, 1]])


def test_tokens_are_streamed_in_order_and_are_those_of_the_answer(monkeypatch):
    monkeypatch.setattr(generate_module, "STREAMED_STEPS", 2)
    stop = tokens(max_new_tokens=5)[0][3]
    plain = answers(max_new_tokens=5, stop_ids=[stop])
    came: list[list[int]] = [[], [], []]
    streamed = answers(max_new_tokens=5, stop_ids=[stop], on_token=lambda row, token: came[row].append(token))
    assert streamed == plain
    assert came == [answer.tokens for answer in plain]


def test_streaming_ends_when_all_rows_have_stopped(monkeypatch):
    monkeypatch.setattr(generate_module, "STREAMED_STEPS", 1)
    calls = []
    run = generate_module._continue
    monkeypatch.setattr(generate_module, "_continue", lambda *a, **k: calls.append(0) or run(*a, **k))
    first = tokens([PROMPTS[0]], max_new_tokens=1)[0][0]
    calls.clear()
    answers([PROMPTS[0]], stop_ids=[first], max_new_tokens=6, on_token=lambda row, token: None)
    assert len(calls) == 1


def test_the_bar_counts_the_tokens_unless_they_are_streamed_or_another_process_shows_it(monkeypatch):
    monkeypatch.setattr(generate_module, "BAR_STEPS", 2)
    bars = []

    class Bar(generate_module.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"delay": 0})
            self.seen = []
            bars.append((self, options))

        def update(self, n=1):
            self.seen.append(n)
            return super().update(n)

    monkeypatch.setattr(generate_module, "tqdm", Bar)
    stop = tokens(max_new_tokens=5)[0][3]
    bars.clear()
    plain = answers(max_new_tokens=5, stop_ids=[stop])
    answers(max_new_tokens=5, on_token=lambda row, token: None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert answers(max_new_tokens=5, stop_ids=[stop]) == plain
    (bar, options), *others = bars
    assert (options["total"], options["desc"], options["unit"], options["delay"]) == (15, "generating", "tokens", 2)
    assert len(bar.seen) == 3
    assert sum(bar.seen) == sum(len(answer.tokens) for answer in plain)
    assert [options["disable"], *(other["disable"] for _, other in others)] == [False, True, True]


def test_looking_at_the_bar_costs_no_compile_and_changes_no_token(monkeypatch):
    whole = tokens(max_new_tokens=12, sampling=WARM)
    size = generate_module._continue._cache_size()
    for steps in (1, 5):
        monkeypatch.setattr(generate_module, "BAR_STEPS", steps)
        assert tokens(max_new_tokens=12, sampling=WARM) == whole
    assert generate_module._continue._cache_size() == size


def test_lengths_in_one_bucket_and_new_seeds_compile_once():
    answers([[1, 2, 3]], max_new_tokens=4, sampling=Sampling(temperature=0.9))
    sizes = [f._cache_size() for f in (generate_module._prefill, generate_module._continue)]
    for prompt, count, seed in (([1], 2, 5), ([1] * 4, 3, 6), ([2] * 5, 1, 7)):
        answers([prompt], max_new_tokens=count, sampling=Sampling(temperature=0.9, seed=seed))
    assert sizes == [f._cache_size() for f in (generate_module._prefill, generate_module._continue)]


def test_bfloat16_generates():
    graphdef = build(CONFIG, dtype="bfloat16", attention="auto")
    for prompts in (PROMPTS, PROMPTS[:1]):
        rows = generate(graphdef, PARAMS, prompts, max_new_tokens=3, stop_ids=[], pad_id=0, sampling=GREEDY)
        assert [len(row.tokens) for row in rows] == [3] * len(prompts)


def test_sharded_generates_the_same():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    wanted = [answers(PROMPTS + PROMPTS[:1], sampling=s) for s in (GREEDY, WARM)]
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shard_params(PARAMS, mesh))
        for sampling, answer in zip((GREEDY, WARM), wanted, strict=True):
            got = generate(
                GRAPHDEF, params, PROMPTS + PROMPTS[:1], max_new_tokens=6, stop_ids=[], pad_id=0, sampling=sampling
            )
            assert got == answer


MANY = [[(7 * i + j) % 31 for j in range(1 + (5 * i) % 7)] for i in range(9)]  # of 1 to 7 tokens, in no order


def loop_steps(monkeypatch) -> list[int]:
    """How many steps the loop has taken after each of its calls."""
    taken: list[int] = []
    run = generate_module._continue

    def counted(*args, **options):
        rows = run(*args, **options)
        taken.append(int(rows.steps))
        return rows

    monkeypatch.setattr(generate_module, "_continue", counted)
    return taken


@pytest.fixture(scope="module")
def stop_of_many() -> int:
    """An id that ends some of the answers to MANY soon, some late and some never."""
    free = tokens(MANY, max_new_tokens=8)

    def ends(stop: int) -> set[int]:
        return {row.index(stop) if stop in row else len(row) for row in free}

    return max(range(CONFIG.vocab_size), key=lambda stop: len(ends(stop)))


@pytest.mark.parametrize("rows_at_once", [1, 2, 4])
@pytest.mark.parametrize(
    "sampling", [GREEDY, WARM, Sampling(repetition_penalty=1.5)], ids=["greedy", "warm", "penalty"]
)
def test_prompts_that_wait_for_a_row_are_answered_as_if_there_were_one_for_each(sampling, rows_at_once, stop_of_many):
    options = {"max_new_tokens": 8, "stop_ids": [stop_of_many], "sampling": sampling}
    wanted = answers(MANY, **options)
    assert answers(MANY, rows_at_once=rows_at_once, **options) == wanted
    assert {answer.stopped for answer in wanted} == {True, False}


def test_greedy_answers_of_prompts_that_waited_are_those_of_each_alone():
    assert tokens(MANY, rows_at_once=3) == [by_hand(prompt, 6) for prompt in MANY]


def test_a_row_that_has_ended_is_filled_anew_while_others_go_on(monkeypatch, stop_of_many):
    lengths = [len(answer.tokens) for answer in answers(MANY, max_new_tokens=8, stop_ids=[stop_of_many])]
    order = sorted(range(len(MANY)), key=lambda i: len(MANY[i]))
    steps = [lengths[i] + (lengths[i] < 8) for i in order]  # a stop id takes a step too
    taken = loop_steps(monkeypatch)
    answers(MANY, max_new_tokens=8, stop_ids=[stop_of_many], rows_at_once=3)
    free_at = [0, 0, 0]
    for count in steps:  # the next one goes where a row is free first
        free_at[free_at.index(min(free_at))] += count
    assert taken[-1] == max(free_at)
    assert taken[-1] < sum(max(steps[i : i + 3]) for i in range(0, len(steps), 3))


def test_an_answer_without_an_end_is_as_long_as_it_may_be_and_holds_nobody_up(monkeypatch, stop_of_many):
    wanted = answers(MANY, max_new_tokens=8, stop_ids=[stop_of_many])
    (endless, *_) = [MANY[i] for i, answer in enumerate(wanted) if not answer.stopped]
    soon = min((i for i in range(len(MANY)) if wanted[i].stopped), key=lambda i: len(wanted[i].tokens))
    taken = loop_steps(monkeypatch)
    got = answers([endless, *[MANY[soon]] * 4], max_new_tokens=8, stop_ids=[stop_of_many], rows_at_once=2)
    assert [len(answer.tokens) for answer in got] == [8, *[len(wanted[soon].tokens)] * 4]
    # All of the short ones go through one row, while the endless one writes in the other.
    assert taken[-1] == max(8, 4 * (len(wanted[soon].tokens) + 1))


def test_tokens_of_prompts_that_wait_are_streamed_in_order(monkeypatch, stop_of_many):
    monkeypatch.setattr(generate_module, "STREAMED_STEPS", 2)
    came: list[list[int]] = [[] for _ in MANY]
    told = answers(
        MANY,
        max_new_tokens=8,
        stop_ids=[stop_of_many],
        rows_at_once=4,
        on_token=lambda prompt, token: came[prompt].append(token),
    )
    assert (
        came
        == [answer.tokens for answer in told]
        == [a.tokens for a in answers(MANY, max_new_tokens=8, stop_ids=[stop_of_many])]
    )


def test_more_prompts_than_rows_need_three_programs_however_many_wait():
    programs = [generate_module._prefill, generate_module._refill, generate_module._continue]
    answers(MANY[:5], rows_at_once=4)
    sizes = [program._cache_size() for program in programs]
    answers(MANY * 2, rows_at_once=4)
    assert sizes == [program._cache_size() for program in programs]


def test_bfloat16_answers_of_prompts_that_waited_are_those_of_each_alone():
    graphdef = build(CONFIG, dtype="bfloat16", attention="auto")
    options = {"max_new_tokens": 4, "stop_ids": [], "pad_id": 0, "sampling": GREEDY}
    one_by_one = [generate(graphdef, PARAMS, [prompt], **options)[0] for prompt in MANY[:3]]
    assert generate(graphdef, PARAMS, MANY[:3], rows_at_once=2, **options) == one_by_one


def test_prompts_that_wait_are_answered_the_same_on_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    wanted = answers(MANY, sampling=WARM)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shard_params(PARAMS, mesh))
        options = {"max_new_tokens": 6, "stop_ids": [], "pad_id": 0, "sampling": WARM}
        assert generate(GRAPHDEF, params, MANY, rows_at_once=4, **options) == wanted


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows_at_once = 0 must be at least 1; it is how many prompts are answered"):
        answers(rows_at_once=0)


def test_no_prompts_give_no_answers():
    assert answers([]) == []


@pytest.mark.parametrize(
    ("prompts", "count", "said"),
    [
        ([[1], []], 4, "prompt 1 is empty; give at least one token"),
        ([[1, 31]], 4, "prompt 0 holds an id outside the vocabulary of 31; use this model's tokenizer"),
        ([[-1]], 4, "prompt 0 holds an id outside the vocabulary"),
        ([[1]], 0, "max_new_tokens = 0 must be at least 1"),
        ([[1] * 60], 5, "prompt 0 has 60 tokens; with max_new_tokens = 5 it exceeds the model's 64 positions"),
    ],
)
def test_bad_requests_are_refused(prompts, count, said):
    with pytest.raises(ValueError, match=said):
        answers(prompts, max_new_tokens=count)


def test_a_pad_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="pad_id = 31 is outside the vocabulary of 31; any id in it will do"):
        generate(GRAPHDEF, PARAMS, PROMPTS, max_new_tokens=1, stop_ids=[], pad_id=31, sampling=GREEDY)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", -1.0, "temperature = -1.0 must be a number of 0 or more; 0 takes the likeliest token"),
        ("temperature", math.nan, "temperature = nan must be a number of 0 or more"),
        ("temperature", math.inf, "temperature = inf must be a number of 0 or more"),
        ("top_k", -1, "top_k = -1 must not be negative; 0 keeps all tokens"),
        ("top_p", 0.0, "top_p = 0.0 must be above 0 and at most 1"),
        ("top_p", 1.5, "top_p = 1.5 must be above 0 and at most 1"),
        ("top_p", math.nan, "top_p = nan must be above 0 and at most 1"),
        ("repetition_penalty", 0.0, "repetition_penalty = 0.0 must be a number above 0"),
        ("repetition_penalty", math.nan, "repetition_penalty = nan must be a number above 0; 1 changes nothing"),
        ("seed", -1, r"seed = -1 must be from 0 to 4294967295 \(2\*\*32 - 1\); choose another"),
        ("seed", 5_000_000_000, "seed = 5000000000 must be from 0 to 4294967295"),
    ],
)
def test_bad_sampling_is_refused(field, value, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**{field: value})
