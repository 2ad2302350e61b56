"""Expert parallelism: `route`, `dispatch`, `combine`, `replay`.

On one device `dispatch` sorts token rows by expert and `combine` sums them back. Over mesh axes a token first crosses
to each rank that holds one of its experts, once for each; with axis_name=(outer, inner) once for each outer rank, then
inside it. Combine goes the same way back.

Every sum over a token's experts runs in float32 along one binary tree over the expert ids, [0, n) halved again and
again. The experts of one rank are a subtree when the number of ranks is a power of two, so the result is the same to
the bit on 1, 2, 4 and 8 devices, in one level or two. With reduction="expert" it is so on any number.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _ffi, reference
from jaxkern._check import FLOATS, INT32, Sizes
from jaxkern.plan import plan as plan  # where one looks for it
from jaxkern.quantize import ScaledArray, ScaleFormat, check_scale_format, check_scaled, scaled, too_many_groups
from jaxkern.quantize import quantize as quantize_rows
from jaxkern.sums import sum_in_order

MAX_TOP_K = 64  # what the kernels hold in registers and on the stack
MOST_EXPERTS, MOST_EXPERT_GROUPS = 1024, 256  # that a Hopper kernel chooses from
LAYOUTS = ("expert", "rank", "masked")
TRANSPORTS = ("all_to_all", "ragged", "gather")
REDUCTIONS = ("rank", "expert")
AxisName = str | tuple[str | tuple[str, ...], ...] | None


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
    Implementations: cpu, xla, cuda, sim; the latter two take at most 1024 experts in 256 groups.
    Errors: TypeError for a dtype, ValueError for a shape, groups that do not divide the experts, or a top_k above 64
        or above what topk_groups groups hold.
    Source: DeepSeek-V3 report, section 2.1.2, equations 12 to 16.
    """
    sizes = Sizes("route")
    logits = sizes.check("logits", logits, (jnp.float32,), "t e")
    bias = sizes.check("bias", bias, (jnp.float32,), "e")
    experts = sizes["e"]
    num_groups, topk_groups, top_k = (
        sizes.require_integer(name, value)
        for name, value in (("num_groups", num_groups), ("topk_groups", topk_groups), ("top_k", top_k))
    )
    sizes.require(num_groups >= 1 and experts % num_groups == 0, f"num_groups={num_groups} must divide e={experts}")
    sizes.require(1 <= topk_groups <= num_groups, f"topk_groups={topk_groups} must be in 1..num_groups={num_groups}")
    limit = min(topk_groups * (experts // num_groups), MAX_TOP_K)
    held = f"what {topk_groups} groups hold, at most {MAX_TOP_K}"
    sizes.require(1 <= top_k <= limit, f"top_k={top_k} must be in 1..{limit}, {held}")
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
        weights = weights / (sum_in_order(weights) + 1e-20)
    return expert_ids, weights * scale


@_ffi.exportable
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ranks", "slots", "keys", "source", "sent", "select"],
    meta_fields=["axis_name", "transport"],
)
@dataclasses.dataclass(frozen=True)
class Level:
    """How the rows of one rank's t tokens cross one mesh axis: into slabs, one for each rank, of `rows` rows.

    ranks: int32 [t, k], the rank of each choice; -1 where it selects nothing
    slots: int32 [t, k], the slab row, rank * rows + row, of a token's first choice on each rank; -1 elsewhere
    keys: int32 [t, k], the rank of each slot; -1 where there is none
    source: int32 [ranks * rows], the choice (token * k + choice) that each slab row holds; -1 where it holds none
    sent: int32 [ranks], the rows that go to each rank
    select: int32 [ranks * rows], the token of all those gathered that each row received is; None: row for row
    """

    ranks: jax.Array
    slots: jax.Array
    keys: jax.Array
    source: jax.Array
    sent: jax.Array
    select: jax.Array | None
    axis_name: str | tuple[str, ...] | None
    transport: str

    @property
    def size(self) -> int:
        return self.sent.shape[0]


@_ffi.exportable
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "group_sizes",
        "dropped",
        "expert_ids",
        "weights",
        "slots",
        "source",
        "token_ids",
        "token_weights",
        "levels",
    ],
    meta_fields=["layout", "num_experts", "implementation"],
)
@dataclasses.dataclass(frozen=True)
class Handle:
    """What `combine` must know of a `dispatch`: arrays only, so it passes through jit, remat and scan.

    group_sizes: int32, the rows of each group received: [local experts], as `grouped_gemm` and `masked_grouped_gemm`
        want them; [ranks] with layout "rank", the rows from each rank of the last level's axis
    dropped: int32 [local experts], the assignments of each expert that found no row, anywhere on the way
    expert_ids, weights: int32 and float32 [n, k], of the n rows that arrived at this rank, ids counted from this rank's
        first expert; -1 and 0 where the expert lives elsewhere. With layout "rank" they belong to the rows received.
    slots: int32 [n, k], the row of each assignment; -1 where there is none. None with layout "rank".
    source: int32 [rows], the assignment (row * k + choice) that each row holds; -1 where it holds none. Likewise.
    token_ids, token_weights: [t, k], this rank's own expert_ids and weights as `dispatch` got them
    levels: the way there, a `Level` for each mesh axis
    """

    group_sizes: jax.Array
    dropped: jax.Array
    expert_ids: jax.Array
    weights: jax.Array
    slots: jax.Array | None
    source: jax.Array | None
    token_ids: jax.Array
    token_weights: jax.Array
    levels: tuple[Level, ...]
    layout: str
    num_experts: int
    implementation: str | None


