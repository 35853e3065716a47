"""Kernels in 8 and 4 bits: bitsandbytes' codes, small errors, the same on every mesh, nothing large kept."""

import functools
import math
import re
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from jax_sft.config import MeshConfig
from jax_sft.model.quantize import NF4_VALUES, Int8, Nf4, dense, num_bytes, quantize, shardings
from jax_sft.sharding import make_mesh, weight_spec
from tests.model import nf4_cases

KINDS = ["int8", "nf4"]
# Every kernel of a block: its letters, which of them are summed over, and a shape with blocks of 64, 32 and 8.
KERNELS = [
    ("LDNH", "D", (3, 128, 4, 6)),
    ("LNHD", "NH", (3, 4, 96, 8)),
    ("LFD", "F", (3, 40, 16)),
    ("LEDF", "D", (2, 4, 64, 16)),
    ("LEFD", "F", (2, 4, 128, 8)),
]


@functools.partial(jax.jit, static_argnames=("letters", "inputs", "kind"))
def quantized(kernel, *, letters, inputs, kind):
    return quantize(kernel, letters=letters, inputs=inputs, kind=kind)


def normal(shape, seed=0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def block_maxima(weight: Nf4) -> np.ndarray:
    return np.asarray(weight.low + weight.step * weight.maxima.astype(jnp.float32))


def floats(weight) -> np.ndarray:
    """What `dense` should make of a kernel "DF", written a second time, in numpy."""
    if isinstance(weight, Int8):
        return np.asarray(weight.codes).astype(np.float32) * np.asarray(weight.scale)
    maxima = block_maxima(weight)
    return code_values(weight) * np.repeat(maxima, weight.shape[0] // len(maxima), axis=0)


def code_values(weight: Nf4) -> np.ndarray:
    codes = np.asarray(weight.codes)
    return np.array(NF4_VALUES, np.float32)[np.stack([codes // 16, codes % 16], axis=1).reshape(weight.shape)]


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def relative_error(got, wanted) -> float:
    return float(np.linalg.norm(np.asarray(got) - np.asarray(wanted)) / np.linalg.norm(wanted))


def test_the_code_book_is_that_of_bitsandbytes_and_of_the_papers_formula():
    np.testing.assert_array_equal(np.array(NF4_VALUES, np.float32), np.load(nf4_cases.GOLDEN)["values"])
    below, above = np.linspace(0.9677083, 0.5, 8)[:-1], np.linspace(0.9677083, 0.5, 9)[:-1]
    quantile = np.vectorize(NormalDist().inv_cdf)
    quantiles = np.sort([*-quantile(below), 0.0, *quantile(above)])
    np.testing.assert_allclose(NF4_VALUES, quantiles / quantile(0.9677083), rtol=0, atol=3e-7)


@pytest.mark.parametrize(
    ("letters", "inputs", "shape"),
    [
        ("DF", "D", (128, 256)),
        ("DNH", "D", (128, 4, 64)),
        ("NHD", "NH", (2, 64, 256)),
        ("NHD", "NH", (1, 128, 256)),
    ],
)
def test_codes_block_maxima_and_error_are_those_of_bitsandbytes(letters, inputs, shape):
    """Its file is [out, in] and ours [in, out]; the error of its own maxima is what double quantisation adds 1 % to."""
    golden, matrix_IO = np.load(nf4_cases.GOLDEN), nf4_cases.matrix().T
    weight = quantized(matrix_IO.reshape(shape), letters=letters, inputs=inputs, kind="nf4")
    np.testing.assert_array_equal(np.asarray(weight.codes).reshape(64, 256), golden["bytes"].T)
    maxima, wanted = block_maxima(weight).reshape(2, 256), golden["maxima"].T
    half_a_step = np.asarray(weight.step).reshape(1, 256) / 2
    assert (np.abs(maxima - wanted) <= half_a_step * 1.001 + 1e-7).all()
    np.testing.assert_allclose(np.asarray(weight.low).ravel(), wanted.min(0), rtol=0, atol=0)
    np.testing.assert_allclose(np.asarray(weight.low + 255 * weight.step).ravel(), wanted.max(0), rtol=1e-6)

    flat = Nf4(codes=weight.codes.reshape(64, 256), maxima=maxima, low=weight.low, step=weight.step, axis=-2)
    values_IO = code_values(flat)
    error = np.abs(values_IO * np.repeat(wanted, 64, axis=0) - matrix_IO)
    np.testing.assert_allclose([error.mean(), error.max()], [golden["mean_error"], golden["max_error"]], rtol=1e-6)
    ours = np.abs(np.asarray(dense(weight, jnp.float32)).reshape(128, 256) - matrix_IO)
    np.testing.assert_allclose([ours.mean(), ours.max()], [error.mean(), error.max()], rtol=0.01)


def test_double_quantisation_of_many_blocks_adds_less_than_a_hundredth_to_the_error():
    kernel_DF = normal((4096, 64))
    weight = quantized(kernel_DF, letters="DF", inputs="D", kind="nf4")
    exact = np.abs(np.asarray(kernel_DF)).reshape(64, 64, 64).max(axis=1)
    assert (block_maxima(weight) != exact).any()
    singly = code_values(weight) * np.repeat(exact, 64, axis=0)
    wanted = relative_error(singly, kernel_DF)
    assert 0.08 < wanted < 0.1
    assert relative_error(dense(weight, jnp.float32), kernel_DF) < 1.01 * wanted


def test_the_literal_example_of_the_docstring():
    rows = dict(
        re.findall(r"^ +(kernel|codes|maxima) +(.*?)(?:  .*)?$", re.sub(r" +\| +| {2,8}", " ", Nf4.__doc__), re.M)
    )
    kernel = [float(x) for x in re.findall(r"-?\d\.\d+", rows["kernel"])]
    weight = quantized(jnp.array(kernel)[:, None], letters="DF", inputs="D", kind="nf4")
    assert re.findall(r"0x\w\w", rows["codes"]) == [f"0x{byte:02X}" for byte in weight.codes.ravel().tolist()]
    assert weight.maxima.ravel().tolist() == [0, 255, 102]
    np.testing.assert_allclose([weight.low.item(), weight.step.item()], [1, 1 / 255], rtol=1e-6)


def test_int8_is_one_scale_for_each_output_and_within_a_hundredth_of_normal_weights():
    kernel_DNH = normal((256, 4, 16)) * jnp.logspace(-3, 3, 64).reshape(1, 4, 16)
    weight = quantized(kernel_DNH, letters="DNH", inputs="D", kind="int8")
    np.testing.assert_allclose(weight.scale, jnp.abs(kernel_DNH).max(0, keepdims=True) / 127, rtol=1e-6)
    assert (np.abs(weight.codes).max(axis=0) == 127).all()
    error_NH = np.linalg.norm(dense(weight, jnp.float32) - kernel_DNH, axis=0) / np.linalg.norm(kernel_DNH, axis=0)
    assert 0.002 < error_NH.max() < 0.01


def test_int8_rounds_halves_to_even():
    kernel_DF = jnp.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])[:, None]
    weight = quantized(kernel_DF, letters="DF", inputs="D", kind="int8")
    assert weight.codes.ravel().tolist() == [127, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_make_no_nan(kind):
    """An output of zeros, a block of zeros, a zero among others, and an output so small that its scale is no number."""
    kernel_DF = normal((128, 4)).at[:, 0].set(0).at[:64, 1].set(0).at[100, 2].set(0).at[:, 3].mul(1e-42)
    with jax.debug_nans(True):  # op by op: the codes of a NaN would be whole numbers again
        got = dense(quantize(kernel_DF, letters="DF", inputs="D", kind=kind), jnp.float32)
    assert np.isfinite(got).all()
    assert (np.asarray(got)[np.asarray(kernel_DF) == 0] == 0).all()
    np.testing.assert_allclose(got[:, 3], 0, atol=1e-37)
    assert np.abs(got[:, 2]).max() > 1


@pytest.mark.parametrize(("width", "block"), [(128, 64), (96, 32), (80, 16), (64, 64), (32, 32), (6, 2)])
def test_blocks_are_of_64_or_of_the_largest_power_of_two_that_divides_the_axis(width, block):
    kernel_NHD = normal((3, width, 8))
    weight = quantized(kernel_NHD, letters="NHD", inputs="NH", kind="nf4")
    assert weight.shape == kernel_NHD.shape
    assert weight.codes.shape == (3, width // 2, 8) and weight.maxima.shape == (3, width // block, 8)
    assert weight.low.shape == weight.step.shape == (1, 1, 8)
    exact = np.abs(np.asarray(kernel_NHD)).reshape(3, -1, block, 8).max(axis=2)
    assert (np.abs(block_maxima(weight) - exact) <= np.asarray(weight.step) * 0.501).all()
    assert relative_error(dense(weight, jnp.float32), kernel_NHD) < 0.1


@pytest.mark.parametrize("letters", ["NHD", "LNHD"])
def test_nf4_of_an_odd_axis_is_refused_with_a_way_out_and_int8_is_not(letters):
    kernel = normal((2, 4, 33, 8)[4 - len(letters) :])
    said = f"two codes share a byte, so axis H of a kernel {letters} must have an even length, not 33; set lora.base to"
    with pytest.raises(ValueError, match=said):
        quantize(kernel, letters=letters, inputs="NH", kind="nf4")
    assert quantize(kernel, letters=letters, inputs="NH", kind="int8").shape == kernel.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("letters", "inputs", "shape"), KERNELS)
def test_a_stack_is_its_layers_and_its_experts_each_by_itself(kind, letters, inputs, shape):
    """Also as a scan cuts it; the shapes of layers are those without the L."""
    stack = normal(shape)
    whole = quantized(stack, letters=letters, inputs=inputs, kind=kind)
    assert whole.shape == shape

    def body(carry, layer):
        assert layer.shape == shape[1:]
        return carry, (layer, dense(layer, jnp.float32))

    layers, cut = jax.lax.scan(body, None, whole)[1]
    np.testing.assert_allclose(cut, dense(whole, jnp.float32), rtol=1e-6)
    for i in range(shape[0]):
        alone = quantized(stack[i], letters=letters[1:], inputs=inputs, kind=kind)
        assert_same(jax.tree.map(lambda x, i=i: x[i], layers), alone)
        for e in range(shape[1]) if "E" in letters else ():
            expert = quantized(stack[i, e], letters=letters[2:], inputs=inputs, kind=kind)
            assert_same(jax.tree.map(lambda x, e=e: x[e], alone), expert)


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 4, 1)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("letters", "inputs", "shape"), KERNELS)
def test_on_a_mesh_every_code_and_scale_is_that_of_one_device(kind, letters, inputs, shape, sizes):
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True))))
    run = functools.partial(quantize, letters=letters, inputs=inputs, kind=kind)
    stack = normal(shape)
    places = shardings(letters, jax.eval_shape(run, stack), mesh)
    spread = jax.device_put(stack, NamedSharding(mesh, weight_spec(letters, shape, mesh)))
    got = jax.jit(run, out_shardings=places)(spread)
    assert got.codes.sharding.spec == weight_spec(letters, got.codes.shape, mesh)
    assert_same(got, quantized(stack, letters=letters, inputs=inputs, kind=kind))
    dense_again = jax.jit(lambda weight: dense(weight, jnp.float32))
    np.testing.assert_allclose(dense_again(got), dense_again(jax.device_get(got)), rtol=1e-6)


