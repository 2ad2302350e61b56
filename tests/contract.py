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

ROWS = P("x")  # sharded along the first axis
ALL = P()  # replicated


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on small random operands.

    call: (*arrays, implementation=None) -> arrays; static arguments are closed over.
    arrays: argument name -> example operand. The first axis of a sharded operand divides by 4.
    specs, out_specs: how shard_map may split the operands and results over one mesh axis "x".
    grad: the operands that the op is differentiable in.
    symbolic: how jax.export may name the operands' dimensions, e.g. "b, 8".
    mismatch: (argument, axis) whose size, changed alone, must be refused.
    primitive: what the jaxpr must hold; None for an op in plain JAX.
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
    symbolic: tuple[str, ...] = ()
    mismatch: tuple[tuple[str, int], ...] = ()
    primitive: str | None = None
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


def _dispatch_in_parts(*arrays):
    """Without an axis every device keeps its tokens to itself."""
    parts = [_dispatch(*part) for part in zip(*[jnp.split(x, 4) for x in arrays], strict=True)]
    return jax.tree.map(lambda *r: jnp.concatenate(r), *parts)


def _combine(x, expert_ids, weights, axis_name=None, **kwargs):
    """An expert that squares its rows, so that the gradients of dispatch, expert and combine all count."""
    received, handle = jaxkern.dispatch(x, expert_ids, weights, num_experts=8, axis_name=axis_name, **kwargs)
    return jaxkern.combine(received * received, handle)


def _gemm_fp8(a, a_scales, b, b_scales, **kwargs):
    a, b = jaxkern.ScaledArray(a, a_scales), jaxkern.ScaledArray(b, b_scales, (128, 128))
    return jaxkern.gemm(a, b, out_dtype=jnp.float32, **kwargs)


def _gemm_weight_only(a, b, b_scales, **kwargs):
    return jaxkern.gemm(a, jaxkern.ScaledArray(b, b_scales, (128, 128)), **kwargs)


def _grouped_gemm_fp8(a, a_scales, b, b_scales, group_sizes, **kwargs):
    a, b = jaxkern.ScaledArray(a, a_scales), jaxkern.ScaledArray(b, b_scales, (128, 128))
    return jaxkern.grouped_gemm(a, b, group_sizes, out_dtype=jnp.float32, **kwargs)


def _mla_decode(q, cache, block_table, seq_lens, **kwargs):
    return jaxkern.mla_decode(q, cache, block_table, seq_lens, softmax_scale=0.2, latent_dim=32, **kwargs)


def _mla_prefill(q, k, v, seq_lens, **kwargs):
    return jaxkern.mla_prefill(q, k, v, softmax_scale=0.2, seq_lens=seq_lens, **kwargs)


_VALUES, _SCALES = _fp8(8, 208, block_shape=(1, 128))
_WEIGHT, _WEIGHT_SCALES = _fp8(48, 208, block_shape=(128, 128), seed=1)
_EXPERTS, _EXPERT_SCALES = _fp8(5, 48, 208, block_shape=(128, 128), seed=2)
_SIZES = np.array([2, 0, 3, 1, 1], np.int32)
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
        "mla_decode",
        _mla_decode,
        {
            "q": normal(4, 2, 6, 40),
            "cache": normal(9, 16, 40),
            "block_table": integers(0, 9, 4, 3),
            "seq_lens": np.array([2, 48, 0, 17], np.int32),
        },
        specs=(ROWS, ALL, ROWS, ROWS),
        out_specs=(ROWS, ROWS),
        symbolic=("b, 2, 6, 40", "p, 16, 40", "b, 3", "b"),
        mismatch=(("cache", 2), ("block_table", 0), ("seq_lens", 0)),
        primitive="jaxkern_mla_decode",
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
    ),
    Case(
        "dispatch",
        _dispatch,
        _MOE,
        specs=(ROWS, ROWS, ROWS),
        out_specs=(ROWS, ROWS, ROWS),
        unsharded_call=_dispatch_in_parts,
        grad=("x",),
        symbolic=("t, 24", "t, 3", "t, 3"),
        mismatch=(("expert_ids", 0), ("weights", 1)),
        primitive="jaxkern_gather_rows",
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
        sharded_call=lambda *arrays, **kwargs: _combine(*arrays, axis_name="x", **kwargs),
    ),
]

# The calls that have a Hopper kernel, again through it. A GPU's tensor cores keep 13 bits of a sum, and XLA's division
# there, the reference's, is not correctly rounded: one e4m3 step.
HOPPER = [case for case in CASES if case.id in ("quantize", "gemm-fp8")]
CASES += [
    dataclasses.replace(
        case,
        call=functools.partial(case.call, implementation=HOPPER_IMPLEMENTATION),
        variant=f"{case.variant}-{HOPPER_IMPLEMENTATION}".lstrip("-"),
        implementation=HOPPER_IMPLEMENTATION,
        exact=case.exact and HOPPER_IMPLEMENTATION == "sim",
        rtol=case.rtol if HOPPER_IMPLEMENTATION == "sim" else 0.07 if case.exact else 2.0**-11,
    )
    for case in HOPPER
    if HOPPER_IMPLEMENTATION != "none"
]
