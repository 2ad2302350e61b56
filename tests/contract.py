"""The table that the contract suite (test_contract.py) runs over: one `Case` for each op.

A new op gets jit, vmap, grad, remat, scan, shard_map, export, donation, determinism and the error tests by adding one.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxkern

# What the Hopper kernels are tested through: the simulator, or on a machine with such a GPU "cuda"; or "none".
HOPPER_IMPLEMENTATION = os.environ.get("JAXKERN_TEST_IMPLEMENTATION", "sim")

SHARDS = 2 if jax.device_count() == 2 else 4  # of the cases' meshes
ROWS = P("x")  # sharded along the first axis
ALL = P()  # replicated


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One op on small random operands.

    call: (*arrays, implementation=None) -> arrays; static arguments are closed over.
    arrays: argument name -> example operand. The first axis of a sharded operand divides by SHARDS.
    specs, out_specs: how shard_map may split the operands and results over one mesh axis "x".
    grad: the operands that the op is differentiable in.
    smooth: whether its slope shows that gradient; not where the op itself rounds its operands.
    symbolic: how jax.export may name the operands' dimensions, e.g. "b, 8".
    mismatch: (argument, axis) whose size, changed alone, must be refused.
    primitive: what the jaxpr must hold; None for an op in plain JAX.
    hopper_parts: where the op is made of others, those that a Hopper GPU runs through kernels, in order.
    exact: bit for bit equal to the reference.
    sharded_call: what to run inside shard_map, where that differs from `call`: an op that exchanges between devices.
    unsharded_call: what the shards' results joined must equal, where that is not `call` on the whole operands.
    variant: tells the cases of one op apart.
    implementation: the one that `call` asks for when it is told none.
    """

    name: str
    call: Callable
    arrays: dict[str, np.ndarray]
    specs: tuple
    out_specs: object
    grad: tuple[str, ...] = ()
    smooth: bool = True
    symbolic: tuple[str, ...] = ()
    mismatch: tuple[tuple[str, int], ...] = ()
    primitive: str | None = None
    hopper_parts: tuple[str, ...] = ()
    exact: bool = False
    rtol: float = 1e-5
    sharded_call: Callable | None = None
    unsharded_call: Callable | None = None
    variant: str = ""
    implementation: str | None = None

    @property
    def id(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name

    @property
    def target(self) -> str:
        prefix = "jaxkern.sim." if self.implementation == "sim" else "jaxkern."
        return self.primitive.replace("jaxkern_", prefix) + ".v"

    @property
    def unsharded(self) -> Callable:
        return self.unsharded_call or self.call

    @property
    def operands(self) -> list[jax.Array]:
        return [jnp.asarray(x) for x in self.arrays.values()]

    @property
    def grad_argnums(self) -> tuple[int, ...]:
        return tuple(list(self.arrays).index(name) for name in self.grad)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32).astype(dtype)


def integers(low, high, *shape, seed=0):
    return np.random.default_rng([seed, *shape]).integers(low, high, shape).astype(np.int32)


def _fp8(*shape, block_shape, seed=0):
    a = jaxkern.quantize(normal(*shape, seed=seed), block_shape, implementation="xla")
    return np.asarray(a.values), np.asarray(a.scales)


def _quantize(x, **kwargs):
    a = jaxkern.quantize(x, **kwargs)
    return a.values, a.scales


def _dequantize(values, scales, **kwargs):
    return jaxkern.dequantize(jaxkern.ScaledArray(values, scales), **kwargs)


def _route(logits, bias, **kwargs):
    return jaxkern.route(logits, bias, top_k=3, num_groups=4, topk_groups=2, scale=2.5, **kwargs)


def _dispatch(x, expert_ids, weights, axis_name=None, **kwargs):
    received, handle = jaxkern.dispatch(x, expert_ids, weights, num_experts=8, axis_name=axis_name, **kwargs)
    return received, handle.group_sizes, handle.dropped


