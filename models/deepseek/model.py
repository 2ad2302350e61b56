"""The DeepSeek-V3 model: `DeepseekForCausalLM`, its layers, and how they run on a mesh.

Paths of parameters are the public tensor names (model.layers.0.self_attn.q_a_proj.weight), except that the experts of a
layer are stacked: model.layers.3.mlp.experts.gate_proj.weight is [experts, out, in].

On a mesh every device runs the layers below on its own rows of the batch, inside one shard_map over all mesh axes.
Parameters are replicated, experts spread over the devices in order; `jaxkern.dispatch` and `jaxkern.combine` are the
only communication.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkern
from jaxkern.models.deepseek.config import Config, Rope, yarn_mscale

WEIGHT_BLOCK = (128, 128)


class QuantizedWeight(nnx.Variable):
    """The float8 values of a block-scaled weight. Not trained."""


class WeightScale(nnx.Variable):
    """The scales of a `QuantizedWeight`, one a block of 128 x 128. Not trained."""


class RouterBias(nnx.Variable):
    """The router's correction bias: moved by the load of the experts, never by a gradient. Always float32."""


class DeepseekForCausalLM(nnx.Module):
    """DeepSeek-V3 with its language model head.

    Attributes that may be set at any time: `implementation`, passed to every jaxkern op; `dtype`, of the activations;
    `fp8`, whether the layers' products run in FP8 (below); `expert_capacity`, the rows that one device's experts
    receive in a forward pass, None being the exact worst case (a smaller number saves memory and drops what does not
    fit: the training metric "dropped" counts it).

    With `fp8`, every projection, MLP and expert multiplies as DeepSeek-V3 does: activations quantised in blocks of
    (1, 128) as they come, weights in blocks of (128, 128), those of an FP8 checkpoint as they are, and the gradients'
    products likewise. The embedding, the head, the router, the norms and the attention core stay as they are; so do
    the parameters. It is set where the weights are FP8; without it FP8 weights multiply plain activations (weight
    only). Activations have the format of scales that config.json names.
    """

    def __init__(
        self,
        config: Config,
        *,
        rngs: nnx.Rngs,
        mesh: Mesh | None = None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    ):
        """Initialises every weight from a normal distribution of `config.initializer_range`.

        Shapes and dtypes: parameters in param_dtype, the router's bias in float32; activations in dtype.
        Sharding: on `mesh`, Explicit or Auto, experts spread over all its axes and everything else replicated.
        Errors: ValueError if the devices of the mesh do not divide the experts.
        """
        check_mesh(config, mesh)
        self.config = config
        self.mesh = mesh
        self.dtype = np.dtype(dtype)
        self.implementation = None
        self.fp8 = config.quantized
        self.expert_capacity = None
        self.checkpoint = Extras()
        init = Init(rngs, np.dtype(param_dtype), config.initializer_range, mesh)
        self.model = Decoder(config, init)
        self.lm_head = None if config.tie_word_embeddings else Weight(init, config.vocab_size, config.hidden_size)

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """The logits of every token.

        Shapes and dtypes: input_ids int32 [b, s]; attention_mask int or bool [b, s], 1 for real tokens, which must be
            next to each other in each row (padding on the left, on the right or on both sides); logits float32
            [b, s, vocab_size], meaningless at padding.
        Units: position ids count from a row's first real token.
        Sharding: any; a batch that the mesh's devices do not divide is padded.
        Gradient: to every `nnx.Param`.
        Implementations: `self.implementation`.
        Errors: TypeError for a dtype, ValueError for a shape, an id outside the vocabulary, or a mask with holes (the
            last two where the values are known, that is outside jit).
        """
        input_ids, attention_mask = check_inputs(self.config, input_ids, attention_mask)
        program, leaves = Program.of(self)
        return _forward(program)(leaves, input_ids, attention_mask)

    def save_pretrained(self, path, *, max_shard_bytes: int = 5 * 10**9):
        """Writes a checkpoint in the public layout: see `jaxkern.models.deepseek.save_pretrained`."""
        from jaxkern.models.deepseek import checkpoint

        checkpoint.save_pretrained(self, path, max_shard_bytes=max_shard_bytes)


class Extras:
    """What a checkpoint holds besides the model, to be written back: `tensors` by name, in host memory.

    Static in the model's graph and equal to itself only, so that no compiled function hands it to another model.
    """

    def __init__(self, tensors: dict[str, np.ndarray] | None = None):
        self.tensors = tensors or {}


# Layers. Each takes its input and a `Run`, which says how to compute.


