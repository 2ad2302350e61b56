"""The Hopper kernels of grouped products: against the reference, in any order of what runs at the same time."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from contract import HOPPER_IMPLEMENTATION, normal

from jaxkern import ScaledArray, grouped_gemm, k_grouped_gemm, masked_grouped_gemm, quantize

gemm = importlib.import_module("jaxkern.gemm")  # the module; jaxkern.gemm is its function
pytestmark = pytest.mark.skipif(HOPPER_IMPLEMENTATION == "none", reason="no implementation to test")

# The tensor cores keep 13 bits of a sum; the simulator, told nothing, all of float32.
SUMS = 1e-5 if HOPPER_IMPLEMENTATION == "sim" else 2.0**-11
# group_sizes, group_alignment, rows. Groups of up to 64 rows and larger ones have kernels of their own.
ROWS = [
    ([70, 0, 3, 100], 1, 200),
    ([130, 20, 64, 65], 4, 300),
    ([1, 7, 0, 16, 9, 17, 33], 1, 90),
    ([300, -4, 1000, 5], 128, 500),  # cut to what there is
    ([0, 0], 1, 64),
    ([256], 1, 256),
    ([600, 700], 1, 1300),  # the large tile, of two blocks together
    ([10, 390, 100, 400], 1, 1100),  # a kernel for each
    ([2**31 - 1, 2**31 - 1, 2**31 - 1], 3, 100),
]


def simulated(run, simulator):
    """Under each of eight seeds the same bits."""
    first = np.asarray(run())
    if HOPPER_IMPLEMENTATION == "sim":
        for seed in range(1, 8):
            simulator.configure(seed=seed)
            np.testing.assert_array_equal(np.asarray(run()), first)
    return first


def check(got, want, out_dtype):
    step = SUMS + (2.0**-7 if out_dtype == jnp.bfloat16 else 0)
    want = np.asarray(want, np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=step, atol=SUMS * np.abs(want).max(initial=1))


def spoiled(a: ScaledArray, mine: np.ndarray, axis: int) -> ScaledArray:
    """NaN in all rows, or columns, that are not `mine`."""
    mine = mine[:, None] if axis == 0 else mine[None, :]
    nan = jnp.asarray(np.nan, ml_dtypes.float8_e4m3fn)
    return ScaledArray(jnp.where(mine, a.values, nan), a.scales, a.block_shape)


def owners(sizes, alignment, rows):
    """Whether each row is in a group."""
    mine, start = np.zeros(rows, bool), 0
    for size in sizes:
        end = min(start + max(size, 0), rows)
        mine[start:end] = True
        start = min(-(-end // alignment) * alignment, rows)
    return mine


@pytest.mark.parametrize("b_block", [(128, 128), (1, 128)], ids=str)
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("sizes,alignment,m", ROWS, ids=str)
def test_grouped_gemm(sizes, alignment, m, out_dtype, b_block, simulator):
    n, k = 192, 272
    a = spoiled(quantize(normal(m, k)), owners(sizes, alignment, m), 0)
    b = quantize(normal(len(sizes), n, k, seed=1), b_block)
    run = functools.partial(
        grouped_gemm, a, b, jnp.asarray(sizes, jnp.int32), group_alignment=alignment, out_dtype=out_dtype
    )
    got = simulated(functools.partial(run, implementation=HOPPER_IMPLEMENTATION), simulator)
    check(got, run(implementation="xla"), out_dtype)
    assert not got[~owners(sizes, alignment, m)].any()


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("sizes,alignment,m", ROWS, ids=str)
def test_grouped_gemm_in_bfloat16(sizes, alignment, m, out_dtype, simulator):
    n, k = 176, 272
    mine = owners(sizes, alignment, m)
    a = jnp.where(mine[:, None], normal(m, k), np.nan).astype(jnp.bfloat16)
    b = jnp.asarray(normal(len(sizes), n, k, seed=1), jnp.bfloat16)
    run = functools.partial(
        grouped_gemm, a, b, jnp.asarray(sizes, jnp.int32), group_alignment=alignment, out_dtype=out_dtype
    )
    got = simulated(functools.partial(run, implementation=HOPPER_IMPLEMENTATION), simulator)
    check(got, run(implementation="xla"), out_dtype)
    assert not got[~mine].any()


def test_product_of_an_input_gradient_in_bfloat16():
    """g b[i] for b as it is stored, [groups, n, k]: as the backward pass of grouped_gemm calls it."""
    sizes = jnp.asarray([3, 0, 70, 20], jnp.int32)
    g, b = (jnp.asarray(normal(*shape), jnp.bfloat16) for shape in ((100, 48), (4, 48, 80)))
    absent = jnp.zeros((0, 0, 0), jnp.float32)

    def product(implementation):
        static = gemm._Static("grouped_gemm", out_dtype="bfloat16", implementation=implementation)
        return gemm._call_grouped_gemm(static, g[None], absent, b, absent, sizes, transpose_b=True)

    check(product(HOPPER_IMPLEMENTATION), product("xla"), jnp.bfloat16)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_in_bfloat16(masked):
    """Products forward and backward through kernels: groups that begin anywhere, a capacity that is no multiple."""
    groups, rows, n, k = 3, 75, 48, 80
    a = jnp.asarray(normal(groups, rows, k) if masked else normal(groups * rows, k), jnp.bfloat16)
    b = jnp.asarray(normal(groups, n, k, seed=1), jnp.bfloat16)
    weights = normal(*a.shape[:-1], n, seed=2)
    sizes = jnp.asarray([70, 0, 75], jnp.int32)
    op = masked_grouped_gemm if masked else functools.partial(grouped_gemm, group_alignment=4)

    def gradients(implementation):
        def loss(a, b):
            return (op(a, b, sizes, implementation=implementation) * weights).sum()

        return jax.grad(loss, (0, 1))(a, b)

    for got, want in zip(gradients(HOPPER_IMPLEMENTATION), gradients("xla"), strict=True):
        check(got, want, jnp.bfloat16)


@pytest.mark.parametrize(
    "sizes,capacity",
    [([70, 3, 0], 70), ([1, 7, 9, -1], 7), ([299, 0, 65], 300), ([16], 200), ([383, 40, 384], 500)],
    ids=str,
)
def test_masked_grouped_gemm(sizes, capacity, simulator):
    """A capacity that is no multiple of a tile: nothing is written beyond a group, or into the next one's slab."""
    n, k, groups = 144, 256, len(sizes)
    mine = np.concatenate([np.arange(capacity) < size for size in sizes])
    a = quantize(normal(groups * capacity, k))
    a = spoiled(a, mine, 0)
    a = ScaledArray(a.values.reshape(groups, capacity, k), a.scales.reshape(groups, capacity, -1), a.block_shape)
    b = quantize(normal(groups, n, k, seed=1), (128, 128))
    run = functools.partial(masked_grouped_gemm, a, b, jnp.asarray(sizes, jnp.int32))
    got = simulated(functools.partial(run, implementation=HOPPER_IMPLEMENTATION), simulator)
    check(got, run(implementation="xla"), jnp.bfloat16)
    assert not got.reshape(-1, n)[~mine].any()


