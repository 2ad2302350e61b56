"""Training: the loss, the step, and the evaluation of a `DeepseekForCausalLM`."""

import collections
import functools
import time
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern.models.deepseek.model import (
    DeepseekForCausalLM,
    MoE,
    Program,
    QuantizedWeight,
    bounds,
    check_inputs,
    check_mask,
    head,
    is_spread,
    roll_rows,
)


def make_train_step(
    *,
    microbatches: int = 1,
    remat: bool = False,
    balance_factor: float = 1e-4,
    bias_update_speed: float = 1e-3,
) -> Callable[[DeepseekForCausalLM, nnx.Optimizer, dict], dict[str, jax.Array]]:
    """A compiled `step(model, optimizer, batch) -> metrics` that updates both in place: their old arrays are donated.

    >>> optimizer = nnx.Optimizer(model, deepseek.adamw(1e-4), wrt=nnx.Param)
    >>> step = deepseek.make_train_step(microbatches=4, remat=True)
    >>> metrics = step(model, optimizer, {"input_ids": tokens})  # [b, s + 1]

    Shapes and dtypes: batch["input_ids"] int [b, s + 1]; optional batch["attention_mask"], 0 and 1 of the same shape,
        the 1s next to each other; optional batch["loss_mask"] of the same shape, 1 for the tokens to learn to predict
        (default: all real ones). metrics: float32 arrays "loss", "balance_loss", "grad_norm", "max_violation",
        "dropped", "tokens" [] and "expert_load" [MoE layers, experts], and the number "tokens_per_second".
    Units: the objective is loss + balance_loss. loss: mean cross-entropy of the next token, in float32, over all
        predicted tokens of the batch. balance_loss: balance_factor times the sum over layers and mean over sequences of
        sum_i f_i P_i (V3 report, equations 17 to 20). expert_load: tokens that chose each expert; max_violation: the
        largest, over layers, of max load / mean load - 1. dropped: assignments beyond `model.expert_capacity`.
        tokens_per_second: the batch's b * s over the time since the step before it began; NaN for the first.
        microbatches: the batch goes through in so many parts, with the gradients of the whole. remat: each layer's
        activations are computed again in the backward pass. After the update each router's bias moves by
        bias_update_speed * sign(mean load - load); no gradient reaches it.
    Sharding: the model's mesh.
    Gradient: to every `nnx.Param` the optimizer was made for; gradients add up in float32. With `model.fp8` the
        products of linear layers, forward and backward, run in FP8 (`jaxkern.fp8_linear`); the parameters and what the
        optimizer does stay in their dtype.
    Errors: ValueError for a batch that microbatches does not divide, or a model with FP8 weights (load it with
        quantized=False, and set model.fp8 to train in FP8).
    Source: DeepSeek-V3 report, sections 2.1.2, 3.3 and 4.2.
    """
    if microbatches < 1:
        raise ValueError(f"make_train_step: microbatches must be at least 1, got {microbatches}")

    in_flight = collections.deque(maxlen=8)  # XLA:CPU deadlocks collectives when more than 32 steps are
    started = float("nan")

    def step(model, optimizer, batch):
        nonlocal started
        _check_trainable(model)
        batch = _check_batch(model, batch, microbatches)
        _join_mesh(model.mesh, model)
        _join_mesh(model.mesh, optimizer)
        if len(in_flight) == in_flight.maxlen:
            in_flight[0].block_until_ready()
        factors = np.float32(balance_factor), np.float32(bias_update_speed)
        metrics = _update(microbatches, remat)(model, optimizer, batch, *factors)
        in_flight.append(metrics["loss"])
        now = time.perf_counter()
        seconds, started = now - started, now
        return metrics | {"tokens_per_second": batch[0].shape[0] * (batch[0].shape[1] - 1) / seconds}

    return step


