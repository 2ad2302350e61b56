"""The table that the contract suite (test_contract.py) runs over: one `Case` for each op.

A new op gets jit, vmap, grad, remat, scan, shard_map, export, donation, determinism and the error tests by adding one.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxkern

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
    sharded_call: what to run inside shard_map, where that differs from `call`.
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


def _combine(x, expert_ids, weights, axis_name=None, **kwargs):
    """An expert that squares its rows, so that the gradients of dispatch, expert and combine all count."""
    received, handle = jaxkern.dispatch(x, expert_ids, weights, num_experts=8, axis_name=axis_name, **kwargs)
    return jaxkern.combine(received * received, handle)


_VALUES, _SCALES = _fp8(8, 200, block_shape=(1, 128))
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
        symbolic=("b, 200", "b, 2"),
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
        "dispatch",
        _dispatch,
        _MOE,
        specs=(ROWS, ROWS, ROWS),
        out_specs=(ROWS, ROWS, ROWS),
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
