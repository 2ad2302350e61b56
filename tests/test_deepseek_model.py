"""The model against transformers' outputs (tests/golden), against NumPy, on meshes, and step by step."""

import deepseek_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deepseek_tools import GOLDEN, SMALL, expected, mesh, mesh_of_up_to_four, public, read_tensors, small_model, tokens
from flax import nnx
from jax.sharding import AxisType

import jaxkern
from jaxkern.models import deepseek
from jaxkern.models.deepseek.model import Program, head

CASES = ["v3-tiny", "v3-latent512", "v3-padded", "v3-fp8", "v3-mtp"]


@pytest.mark.parametrize(
    "case, implementation", [(case, None) for case in CASES] + [(case, "xla") for case in CASES if case != "v3-mtp"]
)
def test_golden_logits(case, implementation):
    want = expected(case)
    model = deepseek.from_pretrained(GOLDEN / case, dtype=jnp.float32)
    model.implementation = implementation
    model.fp8 = False  # the golden outputs of v3-fp8 are of plain activations
    mask = want["attention_mask"]
    logits = model(want["input_ids"], mask if (mask == 0).any() else None)
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(logits)[real], want["logits"][real], rtol=0, atol=1e-4)


def test_dequantized_weights_give_the_same_logits():
    want = expected("v3-fp8")
    model = deepseek.from_pretrained(GOLDEN / "v3-fp8", dtype=jnp.float32, quantized=False)
    assert not model.config.quantized
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {np.dtype(np.float32)}
    np.testing.assert_allclose(model(want["input_ids"]), want["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "on",
    [
        pytest.param(lambda: None, id="one device"),
        pytest.param(lambda: mesh_of_up_to_four(AxisType.Explicit), id="4 devices, explicit"),
    ],
)
def test_golden_gradients(on):
    """Through model(...) and JAX's own transforms, as a user would."""
    want = expected("v3-tiny")
    gradients = dict(np.load(GOLDEN / "v3-tiny" / "gradients.npz"))
    devices = on()
    model = deepseek.from_pretrained(GOLDEN / "v3-tiny", mesh=devices)
    ids = jnp.asarray(want["input_ids"])

    def loss(model):
        logits = model(ids)[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], -1).mean()

    got_loss, got = nnx.jit(nnx.value_and_grad(loss))(model)
    np.testing.assert_allclose(got_loss, gradients.pop("loss"), atol=1e-5)
    got = public(got)
    assert set(got) == set(gradients)
    for name, gradient in gradients.items():
        assert np.abs(got[name] - gradient).max() <= 1e-4 * np.abs(gradient).max(), name


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape, names", [((4,), ("x",)), ((2, 2), ("hosts", "devices"))])
def test_golden_on_a_mesh(kind, shape, names):
    """A batch of 3 rows, padded on the left, on 4 devices."""
    want = expected("v3-padded")
    model = deepseek.from_pretrained(GOLDEN / "v3-padded", dtype=jnp.float32, mesh=mesh(4, kind, shape, names))
    spread = model.model.layers[1].mlp.experts.up_proj.weight.get_value()
    assert {shard.data.shape for shard in spread.addressable_shards} == {(4, 32, 64)}
    logits = np.asarray(model(want["input_ids"], want["attention_mask"]))
    assert logits.shape == want["logits"].shape
    real = want["attention_mask"].astype(bool)
    np.testing.assert_allclose(logits[real], want["logits"][real], rtol=0, atol=1e-4)


