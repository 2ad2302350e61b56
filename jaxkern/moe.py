"""Expert parallelism: `route`, `dispatch`, `combine`.

On one device `dispatch` sorts token rows by expert and `combine` sums them back. Over a mesh axis a token first crosses
to each rank that holds one of its experts, once, and the partial sums of each rank cross back.

Every sum over a token's experts runs in float32 along one binary tree over the expert ids, [0, n) halved again and
again. The experts of one rank are a subtree when the number of ranks is a power of two, so the result is the same to
the bit on 1, 2, 4 and 8 devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _ffi, reference
from jaxkern._check import FLOATS, INT32, Sizes

MAX_TOP_K = 64  # what the kernels hold in registers and on the stack


def route(
    logits: jax.Array,
    bias: jax.Array,
    *,
    top_k: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses each token's experts: sigmoid scores, a correction bias, group-limited top-k.

    Shapes and dtypes: logits float32 [t, e], bias float32 [e] -> expert_ids int32 [t, top_k], weights float32
        [t, top_k]. Experts are in num_groups equal groups; only those of a token's topk_groups best groups can be
        chosen.
    Units: score = sigmoid(logit). Groups rank by the sum of their two largest score + bias, experts by score + bias, in
        falling order, ties to the lower index; a NaN ranks last. weights = scores without the bias, divided by their
        sum + 1e-20 if `normalize`, times `scale`.
    Sharding: shard_map over tokens.
    Gradient: of the weights, to the logits. The choice and the bias have none: the bias is moved by the load.
    Implementations: cpu, xla.
    Errors: TypeError for a dtype, ValueError for a shape, groups that do not divide the experts, or top_k experts that
        topk_groups groups do not hold.
    Source: DeepSeek-V3 report, section 2.1.2, equations 12 to 16.
    """
    sizes = Sizes("route")
    logits = sizes.check("logits", logits, (jnp.float32,), "t e")
    bias = sizes.check("bias", bias, (jnp.float32,), "e")
    experts = sizes["e"]
    sizes.require(num_groups >= 1 and experts % num_groups == 0, f"num_groups={num_groups} must divide e={experts}")
    sizes.require(1 <= topk_groups <= num_groups, f"topk_groups={topk_groups} must be in 1..num_groups={num_groups}")
    limit = min(topk_groups * (experts // num_groups), MAX_TOP_K)
    sizes.require(1 <= top_k <= limit, f"top_k={top_k} must be in 1..{limit}, what {topk_groups} groups hold")
    logits, bias = _ffi.align(logits, bias)
    scores = jax.nn.sigmoid(logits)
    (expert_ids,) = _ffi.call(
        ROUTE,
        jax.lax.stop_gradient(scores),
        jax.lax.stop_gradient(bias),
        implementation=implementation,
        num_groups=num_groups,
        topk_groups=topk_groups,
        top_k=top_k,
    )
    weights = jnp.take_along_axis(scores, expert_ids, axis=-1)
    if normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return expert_ids, weights * scale


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "group_sizes",
        "dropped",
        "weights",
        "slots",
        "keys",
        "source",
        "wire_slots",
        "wire_keys",
        "wire_source",
    ],
    meta_fields=["axis_name", "implementation"],
)
@dataclasses.dataclass(frozen=True)
class Handle:
    """What `combine` must know of a `dispatch`: arrays only, so it passes through jit, remat and scan.

    group_sizes: int32 [local experts], the rows of each expert, as `grouped_gemm` wants them
    dropped: int32 [local experts], the assignments of each expert that found no row
    weights: float32 [n, k], of the n tokens that arrived at this rank
    slots, keys: int32 [n, k], the row and the local expert of each assignment; -1 where there is none
    source: int32 [rows], the assignment (token * k + choice) that each row holds; -1 where it holds none
    wire_slots, wire_keys: int32 [t, k], for this rank's own t tokens: the slab row and the rank of each copy sent
    wire_source: int32 [ranks * t], as `source`, for the slabs sent
    """

    group_sizes: jax.Array
    dropped: jax.Array
    weights: jax.Array
    slots: jax.Array
    keys: jax.Array
    source: jax.Array
    wire_slots: jax.Array | None
    wire_keys: jax.Array | None
    wire_source: jax.Array | None
    axis_name: str | tuple[str, ...] | None
    implementation: str | None