def _dispatch_fp8(*arrays, **kwargs):
    received, *counts = _dispatch(*arrays, quantize="fp8", **kwargs)
    return received.values, received.scales, *counts


def _replay(x, expert_ids, weights, **kwargs):
    _, handle = jaxkern.dispatch(0 * x, expert_ids, weights, num_experts=8, layout="masked", **kwargs)
    return jaxkern.replay(x, handle, weighted=True)


def _in_parts(call, *axes, out_axis=0):
    """`call` on each device's part by itself: operands split along their axes, whole where that is None."""

    def in_parts(*arrays):
        split = [
            [x] * SHARDS if axis is None else jnp.split(x, SHARDS, axis) for x, axis in zip(arrays, axes, strict=True)
        ]
        parts = [call(*part) for part in zip(*split, strict=True)]
        return jax.tree.map(lambda *r: jnp.concatenate(r, out_axis), *parts)

    return in_parts


def _combine(x, expert_ids, weights, axis_name=None, back=None, **kwargs):
    """An expert that squares its rows, so that the gradients of dispatch, expert and combine all count."""
    received, handle = jaxkern.dispatch(x, expert_ids, weights, num_experts=8, axis_name=axis_name, **kwargs)
    return jaxkern.combine(received * received, handle, **back or {})


def _combine_by_expert(x, expert_ids, weights, bias, **kwargs):
    how = {"layout": "masked", "transport": "all_to_all"} if "axis_name" in kwargs else {"layout": "masked"}
    return _combine(x, expert_ids, weights, back={"bias": bias, "reduction": "expert"}, **how, **kwargs)


def _gemm_fp8(a, a_scales, b, b_scales, **kwargs):
    a, b = jaxkern.ScaledArray(a, a_scales), jaxkern.ScaledArray(b, b_scales, (128, 128))
    return jaxkern.gemm(a, b, out_dtype=jnp.float32, **kwargs)


def _gemm_weight_only(a, b, b_scales, **kwargs):
    return jaxkern.gemm(a, jaxkern.ScaledArray(b, b_scales, (128, 128)), **kwargs)


def _grouped_gemm_fp8(a, a_scales, b, b_scales, group_sizes, **kwargs):
    a, b = jaxkern.ScaledArray(a, a_scales), jaxkern.ScaledArray(b, b_scales, (128, 128))
    return jaxkern.grouped_gemm(a, b, group_sizes, out_dtype=jnp.float32, **kwargs)


def _grouped_gemm_bf16(a, b, group_sizes, **kwargs):
    return jaxkern.grouped_gemm(a, b, group_sizes, out_dtype=jnp.float32, **kwargs)


def _masked_grouped_gemm_fp8(a, a_scales, b, b_scales, group_sizes, **kwargs):
    a, b = jaxkern.ScaledArray(a, a_scales), jaxkern.ScaledArray(b, b_scales, (128, 128))
    return jaxkern.masked_grouped_gemm(a, b, group_sizes, out_dtype=jnp.float32, **kwargs)


def _k_grouped_gemm_fp8(a, a_scales, b, b_scales, group_sizes, **kwargs):
    a, b = jaxkern.ScaledArray(a, a_scales), jaxkern.ScaledArray(b, b_scales)
    return jaxkern.k_grouped_gemm(a, b, group_sizes, group_alignment=128, **kwargs)


def _quantize_along_tokens(x, group_sizes, **kwargs):
    a = jaxkern.quantize_along_tokens(x, group_sizes, **kwargs)
    return a.values, a.scales


def _swiglu_quantize(gate_up, weights, **kwargs):
    a = jaxkern.swiglu_quantize(gate_up, weights, **kwargs)
    return a.values, a.scales


def _swiglu_quantize_pair(gate, up, **kwargs):
    a = jaxkern.swiglu_quantize((gate, up), scale_format="ue8m0", **kwargs)
    return a.values, a.scales