def test_every_array_lies_by_the_kernels_letters_where_it_divides():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=1, tensor=2))
    abstract = jax.eval_shape(
        functools.partial(quantize, letters="LDF", inputs="D", kind="nf4"),
        jax.ShapeDtypeStruct((2, 128, 6), jnp.float32),
    )
    places = shardings("LDF", abstract, mesh)
    assert isinstance(places, Nf4)
    assert tuple(places.codes.spec) == (None, "fsdp", "tensor")
    assert tuple(places.maxima.spec) == (None, None, "tensor")  # 2 blocks over 4 devices
    assert tuple(places.low.spec) == tuple(places.step.spec) == (None, None, "tensor")
    plain = shardings("LDF", jax.ShapeDtypeStruct((2, 128, 6), jnp.float32), mesh)
    assert tuple(plain.spec) == (None, "fsdp", "tensor")


def scanned_loss(x_BD, up, down, remat):
    def body(x_BD, layer):
        up_DF, down_FD = (dense(weight, x_BD.dtype) for weight in layer)
        return x_BD + jnp.tanh(x_BD @ up_DF) @ down_FD, None

    x_BD, _ = jax.lax.scan(remat(body), x_BD, (up, down))
    return (x_BD.astype(jnp.float32) ** 2).mean()


REMATS = {
    "none": lambda body: body,
    "full": jax.checkpoint,
    "dots": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
}


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_activations_are_those_of_the_dense_kernels(kind, remat):
    x_BD, up_LDF, down_LFD = normal((4, 64)), 0.1 * normal((3, 64, 128)), 0.1 * normal((3, 128, 64), seed=1)
    up = quantized(up_LDF, letters="LDF", inputs="D", kind=kind)
    down = quantized(down_LFD, letters="LFD", inputs="F", kind=kind)
    gradient = jax.jit(jax.value_and_grad(scanned_loss), static_argnums=3)
    loss, got_BD = gradient(x_BD, up, down, REMATS[remat])
    wanted, wanted_BD = gradient(x_BD, dense(up, jnp.float32), dense(down, jnp.float32), REMATS["none"])
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(got_BD, wanted_BD, rtol=1e-4, atol=1e-5 * np.abs(wanted_BD).max())


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_finds_no_array_as_large_as_a_kernel_stored(kind, remat):
    """Neither kernels of all layers, nor constants of the look-up, which would be moved out of the scan."""
    depth, width = 6, 256
    shape = jax.ShapeDtypeStruct((depth, width, width), jnp.bfloat16)
    up = jax.eval_shape(functools.partial(quantize, letters="LDF", inputs="D", kind=kind), shape)
    down = jax.eval_shape(functools.partial(quantize, letters="LFD", inputs="F", kind=kind), shape)
    x_BD = jax.ShapeDtypeStruct((4, width), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(scanned_loss), static_argnums=3)(x_BD, up, down, REMATS[remat])
    outside_the_scans = [var.aval for eqn in jaxpr.eqns for var in eqn.outvars] + jaxpr.consts
    largest = max(math.prod(array.shape) for array in outside_the_scans)
    assert largest < width * width


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_is_computed_in_float32_and_rounded_once(kind):
    weight = quantized(normal((256, 32)), letters="DF", inputs="D", kind=kind)
    np.testing.assert_array_equal(dense(weight, jnp.float32), floats(weight))
    got = dense(weight, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, floats(weight).astype(jnp.bfloat16))