def dispatch(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    *,
    num_experts: int,
    axis_name: str | tuple[str, ...] | None = None,
    capacity: int | None = None,
    expert_alignment: int = 1,
    implementation: str | None = None,
) -> tuple[jax.Array, Handle]:
    """Brings each token to its experts: rows grouped by expert, ready for `grouped_gemm`.

    Shapes and dtypes: x float32 or bfloat16 [t, h], expert_ids int32 [t, k] (-1, or any id that is no expert, selects
        nothing), weights float32 [t, k] -> received [rows, h] in x's dtype and a `Handle`. The rows of one expert are
        together, in the order of (source rank, token, choice); each expert's first row is a multiple of
        expert_alignment; rows of no expert are zero.
    Units: `capacity` is the number of received rows; None is the exact worst case. A smaller one drops what does not
        fit and counts it in handle.dropped, by expert; nothing is ever written elsewhere.
    Sharding: inside shard_map, axis_name being the mesh axis (or axes) that the experts are spread over, in order:
        expert e lives on rank e // (num_experts / ranks). The tokens are this rank's own, as many on every rank. None:
        all experts are here. A token crosses once for each rank that needs it.
    Gradient: to x and, through the handle, to the weights; the gradient of dispatch is an unweighted combine.
    Implementations: cpu, xla.
    Errors: TypeError for a dtype, ValueError for a shape, or ranks that do not divide the experts.
    Source: DeepSeek-V3 report, section 3.2.2; DeepEP's `dispatch`.
    """
    sizes = Sizes("dispatch")
    x = sizes.check("x", x, FLOATS, "t h")
    expert_ids = sizes.check("expert_ids", expert_ids, INT32, "t k")
    weights = sizes.check("weights", weights, (jnp.float32,), "t k")
    t, k = expert_ids.shape
    ranks = jax.lax.axis_size(axis_name) if axis_name else 1
    sizes.require(1 <= k <= MAX_TOP_K, f"expert_ids must hold 1..{MAX_TOP_K} choices a token, got k={k}")
    sizes.require(num_experts % ranks == 0, f"the {ranks} ranks must divide num_experts={num_experts}")
    sizes.require_size("expert_alignment", expert_alignment)
    local_experts = num_experts // ranks
    worst = ranks * t * min(k, local_experts)
    if expert_alignment > 1:
        worst = _ceil_to(worst + min(local_experts, worst) * (expert_alignment - 1), expert_alignment)
    rows = worst if capacity is None else capacity
    if capacity is not None:
        sizes.require_size("capacity", capacity)
    x, expert_ids, weights = _ffi.align(x, expert_ids, weights)
    call = functools.partial(_ffi.call, implementation=implementation)

    wire_slots = wire_keys = wire_source = None
    if axis_name:
        wire_keys = _first_of_each_rank(expert_ids, num_experts, local_experts)
        wire_slots, wire_source, _, _ = call(
            ASSIGN_SLOTS, wire_keys, num_groups=ranks, rows=ranks * t, slabs=True, alignment=1
        )
        send = functools.partial(_send, wire_source, wire_slots, wire_keys, axis_name, ranks, implementation)
        empty = (wire_source < 0)[:, None]
        (ids,) = call(GATHER_ROWS, expert_ids, wire_source, _none(weights), top_k=k, weighted=False)
        first_expert = jnp.repeat(jnp.arange(ranks, dtype=jnp.int32) * local_experts, t)[:, None]
        expert_ids = _exchange(jnp.where(empty, -1, ids - first_expert), axis_name, ranks)
        x, weights = send(x), send(weights)
    slots, source, group_sizes, dropped = call(
        ASSIGN_SLOTS, expert_ids, num_groups=local_experts, rows=rows, slabs=False, alignment=expert_alignment
    )
    keys = jnp.where(slots < 0, -1, expert_ids)
    received = _permute(x, source, slots, keys, local_experts, implementation)
    return received, Handle(
        group_sizes,
        dropped,
        weights,
        slots,
        keys,
        source,
        wire_slots,
        wire_keys,
        wire_source,
        axis_name,
        implementation,
    )


def combine(y: jax.Array, handle: Handle, *, weighted: bool = True) -> jax.Array:
    """Brings the experts' rows back: each token's sum over its experts, times its weights if `weighted`.

    Shapes and dtypes: y float32 or bfloat16 [rows, h], rows as `dispatch` laid them out -> [t, h] in y's dtype. Sums
        are float32 in the order that this module's first lines state, with one rounding at the end.
    Sharding: as the dispatch that made the handle; ranks exchange float32 partial sums.
    Gradient: to y and to the dispatch's weights; the gradient of combine is a weighted dispatch.
    Implementations: cpu, xla; the one that dispatch ran.
    Errors: TypeError for a dtype, ValueError for another number of rows than the dispatch had.
    Source: DeepSeek-V3 report, section 3.2.2; DeepEP's `combine`.
    """
    sizes = Sizes("combine", rows=handle.source.shape[0])
    y = sizes.check("y", y, FLOATS, "rows h")
    weights = handle.weights if weighted else jnp.ones_like(handle.weights)
    local_experts = handle.group_sizes.shape[0]
    out_dtype = jnp.float32 if handle.axis_name else y.dtype
    reduce = functools.partial(_reduce, implementation=handle.implementation)
    out = reduce(y, handle.slots, handle.keys, weights, handle.source, local_experts, out_dtype)
    if handle.axis_name:
        ranks = jax.lax.axis_size(handle.axis_name)
        partial_sums = _exchange(out, handle.axis_name, ranks)
        ones = jnp.ones_like(handle.wire_slots, jnp.float32)
        out = reduce(partial_sums, handle.wire_slots, handle.wire_keys, ones, handle.wire_source, ranks, y.dtype)
    return out