VARIATIONS = {
    "no q_lora, half-split and plain RoPE, tied, all experts": {
        "q_lora_rank": None,
        "rope_interleave": False,
        "rope_scaling": None,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
        "first_k_dense_replace": 0,
    },
    "biases, weights as they are, two shared experts, every other layer, YaRN's other keys": {
        "attention_bias": True,
        "norm_topk_prob": False,
        "n_shared_experts": 2,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 2,
        "rope_scaling": SMALL["rope_scaling"] | {"mscale": 0.7, "truncate": False, "beta_fast": 16, "beta_slow": 2},
    },
    "no experts, YaRN without mscale, another eps": {
        "n_routed_experts": None,
        "rms_norm_eps": 0.05,
        "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    },
    "one group, one expert, none shared, odd sizes": {
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "n_routed_experts": 6,
        "n_shared_experts": 0,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "qk_nope_head_dim": 12,
        "v_head_dim": 20,
        "num_attention_heads": 3,
        "hidden_size": 40,
    },
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_variations_against_numpy(name, tmp_path):
    """Logits of a whole sequence, and of its last tokens decoded against the cache of the first ones."""
    model = small_model(**VARIATIONS[name])
    model.save_pretrained(tmp_path)
    ids = tokens(2, 21)
    want = deepseek_numpy.logits(SMALL | VARIATIONS[name], read_tensors(tmp_path), ids)
    assert np.ptp(want) > 1
    np.testing.assert_allclose(model(ids), want, rtol=0, atol=2e-5 * np.ptp(want))
    decoded = decode_logits(model, ids, new=3)
    np.testing.assert_allclose(decoded, want[:, -3:], rtol=0, atol=2e-5 * np.ptp(want))
    reread = deepseek.from_pretrained(tmp_path)
    np.testing.assert_array_equal(reread(ids), model(ids))


def decode_logits(model, ids, new: int, page_size: int = 8):
    """The logits of the last `new` tokens: the others are in the cache."""
    program, leaves = Program.of(model)
    b, s = ids.shape
    pages = -(-s // page_size)
    table = np.random.default_rng(0).permutation(b * pages).astype(np.int32).reshape(b, pages)

    def body(parts, ids):
        _, rows, _ = parts["model"](ids[:, :-new], None, program.run)
        empty = jnp.zeros((b * pages, page_size, model.config.latent_width))
        positions = jnp.broadcast_to(jnp.arange(s - new, dtype=jnp.int32), (b, s - new))
        cache = [jaxkern.kv_cache.append(empty, r, jnp.asarray(table), positions) for r in rows]
        lengths, active = jnp.full(b, s, jnp.int32), jnp.ones(b, bool)
        absorbed = parts["model"].absorbed(program.run)
        x, _ = parts["model"].decode(ids[:, -new:], cache, absorbed, jnp.asarray(table), lengths, active, program.run)
        return head(parts, x, program.run)

    return jax.jit(program.map(body, (program.rows,), program.rows))(leaves, ids)


def test_padding_on_both_sides():
    model = small_model()
    ids = tokens(2, 12)
    mask = np.zeros((2, 20), np.int32)
    mask[0, 5:17], mask[1, 8:20] = 1, 1
    padded = np.where(mask, 0, tokens(2, 20, seed=1))
    padded[mask == 1] = ids.ravel()
    logits = np.asarray(model(padded, mask))
    np.testing.assert_allclose(logits[mask == 1].reshape(2, 12, -1), model(ids), rtol=0, atol=1e-4)


def test_bfloat16_stays_close():
    """Activations take the checkpoint's dtype; the published noise of bfloat16 on such models is of order 0.1."""
    want = expected("v3-latent512")
    model = deepseek.from_pretrained(GOLDEN / "v3-latent512")
    assert model.dtype == jnp.bfloat16
    logits = np.asarray(model(want["input_ids"]))
    assert logits.dtype == np.float32
    assert np.abs(logits - want["logits"]).mean() < 0.1
    assert (logits.argmax(-1) == want["logits"].argmax(-1)).mean() > 0.9


def test_new_parameters():
    """The same on any mesh, spread over it, with the asked for scale."""

    def create(mesh):
        return deepseek.DeepseekForCausalLM(config, rngs=nnx.Rngs(3), mesh=mesh, param_dtype=jnp.bfloat16)

    config = deepseek.Config.from_dict(SMALL | {"initializer_range": 0.1})
    single, spread = create(None), create(mesh(4, AxisType.Explicit))
    for a, b in zip(jax.tree.leaves(nnx.state(spread)), jax.tree.leaves(nnx.state(single)), strict=True):
        np.testing.assert_array_equal(a, b)
    weight = spread.model.layers[1].mlp.experts.gate_proj.weight.get_value()
    assert weight.dtype == jnp.bfloat16 and weight.addressable_shards[0].data.shape[0] == 2
    assert np.std(np.float32(weight)) == pytest.approx(0.1, rel=0.1)
    np.testing.assert_array_equal(single.model.norm.weight[...], 1)
    assert np.isfinite(spread(tokens(4, 5))).all()
    with pytest.raises(ValueError, match="3 devices must divide n_routed_experts 8"):
        create(mesh(3))
    with pytest.raises(ValueError, match="all be Auto or all Explicit"):
        create(
            jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Explicit), devices=jax.devices()[:4])
        )


def test_errors():
    model = small_model()
    with pytest.raises(ValueError, match=r"input_ids must be in 0\.\.63, got 3\.\.64"):
        model(np.array([[3, 64]]))
    with pytest.raises(TypeError, match="input_ids must be integers, got float32"):
        model(np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match=r"input_ids must be \[b, s\]"):
        model(np.zeros(4, np.int32))
    with pytest.raises(ValueError, match="row 1 has holes"):
        model(tokens(2, 4), np.array([[0, 1, 1, 1], [1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="attention_mask must have input_ids's shape"):
        model(tokens(2, 4), np.ones((2, 3), np.int32))
    with pytest.raises(ValueError, match="must hold 0 and 1"):
        model(tokens(1, 2), np.array([[1, 2]]))