@pytest.mark.skipif(HOPPER_IMPLEMENTATION != "sim", reason="a GPU does not count")
def test_gaps_that_are_left_alone_move_nothing(simulator):
    """By the simulator's count of bytes; with zeros it is the capacity that counts."""
    groups, rows, n, k = 2, 16, 64, 128
    b = quantize(normal(groups, n, k, seed=1), (128, 128))

    def moved(capacity, zero_gaps):
        a = quantize(normal(groups * capacity, k).reshape(groups, capacity, k))
        sizes = jnp.full(groups, rows, jnp.int32)
        simulator.clear_statistics()
        masked_grouped_gemm(a, b, sizes, zero_gaps=zero_gaps, implementation="sim").block_until_ready()
        return sum(kernel["moved_bytes"] for kernel in json.loads(simulator.statistics())["kernels"].values())

    products = moved(rows, zero_gaps=True)
    assert moved(60, zero_gaps=False) - products < 512  # as tiles read rows of no group, and scales
    assert moved(60, zero_gaps=True) - products >= groups * (60 - rows) * n * 2


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    "sizes,t,m,n",
    [
        ([100, 0, 300], 512, 200, 144),
        ([1, 128, 129, 0, 260], 1024, 200, 144),
        ([384], 384, 200, 144),
        ([100, 0, 300], 2048, 392, 144),  # the large tile, of two blocks together
        ([200], 1280, 256, 592),  # a pair whose second tile is beyond n
    ],
    ids=str,
)
def test_k_grouped_gemm(sizes, t, m, n, accumulate, simulator):
    mine = owners(sizes, 128, t)
    a, b = (spoiled(quantize(x.T), mine, 1) for x in (normal(t, m), normal(t, n, seed=1)))
    accumulator = normal(len(sizes), m, n, seed=2) if accumulate else None
    run = functools.partial(
        k_grouped_gemm, a, b, jnp.asarray(sizes, jnp.int32), group_alignment=128, accumulator=accumulator
    )
    got = simulated(functools.partial(run, implementation=HOPPER_IMPLEMENTATION), simulator)
    check(got, run(implementation="xla"), jnp.float32)
    for group, size in enumerate(sizes):
        if size == 0:
            np.testing.assert_array_equal(got[group], accumulator[group] if accumulate else 0)