@dataclasses.dataclass(frozen=True)
class Run:
    """How a forward pass computes: one for all layers.

    fp8: whether layers multiply in FP8, with scales of scale_format.
    axis_name: the mesh axes that the experts are spread over, hosts before the devices of each; None on one device.
    inference: nothing will be differentiated, so that tokens may go to their experts in FP8, and rows without one need
        not be zero.
    remat: whether each layer's activations are computed again in the backward pass instead of being kept.
    """

    dtype: np.dtype
    implementation: str | None = None
    fp8: bool = False
    scale_format: str = "float32"
    axis_name: tuple[str, ...] | str | None = None
    expert_capacity: int | None = None
    remat: bool = False
    inference: bool = False


@dataclasses.dataclass(frozen=True)
class Batch:
    """Where the tokens of one pass stand.

    cos, sin: float32 [b, s, rope / 2]
    seq_lens: int32 [b], the real tokens of a row, counted from its start; None: all of them
    valid: bool [b, s], which tokens go to experts; None: all
    """

    cos: jax.Array
    sin: jax.Array
    seq_lens: jax.Array | None
    valid: jax.Array | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["load", "balance", "dropped"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Routing:
    """How one layer routed the tokens of this device.

    load: float32 [experts], the tokens that chose each expert
    balance: float32 [], the sum over sequences of equation 17 without its factor alpha
    dropped: float32 [], assignments that found no row at their expert
    """

    load: jax.Array
    balance: jax.Array
    dropped: jax.Array


class Decoder(nnx.Module):
    """The embedding, the layers and the final norm."""

    def __init__(self, config: Config, init: "Init"):
        self.config = config
        self.embed_tokens = Weight(init, config.vocab_size, config.hidden_size)
        self.layers = nnx.List([DecoderLayer(config, init, i) for i in range(config.num_hidden_layers)])
        self.norm = Norm(init, config.hidden_size, config.rms_norm_eps)

    def __call__(self, input_ids, seq_lens, run: Run, prefix=None):
        """-> hidden states after the final norm, each layer's cache rows, each MoE layer's `Routing`.

        prefix: what `prefix_rows` made of tokens that come before each row.
        """
        b, s = input_ids.shape
        positions = jnp.broadcast_to(jnp.arange(s), (b, s))
        valid = None if seq_lens is None else positions < seq_lens[:, None]
        prefix = prefix or [None] * len(self.layers)
        before = 0 if prefix[0] is None else prefix[0].shape[1]
        batch = Batch(*rope_angles(self.config, before + positions), seq_lens, valid)
        x = self.embed(input_ids, run)
        rows, routings = [], []
        for layer, layer_prefix in zip(self.layers, prefix, strict=True):

            def apply(x, layer=layer, layer_prefix=layer_prefix):
                return layer(x, batch, run, layer_prefix)

            x, row, routing = jax.checkpoint(apply)(x) if run.remat else apply(x)
            rows.append(row)
            routings += [routing] if routing is not None else []
        return self.norm(x), rows, routings

    def prefix_rows(self, input_ids, run: Run):
        """input_ids [p], which all rows of all devices begin with -> each layer's cache rows [1, p, width]."""
        if run.axis_name is None:
            return self(input_ids[None], None, run)[1]
        # The first device's tokens alone go to experts.
        first = jax.lax.axis_index(run.axis_name) == 0
        seq_lens = jnp.where(first, input_ids.size, 0).astype(jnp.int32)[None]
        _, rows, _ = self(input_ids[None], seq_lens, run)
        return [jax.lax.psum(jnp.where(first, r, 0), run.axis_name) for r in rows]

    def absorbed(self, run: Run):
        """What `decode` multiplies by besides the parameters, of each layer: made once, not at every step."""
        return [layer.self_attn.absorbed(run) for layer in self.layers]

    def decode(self, input_ids, cache, absorbed, block_table, seq_lens, active, run: Run):
        """One step: input_ids [b, s] are the last s of each row's seq_lens tokens -> hidden states, new cache."""
        b, s = input_ids.shape
        positions = seq_lens[:, None] - s + jnp.arange(s, dtype=jnp.int32)
        valid = jnp.broadcast_to(active[:, None], (b, s))
        batch = Batch(*rope_angles(self.config, positions), seq_lens, valid)
        x = self.embed(input_ids, run)
        caches = []
        for layer, layer_cache, halves in zip(self.layers, cache, absorbed, strict=True):
            x, layer_cache = layer.decode(x, batch, layer_cache, halves, block_table, positions, run)
            caches.append(layer_cache)
        return self.norm(x), caches

    def embed(self, input_ids, run: Run):
        return jnp.take(self.embed_tokens.weight[...], input_ids, axis=0, mode="clip").astype(run.dtype)


class DecoderLayer(nnx.Module):
    def __init__(self, config: Config, init: "Init", index: int):
        self.input_layernorm = Norm(init, config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, init)
        self.post_attention_layernorm = Norm(init, config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, init) if config.is_moe(index) else MLP(config, init, config.intermediate_size)

    def __call__(self, x, batch: Batch, run: Run, prefix=None):
        attended, rows = self.self_attn(self.input_layernorm(x), batch, run, prefix)
        x = x + attended
        out, routing = self._mlp(self.post_attention_layernorm(x), batch, run)
        return x + out, rows, routing

    def decode(self, x, batch: Batch, cache, absorbed, block_table, positions, run: Run):
        normed = self.input_layernorm(x)
        attended, cache = self.self_attn.decode(normed, batch, cache, absorbed, block_table, positions, run)
        x = x + attended
        out, _ = self._mlp(self.post_attention_layernorm(x), batch, run)
        return x + out, cache

    def _mlp(self, x, batch, run):
        if isinstance(self.mlp, MoE):
            return self.mlp(x, batch.valid, run)
        return self.mlp(x, run), None


class Attention(nnx.Module):
    """Multi-head latent attention: expanded to full heads over a whole sequence, absorbed into the latent for decoding.

    A token leaves kv_lora_rank + qk_rope_head_dim values in the cache: its normed latent and its rotated key part.
    """

    def __init__(self, config: Config, init: "Init"):
        self.config = config
        heads, hidden, bias = config.num_attention_heads, config.hidden_size, config.attention_bias
        linear = functools.partial(Linear, init, quantized=config.quantized)
        if config.q_lora_rank is None:
            self.q_proj = linear(heads * config.qk_head_dim, hidden)
        else:
            self.q_a_proj = linear(config.q_lora_rank, hidden, bias=bias)
            self.q_a_layernorm = Norm(init, config.q_lora_rank)
            self.q_b_proj = linear(heads * config.qk_head_dim, config.q_lora_rank)
        self.kv_a_proj_with_mqa = linear(config.latent_width, hidden, bias=bias)
        self.kv_a_layernorm = Norm(init, config.kv_lora_rank)
        self.kv_b_proj = linear(heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
        self.o_proj = linear(hidden, heads * config.v_head_dim, bias=bias)

    def __call__(self, x, batch: Batch, run: Run, prefix=None):
        """prefix [1, p, width]: the cache rows of tokens before each row, which its own tokens see as well."""
        b, s, _ = x.shape
        q = jnp.concatenate(self._queries(x, batch, run), -1)
        rows = jnp.concatenate(self._latent(x, batch, run), -1)
        out, lse = self._attend(q, rows, run, causal=True, seq_lens=batch.seq_lens)
        if prefix is not None:
            # The same keys for all queries, which therefore need not be those of one row: as many at a time as keys.
            p, tokens = prefix.shape[1], b * s
            queries = jnp.pad(q.reshape(tokens, *q.shape[2:]), ((0, -tokens % p), (0, 0), (0, 0)))
            parts = self._attend(queries.reshape(-1, p, *q.shape[2:]), prefix, run, causal=False)
            parts = [y.reshape(-1, *y.shape[2:])[:tokens].reshape(b, s, *y.shape[2:]) for y in parts]
            outs, lses = zip((out, lse), parts, strict=True)
            out, _ = jaxkern.merge_attention(outs, lses, implementation=run.implementation)
        return self.o_proj(out.reshape(b, s, -1), run), rows

    def _attend(self, q, rows, run, **options):
        """q [b, s, h, nope + rope] to the expanded keys and values of cache rows [b or 1, s, width] -> out, lse."""
        heads, nope = self.config.num_attention_heads, self.config.qk_nope_head_dim
        latent, rope = jnp.split(rows, [self.config.kv_lora_rank], axis=-1)
        kv = self.kv_b_proj(latent, run).reshape(*rows.shape[:2], heads, -1)
        rope = jnp.broadcast_to(rope[:, :, None], (*kv.shape[:3], rope.shape[-1]))
        k, v = jnp.concatenate([kv[..., :nope], rope], -1), kv[..., nope:]
        k, v = (jnp.broadcast_to(x, (*q.shape[:3], x.shape[-1])) for x in (k, v))
        options |= {"softmax_scale": self.config.softmax_scale, "implementation": run.implementation}
        return jaxkern.mla_prefill(q, k, v, **options)

    def decode(self, x, batch: Batch, cache, absorbed, block_table, positions, run: Run):
        b, s, _ = x.shape
        to_latent, from_latent = absorbed
        q_nope, q_rope = self._queries(x, batch, run)
        rows = jnp.concatenate(self._latent(x, batch, run), -1)
        cache = jaxkern.kv_cache.append(
            cache,
            rows,
            block_table,
            positions,
            latent_dim=self.config.kv_lora_rank,
            implementation=run.implementation,
        )
        q_latent = per_head(q_nope, to_latent, run)
        out, _ = jaxkern.mla_decode(
            jnp.concatenate([q_latent, q_rope], -1),
            cache,
            block_table,
            batch.seq_lens,
            softmax_scale=self.config.softmax_scale,
            latent_dim=self.config.kv_lora_rank,
            causal=True,
            implementation=run.implementation,
        )
        return self.o_proj(per_head(out, from_latent, run).reshape(b, s, -1), run), cache

    def absorbed(self, run):
        """kv_b_proj as one matrix a head: nope -> latent [h, latent, nope] and latent -> v [h, v, latent]."""
        weight = self.kv_b_proj.matrix()
        if isinstance(weight, jaxkern.ScaledArray):
            weight = jaxkern.dequantize(weight, run.dtype, implementation=run.implementation)
        weight = weight.astype(run.dtype).reshape(self.config.num_attention_heads, -1, self.config.kv_lora_rank)
        to_latent, from_latent = jnp.split(weight, [self.config.qk_nope_head_dim], axis=1)
        return to_latent.swapaxes(1, 2), from_latent

    def _queries(self, x, batch, run):
        """-> [b, s, heads, nope], [b, s, heads, rope] rotated."""
        b, s, _ = x.shape
        if self.config.q_lora_rank is None:
            q = self.q_proj(x, run)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x, run)), run)
        q = q.reshape(b, s, self.config.num_attention_heads, self.config.qk_head_dim)
        nope, rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return nope, rotate(rope, batch.cos[:, :, None], batch.sin[:, :, None], self.config.rope_interleave)

    def _latent(self, x, batch, run):
        """-> [b, s, latent] normed, [b, s, rope] rotated: one key for all heads."""
        latent, rope = jnp.split(self.kv_a_proj_with_mqa(x, run), [self.config.kv_lora_rank], axis=-1)
        return self.kv_a_layernorm(latent), rotate(rope, batch.cos, batch.sin, self.config.rope_interleave)