def evaluate(model: DeepseekForCausalLM, batches: Iterable[dict]) -> float:
    """The mean next-token cross-entropy over all predicted tokens of the batches, each as `make_train_step` takes it.

    Errors: TypeError for one batch instead of several, ValueError if no batch has a token to predict.
    """
    if isinstance(batches, Mapping):
        raise TypeError("evaluate: batches must be a list, or any other iterable, of dicts; got one dict")
    program, leaves = Program.of(model)
    total, tokens = 0.0, 0.0
    for batch in batches:
        loss, count = _evaluate(program)(leaves, _check_batch(model, batch, 1))
        total, tokens = total + float(loss), tokens + float(count)
    if not tokens:
        raise ValueError("evaluate: the batches have no token to predict")
    return total / tokens


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    max_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW after clipping to a global norm, with DeepSeek-V3's values. Vectors (norms, biases) do not decay."""

    def matrices(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(max_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=matrices),
    )


@functools.lru_cache(maxsize=16)
def _update(microbatches: int, remat: bool):
    """The compiled step; the two factors are arguments, so that changing them compiles nothing."""

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def update(model, optimizer, batch, balance_factor, bias_update_speed):
        program, _ = Program.of(model, remat=remat)
        objective = _objective(program)
        graph, trained, rest = nnx.split(model, optimizer.wrt, ...)
        scale = _loss_scale(program, batch)

        def of_part(trained, part, whole):
            _, leaves = Program.of(nnx.merge(graph, trained, rest))
            loss, sums = objective(leaves, part, whole)
            return loss * scale, sums

        gradients, sums = _accumulate(program, of_part, trained, batch, balance_factor, microbatches)
        gradients = jax.tree.map(lambda g: g / scale, gradients)
        sums["grad_norm"] = optax.tree.norm(gradients)
        optimizer.update(model, gradients)
        load = sums["expert_load"]
        layers = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)]
        for mlp, counts in zip(layers, load, strict=True):
            bias = mlp.gate.e_score_correction_bias
            bias[...] += bias_update_speed * jnp.sign(counts.mean() - counts)
        return sums | {"max_violation": _max_violation(load)}

    return update


def _loss_scale(program: Program, batch) -> float:
    """What the objective is multiplied by while gradients flow back: a power of two, so that nothing else changes.

    A mean over many tokens has gradients far below the 1e-4 that FP8 scales start at; those of the sum are not.
    """
    return 2.0 ** batch[0].size.bit_length() if program.run.fp8 else 1.0


def _objective(program: Program) -> Callable:
    """(leaves, part, whole) -> (objective, sums) of a part of a batch: (input_ids, attention_mask, loss_mask).

    `whole` is (predicted tokens, sequences, balance_factor) of the whole batch. The objectives and the sums of its
    parts add up to its own.
    """
    names = tuple(program.mesh.axis_names) if program.mesh is not None else ()

    def body(parts, part, whole):
        tokens, sequences, balance_factor = whole
        nll, _, routings = _token_losses(program, parts, *part)
        sums = {"loss": nll / tokens}
        if routings:
            sums["balance_loss"] = balance_factor * sum(r.balance for r in routings) / sequences
            sums["expert_load"] = jnp.stack([r.load for r in routings])
            sums["dropped"] = sum(r.dropped for r in routings)
        return jax.lax.psum(sums, names) if names else sums

    def objective(leaves, part, whole):
        sums = program.map(body, (program.rows, P()), P())(leaves, program.place_batch(*part), whole)
        sums = {"balance_loss": jnp.zeros(()), "expert_load": jnp.zeros((0, 0)), "dropped": jnp.zeros(())} | sums
        return sums["loss"] + sums["balance_loss"], sums

    return objective


def _token_losses(program: Program, parts, input_ids, attention_mask, loss_mask):
    """-> the sum of the cross-entropies of this device's rows [b, s + 1], their number, each MoE layer's `Routing`."""
    starts, seq_lens = bounds(attention_mask)
    input_ids, loss_mask = roll_rows(input_ids, starts), roll_rows(loss_mask, starts)
    x, _, routings = parts["model"](input_ids[:, :-1], jnp.maximum(seq_lens - 1, 0), program.run)
    logits = head(parts, x, program.run)
    targets = input_ids[:, 1:]
    real = jnp.arange(1, input_ids.shape[1]) < seq_lens[:, None]
    weights = (real & (loss_mask[:, 1:] != 0)).astype(jnp.float32)
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (nll * weights).sum(), weights.sum(), routings


