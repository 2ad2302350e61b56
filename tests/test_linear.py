"""fp8_linear and fp8_grouped_linear against the same quantisation written out, and against plain products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gemm import assert_close, calc_diff, exact, normal, spans

import jaxkern
from jaxkern import ScaledArray, fp8_grouped_linear, fp8_linear, k_grouped_gemm, quantize, quantize_along_tokens

FORMATS = ("float32", "power_of_two", "ue8m0")
few = settings(max_examples=12, deadline=None, derandomize=True)


def rounded(x, block_shape, scale_format):
    """What is left of x after quantisation, float64."""
    return exact(quantize(jnp.asarray(x), block_shape, scale_format=scale_format))


def rounded_along_tokens(x, scale_format):
    """The same in blocks of 128 rows of one group."""
    return rounded(jnp.asarray(x).T, (1, 128), scale_format).T


def with_gradients(linear, x, w, g):
    def f(x, w, g):
        out, backward = jax.vjp(linear, x, w)
        return out, backward(g)

    return jax.jit(f)(x, w, g)


def check(x, w, g, out, dx, dw, scale_format):
    """One group: the three products of what quantisation leaves of the operands."""
    qx, qw, qg = rounded(x, (1, 128), scale_format), exact(w), rounded(g, (1, 128), scale_format)
    if not isinstance(w, ScaledArray):
        qw = rounded(w, (128, 128), scale_format)
    tx, tg = rounded_along_tokens(x, scale_format), rounded_along_tokens(g, scale_format)
    assert_close(out, qx @ qw.T, np.abs(qx) @ np.abs(qw.T))
    assert_close(dx, qg @ qw, np.abs(qg) @ np.abs(qw))
    if dw is not None:
        assert_close(dw, tg.T @ tx, np.abs(tg.T) @ np.abs(tx))


@few
@given(
    dtypes=st.sampled_from([(jnp.float32,) * 3, (jnp.bfloat16, jnp.float32, jnp.bfloat16), (jnp.bfloat16,) * 3]),
    batch=st.sampled_from([(), (1,), (7,), (3, 50), (2, 0)]),
    n=st.sampled_from([1, 130, 257]),
    k=st.sampled_from([1, 129, 300]),
    scale_format=st.sampled_from(FORMATS),
    frozen=st.booleans(),
    implementation=st.sampled_from([None, None, "xla"]),
)
def test_fp8_linear(dtypes, batch, n, k, scale_format, frozen, implementation):
    x_dtype, w_dtype, out_dtype = dtypes
    x, w, g = normal(*batch, k, dtype=x_dtype), normal(n, k, seed=1, dtype=w_dtype), normal(*batch, n, seed=2)
    w, g = quantize(w, (128, 128), scale_format=scale_format) if frozen else w, g.astype(out_dtype)

    def f(x, w):
        return fp8_linear(x, w, scale_format=scale_format, out_dtype=out_dtype, implementation=implementation)

    out, (dx, dw) = with_gradients(f, x, w, g)
    assert (out.shape, out.dtype) == ((*batch, n), out_dtype) and (dx.shape, dx.dtype) == (x.shape, x.dtype)
    if frozen:
        assert not np.asarray(dw.values, np.float32).any()
        assert (np.asarray(dw.scales).astype(np.float64) <= 2.0**-127).all()  # the zero of ue8m0
    else:
        assert (dw.shape, dw.dtype) == (w.shape, w.dtype)
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, g, out, dx)]
    check(rows[0], w, rows[1], rows[2], rows[3], None if frozen else dw, scale_format)


@few
@given(
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    sizes=st.lists(st.sampled_from([0, 0, 1, 7, 130, 250, -5, 2**31 - 1, -(2**31)]), min_size=3, max_size=3),
    alignment=st.sampled_from([1, 8, 128]),
    scale_format=st.sampled_from(FORMATS),
    implementation=st.sampled_from([None, None, "xla"]),
)
def test_fp8_grouped_linear(dtype, sizes, alignment, scale_format, implementation):
    m, n, k = 300, 150, 140
    x, w, g = normal(m, k, dtype=dtype), normal(3, n, k, seed=1), normal(m, n, seed=2, dtype=dtype)
    inside = np.zeros((m, 1), bool)
    for begin, end in spans(sizes, alignment, m):
        inside[begin:end] = True
    x, g = jnp.where(inside, x, jnp.nan), jnp.where(inside, g, jnp.inf)  # rows in no group must not matter

    def f(x, w):
        return fp8_grouped_linear(
            x,
            w,
            jnp.asarray(sizes, jnp.int32),
            group_alignment=alignment,
            scale_format=scale_format,
            implementation=implementation,
        )

    out, (dx, dw) = with_gradients(f, x, w, g)
    assert out.dtype == dx.dtype == dtype and dw.dtype == jnp.float32
    assert not np.asarray(out)[~inside[:, 0]].any() and not np.asarray(dx)[~inside[:, 0]].any()
    for i, (begin, end) in enumerate(spans(sizes, alignment, m)):
        here = np.s_[begin:end]
        if begin == end:
            assert not np.asarray(dw[i]).any()
        else:
            check(x[here], w[i], g[here], out[here], dx[here], dw[i], scale_format)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_close_to_the_plain_linear(scale_format):
    x, w, g = normal(384, 768), normal(512, 768, seed=1), normal(384, 512, seed=2)
    got = jax.vjp(lambda x, w: fp8_linear(x, w, scale_format=scale_format), x, w)
    plain = jax.vjp(lambda x, w: jnp.matmul(x, w.T, precision="highest"), x, w)
    for ours, theirs in zip((got[0], *got[1](g)), (plain[0], *plain[1](g)), strict=True):
        assert calc_diff(ours, theirs) < 1e-3


@pytest.mark.parametrize("scale_format", FORMATS)
def test_grouped_close_to_the_plain_linear(scale_format):
    x, w, g = normal(400, 640), normal(3, 512, 640, seed=1), normal(400, 512, seed=2)
    sizes = jnp.asarray([260, 0, 140], jnp.int32)
    got = jax.vjp(lambda x, w: fp8_grouped_linear(x, w, sizes, scale_format=scale_format), x, w)
    plain = jax.vjp(lambda x, w: jaxkern.grouped_gemm(x, w, sizes), x, w)
    for ours, theirs in zip((got[0], *got[1](g)), (plain[0], *plain[1](g)), strict=True):
        assert calc_diff(ours, theirs) < 1e-3


def test_microbatches_add_up():
    """k_grouped_gemm's accumulator is the sum of the microbatches' weight gradients."""
    x, w, sizes = normal(2, 200, 96), normal(2, 130, 96, seed=1), jnp.asarray([[150, 50], [0, 200]], jnp.int32)
    g = normal(2, 200, 130, seed=2)
    total = jnp.zeros_like(w)
    for i in range(2):
        side = [quantize_along_tokens(y[i], sizes[i]) for y in (g, x)]
        total = k_grouped_gemm(*side, sizes[i], group_alignment=128, accumulator=total)
    parts = [jax.vjp(lambda w, i=i: fp8_grouped_linear(x[i], w, sizes[i]), w)[1](g[i])[0] for i in range(2)]
    np.testing.assert_allclose(total, parts[0] + parts[1], atol=1e-4)


def test_what_is_kept_for_the_backward_pass():
    """x as it came and the quantised w, one byte an element."""
    x, w = normal(4, 256, dtype=jnp.bfloat16), normal(512, 256)
    _, gradient = jax.vjp(fp8_linear, x, w)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(gradient))
    assert x.nbytes + w.size <= kept <= x.nbytes + w.size + 4 * (w.size // 128**2) + 64


@pytest.mark.parametrize("grouped", [False, True])
def test_the_backward_pass_makes_no_dequantised_copy_of_the_weight(grouped):
    """XLA's own account of a layer of few tokens: w is 4 MiB in FP8, and a copy of it would be 8 or 16."""
    n, k = 2048, 2048
    x = normal(4, k, dtype=jnp.bfloat16)
    w = ScaledArray(jnp.zeros((n, k), jnp.float8_e4m3fn), jnp.ones((n // 128, k // 128)), (128, 128))
    if grouped:
        w = jax.tree.map(lambda leaf: leaf[None], w)

    def temporary(linear, w, argnums):
        gradients = jax.grad(lambda *o: linear(*o).astype(jnp.float32).sum(), argnums)
        return jax.jit(gradients).lower(x, w).compile().memory_analysis().temp_size_in_bytes

    def ours(x, w):
        return fp8_grouped_linear(x, w, jnp.full(1, 4, jnp.int32)) if grouped else fp8_linear(x, w)

    def plain(x, w):
        return x @ jaxkern.dequantize(w, jnp.bfloat16).reshape(n, k).T

    assert temporary(ours, w, (0,)) < n * k // 8
    assert temporary(ours, jnp.zeros(w.shape, jnp.float32), (0, 1)) < 1.5 * n * k  # of which n * k are the quantised w
    assert temporary(plain, w, (0,)) >= 2 * n * k


def test_nan_and_infinity_reach_their_row_and_block_only():
    x, w, g = normal(300, 256), normal(40, 256, seed=1), normal(300, 40, seed=2)
    x = x.at[5, 3].set(jnp.nan).at[200, 130].set(jnp.inf)
    out, gradient = jax.vjp(fp8_linear, x, w)
    dx, dw = gradient(g)
    rows = np.isin(np.arange(300), [5, 200])
    np.testing.assert_array_equal(np.isnan(np.asarray(out)), np.broadcast_to(rows[:, None], out.shape))
    assert not np.isnan(np.asarray(dx)).any()
    columns = np.isin(np.arange(256), [3, 130])
    np.testing.assert_array_equal(np.isnan(np.asarray(dw)), np.broadcast_to(columns, dw.shape))


@pytest.mark.parametrize(
    "error,match,call",
    [
        (
            ValueError,
            r"fp8_linear: w must be .*k=4\], got float32\[3,5\]",
            lambda: fp8_linear(normal(2, 4), normal(3, 5)),
        ),
        (ValueError, r"fp8_linear: x must be \[..., k\], got float32\[\]", lambda: fp8_linear(normal(), normal(3, 5))),
        (
            TypeError,
            r"fp8_linear: x must be float32 or bfloat16 \[b0, k\], got float16\[2,4\]",
            lambda: fp8_linear(normal(2, 4, dtype=jnp.float16), normal(3, 4)),
        ),
        (
            TypeError,
            r"fp8_linear: out_dtype must be float32 or bfloat16, got float16",
            lambda: fp8_linear(normal(2, 4), normal(3, 4), out_dtype=jnp.float16),
        ),
        (
            ValueError,
            r"fp8_linear: w must have blocks \(128, 128\), got \(1, 128\)",
            lambda: fp8_linear(normal(2, 4), quantize(normal(3, 4))),
        ),
        (
            ValueError,
            r"fp8_linear: scale_format must be one of .*, got 'int8'",
            lambda: fp8_linear(normal(2, 4), normal(3, 4), scale_format="int8"),
        ),
        (
            ValueError,
            r"fp8_grouped_linear: group_sizes must be int32 \[g=2\], got int32\[3\]",
            lambda: fp8_grouped_linear(normal(2, 4), normal(2, 3, 4), jnp.zeros(3, jnp.int32)),
        ),
        (
            ValueError,
            r"fp8_grouped_linear: group_alignment must be in 1..2\*\*31 - 1, got 0",
            lambda: fp8_grouped_linear(normal(2, 4), normal(2, 3, 4), jnp.zeros(2, jnp.int32), group_alignment=0),
        ),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_gradient_without_tokens(implementation):
    def loss(x, w):
        return fp8_grouped_linear(x, w, jnp.array([1, 2], jnp.int32), implementation=implementation).sum()

    dx, dw = jax.grad(loss, (0, 1))(jnp.ones((0, 16)), jnp.ones((2, 8, 16)))
    assert dx.shape == (0, 16) and (dw == 0).all()