class MLP(nnx.Module):
    def __init__(self, config: Config, init: "Init", width: int):
        self.gate_proj = Linear(init, width, config.hidden_size, quantized=config.quantized)
        self.up_proj = Linear(init, width, config.hidden_size, quantized=config.quantized)
        self.down_proj = Linear(init, config.hidden_size, width, quantized=config.quantized)

    def __call__(self, x, run: Run):
        weights = self.gate_proj.matrix(), self.up_proj.matrix(), self.down_proj.matrix()
        return swiglu(x.reshape(-1, x.shape[-1]), weights, None, run).reshape(x.shape)


class MoE(nnx.Module):
    """A router, the experts that it chooses from, and the experts that every token passes."""

    def __init__(self, config: Config, init: "Init"):
        self.config = config
        self.gate = Router(config, init)
        self.experts = Experts(config, init)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config, init, shared) if shared else None

    def __call__(self, x, valid, run: Run):
        b, s, hidden = x.shape
        expert_ids, weights, scores = self.gate(x, run)
        if valid is not None:
            expert_ids = jnp.where(valid.reshape(-1, 1), expert_ids, -1)
        received, handle = jaxkern.dispatch(
            x.reshape(-1, hidden),
            expert_ids,
            weights,
            num_experts=self.config.n_routed_experts,
            axis_name=run.axis_name,
            capacity=run.expert_capacity,
            zero_gaps=not run.inference,
            # As the experts would quantise them, only before they travel.
            quantize="fp8" if run.inference and run.fp8 and self.config.quantized else None,
            scale_format=run.scale_format,
            implementation=run.implementation,
        )
        shared = None if self.shared_experts is None else self.shared_experts(x, run).reshape(-1, hidden)
        out = jaxkern.combine(self.experts(received, handle.group_sizes, run), handle, bias=shared)
        return out.reshape(b, s, hidden), self._routing(scores.reshape(b, s, -1), expert_ids, valid, handle)

    def _routing(self, scores, expert_ids, valid, handle) -> Routing:
        """`scores` [b, s, experts]: the sigmoid of the router's logits. Balance: V3 report, equations 17 to 20."""
        experts, top_k = self.config.n_routed_experts, self.config.num_experts_per_tok
        valid = jnp.ones(scores.shape[:2], bool) if valid is None else valid
        tokens = jnp.maximum(valid.sum(1), 1).astype(jnp.float32)[:, None]
        # The report counts the largest scores, without the bias and the groups: what the router itself would choose.
        _, largest = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)
        chosen = jax.nn.one_hot(largest, experts).sum(2) * valid[..., None]
        frequency = chosen.sum(1) * (experts / top_k) / tokens
        share = (scores / (scores.sum(-1, keepdims=True) + 1e-20) * valid[..., None]).sum(1) / tokens
        return Routing(
            load=jnp.zeros(experts).at[jnp.where(expert_ids < 0, experts, expert_ids)].add(1, mode="drop"),
            balance=(frequency * share).sum(),
            dropped=handle.dropped.sum().astype(jnp.float32),
        )