def dispatch(
    x: jax.Array | ScaledArray,
    expert_ids: jax.Array,
    weights: jax.Array,
    *,
    num_experts: int,
    axis_name: AxisName = None,
    layout: Literal["expert", "rank", "masked"] = "expert",
    capacity: int | None = None,
    wire_capacity: int | tuple[int | None, ...] | None = None,
    expert_alignment: int = 1,
    zero_gaps: bool = True,
    quantize: Literal["fp8"] | None = None,
    scale_format: ScaleFormat = "float32",
    transport: str | tuple[str | None, ...] | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array | ScaledArray, Handle]:
    """Brings each token to its experts.

    Shapes and dtypes: x float32 or bfloat16 [t, h], or a ScaledArray of it with blocks (1, 128), expert_ids int32
        [t, k] (-1, or any id that is no expert, selects nothing), weights float32 [t, k] -> received and a `Handle`.
        received has x's dtype, or is a ScaledArray if x is one or with quantize="fp8", which gives the values and
        scales of `jaxkern.quantize`, in scale_format; a ScaledArray travels as it is, whatever they say. By layout:
        "expert": [capacity, h], ready for `grouped_gemm`. The rows of one expert are together, in the order of (source
        rank, token, choice); each expert's first row is a multiple of expert_alignment.
        "masked": [local experts, capacity, h], ready for `masked_grouped_gemm`: the rows of each expert come first.
        "rank": [ranks * wire_capacity, h], a token once, however many of its experts live here: handle.expert_ids and
        handle.weights say which. The rows from each rank of the (last) axis come first in its share, in token order.
        Rows that hold no token are zero bytes; without zero_gaps nobody writes them, and they hold anything, which has
        no effect on the grouped products and `combine`.
    Units: capacity and wire_capacity, the rows that one rank sends to another (one number, or one for each level), are
        by default the exact worst case for tokens whose experts are distinct. What does not fit is dropped and counted
        in handle.dropped, by expert; nothing is ever written elsewhere. What comes first in the order above fits first.
    Sharding: inside shard_map, axis_name being the mesh axis that the experts are spread over, in order: expert e lives
        on rank e // (num_experts / ranks). The tokens are this rank's own, as many on every rank. (outer, inner)
        crosses two axes one after the other, hosts and the devices of each: a token crosses the outer one once for each
        host that needs it. An axis may itself be a tuple of mesh axes that act as one. None: all experts are here.
        transport, one for all levels or one for each: "all_to_all" exchanges slabs of wire_capacity rows, "ragged" only
        the rows in them (jax.lax.ragged_all_to_all, not on CPUs), "gather" all tokens, of which each rank selects its
        own. None: "all_to_all" where there is a wire_capacity, else "gather", which then moves no more bytes and copies
        less. What is received is the same to the bit.
    Gradient: to x, where it is not quantised, and, through the handle, to the weights; the gradient of dispatch is an
        unweighted combine.
    Implementations: cpu, xla, cuda, sim; the latter two take at most 1024 experts of one device.
    Errors: TypeError for a dtype, ValueError for a shape, more than 64 choices, ranks that do not divide the experts,
        an unknown name, or a capacity that the layout or the transport has no use for; NotImplementedError for "ragged"
        on a CPU.
    Source: DeepSeek-V3 report, section 3.2; DeepEP's `dispatch`, plain, expanded and low-latency.
    """
    sizes = Sizes("dispatch")
    x = _rows(sizes, x)
    expert_ids = sizes.check("expert_ids", expert_ids, INT32, "t k")
    weights = sizes.check("weights", weights, (jnp.float32,), "t k")
    t, k = expert_ids.shape
    axes = _levels(axis_name)
    ranks = [jax.lax.axis_size(axis) for axis in axes]
    _check_names(sizes, layout, quantize, scale_format)
    sizes.require(1 <= k <= MAX_TOP_K, f"expert_ids must hold 1..{MAX_TOP_K} choices a token, got k={k}")
    num_experts = sizes.require_size("num_experts", num_experts)
    sizes.require(
        num_experts % math.prod(ranks) == 0, f"the {math.prod(ranks)} ranks must divide num_experts={num_experts}"
    )
    expert_alignment = sizes.require_size("expert_alignment", expert_alignment)
    sizes.require(layout == "expert" or expert_alignment == 1, "expert_alignment needs layout 'expert'")
    if layout == "rank":
        sizes.require(capacity is None, "layout 'rank' is what crosses: wire_capacity bounds it, not capacity")
        axes, ranks = axes or [None], ranks or [1]
    capacity = sizes.optional_size("capacity", capacity)
    transports = _per_level(sizes, "transport", transport, len(axes), functools.partial(_check_transport, sizes))
    wire_capacities = _per_level(sizes, "wire_capacity", wire_capacity, len(axes), sizes.optional_size)
    *x, expert_ids, weights = _ffi.align(*x, expert_ids, weights)
    token_ids, token_weights = expert_ids, weights

    # The way of each token: one level after the other, then to the rows of its experts. Several levels leave the tokens
    # in another order than one, so each carries its place in that.
    if len(axes) > 1:
        here = jax.lax.axis_index(tuple(jax.tree.leaves(axes)))
        place = here * t + jnp.arange(t, dtype=jnp.int32)[:, None]
    local_experts, levels, lost = num_experts, [], None
    for axis, size, rows, transport in zip(axes, ranks, wire_capacities, transports, strict=True):
        local_experts //= size
        transport = _choose_transport(sizes, transport, axis, rows, layout)
        level = _make_level(expert_ids, local_experts, size, axis, rows, transport, layout == "rank", implementation)
        lost = _count_lost(level, expert_ids, rows is not None, lost, local_experts)
        first_expert = (jax.lax.axis_index(axis) if axis else 0) * local_experts
        expert_ids = _forward(level, [expert_ids + 1], implementation)[0] - 1 - first_expert  # no row: 0 - 1
        expert_ids = jnp.where((expert_ids >= 0) & (expert_ids < local_experts), expert_ids, -1)
        if len(axes) > 1:
            place = _forward(level, [place], implementation)[0]
        levels.append(level)
    static = _Static(local_experts, "float32", "float32", False, implementation)
    weights = _spread(static, weights, None, (tuple(levels), None, None, None))
    slots = source = None
    if layout == "rank":
        group_sizes, dropped = (
            _exchange(levels[-1], levels[-1].sent),
            jnp.zeros_like(expert_ids, shape=(local_experts,)),
        )
        weights = jnp.where(expert_ids < 0, 0, weights)
    else:
        rows = capacity or _worst_case(expert_ids.shape, local_experts, expert_alignment, layout)
        order = jnp.argsort(place[:, 0], stable=True).astype(jnp.int32) if len(axes) > 1 else None
        slots, source, group_sizes, dropped = _ffi.call(
            ASSIGN_SLOTS,
            expert_ids if order is None else expert_ids[order],
            implementation=implementation,
            num_groups=local_experts,
            rows=rows * local_experts if layout == "masked" else rows,
            slabs=layout == "masked",
            alignment=expert_alignment,
        )
        if order is not None:
            slots = slots.at[order].set(slots, unique_indices=True)
            source = jnp.where(source < 0, -1, order[source // k] * k + source % k)
    handle = Handle(
        group_sizes,
        dropped if lost is None else dropped + lost,
        expert_ids,
        weights,
        slots,
        source,
        token_ids,
        token_weights,
        tuple(levels),
        layout,
        num_experts,
        implementation,
    )
    return _deliver(x, handle, scale_format if quantize else None, False, zero_gaps), handle


def combine(
    y: jax.Array,
    handle: Handle,
    *,
    weighted: bool | None = None,
    bias: jax.Array | None = None,
    reduction: Literal["rank", "expert"] = "rank",
    out_dtype=None,
    wire_dtype=None,
) -> jax.Array:
    """Brings the experts' rows back: each token's sum over its experts, times its weights if `weighted`.

    Shapes and dtypes: y float32 or bfloat16, as `dispatch` laid the rows out ([rows, h], or [local experts, rows, h]);
        bias float32 or bfloat16 [t, h], or None, is added to the sum: a shared expert's output -> [t, h] in out_dtype,
        float32 or bfloat16, by default y's. `weighted` is the default but for layout "rank", whose rows are the
        caller's sums over the experts of this rank: they are added up as they are.
    Units: sums are float32 and rounded once, to out_dtype. reduction="rank": each rank sums its own experts' rows, and
        the ranks' sums, which cross in wire_dtype (None: float32, or y's dtype with layout "rank"), are summed at the
        token, both along the tree that this module's first lines state. wire_dtype=bfloat16 moves half the bytes and
        rounds once more a level. reduction="expert": every expert's row crosses in y's dtype, top_k times as many, and
        is summed at the token along the same tree: the same bits on any number of ranks.
    Sharding: as the dispatch that made the handle; the way back is all_to_all, or ragged if the way there was.
    Gradient: to y, bias and the dispatch's weights; the gradient of combine is a weighted `replay`.
    Implementations: cpu, xla, cuda, sim; the one that dispatch ran.
    Errors: TypeError for a dtype, ValueError for other rows than the dispatch had, an unknown reduction, or weights or
        experts' rows asked of layout "rank".
    Source: DeepSeek-V3 report, section 3.2; DeepEP's `combine`.
    """
    rank_layout = handle.layout == "rank"
    sizes, dims = _sizes_of(handle, "combine")
    y = sizes.check("y", y, FLOATS, dims)
    weighted = not rank_layout if weighted is None else bool(weighted)
    sizes.require(not (rank_layout and weighted), "the rows of layout 'rank' are sums already, weighted must be False")
    sizes.require(reduction in REDUCTIONS, f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    sizes.require(not (rank_layout and reduction == "expert"), "layout 'rank' has no rows of experts to sum")
    dtypes = [y.dtype, y.dtype if rank_layout else np.dtype(np.float32)]
    for i, (name, dtype) in enumerate((("out_dtype", out_dtype), ("wire_dtype", wire_dtype))):
        dtypes[i] = dtypes[i] if dtype is None else sizes.require_dtype(name, dtype, FLOATS)
    sizes.known["t"] = handle.token_ids.shape[0]
    bias = _none(handle.token_weights) if bias is None else sizes.check("bias", bias, FLOATS, "t h")
    y = y.reshape(math.prod(y.shape[:-1]), y.shape[-1])
    index = _index(handle)
    weights, experts = handle.weights, _local_experts(handle)
    if reduction == "expert" and handle.levels:
        y, weights, experts = _rows_at_tokens(y, handle), handle.token_weights, handle.num_experts
        index = _index_at_tokens(handle)
    static = _Static(experts, dtypes[0].name, dtypes[1].name, weighted, handle.implementation)
    return _collect(static, y, weights, bias, index)


def replay(
    x: jax.Array | ScaledArray,
    handle: Handle,
    *,
    weighted: bool = False,
    zero_gaps: bool = True,
    quantize: Literal["fp8"] | None = None,
    scale_format: ScaleFormat = "float32",
) -> jax.Array | ScaledArray:
    """Dispatches other rows of the same tokens along a handle: no routing, the rows land where the first ones did.

    Shapes and dtypes: x as in `dispatch` -> received, as there. With `weighted` each expert's row is times its weight,
        rounded once: the gradient of `combine`.
    Sharding: as the dispatch that made the handle.
    Gradient: to x, where it is not quantised, and to the weights if they count.
    Implementations: cpu, xla, cuda, sim; the one that dispatch ran.
    Errors: as `dispatch`; ValueError for weights with layout "rank" or quantised rows.
    Source: DeepEP's `dispatch` with a handle.
    """
    sizes = Sizes("replay", t=handle.token_ids.shape[0])
    x = _rows(sizes, x)
    _check_names(sizes, handle.layout, quantize, scale_format)
    plain = handle.layout != "rank" and quantize is None and len(x) == 1
    sizes.require(plain or not weighted, "weighted needs rows of experts that are not quantised")
    return _deliver(x, handle, scale_format if quantize else None, weighted, zero_gaps)


def _rows(sizes, x):
    """What travels of x: itself, or its values and scales."""
    if isinstance(x, ScaledArray):
        sizes.require(x.block_shape == (1, 128), f"x must have blocks (1, 128), got {x.block_shape}")
        return list(check_scaled(sizes, "x", x.values, x.scales, x.block_shape, "t h"))
    return [sizes.check("x", x, FLOATS, "t h")]


def _check_names(sizes, layout, quantize, scale_format):
    sizes.require(layout in LAYOUTS, f"layout must be one of {LAYOUTS}, got {layout!r}")
    sizes.require(quantize in (None, "fp8"), f"quantize must be None or 'fp8', got {quantize!r}")
    check_scale_format(sizes, scale_format)


def _levels(axis_name) -> list:
    if axis_name is None or axis_name == ():
        return []
    return list(axis_name) if isinstance(axis_name, tuple) else [axis_name]


def _per_level(sizes, name, value, levels, check):
    """One value for each level, checked where there is none too."""
    values = [check(name, v) for v in (value if isinstance(value, tuple) else (value,))]
    values = values if isinstance(value, tuple) else values * levels
    sizes.require(len(values) == levels, f"{name} must be one for each of {levels} levels, got {value}")
    return values


def _check_transport(sizes, name, transport):
    allowed = transport is None or transport in TRANSPORTS
    sizes.require(allowed, f"{name} must be None or one of {TRANSPORTS}, got {transport!r}")
    return transport


def _choose_transport(sizes, transport, axis, rows, layout):
    if transport == "gather" and layout != "rank":
        sizes.require(rows is None, "transport 'gather' has no slabs that wire_capacity could bound")
    if axis is None:
        return "all_to_all"  # with itself
    return transport or ("gather" if rows is None else "all_to_all")


def _worst_case(shape, local_experts, alignment, layout):
    n, k = shape
    if layout == "masked":
        return n
    worst = n * min(k, local_experts)
    if alignment > 1:
        experts = min(local_experts, worst) if isinstance(worst, int) else local_experts  # that a token may choose
        worst = _ceil_to(worst + experts * (alignment - 1), alignment)
    return worst


def _sizes_of(handle, op):
    rows = handle.levels[-1].source.shape[0] if handle.layout == "rank" else handle.source.shape[0]
    if handle.layout == "masked":
        experts = handle.group_sizes.shape[0]
        return Sizes(op, experts=experts, rows=rows // experts), "experts rows h"
    return Sizes(op, rows=rows), "rows h"


def _local_experts(handle) -> int:
    return handle.num_experts // math.prod(level.size for level in handle.levels)


# The way across one mesh axis


def _make_level(expert_ids, local_experts, size, axis, rows, transport, exact, implementation) -> Level:
    """`exact`: what arrives is slabs, whatever the transport."""
    t, k = expert_ids.shape
    valid = (expert_ids >= 0) & (expert_ids < size * local_experts)
    ranks = jnp.where(valid, expert_ids // local_experts, -1)
    earlier = np.tri(k, k=-1, dtype=bool)  # [choice, earlier choice]
    repeated = ((ranks[:, :, None] == ranks[:, None, :]) & earlier).any(-1)
    keys = jnp.where(repeated, -1, ranks)
    token = jnp.arange(t, dtype=jnp.int32)[:, None]
    if transport == "gather" and not exact:
        slots = jnp.where(keys < 0, -1, keys * t + token)
        return Level(ranks, slots, keys, None, jnp.full_like(keys, t, shape=(size,)), None, axis, transport)
    rows = t if rows is None else rows
    slots, source, sent, _ = _ffi.call(
        ASSIGN_SLOTS, keys, implementation=implementation, num_groups=size, rows=size * rows, slabs=True, alignment=1
    )
    level = Level(ranks, slots, jnp.where(slots < 0, -1, keys), source, sent, None, axis, transport)
    if transport == "gather":
        arriving = _exchange(level, source)
        first_token = jnp.repeat(jnp.arange(size, dtype=jnp.int32) * t, rows, total_repeat_length=size * rows)
        level = dataclasses.replace(level, select=jnp.where(arriving < 0, -1, first_token + arriving // k))
    return level


def _slot_of_choice(level):
    """int32 [t, k]: the slab row by which the token reached the rank of each choice, not only of the first there."""
    same = (level.ranks[:, :, None] == level.keys[:, None, :]) & (level.keys[:, None, :] >= 0)
    return jnp.where(same, level.slots[:, None, :], -1).max(-1)


def _count_lost(level, expert_ids, bounded, lost, local_experts):
    """int32 [local experts]: the assignments that this level or one before had no room for; None if that cannot be."""
    if not bounded and lost is None:
        return None
    experts = level.size * local_experts
    here = jnp.where((_slot_of_choice(level) < 0) & (level.ranks >= 0), expert_ids, experts)
    counts = jnp.zeros_like(here, shape=(experts,)).at[here.reshape(-1)].add(1, mode="drop")
    counts = counts if lost is None else counts + lost
    return (
        _exchange(dataclasses.replace(level, transport="all_to_all"), counts)
        .reshape(-1, local_experts)
        .sum(0, dtype=jnp.int32)
    )


def _forward(level, arrays, implementation, scale_format=None, zero_gaps=True):
    """Rows [t, ...] -> those that arrive at this rank. With a scale_format, one array becomes its values and scales."""
    if level.transport != "gather":
        sent = _take(arrays, level.source, level.slots, implementation, scale_format, zero_gaps)
        return [_exchange(level, a) for a in sent]
    if scale_format:
        x = quantize_rows(arrays[0], scale_format=scale_format, implementation=implementation)
        arrays = [x.values, x.scales]
    arrays = [_as_integers(lambda a: jax.lax.all_gather(a, level.axis_name, tiled=True), a) for a in arrays]
    if level.select is not None:
        arrays = _take(arrays, level.select, level.select[:, None], implementation, zero_gaps=zero_gaps)
    return arrays


def _take(arrays, source, slots, implementation, scale_format=None, zero_gaps=True):
    """Rows by `source`: token * k + choice, with slots [t, k]."""
    call = functools.partial(_ffi.call, implementation=implementation, top_k=slots.shape[1], zero_gaps=zero_gaps)
    if scale_format:
        return call(GATHER_QUANTIZE_ROWS, arrays[0], source, slots, scale_format=scale_format)
    return [call(GATHER_ROWS, a, source, _none(source, jnp.float32), weighted=False)[0] for a in arrays]


def _exchange(level, x, back=False):
    """[ranks * rows, ...] -> the same, share i of this rank going to rank i as its share of this rank."""
    if level.axis_name is None:
        return x
    if level.transport == "ragged" and x.ndim > 1:
        return _as_integers(functools.partial(_exchange_ragged, level, back), x)

    def exchange(x):
        slabs = x.reshape(level.size, x.shape[0] // level.size, *x.shape[1:])
        return jax.lax.all_to_all(slabs, level.axis_name, split_axis=0, concat_axis=0).reshape(x.shape)

    return _as_integers(exchange, x)


def _exchange_ragged(level, back, x):
    sent = _ffi.only_on(("cuda", "rocm", "tpu"), level.sent, "dispatch: transport 'ragged' does not run on a CPU")
    received = _exchange(level, sent)
    rows, me = x.shape[0] // level.size, jax.lax.axis_index(level.axis_name)
    starts = jnp.arange(level.size, dtype=jnp.int32) * rows
    sizes = (received, sent) if back else (sent, received)
    starts, mine, *sizes = _ffi.align(starts, jnp.full(level.size, me * rows, jnp.int32), *sizes)
    return jax.lax.ragged_all_to_all(x, jnp.zeros_like(x), starts, sizes[0], mine, sizes[1], axis_name=level.axis_name)


def _as_integers(move, x):
    """Moves narrow floats as integers: XLA:CPU widens bfloat16 before a collective, and not all know 8-bit floats."""
    if x.dtype.itemsize > 2:
        return move(x)
    integers = {1: jnp.uint8, 2: jnp.uint16}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(move(jax.lax.bitcast_convert_type(x, integers)), x.dtype)


# The way to the experts and back. Each is the other's gradient.


@dataclasses.dataclass(frozen=True)
class _Static:
    experts: int  # whose rows are summed
    out_dtype: str
    wire_dtype: str
    weighted: bool
    implementation: str | None
    zero_gaps: bool = True  # in what `dispatch` returns


def _index(handle):
    """What the ways follow: (levels, slots, keys, source); no slots where rows are not sorted by expert."""
    if handle.slots is None:
        return handle.levels, None, None, None
    keys = jnp.where(handle.slots < 0, -1, handle.expert_ids)
    return handle.levels, handle.slots, keys, handle.source


def _deliver(x, handle, scale_format, weighted, zero_gaps):
    weighted, zero_gaps = bool(weighted), bool(zero_gaps)
    implementation = handle.implementation
    index = levels, slots, _, source = _index(handle)
    if len(x) == 1 and not scale_format:
        static = _Static(_local_experts(handle), x[0].dtype.name, "float32", weighted, implementation, zero_gaps)
        arrays = [_spread(static, x[0], handle.weights if weighted else None, index)]
    else:
        arrays = x
        scale_format = scale_format if len(x) == 1 else None
        for level in levels:
            arrays = _forward(level, arrays, implementation, scale_format, zero_gaps and slots is None)
            scale_format = None  # the first move quantises
        if slots is not None:
            arrays = _take(arrays, source, slots, implementation, scale_format, zero_gaps)
    if handle.layout == "masked":
        experts = handle.group_sizes.shape[0]
        arrays = [a.reshape(experts, a.shape[0] // experts, a.shape[1]) for a in arrays]
    return arrays[0] if len(arrays) == 1 else ScaledArray(*arrays)


def _spread(static, x, weights, index):
    """Rows of x [t, h] to where `index` says, times weights [n, k] if there are any."""

    @jax.custom_vjp
    def spread(x, weights, index):
        return _spread_rows(static, _arrive(static, x, index), weights, index)

    def forward(x, weights, index):
        arrived = _arrive(static, x, index)
        return _spread_rows(static, arrived, weights, index), (arrived if static.weighted else None, weights, index)

    def backward(saved, g):
        arrived, weights, index = saved
        d_x = _collect_rows(static, g, weights, None, index)
        if not static.weighted:
            return d_x, None, None
        (d_weights,) = _ffi.call(DOT_ROWS, g, index[1], arrived, implementation=static.implementation)
        return d_x, d_weights, None

    spread.defvjp(forward, backward)
    return spread(*_aligned(x, weights, index))


def _collect(static, y, weights, bias, index):
    """The sums [t, h] of the rows y that `index` tells, times weights [n, k] if they count, plus bias [t, h] if any."""

    @jax.custom_vjp
    def collect(y, weights, bias, index):
        return _collect_rows(static, y, weights if static.weighted else None, bias, index)

    def forward(y, weights, bias, index):
        return collect(y, weights, bias, index), (y, weights, bias, index)

    def backward(saved, g):
        y, weights, bias, index = saved
        arrived = _arrive(static, g, index)
        d_y = _spread_rows(static, arrived, weights if static.weighted else None, index).astype(y.dtype)
        d_weights = None
        if static.weighted:
            (d_weights,) = _ffi.call(DOT_ROWS, y, index[1], arrived, implementation=static.implementation)
        return d_y, d_weights, g.astype(bias.dtype) if bias.size else None, None

    collect.defvjp(forward, backward)
    return collect(*_aligned(y, weights, bias, index))


def _arrive(static, x, index):
    """What arrives; where it is sorted by expert next, nobody looks at rows that hold no token."""
    levels, slots, _, _ = index
    for level in levels:
        (x,) = _forward(level, [x], static.implementation, zero_gaps=static.zero_gaps and slots is None)
    return x


def _spread_rows(static, arrived, weights, index):
    _, slots, _, source = index
    if slots is None:
        return arrived
    weighted = weights is not None
    weights = weights if weighted else _none(source, jnp.float32)
    call = functools.partial(_ffi.call, implementation=static.implementation, zero_gaps=static.zero_gaps)
    return call(GATHER_ROWS, arrived, source, weights, top_k=slots.shape[1], weighted=weighted)[0]


def _collect_rows(static, y, weights, bias, index):
    levels, slots, keys, _ = index
    bias = _none(y) if bias is None else bias

    def total(rows, slots, keys, weights, experts, last):
        weights = jnp.ones_like(slots, jnp.float32) if weights is None else weights
        return _ffi.call(
            SUM_ROWS,
            rows,
            slots,
            keys,
            weights,
            bias if last else _none(bias),
            implementation=static.implementation,
            num_keys=experts,
            out_dtype=static.out_dtype if last else static.wire_dtype,
        )[0]

    y = y.astype(static.wire_dtype) if slots is None else total(y, slots, keys, weights, static.experts, not levels)
    for i, level in reversed(list(enumerate(levels))):
        y = total(_exchange(level, y, back=True), level.slots, level.keys, None, level.size, i == 0)
    return y


def _rows_at_tokens(y, handle):
    """Every expert's row, back at its token: [t * k, h]."""
    implementation = handle.implementation
    rows = _move(y, handle.slots.reshape(-1), handle.source, implementation)
    for level in reversed(handle.levels):
        t, k = level.slots.shape
        slabs, h = rows.shape[0] // k, rows.shape[1]
        # A slab row carries the rows of all k choices of its token.
        rows = _return(level, rows.reshape(slabs, k * h)).reshape(slabs * k, h)
        slots = _slot_of_choice(level)
        there = jnp.where(slots < 0, -1, slots * k + np.arange(k, dtype=np.int32)).reshape(-1)
        back = jnp.full_like(there, -1, shape=(rows.shape[0],))
        back = back.at[jnp.where(there < 0, rows.shape[0], there)].set(jnp.arange(t * k, dtype=jnp.int32), mode="drop")
        rows = _move(rows, there, back, implementation)
    return rows


def _return(level, rows):
    @jax.custom_vjp
    def back(rows, level):
        return _exchange(level, rows, back=True)

    back.defvjp(lambda rows, level: (back(rows, level), level), lambda level, g: (_exchange(level, g), None))
    return back(rows, level)


def _index_at_tokens(handle):
    ids = handle.token_ids
    valid = (ids >= 0) & (ids < handle.num_experts)
    slots = jnp.where(valid, jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape), -1)
    return (), slots, jnp.where(valid, ids, -1), slots.reshape(-1)


def _move(x, source, back, implementation):
    """Row source[i] of x as row i, each row going to one place at most; `back` is the inverse."""

    @jax.custom_vjp
    def move(x, source, back):
        return _take([x], source, source[:, None], implementation)[0]

    def forward(x, source, back):
        return move(x, source, back), (source, back)

    def backward(saved, g):
        source, back = saved
        return _take([g], back, back[:, None], implementation)[0], None, None

    move.defvjp(forward, backward)
    return move(*_ffi.align(x, source, back))


def _aligned(*trees):
    leaves, tree = jax.tree.flatten(trees)
    return tree.unflatten(_ffi.align(*leaves))


def _none(like, dtype=None):
    """An absent operand, varying over the mesh as `like` does."""
    return jnp.zeros_like(like, dtype, shape=(0, 0))


def _ceil_to(x, multiple):
    return -(-x // multiple) * multiple


def _hopper_refuses_route(scores, _, *, num_groups, **__):
    experts = scores.shape[1]
    if isinstance(experts, int) and experts > MOST_EXPERTS:
        return f"there must be at most {MOST_EXPERTS} experts, got {experts}"
    if num_groups > MOST_EXPERT_GROUPS:
        return f"num_groups must be at most {MOST_EXPERT_GROUPS}, got {num_groups}"
    return ""


ROUTE = _ffi.Op(
    "route",
    lambda scores, bias, *, top_k, **_: [((scores.shape[0], top_k), jnp.int32)],
    reference.route,
    hopper=_ffi.Kernel(
        layouts=lambda **_: ((None, None), (None,)),
        attributes=("num_groups", "topk_groups", "top_k"),
        refuses=_hopper_refuses_route,
    ),
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
    hopper=_ffi.Kernel(
        layouts=lambda **_: ((None,), (None,) * 4),
        attributes=("num_groups", "slabs", "alignment"),
        refuses=lambda ids, *, num_groups, **_: too_many_groups(num_groups, 0),
        workspaces=lambda ids, *, num_groups, **_: [((64, num_groups), jnp.int32)],  # counts: see cuda/moe/moe.h
    ),
)

# x [t, h] of any dtype, source int32 [rows], weights float32 [t, k] or [0, 0] -> [rows, h]: row i is
# x[source[i] // top_k], times its weight if `weighted`; where source is no assignment, zero or, without `zero_gaps`,
# anything.
GATHER_ROWS = _ffi.Op(
    "gather_rows",
    lambda x, source, weights, **_: [((source.shape[0], x.shape[1]), x.dtype)],
    reference.gather_rows,
    part_of="dispatch, combine",
    cpu=2,
    hopper=_ffi.Kernel(
        layouts=lambda **_: ((None,) * 3, (None,)), attributes=("top_k", "weighted", "zero_gaps"), version=2
    ),
)

# x [t, h] float32 or bfloat16, source int32 [rows], slots int32 [t, k] -> values float8_e4m3fn [rows, h], scales
# [rows, ceil(h / 128)]: gather_rows of x, quantised; where there is no row, zero bytes or, without `zero_gaps`,
# anything. slots, the inverse of source, changes nothing but the speed.
GATHER_QUANTIZE_ROWS = _ffi.Op(
    "gather_quantize_rows",
    lambda x, source, slots, *, scale_format, **_: scaled(
        source.shape[0], x.shape[1], block_shape=(1, 128), scale_format=scale_format
    ),
    reference.gather_quantize_rows,
    part_of="dispatch",
    cpu=2,
    hopper=_ffi.Kernel(
        layouts=lambda **_: ((None,) * 3, (None, (1, 0))),  # the scales as the grouped product loads them
        attributes=("top_k", "zero_gaps", "scale_format"),
        version=2,
    ),
)

# rows [c, h], slots and keys int32 [t, k], weights float32 [t, k], bias [t, h] or [0, 0] for none -> [t, h]: the sum
# along the tree over keys [0, num_keys), plus the bias, in float32.
SUM_ROWS = _ffi.Op(
    "sum_rows",
    lambda rows, slots, keys, weights, bias, *, out_dtype, **_: [((slots.shape[0], rows.shape[1]), out_dtype)],
    reference.sum_rows,
    part_of="dispatch, combine",
    cpu=2,
    hopper=_ffi.Kernel(layouts=lambda **_: ((None,) * 5, (None,)), attributes=("num_keys",)),
)

# rows [c, h], slots int32 [t, k], x [t, h] -> float32 [t, k]: the dot product of x[t] with rows[slots[t, j]].
DOT_ROWS = _ffi.Op(
    "dot_rows",
    lambda rows, slots, x: [(slots.shape, jnp.float32)],
    reference.dot_rows,
    part_of="combine",
    hopper=_ffi.Kernel(layouts=lambda **_: ((None,) * 3, (None,))),
)