def test_a_plain_kernel_is_cast():
    kernel = normal((8, 4))
    np.testing.assert_array_equal(dense(kernel, jnp.bfloat16), kernel.astype(jnp.bfloat16))


@pytest.mark.parametrize(("kind", "dtype"), [("int8", Int8), ("nf4", Nf4)])
def test_it_stands_in_a_module_where_a_kernel_stood(kind, dtype):
    class Stack(nnx.Module):
        def __init__(self) -> None:
            self.blocks = nnx.Dict(
                {"up_LDF": nnx.Param(jnp.zeros((2, 64, 8))), "norm_LD": nnx.Param(jnp.ones((2, 64)))}
            )

    graphdef = nnx.split(nnx.eval_shape(Stack))[0]
    weight = quantized(normal((2, 64, 8)), letters="LDF", inputs="D", kind=kind)
    params = {"blocks": {"up_LDF": weight, "norm_LD": jnp.ones((2, 64))}}

    @jax.jit
    def summed(params, x_BD):
        blocks = nnx.merge(graphdef, params).blocks
        layers = {name: stacked.get_value() for name, stacked in blocks.items()}
        assert isinstance(layers["up_LDF"], dtype)

        def body(total, layer):
            return total + ((x_BD * layer["norm_LD"][None]) @ dense(layer["up_LDF"], x_BD.dtype)).sum(), None

        return jax.lax.scan(body, jnp.float32(0), layers)[0]

    wanted = np.asarray(dense(weight, jnp.float32)).sum() * 3
    np.testing.assert_allclose(summed(params, jnp.ones((3, 64))), wanted, rtol=1e-4)