class Router(nnx.Module):
    def __init__(self, config: Config, init: "Init"):
        self.config = config
        self.weight = init.normal(config.n_routed_experts, config.hidden_size)
        self.e_score_correction_bias = init.variable(RouterBias, jnp.zeros(config.n_routed_experts, jnp.float32))

    def __call__(self, x, run: Run):
        """-> expert ids int32 [t, k], weights float32 [t, k], scores float32 [t, experts]. All in float32."""
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        logits = jaxkern.gemm(
            x, self.weight[...].astype(jnp.float32), out_dtype=jnp.float32, implementation=run.implementation
        )
        expert_ids, weights = jaxkern.route(
            logits,
            jax.lax.stop_gradient(self.e_score_correction_bias[...]),
            num_groups=self.config.n_group,
            topk_groups=self.config.topk_group,
            top_k=self.config.num_experts_per_tok,
            scale=self.config.routed_scaling_factor,
            normalize=self.config.norm_topk_prob,
            implementation=run.implementation,
        )
        return expert_ids, weights, jax.nn.sigmoid(logits)


class Experts(nnx.Module):
    """The routed experts of one layer, stacked; on a mesh, those of this device."""

    def __init__(self, config: Config, init: "Init"):
        linear = functools.partial(Linear, init, quantized=config.quantized, experts=config.n_routed_experts)
        self.gate_proj = linear(config.moe_intermediate_size, config.hidden_size)
        self.up_proj = linear(config.moe_intermediate_size, config.hidden_size)
        self.down_proj = linear(config.hidden_size, config.moe_intermediate_size)

    def __call__(self, x, group_sizes, run: Run):
        weights = self.gate_proj.matrix(), self.up_proj.matrix(), self.down_proj.matrix()
        return swiglu(x, weights, group_sizes, run)