def _swiglu_quantize_some(gate_up, num_rows, **kwargs):
    a = jaxkern.swiglu_quantize(gate_up, num_rows=num_rows, **kwargs)
    counted = jnp.arange(gate_up.shape[-2]) < num_rows[..., None]
    return tuple(jnp.where(counted[..., None], x, 0) for x in (a.values, a.scales))


def _fp8_linear_frozen(x, w, w_scales, **kwargs):
    return jaxkern.fp8_linear(x, jaxkern.ScaledArray(w, w_scales, (128, 128)), **kwargs)


def _mla_decode(q, cache, block_table, seq_lens, **kwargs):
    return jaxkern.mla_decode(q, cache, block_table, seq_lens, softmax_scale=0.2, latent_dim=32, **kwargs)


def _append(cache, rows, block_table, positions, **kwargs):
    return jaxkern.kv_cache.append(cache, rows, block_table, positions, latent_dim=132, **kwargs)


def _mla_decode_full(q, cache, block_table, seq_lens, **kwargs):
    return jaxkern.mla_decode(q, cache, block_table, seq_lens, softmax_scale=0.04, **kwargs)


def _decode_case(call, q, cache, **options):
    return Case(
        "mla_decode",
        call,
        {
            "q": q,
            "cache": cache,
            "block_table": integers(0, 9, 4, 3),
            "seq_lens": np.array([2, 48, 0, 17], np.int32),
        },
        specs=(ROWS, ALL, ROWS, ROWS),
        out_specs=(ROWS, ROWS),
        symbolic=(f"b, {q.shape[1]}, {q.shape[2]}, {q.shape[3]}", f"p, 16, {cache.shape[2]}", "b, 3", "b"),
        mismatch=(("cache", 2), ("block_table", 0), ("seq_lens", 0)),
        primitive="jaxkern_mla_decode",
        **options,
    )


def _mla_prefill(q, k, v, seq_lens, **kwargs):
    return jaxkern.mla_prefill(q, k, v, softmax_scale=0.2, seq_lens=seq_lens, **kwargs)


_VALUES, _SCALES = _fp8(8, 208, block_shape=(1, 128))
_WEIGHT, _WEIGHT_SCALES = _fp8(48, 208, block_shape=(128, 128), seed=1)
_EXPERTS, _EXPERT_SCALES = _fp8(5, 48, 208, block_shape=(128, 128), seed=2)
_SIZES = np.array([2, 0, 3, 1, 1], np.int32)
_ALONG_TOKENS, _TOKEN_SCALES = _fp8(16, 384, block_shape=(1, 128), seed=3)
_FP8_A = {"a.values": _VALUES, "a.scales": _SCALES}
_MOE = {"x": normal(16, 24), "expert_ids": integers(-1, 8, 16, 3), "weights": normal(16, 3)}