# group_sizes, group_alignment, rows, m, n. Groups begin and end anywhere in a stage of 64 rows. Which tile it is, is
# the simulator's choice, of six multiprocessors.
COLUMNS = [
    ([100, 0, 300, 1], 1, 470, 200, 144),
    ([63, 64, 65, -3, 128], 1, 320, 136, 8),
    ([700], 1, 700, 64, 264),  # every row; more stages than the ring holds
    ([0, 300, 0], 1, 300, 8, 8),  # one group has everything
    ([30, 70, 5], 16, 1000, 392, 136),  # the large tile, of two blocks together
    ([90], 128, 640, 256, 600),  # a pair whose second tile is beyond n
    ([2**31 - 1, 2**31 - 1], 3, 100, 520, 144),
    ([0, 0], 1, 64, 264, 128),
]
if HOPPER_IMPLEMENTATION != "sim":
    COLUMNS.append(([300, 0, 57], 1, 1920, 512, 2816))  # the large tile, for a GPU's number of multiprocessors


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("sizes,alignment,t,m,n", COLUMNS, ids=str)
def test_k_grouped_gemm_in_bfloat16(sizes, alignment, t, m, n, accumulate, simulator):
    mine = owners(sizes, alignment, t)[:, None]
    a = jnp.where(mine, normal(t, m), np.nan).astype(jnp.bfloat16)
    b = jnp.where(mine, normal(t, n, seed=1), np.inf).astype(jnp.bfloat16)
    accumulator = normal(len(sizes), m, n, seed=2) if accumulate else None
    run = functools.partial(
        k_grouped_gemm, a, b, jnp.asarray(sizes, jnp.int32), group_alignment=alignment, accumulator=accumulator
    )
    got = simulated(functools.partial(run, implementation=HOPPER_IMPLEMENTATION), simulator)
    check(got, run(implementation="xla"), jnp.float32)
    for group, size in enumerate(sizes):
        if size <= 0:
            np.testing.assert_array_equal(got[group], accumulator[group] if accumulate else 0)


def test_the_next_groups_rows_do_not_matter():
    """NaN in all rows of a group: its own result alone has them."""
    sizes, t, m, n = [50, 60, 70], 180, 136, 72
    x = normal(t, m)
    x[50:110] = np.nan
    a, b = jnp.asarray(x, jnp.bfloat16), jnp.asarray(normal(t, n, seed=1), jnp.bfloat16)
    got = k_grouped_gemm(a, b, jnp.asarray(sizes, jnp.int32), implementation=HOPPER_IMPLEMENTATION)
    assert np.isnan(got[1]).all() and np.isfinite(got[0]).all() and np.isfinite(got[2]).all()


@pytest.mark.parametrize(
    "dtypes,m,n,why",
    [
        ((jnp.float32, jnp.float32), 16, 16, "both ScaledArrays or both bfloat16"),
        ((jnp.bfloat16, jnp.float32), 16, 16, "both ScaledArrays or both bfloat16"),
        ((jnp.bfloat16, jnp.bfloat16), 12, 16, "m must be a multiple of 8, got 12"),
        ((jnp.bfloat16, jnp.bfloat16), 16, 12, "n must be a multiple of 8, got 12"),
    ],
)
def test_what_k_grouped_gemm_refuses(dtypes, m, n, why):
    a, b = (jnp.asarray(normal(32, width), dtype) for width, dtype in zip((m, n), dtypes, strict=True))
    with pytest.raises(NotImplementedError, match=f"k_grouped_gemm: .* cannot run this call: .*{why}"):
        k_grouped_gemm(a, b, jnp.asarray([20], jnp.int32), implementation=HOPPER_IMPLEMENTATION)


def test_too_many_groups_are_refused():
    a, b = quantize(normal(16, 128)), quantize(normal(1025, 16, 128), (128, 128))
    with pytest.raises(NotImplementedError, match="grouped_gemm: .* at most 1024 groups, got 1025"):
        grouped_gemm(a, b, jnp.zeros(1025, jnp.int32), implementation=HOPPER_IMPLEMENTATION)