class Linear(nnx.Module):
    """y = x weight^T (+ bias), weight [out, in] or [experts, out, in], plain or block-scaled FP8."""

    def __init__(self, init: "Init", out: int, width: int, *, bias=False, quantized=False, experts: int | None = None):
        shape = (out, width) if experts is None else (experts, out, width)
        if quantized:
            scaled = init.quantized(*shape)
            self.weight = init.variable(QuantizedWeight, scaled.values, spread=experts is not None)
            self.weight_scale_inv = init.variable(WeightScale, scaled.scales, spread=experts is not None)
        else:
            self.weight = init.normal(*shape, spread=experts is not None)
        if bias:
            self.bias = init.variable(nnx.Param, jnp.zeros(out, init.dtype))

    def __call__(self, x, run: Run):
        out = linear(x.reshape(-1, x.shape[-1]), self.matrix(), None, run).reshape(*x.shape[:-1], -1)
        return out + self.bias[...].astype(out.dtype) if hasattr(self, "bias") else out

    def matrix(self) -> jax.Array | jaxkern.ScaledArray:
        if isinstance(self.weight, QuantizedWeight):
            return jaxkern.ScaledArray(self.weight[...], self.weight_scale_inv[...], WEIGHT_BLOCK)
        return self.weight[...]


class Weight(nnx.Module):
    """One matrix: the embedding, or the head."""

    def __init__(self, init: "Init", rows: int, width: int):
        self.weight = init.normal(rows, width)