CASES = [
    Case(
        "quantize",
        _quantize,
        {"x": normal(8, 200, dtype=jnp.bfloat16)},
        specs=(ROWS,),
        out_specs=(ROWS, ROWS),
        symbolic=("b, 200",),
        primitive="jaxkern_quantize",
        exact=True,
    ),
    Case(
        "dequantize",
        _dequantize,
        {"a.values": _VALUES, "a.scales": _SCALES},
        specs=(ROWS, ROWS),
        out_specs=ROWS,
        symbolic=("b, 208", "b, 2"),
        mismatch=(("a.scales", 0), ("a.scales", 1)),
        primitive="jaxkern_dequantize",
        exact=True,
    ),
    Case(
        "route",
        _route,
        {"logits": normal(16, 32), "bias": normal(32)},
        specs=(ROWS, ALL),
        out_specs=(ROWS, ROWS),
        grad=("logits",),
        symbolic=("t, 32", "32"),
        mismatch=(("bias", 0),),
        primitive="jaxkern_route",
        exact=True,
    ),
    Case(
        "gemm",
        jaxkern.gemm,
        {"a": normal(8, 60), "b": normal(24, 60)},
        specs=(ROWS, ALL),
        out_specs=ROWS,
        grad=("a", "b"),
        symbolic=("m, 60", "24, 60"),
        mismatch=(("b", 1),),
        primitive="jaxkern_gemm",
    ),
    Case(
        "gemm",
        _gemm_fp8,
        _FP8_A | {"b.values": _WEIGHT, "b.scales": _WEIGHT_SCALES},
        specs=(ROWS, ROWS, ALL, ALL),
        out_specs=ROWS,
        symbolic=("m, 208", "m, 2", "48, 208", "1, 2"),
        mismatch=(("b.values", 1), ("a.scales", 0)),
        primitive="jaxkern_gemm",
        variant="fp8",
    ),
    Case(
        "gemm",
        _gemm_weight_only,
        {"a": normal(8, 208), "b.values": _WEIGHT, "b.scales": _WEIGHT_SCALES},
        specs=(ROWS, ALL, ALL),
        out_specs=ROWS,
        grad=("a",),
        symbolic=("m, 208", "48, 208", "1, 2"),
        mismatch=(("b.scales", 1),),
        primitive="jaxkern_gemm",
        variant="weight-only",
    ),
    Case(
        "grouped_gemm",
        jaxkern.grouped_gemm,
        {"a": normal(8, 60), "b": normal(5, 24, 60), "group_sizes": _SIZES},
        specs=(ALL, P(None, "x"), ALL),
        out_specs=P(None, "x"),
        grad=("a", "b"),
        symbolic=("m, 60", "5, 24, 60", "5"),
        mismatch=(("b", 2), ("group_sizes", 0)),
        primitive="jaxkern_grouped_gemm",
    ),
    Case(
        "grouped_gemm",
        _grouped_gemm_fp8,
        _FP8_A | {"b.values": _EXPERTS, "b.scales": _EXPERT_SCALES, "group_sizes": _SIZES},
        specs=(ALL, ALL, ALL, ALL, ALL),
        out_specs=ALL,
        symbolic=("m, 208", "m, 2", "5, 48, 208", "5, 1, 2", "5"),
        mismatch=(("b.values", 0),),
        primitive="jaxkern_grouped_gemm",
        variant="fp8",
    ),
    Case(
        "grouped_gemm",
        _grouped_gemm_bf16,
        {
            "a": normal(8, 80, dtype=jnp.bfloat16),
            "b": normal(5, 64, 80, dtype=jnp.bfloat16),
            "group_sizes": _SIZES,
        },
        specs=(ALL, P(None, "x"), ALL),
        out_specs=P(None, "x"),
        symbolic=("m, 80", "5, 64, 80", "5"),
        mismatch=(("b", 2), ("group_sizes", 0)),
        primitive="jaxkern_grouped_gemm",
        variant="bf16",
    ),
    Case(
        "k_grouped_gemm",
        jaxkern.k_grouped_gemm,
        {"a": normal(8, 20), "b": normal(8, 24), "group_sizes": _SIZES},
        specs=(ALL, P(None, "x"), ALL),
        out_specs=P(None, None, "x"),
        grad=("a", "b"),
        symbolic=("t, 20", "t, 24", "5"),
        mismatch=(("b", 0),),
        primitive="jaxkern_k_grouped_gemm",
    ),
    Case(
        "k_grouped_gemm",
        _k_grouped_gemm_fp8,
        {
            "a.values": _ALONG_TOKENS[:8],
            "a.scales": _TOKEN_SCALES[:8],
            "b.values": _ALONG_TOKENS,
            "b.scales": _TOKEN_SCALES,
            "group_sizes": np.array([100, 0, 130], np.int32),
        },
        specs=(ROWS, ROWS, ALL, ALL, ALL),
        out_specs=P(None, "x"),
        symbolic=("m, 384", "m, 3", "16, 384", "16, 3", "3"),
        mismatch=(("b.values", 1), ("a.scales", 1)),
        primitive="jaxkern_k_grouped_gemm",
        variant="fp8",
    ),
    Case(
        "k_grouped_gemm",
        jaxkern.k_grouped_gemm,
        {"a": normal(8, 16, dtype=jnp.bfloat16), "b": normal(8, 64, dtype=jnp.bfloat16), "group_sizes": _SIZES},
        specs=(ALL, P(None, "x"), ALL),
        out_specs=P(None, None, "x"),
        symbolic=("t, 16", "t, 64", "5"),
        mismatch=(("b", 0),),
        primitive="jaxkern_k_grouped_gemm",
        variant="bf16",
    ),
    Case(
        "masked_grouped_gemm",
        jaxkern.masked_grouped_gemm,
        {"a": normal(4, 6, 60), "b": normal(4, 24, 60), "group_sizes": np.array([2, 0, 9, 3], np.int32)},
        specs=(ROWS, ROWS, ROWS),
        out_specs=ROWS,
        grad=("a", "b"),
        symbolic=("g, 6, 60", "g, 24, 60", "g"),
        mismatch=(("b", 0), ("b", 2), ("group_sizes", 0)),
        primitive="jaxkern_grouped_gemm",
    ),
    Case(
        "masked_grouped_gemm",
        _masked_grouped_gemm_fp8,
        {
            "a.values": _VALUES.reshape(4, 2, 208),
            "a.scales": _SCALES.reshape(4, 2, 2),
            "b.values": _EXPERTS[:4],
            "b.scales": _EXPERT_SCALES[:4],
            "group_sizes": np.array([2, 0, 1, -1], np.int32),
        },
        specs=(ROWS, ROWS, ROWS, ROWS, ROWS),
        out_specs=ROWS,
        symbolic=("g, 2, 208", "g, 2, 2", "g, 48, 208", "g, 1, 2", "g"),
        mismatch=(("a.values", 1), ("b.scales", 0)),
        primitive="jaxkern_grouped_gemm",
        variant="fp8",
    ),
    Case(
        "quantize_along_tokens",
        _quantize_along_tokens,
        {"x": normal(200, 8, dtype=jnp.bfloat16), "group_sizes": np.array([30, 0, 150], np.int32)},
        specs=(P(None, "x"), ALL),
        out_specs=(ROWS, ROWS),
        symbolic=("t, 8", "3"),
        primitive="jaxkern_quantize_along_tokens",
        exact=True,
    ),
    Case(
        "swiglu_quantize",
        _swiglu_quantize,
        {"gate_up": normal(8, 300, dtype=jnp.bfloat16), "weights": normal(8)},
        specs=(ROWS, ROWS),
        out_specs=(ROWS, ROWS),
        symbolic=("m, 300", "m"),
        mismatch=(("weights", 0),),
        primitive="jaxkern_swiglu_quantize",
        rtol=0.07,  # one e4m3 step, as the last bit of an exp may make it
    ),
    Case(
        "swiglu_quantize",
        _swiglu_quantize_pair,
        {"gate_up.gate": normal(8, 150), "gate_up.up": normal(8, 150, seed=1)},
        specs=(ROWS, ROWS),
        out_specs=(ROWS, ROWS),
        symbolic=("m, 150", "m, 150"),
        mismatch=(("gate_up.up", 0), ("gate_up.up", 1)),
        primitive="jaxkern_swiglu_quantize",
        variant="pair",
        rtol=0.07,
    ),
    Case(
        "swiglu_quantize",
        _swiglu_quantize_some,
        {"gate_up": normal(8, 5, 300), "num_rows": np.arange(-1, 7, dtype=np.int32)},
        specs=(ROWS, ROWS),
        out_specs=(ROWS, ROWS),
        symbolic=("b, 5, 300", "b"),
        mismatch=(("num_rows", 0),),
        primitive="jaxkern_swiglu_quantize",
        variant="some",
        rtol=0.07,
    ),
    Case(
        "fp8_linear",
        jaxkern.fp8_linear,
        {"x": normal(8, 208), "w": normal(48, 208)},
        specs=(ROWS, ALL),
        out_specs=ROWS,
        unsharded_call=_in_parts(jaxkern.fp8_linear, 0, None),  # each device's tokens are blocks of their own
        grad=("x", "w"),
        smooth=False,
        symbolic=("m, 208", "48, 208"),
        mismatch=(("w", 1),),
        primitive="jaxkern_gemm",
        hopper_parts=("quantize", "quantize", "gemm"),
    ),
    Case(
        "fp8_linear",
        _fp8_linear_frozen,
        {"x": normal(8, 208), "w.values": _WEIGHT, "w.scales": _WEIGHT_SCALES},
        specs=(ROWS, ALL, ALL),
        out_specs=ROWS,
        grad=("x",),
        smooth=False,
        symbolic=("m, 208", "48, 208", "1, 2"),
        mismatch=(("w.values", 1), ("w.scales", 1)),
        primitive="jaxkern_gemm",
        hopper_parts=("quantize", "gemm"),
        variant="frozen",
    ),
    Case(
        "fp8_grouped_linear",
        jaxkern.fp8_grouped_linear,
        {"x": normal(8, 208), "w": normal(5, 64, 208), "group_sizes": _SIZES},
        specs=(ALL, P(None, "x"), ALL),
        out_specs=P(None, "x"),
        unsharded_call=_in_parts(jaxkern.fp8_grouped_linear, None, 1, None, out_axis=1),  # n is cut inside a block
        grad=("x", "w"),
        smooth=False,
        symbolic=("m, 208", "5, 64, 208", "5"),
        mismatch=(("w", 2), ("group_sizes", 0)),
        primitive="jaxkern_grouped_gemm",
        hopper_parts=("quantize", "quantize", "grouped_gemm"),
    ),
    _decode_case(_mla_decode, normal(4, 2, 6, 40), normal(9, 16, 40)),
    Case(
        "kv_cache.append",
        _append,
        {
            "cache": normal(8, 16, 40),
            "rows": normal(4, 6, 40),
            "block_table": integers(-1, 3, 4, 3),  # a page may be another request's too, or none of the cache's
            "positions": integers(-4, 52, 4, 6),
        },
        specs=(ROWS, ROWS, ROWS, ROWS),
        out_specs=ROWS,
        unsharded_call=_in_parts(_append, 0, 0, 0, 0),  # page numbers are a device's own
        symbolic=("p, 16, 40", "b, 6, 40", "b, 3", "b, 6"),
        mismatch=(("rows", 0), ("rows", 2), ("block_table", 0), ("positions", 1)),
        primitive="jaxkern_kv_cache_append",
        exact=True,
    ),
    Case(
        "kv_cache.append",
        _append,
        {
            "cache": integers(0, 256, 8, 16, 132 + 2 * 4 + 2 * 20).astype(np.uint8),
            "rows": normal(4, 6, 152, dtype=jnp.bfloat16),
            "block_table": integers(-1, 3, 4, 3),
            "positions": integers(-4, 52, 4, 6),
        },
        specs=(ROWS, ROWS, ROWS, ROWS),
        out_specs=ROWS,
        unsharded_call=_in_parts(_append, 0, 0, 0, 0),
        symbolic=("p, 16, 180", "b, 6, 152", "b, 3", "b, 6"),
        mismatch=(("cache", 2), ("rows", 2), ("block_table", 0), ("positions", 1)),
        primitive="jaxkern_kv_cache_append",
        exact=True,
        variant="packed",
    ),
    _decode_case(
        _mla_decode,
        normal(4, 2, 6, 40, dtype=jnp.bfloat16),
        np.asarray(jaxkern.reference.pack_rows(normal(9, 16, 40), 32)),
        variant="fp8",
        rtol=2.0**-7,  # weights and result are bfloat16
    ),
    _decode_case(
        _mla_decode,
        normal(4, 2, 6, 40, dtype=np.float16),
        normal(9, 16, 40, dtype=np.float16),
        variant="float16",
        rtol=2.0**-10,
    ),
    _decode_case(
        _mla_decode_full,
        normal(4, 2, 3, 576, dtype=jnp.bfloat16),
        normal(9, 16, 576, dtype=jnp.bfloat16),
        variant="full",
        rtol=2.0**-6,  # weights and result are bfloat16
    ),
    _decode_case(
        _mla_decode_full,
        normal(4, 2, 3, 576, dtype=np.float16),
        normal(9, 16, 576, dtype=np.float16),
        variant="full-float16",
        rtol=2.0**-9,  # weights and result are float16
    ),
    _decode_case(
        _mla_decode_full,
        normal(4, 2, 3, 576, dtype=jnp.bfloat16),
        np.asarray(jaxkern.reference.pack_rows(normal(9, 16, 576), 512)),
        variant="full-fp8",
        rtol=2.0**-6,  # weights, result and on Hopper keys are bfloat16
    ),
    Case(
        "merge_attention",
        jaxkern.merge_attention,
        {"outs": normal(3, 8, 5, 20), "lses": normal(3, 8, 5)},
        specs=(P(None, "x"), P(None, "x")),
        out_specs=(ROWS, ROWS),
        grad=("outs", "lses"),
        symbolic=("n, b, 5, 20", "n, b, 5"),
        mismatch=(("lses", 0), ("lses", 2)),
        primitive="jaxkern_merge_attention",
    ),
    Case(
        "mla_prefill",
        _mla_prefill,
        {
            "q": normal(4, 24, 2, 20),
            "k": normal(4, 24, 2, 20, seed=1),
            "v": normal(4, 24, 2, 12),
            "seq_lens": np.array([24, 7, 0, 1], np.int32),
        },
        specs=(ROWS, ROWS, ROWS, ROWS),
        out_specs=(ROWS, ROWS),
        grad=("q", "k", "v"),
        symbolic=("b, 24, 2, 20", "b, 24, 2, 20", "b, 24, 2, 12", "b"),
        mismatch=(("k", 3), ("v", 1), ("seq_lens", 0)),
        primitive="jaxkern_mla_prefill",
    ),
    Case(
        "mla_prefill",
        _mla_prefill,
        {
            "q": normal(4, 24, 2, 192, dtype=jnp.bfloat16),
            "k": normal(4, 24, 2, 192, seed=1, dtype=jnp.bfloat16),
            "v": normal(4, 24, 2, 128, dtype=jnp.bfloat16),
            "seq_lens": np.array([24, 7, 0, 1], np.int32),
        },
        specs=(ROWS, ROWS, ROWS, ROWS),
        out_specs=(ROWS, ROWS),
        grad=("q", "k", "v"),
        symbolic=("b, 24, 2, 192", "b, 24, 2, 192", "b, 24, 2, 128", "b"),
        mismatch=(("k", 3), ("v", 1), ("seq_lens", 0)),
        primitive="jaxkern_mla_prefill",
        variant="full",
        rtol=2.0**-6,  # weights and result are bfloat16
    ),
    Case(
        "dispatch",
        _dispatch,
        _MOE,
        specs=(ROWS, ROWS, ROWS),
        out_specs=(ROWS, ROWS, ROWS),
        unsharded_call=_in_parts(_dispatch, 0, 0, 0),  # without an axis every device keeps its tokens to itself
        grad=("x",),
        symbolic=("t, 24", "t, 3", "t, 3"),
        mismatch=(("expert_ids", 0), ("weights", 1)),
        primitive="jaxkern_gather_rows",
        hopper_parts=("assign_slots", "gather_rows"),
        exact=True,
    ),
    Case(
        "combine",
        _combine,
        _MOE,
        specs=(ROWS, ROWS, ROWS),
        out_specs=ROWS,
        grad=("x", "weights"),
        symbolic=("t, 24", "t, 3", "t, 3"),
        primitive="jaxkern_sum_rows",
        hopper_parts=("assign_slots", "gather_rows", "sum_rows"),
        sharded_call=lambda *arrays, **kwargs: _combine(*arrays, axis_name="x", **kwargs),
    ),
    Case(
        "combine",
        _combine_by_expert,
        _MOE | {"bias": normal(16, 24, seed=1)},
        specs=(ROWS, ROWS, ROWS, ROWS),
        out_specs=ROWS,
        grad=("x", "weights", "bias"),
        symbolic=("t, 24", "t, 3", "t, 3", "t, 24"),
        mismatch=(("bias", 0), ("bias", 1)),
        primitive="jaxkern_sum_rows",
        hopper_parts=("assign_slots", "gather_rows", "sum_rows"),
        sharded_call=lambda *arrays, **kwargs: _combine_by_expert(*arrays, axis_name="x", **kwargs),
        variant="expert",
    ),
    Case(
        "dispatch",
        _dispatch_fp8,
        _MOE,
        specs=(ROWS, ROWS, ROWS),
        out_specs=(ROWS, ROWS, ROWS, ROWS),
        unsharded_call=_in_parts(_dispatch_fp8, 0, 0, 0),
        symbolic=("t, 24", "t, 3", "t, 3"),
        primitive="jaxkern_gather_quantize_rows",
        hopper_parts=("assign_slots", "gather_quantize_rows"),
        exact=True,
        variant="fp8",
    ),
    Case(
        "replay",
        _replay,
        _MOE,
        specs=(ROWS, ROWS, ROWS),
        out_specs=ROWS,
        unsharded_call=_in_parts(_replay, 0, 0, 0),
        grad=("x", "weights"),
        symbolic=("t, 24", "t, 3", "t, 3"),
        primitive="jaxkern_gather_rows",
        hopper_parts=("assign_slots", "gather_rows"),
        exact=True,
        variant="masked",
    ),
]