def _first_of_each_rank(expert_ids, num_experts, local_experts):
    """The rank of each choice, -1 where an earlier choice of the same token already goes there."""
    valid = (expert_ids >= 0) & (expert_ids < num_experts)
    ranks = jnp.where(valid, expert_ids // local_experts, -1)
    earlier = np.tri(expert_ids.shape[1], k=-1, dtype=bool)  # [choice, earlier choice]
    repeated = ((ranks[:, :, None] == ranks[:, None, :]) & earlier).any(-1)
    return jnp.where(repeated, -1, ranks)


def _send(source, slots, keys, axis_name, ranks, implementation, x):
    return _exchange(_permute(x, source, slots, keys, ranks, implementation), axis_name, ranks)


def _exchange(slabs, axis_name, ranks):
    """[ranks * t, ...] -> the same, slab i of this rank going to rank i as its slab of this rank."""
    shape = slabs.shape
    slabs = slabs.reshape(ranks, shape[0] // ranks, *shape[1:])
    return jax.lax.all_to_all(slabs, axis_name, split_axis=0, concat_axis=0).reshape(shape)


def _permute(x, source, slots, keys, num_keys, implementation):
    """Rows of x by `source`; `slots` is the inverse map, which the gradient sums along."""

    @jax.custom_vjp
    def permute(x, source, slots, keys):
        weights = _none(slots, jnp.float32)
        return _ffi.call(
            GATHER_ROWS, x, source, weights, implementation=implementation, top_k=slots.shape[1], weighted=False
        )[0]

    def forward(x, source, slots, keys):
        return permute(x, source, slots, keys), (source, slots, keys)

    def backward(saved, g):
        source, slots, keys = saved
        ones = jnp.ones_like(slots, jnp.float32)
        return _reduce(g, slots, keys, ones, source, num_keys, g.dtype, implementation), None, None, None

    permute.defvjp(forward, backward)
    return permute(*_ffi.align(x, source, slots, keys))


def _reduce(rows, slots, keys, weights, source, num_keys, out_dtype, implementation):
    """Sums of weights[t, j] * rows[slots[t, j]] over j, as a tree over the keys."""
    call = functools.partial(_ffi.call, implementation=implementation)

    @jax.custom_vjp
    def reduce(rows, weights, slots, keys, source):
        return call(SUM_ROWS, rows, slots, keys, weights, num_keys=num_keys, out_dtype=np.dtype(out_dtype).name)[0]

    def forward(rows, weights, slots, keys, source):
        return reduce(rows, weights, slots, keys, source), (rows, weights, slots, source)

    def backward(saved, g):
        rows, weights, slots, source = saved
        (d_rows,) = call(GATHER_ROWS, g, source, weights, top_k=slots.shape[1], weighted=True)
        (d_weights,) = call(DOT_ROWS, rows, slots, g)
        return d_rows.astype(rows.dtype), d_weights, None, None, None

    reduce.defvjp(forward, backward)
    rows, weights, slots, keys, source = _ffi.align(rows, weights, slots, keys, source)
    return reduce(rows, weights, slots, keys, source)


def _none(like, dtype=None):
    """An absent operand, varying over the mesh as `like` does."""
    return jnp.zeros_like(like, dtype, shape=(0, 0))


def _ceil_to(x, multiple):
    return -(-x // multiple) * multiple


ROUTE = _ffi.Op(
    "route",
    lambda scores, bias, *, top_k, **_: [((scores.shape[0], top_k), jnp.int32)],
    reference.route,
)

# expert_ids int32 [t, k] -> slots [t, k], source [rows], group_sizes [groups], dropped [groups].
# Groups follow one another, each start rounded up to `alignment`; with slabs each has the same share of the rows.
ASSIGN_SLOTS = _ffi.Op(
    "assign_slots",
    lambda ids, *, num_groups, rows, **_: [
        (ids.shape, jnp.int32),
        ((rows,), jnp.int32),
        ((num_groups,), jnp.int32),
        ((num_groups,), jnp.int32),
    ],
    reference.assign_slots,
    part_of="dispatch",
    sizes=("rows",),
)

# x [t, h] of any dtype, source int32 [rows], weights float32 [t, k] or [0, 0] -> [rows, h]: row i is
# x[source[i] // top_k], times its weight if `weighted`; zero where source is no assignment.
GATHER_ROWS = _ffi.Op(
    "gather_rows",
    lambda x, source, weights, **_: [((source.shape[0], x.shape[1]), x.dtype)],
    reference.gather_rows,
    part_of="dispatch, combine",
)

# rows [c, h], slots and keys int32 [t, k], weights float32 [t, k] -> [t, h].
SUM_ROWS = _ffi.Op(
    "sum_rows",
    lambda rows, slots, keys, weights, *, out_dtype, **_: [((slots.shape[0], rows.shape[1]), out_dtype)],
    reference.sum_rows,
    part_of="dispatch, combine",
)

# rows [c, h], slots int32 [t, k], x [t, h] -> float32 [t, k]: the dot product of x[t] with rows[slots[t, j]].
DOT_ROWS = _ffi.Op(
    "dot_rows",
    lambda rows, slots, x: [(slots.shape, jnp.float32)],
    reference.dot_rows,
    part_of="combine",
)