class Norm(nnx.Module):
    """RMS norm: in float32, rounded to x's dtype before the weight, as the released model's code has it."""

    def __init__(self, init: "Init", width: int, eps: float = 1e-6):
        self.weight = init.variable(nnx.Param, jnp.ones(width, init.dtype))
        self.eps = eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        # XLA:CPU's order of additions depends on the number of rows; written out they are several kernels on a GPU.
        total = jax.lax.platform_dependent(
            x32 * x32, cpu=jaxkern.sum_in_order, default=functools.partial(jnp.sum, axis=-1, keepdims=True)
        )
        # Not rsqrt: XLA:CPU's is an approximation, with other bits for four rows at a time than for one.
        x32 = x32 * jnp.sqrt(1 / (total / x.shape[-1] + self.eps))
        return self.weight[...].astype(x.dtype) * x32.astype(x.dtype)


def linear(x, weight, group_sizes, run: Run):
    """x [t, k] x weight [n, k] -> [t, n]; with group_sizes the rows of each expert x its [n, k] of [experts, n, k]."""
    groups = () if group_sizes is None else (group_sizes,)
    options = {"out_dtype": run.dtype, "implementation": run.implementation}
    if isinstance(x, jaxkern.ScaledArray) or not run.fp8:
        if not isinstance(weight, jaxkern.ScaledArray):
            weight = weight.astype(run.dtype)
        if groups:
            return jaxkern.grouped_gemm(x, weight, group_sizes, zero_gaps=not run.inference, **options)
        return jaxkern.gemm(x, weight, **options)
    fp8 = jaxkern.fp8_grouped_linear if groups else jaxkern.fp8_linear
    return fp8(x, weight, *groups, scale_format=run.scale_format, **options)


def swiglu(x, weights, group_sizes, run: Run):
    """down(silu(gate(x)) * up(x)) for rows x [t, hidden], each weight of (gate, up, down) as in `linear`."""
    if run.fp8 and isinstance(weights[0], jaxkern.ScaledArray):
        return _fused_swiglu(run, x, weights, group_sizes)
    return _swiglu(run, x, weights, group_sizes)