# The calls that have a Hopper kernel, again through it. A GPU's tensor cores keep 13 bits of a sum, and XLA's division
# there, the reference's, is not correctly rounded: one e4m3 step.
HOPPER = [
    case
    for case in CASES
    if case.name
    in (
        "quantize",
        "quantize_along_tokens",
        "swiglu_quantize",
        "fp8_linear",
        "fp8_grouped_linear",
        "kv_cache.append",
        "merge_attention",
        "route",
        "dispatch",
        "combine",
        "replay",
    )
    or case.id
    in (
        "mla_decode-full",
        "mla_decode-full-float16",
        "mla_decode-full-fp8",
        "mla_prefill-full",
        "gemm-fp8",
        "grouped_gemm-fp8",
        "grouped_gemm-bf16",
        "masked_grouped_gemm-fp8",
        "k_grouped_gemm-fp8",
        "k_grouped_gemm-bf16",
    )
]
CASES += [
    dataclasses.replace(
        case,
        call=functools.partial(case.call, implementation=HOPPER_IMPLEMENTATION),
        variant=f"{case.variant}-{HOPPER_IMPLEMENTATION}".lstrip("-"),
        implementation=HOPPER_IMPLEMENTATION,
        exact=case.exact and HOPPER_IMPLEMENTATION == "sim",
        rtol=case.rtol if HOPPER_IMPLEMENTATION == "sim" else 0.07 if case.exact else max(case.rtol, 2.0**-11),
    )
    for case in HOPPER
    if HOPPER_IMPLEMENTATION != "none"
]