def _accumulate(program: Program, of_part: Callable, trained, batch, balance_factor, microbatches: int):
    """-> gradients of the objective of the whole batch, its sums."""
    batch = [program.place(x, P()) for x in batch]
    _, attention_mask, loss_mask = batch
    sequences = jnp.float32(attention_mask.shape[0])
    predicted = (attention_mask[:, 1:] * attention_mask[:, :-1] * loss_mask[:, 1:]).sum().astype(jnp.float32)
    whole = jnp.maximum(predicted, 1.0), sequences, balance_factor
    grad = jax.grad(of_part, has_aux=True)
    if microbatches == 1:
        gradients, sums = grad(trained, batch, whole)
    else:
        # Part i is rows i, i + microbatches, ...: neighbours, often of one length, go to different parts.
        parts = [x.reshape(-1, microbatches, x.shape[1]).swapaxes(0, 1) for x in batch]

        def add(total, part):
            return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grad(trained, part, whole)), None

        shapes = jax.eval_shape(grad, trained, [x[0] for x in parts], whole)[1]
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), trained)
        start = zeros, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (gradients, sums), _ = jax.lax.scan(add, start, parts)
        gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, trained)
    return gradients, sums | {"tokens": predicted}


def _max_violation(load):
    return (load.max(1) / jnp.maximum(load.mean(1), 1e-9) - 1).max() if load.size else jnp.zeros(())


@functools.lru_cache(maxsize=16)
def _evaluate(program: Program):
    names = tuple(program.mesh.axis_names) if program.mesh is not None else ()

    def body(parts, *batch):
        loss, count, _ = _token_losses(program, parts, *batch)
        return jax.lax.psum((loss, count), names) if names else (loss, count)

    @jax.jit
    def run(leaves, batch):
        return program.map(body, (program.rows,) * 3, P())(leaves, *program.place_batch(*batch))

    return run


def _join_mesh(mesh, module: nnx.Module):
    """Spreads the arrays that are not on the mesh as the parameters are spread: those that were restored from NumPy or
    from one device, and at first an optimizer's counters."""
    if mesh is None:
        return
    state = nnx.state(module)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    devices = set(mesh.devices.flat)

    def on_mesh(x):
        return isinstance(x, jax.Array) and x.sharding.device_set == devices

    def spread(path, x):
        return jax.device_put(x, NamedSharding(mesh, P(mesh.axis_names) if is_spread(path) and x.ndim else P()))

    if not all(on_mesh(x) for _, x in leaves):
        nnx.update(module, tree.unflatten([x if on_mesh(x) else spread(path, x) for path, x in leaves]))


def _check_trainable(model):
    if (model.config.source or {}).get("attention_dropout"):
        raise ValueError("train step: config.json: attention_dropout must be 0, there is no dropout")
    for layer in model.model.layers:
        if isinstance(layer.self_attn.kv_b_proj.weight, QuantizedWeight):
            raise ValueError(
                "train step: the model has FP8 weights; load it with from_pretrained(..., quantized=False)"
            )


def _check_batch(model, batch: dict, microbatches: int) -> tuple:
    """-> (input_ids, attention_mask, loss_mask), all int32 [b, s + 1]."""
    if unknown := set(batch) - {"input_ids", "attention_mask", "loss_mask"}:
        raise ValueError(f"batch: unknown keys {sorted(unknown)}; it takes input_ids, attention_mask and loss_mask")
    input_ids, attention_mask = check_inputs(model.config, batch["input_ids"], batch.get("attention_mask"))
    if input_ids.shape[1] < 2:
        raise ValueError(f"batch: input_ids must be [b, s + 1] with s >= 1, got {list(input_ids.shape)}")
    if input_ids.shape[0] % microbatches:
        raise ValueError(f"batch: microbatches {microbatches} must divide the batch of {input_ids.shape[0]} rows")
    ones = np.ones(input_ids.shape, np.int32)
    attention_mask = ones if attention_mask is None else attention_mask
    loss_mask = batch.get("loss_mask")
    loss_mask = ones if loss_mask is None else check_mask("batch: loss_mask", loss_mask, input_ids.shape)
    return input_ids, attention_mask, loss_mask