def _swiglu(run, x, weights, group_sizes):
    gate, up, down = weights
    return linear(
        jax.nn.silu(linear(x, gate, group_sizes, run)) * linear(x, up, group_sizes, run), down, group_sizes, run
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_swiglu(run, x, weights, group_sizes):
    """FP8 from end to end: x quantised once, and what lies between the products is written only in FP8."""
    gate, up, down = weights
    options = {"scale_format": run.scale_format, "implementation": run.implementation}
    x = x if isinstance(x, jaxkern.ScaledArray) else jaxkern.quantize(x, **options)
    both = linear(x, gate, group_sizes, run), linear(x, up, group_sizes, run)
    num_rows = None if group_sizes is None else group_sizes.sum()
    return linear(jaxkern.swiglu_quantize(both, num_rows=num_rows, **options), down, group_sizes, run)


def _fused_swiglu_forward(run, x, weights, group_sizes):
    return _fused_swiglu(run, x, weights, group_sizes), (x, weights, group_sizes)


def _fused_swiglu_backward(run, saved, g):
    x, weights, group_sizes = saved
    (dx,) = jax.vjp(lambda x: _swiglu(run, x, weights, group_sizes), x)[1](g)
    return dx, None, None  # the weights are frozen


_fused_swiglu.defvjp(_fused_swiglu_forward, _fused_swiglu_backward)


def per_head(x, weights, run: Run):
    """[b, s, h, k] x [h, n, k] -> [b, s, h, n]."""
    b, s, h, k = x.shape
    gemm = functools.partial(jaxkern.gemm, out_dtype=x.dtype, implementation=run.implementation)
    out = jax.vmap(gemm)(x.reshape(b * s, h, k).swapaxes(0, 1), weights)
    return out.swapaxes(0, 1).reshape(b, s, h, -1)


def head(parts: dict, x, run: Run):
    """The logits, float32, of hidden states after the final norm."""
    weight = (parts["lm_head"] or parts["model"].embed_tokens).weight[...]
    rows, weight = x.reshape(-1, x.shape[-1]), weight.astype(x.dtype)
    logits = jaxkern.gemm(rows, weight, out_dtype=jnp.float32, implementation=run.implementation)
    return logits.reshape(*x.shape[:-1], -1)


def rope_angles(config: Config, positions):
    """cos and sin, float32 [..., rope / 2], of int positions [...]."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config.rope, config.qk_rope_head_dim)
    factor = np.float32(rope_attention_factor(config.rope))
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rope_frequencies(rope: Rope, dim: int) -> np.ndarray:
    """Radians a token of each pair, float32 [dim / 2]. YaRN: slow pairs are interpolated, fast ones are left alone."""
    plain = rope.theta ** -(np.arange(0, dim, 2) / dim)
    if rope.factor is None:
        return plain.astype(np.float32)

    def pair_that_turns(rotations):
        return dim * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * log_theta)

    log_theta = math.log(rope.theta)
    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    slow = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return (plain / rope.factor * slow + plain * (1 - slow)).astype(np.float32)


def rope_attention_factor(rope: Rope) -> float:
    if rope.factor is None:
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def rotate(x, cos, sin, interleave: bool):
    """Rotates pairs of the last axis, neighbours if `interleave`, else i and i + half. Result: firsts, then seconds.

    The order of the result is one for queries, keys and the cache, and no product depends on it.
    """
    x32 = x.astype(jnp.float32)
    half = x.shape[-1] // 2
    first, second = (x32[..., ::2], x32[..., 1::2]) if interleave else (x32[..., :half], x32[..., half:])
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Init:
    """How parameters are made and where they are put."""

    rngs: nnx.Rngs
    dtype: np.dtype
    std: float
    mesh: Mesh | None

    def normal(self, *shape: int, spread: bool = False) -> nnx.Param:
        make = _normal(shape, self.std, self.dtype, self._sharding(spread))
        return nnx.Param(make(self.rngs.params()))

    def quantized(self, *shape: int) -> jaxkern.ScaledArray:
        return jaxkern.quantize(_normal(shape, self.std, np.dtype(np.float32), None)(self.rngs.params()), WEIGHT_BLOCK)

    def variable(self, kind: type[nnx.Variable], value, spread: bool = False) -> nnx.Variable:
        sharding = self._sharding(spread)
        return kind(value if sharding is None else jax.device_put(value, sharding))

    def _sharding(self, spread):
        return self.mesh and NamedSharding(self.mesh, P(self.mesh.axis_names) if spread else P())


@functools.lru_cache(maxsize=256)
def _normal(shape, std, dtype, sharding):
    def make(key):
        return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


# Programs: what runs on every device of the mesh, compiled once for each structure of model.


@dataclasses.dataclass(frozen=True)
class Program:
    """The structure of a model without its arrays: what compiled programs are cached by."""

    graph: nnx.GraphDef
    tree: jax.tree_util.PyTreeDef
    specs: tuple[P, ...]
    config: Config
    mesh: Mesh | None
    run: Run

    @classmethod
    def of(cls, model: DeepseekForCausalLM, **options) -> tuple["Program", list[jax.Array]]:
        """-> the model's program and its arrays. `options` go to `Run`."""
        graph, state = nnx.split({"model": model.model, "lm_head": model.lm_head})
        paths, tree = jax.tree_util.tree_flatten_with_path(state)
        mesh = model.mesh
        axes = mesh.axis_names if mesh is not None else ()
        specs = tuple(P(axes) if is_spread(path) and mesh is not None else P() for path, _ in paths)
        axis_name = None if mesh is None else axes[0] if len(axes) == 1 else tuple(axes)
        run = Run(
            np.dtype(model.dtype),
            model.implementation,
            model.fp8,
            model.config.scale_format,
            axis_name,
            model.expert_capacity,
            **options,
        )
        return cls(graph, tree, specs, model.config, mesh, run), [leaf for _, leaf in paths]

    @property
    def rows(self) -> P:
        """The spec of an array whose first axis is the batch."""
        return P() if self.mesh is None else P(self.mesh.axis_names)

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def map(self, body: Callable, in_specs: tuple, out_specs) -> Callable:
        """`body(parts, *args)` on every device as a function of (leaves, *args); parts: {"model", "lm_head"}."""

        def call(leaves, *args):
            return body(nnx.merge(self.graph, self.tree.unflatten(leaves)), *args)

        if self.mesh is None:
            return call
        return jax.shard_map(call, mesh=self.mesh, in_specs=(list(self.specs), *in_specs), out_specs=out_specs)

    def place(self, x, spec: P):
        """Inside jit: x laid out by `spec`."""
        if self.mesh is None or x is None:
            return x
        sharding = NamedSharding(self.mesh, spec)
        if AxisType.Explicit in self.mesh.axis_types:
            return jax.sharding.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)

    def place_batch(self, *arrays, axis: int = 0):
        """Inside jit: arrays whose `axis` is the batch, padded with zeros to the devices and spread over them."""
        spec = P(*[None] * axis, *self.rows)
        return tuple(self.place(self.pad(x, axis), spec) if x is not None else None for x in arrays)

    def pad(self, x, axis: int = 0):
        missing = -x.shape[axis] % self.devices
        return jnp.pad(self.place(x, P()), [(0, missing if i == axis else 0) for i in range(x.ndim)])

    def unpad(self, x, b: int):
        """Inside jit: the first b rows; the inverse of `place_batch`."""
        return x if x.shape[0] == b else self.place(x, P())[:b]


