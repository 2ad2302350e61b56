"""Training: one step is the same step on any mesh, in any number of parts, with or without remat."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from deepseek_tools import GOLDEN, expected, mesh_of_up_to_four, small_model, tokens
from flax import nnx
from jax.sharding import AxisType

from jaxkern.models import deepseek

BATCH = {"input_ids": tokens(4, 13)}
# One object each: compiled steps are told apart by their optimizer.
# Steps so small that a gradient's last bits stay last bits: with 1e-2 ten of them make 1e-4 of the loss.
ADAMW, SGD = deepseek.adamw(5e-3), optax.sgd(1.0)


def train(model, steps=1, batch=BATCH, tx=ADAMW, **options):
    """-> the metrics of each step."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = deepseek.make_train_step(**options)
    return [jax.tree.map(np.asarray, step(model, optimizer, batch)) for _ in range(steps)]


def gradients_of(model, batch=BATCH, **options):
    """What one step of plain descent takes off the parameters, its metrics."""
    before = jax.tree.map(np.array, nnx.state(model, nnx.Param))
    (metrics,) = train(model, batch=batch, tx=SGD, **{"bias_update_speed": 0.0} | options)
    after = nnx.state(model, nnx.Param)
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, after), metrics


def assert_same(a, b, tolerance):
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        scale = max(np.abs(x).max(), 1e-3)
        assert np.abs(x - y).max() <= tolerance * scale, jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def reference():
    return gradients_of(small_model(), balance_factor=0.5)


def test_loss_and_load_are_what_they_say(reference):
    model = small_model()
    logits = np.asarray(model(BATCH["input_ids"][:, :-1])).astype(np.float64)
    nll = jax.nn.logsumexp(logits, -1) - np.take_along_axis(logits, BATCH["input_ids"][:, 1:, None], -1)[..., 0]
    _, metrics = reference
    np.testing.assert_allclose(metrics["loss"], nll.mean(), rtol=1e-5)
    assert metrics["tokens"] == 48 and metrics["dropped"] == 0
    assert metrics["expert_load"].shape == (1, 8) and metrics["expert_load"].sum() == 48 * 2
    load = metrics["expert_load"][0]
    np.testing.assert_allclose(metrics["max_violation"], load.max() / load.mean() - 1, rtol=1e-6)
    np.testing.assert_allclose(deepseek.evaluate(model, [BATCH]), nll.mean(), rtol=1e-5)
    halves = [{"input_ids": BATCH["input_ids"][:1]}, {"input_ids": BATCH["input_ids"][1:]}]
    np.testing.assert_allclose(deepseek.evaluate(model, halves), nll.mean(), rtol=1e-5)


def test_balance_loss_by_hand():
    """One layer: the report's equations 17 to 20 on the router's own scores."""
    changes = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    model = small_model(**changes)
    seen = {}
    gate = model.model.layers[0].mlp.gate
    original = type(gate).__call__
    with pytest.MonkeyPatch.context() as patch:

        def spy(self, x, run):
            out = original(self, x, run)
            jax.debug.callback(lambda scores: seen.update(scores=np.asarray(scores)), out[2])
            return out

        patch.setattr(type(gate), "__call__", spy)
        (metrics,) = train(small_model(**changes), balance_factor=0.5)
        jax.effects_barrier()
    scores = seen["scores"].reshape(4, 12, 8).astype(np.float64)
    total = 0.0
    for s in scores:
        chosen = np.zeros_like(s)
        np.put_along_axis(chosen, np.argsort(-s, axis=1)[:, :2], 1.0, axis=1)
        f = 8 / (2 * 12) * chosen.sum(0)
        p = (s / s.sum(1, keepdims=True)).mean(0)
        total += (f * p).sum()
    np.testing.assert_allclose(metrics["balance_loss"], 0.5 * total / 4, rtol=1e-5)