@pytest.mark.parametrize(("kind", "most"), [("int8", 1.001), ("nf4", 0.518)])
def test_bytes_for_each_parameter(kind, most):
    kernel = jax.ShapeDtypeStruct((2, 4096, 1024), jnp.bfloat16)
    weight = jax.eval_shape(functools.partial(quantize, letters="LDF", inputs="D", kind=kind), kernel)
    assert num_bytes(kernel) == 2 * 2 * 4096 * 1024
    assert most - 0.02 < num_bytes(weight) / (2 * 4096 * 1024) < most
    assert num_bytes(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), weight)) == num_bytes(weight)


@given(
    seed=st.integers(0, 2**31),
    length=st.sampled_from([2, 32, 192]),
    exponents=st.lists(st.floats(-20, 20), min_size=3, max_size=3),
    outlier=st.floats(-1000, 1000, width=32),
)
@settings(max_examples=30, deadline=None)
def test_no_value_is_further_off_than_half_the_gap_of_its_codes(seed, length, exponents, outlier):
    random = np.random.RandomState(seed)
    kernel = (random.standard_normal((length, 3)) * 10.0 ** np.array(exponents)[None]).astype(np.float32)
    kernel[seed % length, 0] *= np.float32(outlier)
    of = {kind: quantized(kernel, letters="DF", inputs="D", kind=kind) for kind in KINDS}
    error = {kind: np.abs(np.asarray(dense(weight, jnp.float32)) - kernel) for kind, weight in of.items()}
    assert (error["int8"] <= np.asarray(of["int8"].scale) * 0.5001).all()
    block = math.gcd(length, 64)
    largest = np.repeat(np.abs(kernel).reshape(-1, block, 3).max(axis=1), block, axis=0)
    widest = np.diff(NF4_VALUES).max() / 2
    assert (error["nf4"] <= (widest * largest + np.asarray(of["nf4"].step) / 2) * 1.0001).all()