def is_spread(path) -> bool:
    """Whether the parameter at this tree path belongs to the routed experts, which are spread over the mesh."""
    return any(getattr(key, "key", None) == "experts" for key in path)


@functools.lru_cache(maxsize=64)
def _forward(program: Program):
    def body(parts, input_ids, mask):
        run = program.run
        if mask is None:
            x, _, _ = parts["model"](input_ids, None, run)
            return head(parts, x, run)
        starts, seq_lens = bounds(mask)
        x, _, _ = parts["model"](roll_rows(input_ids, starts), seq_lens, run)
        return roll_rows(head(parts, x, run), -starts)

    @jax.jit
    def forward(leaves, input_ids, mask):
        b = input_ids.shape[0]
        if mask is None and b % program.devices:
            mask = jnp.ones_like(input_ids)
        input_ids, mask = program.place_batch(input_ids, mask)
        specs = (program.rows, None if mask is None else program.rows)
        return program.unpad(program.map(body, specs, program.rows)(leaves, input_ids, mask), b)

    return forward


def bounds(mask):
    """The first real token of each row and the number of real tokens, int32 [b] each."""
    return jnp.argmax(mask, axis=1).astype(jnp.int32), mask.sum(1, dtype=jnp.int32)


def roll_rows(x, starts):
    """Each row of x [b, s, ...] moved so that its element `starts` [b] comes first."""
    s = x.shape[1]
    index = (jnp.arange(s) + starts[:, None]) % s
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def check_inputs(config: Config, input_ids, attention_mask):
    """-> int32 ids [b, s] and an int32 mask or None, or an error. Values are checked where they are known."""
    where = "DeepseekForCausalLM"
    input_ids = integers(f"{where}: input_ids", input_ids)
    if input_ids.ndim != 2 or not input_ids.size:
        raise ValueError(f"{where}: input_ids must be [b, s] with b, s >= 1, got {list(input_ids.shape)}")
    input_ids = check_ids(f"{where}: input_ids", input_ids, config)
    if attention_mask is None:
        return input_ids, None
    attention_mask = check_mask(f"{where}: attention_mask", attention_mask, input_ids.shape)
    if (mask := known(attention_mask)) is not None:
        starts = (np.diff(mask, axis=1, prepend=0) == 1).sum(1)
        if (starts > 1).any():
            row = int(np.argmax(starts > 1))
            raise ValueError(f"{where}: attention_mask must have its 1s next to each other, row {row} has holes")
    return input_ids, attention_mask


def check_ids(name: str, x, config: Config):
    """-> int32 ids within the vocabulary, or an error."""
    if (ids := known(x)) is not None and ids.size:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"{name} must be in 0..{config.vocab_size - 1}, got {low}..{high}")
    return x.astype(jnp.int32)


def check_mask(name: str, x, shape):
    """-> int32 zeros and ones of `shape`, or an error."""
    x = integers(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have input_ids's shape {list(shape)}, got {list(x.shape)}")
    if (values := known(x)) is not None and ((values != 0) & (values != 1)).any():
        raise ValueError(f"{name} must hold 0 and 1")
    return x.astype(jnp.int32)


def integers(name: str, x):
    try:
        x = x if isinstance(x, jax.Array) else np.asarray(x)
    except ValueError:
        raise ValueError(f"{name} must have rows of one length: pad them, and pass an attention_mask") from None
    if not (jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool):
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    return x


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array on the host; every process of a mesh must ask for it."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def known(x) -> np.ndarray | None:
    """The values of x, unless it is traced or lies in part on other processes."""
    if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)


def check_mesh(config: Config, mesh: Mesh | None):
    if mesh is None:
        return
    if len(set(mesh.axis_types)) > 1:
        raise ValueError(
            f"DeepseekForCausalLM: the mesh's axes must all be Auto or all Explicit, got {mesh.axis_types}"
        )
    if config.n_routed_experts % mesh.size:
        raise ValueError(
            f"DeepseekForCausalLM: the mesh's {mesh.size} devices must divide n_routed_experts "
            f"{config.n_routed_experts}"
        )