def test_golden_loss_and_gradients():
    """Through the step itself, on 4 devices that the batch of 2 does not fill."""
    want = dict(np.load(GOLDEN / "v3-tiny" / "gradients.npz"))
    model = deepseek.from_pretrained(GOLDEN / "v3-tiny", mesh=mesh_of_up_to_four())
    batch = {"input_ids": expected("v3-tiny")["input_ids"]}
    _, metrics = gradients_of(model, batch, balance_factor=0.0)
    np.testing.assert_allclose(metrics["loss"], want.pop("loss"), rtol=1e-6)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in want.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"microbatches": 2}, {"remat": True}],
    ids=["2 parts", "remat"],
)
def test_parts_and_remat_change_nothing(reference, options):
    gradients, metrics = gradients_of(small_model(), balance_factor=0.5, **options)
    assert_same(reference[0], gradients, 1e-5)
    for name, value in reference[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


# Rows of different lengths, and a batch that does not fill four devices.
UNEVEN = {"input_ids": tokens(6, 13), "attention_mask": (np.arange(13) >= np.arange(6)[:, None]).astype(np.int32)}


@pytest.fixture(scope="module")
def ten_steps():
    model = small_model()
    metrics = train(model, 10, UNEVEN)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    return model, metrics, deepseek.evaluate(model, [UNEVEN])


@pytest.mark.parametrize(
    "kind, options",
    [
        pytest.param(AxisType.Auto, {}, marks=pytest.mark.slow),
        (AxisType.Explicit, {"microbatches": 2, "remat": True}),
    ],
)
def test_ten_steps_on_four_devices(ten_steps, kind, options):
    one, want, want_loss = ten_steps
    model = small_model(mesh_of_up_to_four(kind))
    optimizer = nnx.Optimizer(model, ADAMW, wrt=nnx.Param)
    step = deepseek.make_train_step(**options)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **kwargs: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    got = [step(model, optimizer, UNEVEN)]
    assert compiled
    compiled.clear()
    got += [step(model, optimizer, UNEVEN) for _ in range(9)]
    assert not compiled  # the first step's programs served all others
    for name in ("loss", "balance_loss"):
        np.testing.assert_allclose([m[name] for m in got], [m[name] for m in want], rtol=0, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(got[0]["grad_norm"], want[0]["grad_norm"], rtol=1e-5)
    np.testing.assert_array_equal([m["expert_load"] for m in got], [m["expert_load"] for m in want])
    bias = [m.model.layers[1].mlp.gate.e_score_correction_bias[...] for m in (one, model)]
    np.testing.assert_array_equal(*bias)
    experts = model.model.layers[1].mlp.experts.up_proj.weight.get_value()
    assert {shard.data.shape[0] for shard in experts.addressable_shards} == {8 // model.mesh.size}
    np.testing.assert_allclose(deepseek.evaluate(model, [UNEVEN]), want_loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_restored_arrays_join_the_mesh(kind):
    """A step goes on from arrays of NumPy and of one device as from those on the mesh."""
    step = deepseek.make_train_step()
    losses = []
    for restores in (False, True):
        model = small_model(mesh_of_up_to_four(kind))
        optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
        for module in (model, optimizer) if restores else ():
            leaves, tree = jax.tree.flatten(nnx.state(module))
            arrays = [np.array(x) if i % 2 else jnp.array(np.array(x)) for i, x in enumerate(leaves)]
            nnx.update(module, tree.unflatten(arrays))
        losses += [[float(step(model, optimizer, BATCH)["loss"]) for _ in range(2)]]
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]
    experts = model.model.layers[1].mlp.experts.up_proj.weight.get_value()
    assert {shard.data.shape[0] for shard in experts.addressable_shards} == {8 // model.mesh.size}


def test_bias_moves_against_the_load():
    model = small_model()
    before = np.array(model.model.layers[1].mlp.gate.e_score_correction_bias[...])
    _, metrics = gradients_of(model, bias_update_speed=0.01)
    load = metrics["expert_load"][0]
    assert len(set(np.sign(load.mean() - load))) > 1
    after = np.asarray(model.model.layers[1].mlp.gate.e_score_correction_bias[...])
    np.testing.assert_allclose(after - before, 0.01 * np.sign(load.mean() - load), atol=1e-6)


def test_padding_and_loss_mask():
    """Rows padded on either side train as the rows alone do; the loss mask picks targets, not inputs."""
    ids = BATCH["input_ids"][:, :9]
    want, metrics = gradients_of(small_model(), {"input_ids": ids})
    mask = np.zeros((4, 13), np.int32)
    mask[0, 4:], mask[1, 2:11], mask[2, :9], mask[3, 4:] = 1, 1, 1, 1
    padded = tokens(4, 13, seed=7)
    padded[mask == 1] = ids.ravel()
    got, padded_metrics = gradients_of(small_model(), {"input_ids": padded, "attention_mask": mask})
    assert_same(want, got, 1e-5)
    for name in ("loss", "tokens", "expert_load", "balance_loss"):
        np.testing.assert_allclose(padded_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    loss_mask = mask.copy()
    loss_mask[:, :7] = 0
    batch = {"input_ids": padded, "attention_mask": mask, "loss_mask": loss_mask}
    logits = np.asarray(small_model()(padded, mask))
    nll = jax.nn.logsumexp(logits[:, :-1], -1) - np.take_along_axis(logits[:, :-1], padded[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(deepseek.evaluate(small_model(), [batch]), nll[loss_mask[:, 1:] == 1].mean(), rtol=1e-5)


def test_dropped_tokens_are_counted():
    model = small_model()
    model.expert_capacity = 40
    _, metrics = gradients_of(model)
    assert metrics["dropped"] == 4 * 12 * 2 - 40
    assert np.isfinite(metrics["loss"])


def test_bfloat16_activations_and_float32_parameters():
    model = small_model()
    model.dtype = jnp.bfloat16
    metrics = train(model, 5)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {np.dtype(np.float32)}


def test_errors():
    model = small_model()
    with pytest.raises(ValueError, match="microbatches 3 must divide the batch of 4 rows"):
        train(model, microbatches=3)
    with pytest.raises(ValueError, match="microbatches must be at least 1"):
        deepseek.make_train_step(microbatches=0)
    with pytest.raises(ValueError, match=r"unknown keys \['labels'\]"):
        train(model, batch=BATCH | {"labels": BATCH["input_ids"]})
    with pytest.raises(ValueError, match=r"input_ids must be \[b, s \+ 1\]"):
        train(model, batch={"input_ids": tokens(2, 1)})
    with pytest.raises(ValueError, match="loss_mask must have input_ids's shape"):
        train(model, batch=BATCH | {"loss_mask": np.ones((4, 2), np.int32)})
    with pytest.raises(TypeError, match="evaluate: batches must be a list.* got one dict"):
        deepseek.evaluate(model, BATCH)
    with pytest.raises(ValueError, match="no token to predict"):
        deepseek.evaluate(model, [])
    with pytest.raises(ValueError, match="attention_dropout"):
        train(small_model(attention_dropout=0.1))
    with pytest.raises(ValueError, match="quantized=False"):
        train(deepseek.from_pretrained(GOLDEN / "v3-fp8"))


def test_tokens_per_second():
    start = time.perf_counter()
    first, second, third = (m["tokens_per_second"] for m in train(small_model(), steps=3))
    elapsed = time.perf_counter() - start
    assert np.isnan(first)
    assert 48 / second + 48 / third < elapsed


def test_each_model_keeps_its_own_further_layers(tmp_path):
    """Two models of one structure through one compiled step: each is saved with the tensors it was loaded with."""
    first = deepseek.from_pretrained(GOLDEN / "v3-mtp", dtype=jnp.float32)
    name = next(name for name in first.checkpoint.tensors if name.endswith("eh_proj.weight"))
    first.checkpoint.tensors[name] = first.checkpoint.tensors[name] + 1
    second = deepseek.from_pretrained(GOLDEN / "v3-mtp", dtype=jnp.float32)
    kept = [model.checkpoint.tensors[name] for model in (first, second)]
    assert not np.array_equal(*kept)
    for model, tensor in zip((first, second), kept, strict=True):
        train(model, batch={"input_ids": tokens(2, 9)}, tx=SGD)
        model.save_pretrained(tmp_path)
        loaded = deepseek.from_pretrained(tmp_path)
        np.testing.assert_array_equal(loaded.checkpoint.tensors[name], tensor)


def test_a_loss_mask_holds_zeros_and_ones():
    with pytest.raises(ValueError, match="batch: loss_mask must hold 0 and 1"):
        train(small_model(), batch=BATCH | {"loss_mask": np.full((4, 13), 2)})
