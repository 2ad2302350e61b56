"""FP8 products in the model: on an FP8 checkpoint with dynamic activation scales, and in training."""

import json
import os
import pathlib
import re
import subprocess
import sys

import deepseek_numpy
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from deepseek_tools import GOLDEN, SMALL, expected, mesh, mesh_of_up_to_four, read_tensors, tokens
from flax import nnx
from jax.sharding import AxisType

from jaxkern.models import deepseek
from jaxkern.models.deepseek import model as layers
from jaxkern.models.deepseek.generate import _programs
from jaxkern.models.deepseek.model import Program

ROOT = pathlib.Path(__file__).parent.parent
BATCH = {"input_ids": tokens(4, 33)}
SGD, ADAMW = optax.sgd(1.0), deepseek.adamw(2e-4)


def rounded(x, power_of_two=False):
    """What blocks of (1, 128) make of float64 x [t, k]."""
    t, k = x.shape
    x = np.pad(x, ((0, 0), (0, -k % 128))).reshape(t, -1, 128)
    scales = np.float32(np.maximum(np.abs(x).max(-1, keepdims=True), 1e-4)) / np.float32(448)
    if power_of_two:
        scales = np.exp2(np.ceil(np.log2(scales)))
    values = np.float32(x / scales).astype(ml_dtypes.float8_e4m3fn)
    return (values.astype(np.float64) * scales).reshape(t, -1)[:, :k]


@pytest.fixture(scope="module")
def dequantised(tmp_path_factory):
    """Tensors of the golden FP8 checkpoint, by their public names."""
    folder = tmp_path_factory.mktemp("plain")
    deepseek.from_pretrained(GOLDEN / "v3-fp8", quantized=False, dtype=jnp.float32).save_pretrained(folder)
    return read_tensors(folder)


@pytest.mark.parametrize("implementation, scale_fmt", [(None, None), ("xla", None), (None, "ue8m0")])
def test_dynamic_activations_against_numpy(implementation, scale_fmt, dequantised, tmp_path):
    """As a float64 model whose linear layers round their inputs, but for what lies at a rounding boundary.

    Which values do depends on the order of sums, so on the machine; one reaches all later tokens of its sequence. The
    effect of the rounding itself is of order 0.2 on these weights, so a layer that rounds too much, too little or with
    other blocks shows.
    """
    config = json.loads((GOLDEN / "v3-fp8" / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = scale_fmt
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(GOLDEN / "v3-fp8" / "model.safetensors")
    ids = expected("v3-fp8")["input_ids"]
    model = deepseek.from_pretrained(tmp_path, dtype=jnp.float32)
    model.implementation = implementation
    assert model.fp8
    got = np.asarray(model(ids))
    want = deepseek_numpy.logits(config, dequantised, ids, lambda x: rounded(x, scale_fmt == "ue8m0"))
    difference = np.abs(got - want)
    assert np.median(difference) < 1e-5
    assert (got.argmax(-1) == want.argmax(-1)).mean() > 0.95
    effect = np.abs(want - expected("v3-fp8")["logits"]).mean()
    assert 0.05 < effect < 0.5 and difference.mean() < effect / 8


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
# A token goes to every expert, so that no rounding changes its choice.
ALL_EXPERTS = {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}


def new_model(on=None, **changes):
    """SMALL with weights of a trained model's size, so that roundings do not grow from layer to layer; hidden 160 is a
    whole block and a part of one."""
    config = SMALL | {"hidden_size": 160, "moe_intermediate_size": 48, "initializer_range": 0.08} | changes
    return deepseek.DeepseekForCausalLM(deepseek.Config.from_dict(config), rngs=nnx.Rngs(0), mesh=on)


def plain_copy(model, tmp_path):
    model.save_pretrained(tmp_path)
    return deepseek.from_pretrained(tmp_path, quantized=False)


def relative(a, b):
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_fp8_is_close_to_plain(tmp_path):
    """Dynamic activations, plain ones and dequantised weights: the same model to the precision of e4m3, whose rounding
    is 2.6 % of a block; ten products follow one another."""
    model, ids = new_model(quantization_config=FP8, **ALL_EXPERTS), tokens(3, 20)
    plain = plain_copy(model, tmp_path)
    dynamic = np.asarray(model(ids))
    model.fp8 = False
    weight_only = np.asarray(model(ids))
    want = np.asarray(plain(ids))
    assert relative(weight_only, want) < 1e-5
    assert 1e-2 < relative(dynamic, want) < 0.15
    assert (dynamic.argmax(-1) == want.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("on", [None, 4])
def test_gradients_through_frozen_weights(on, tmp_path):
    """What is not quantised can still be trained: norms, router, embedding, head."""
    new_model(quantization_config=FP8, **ALL_EXPERTS).save_pretrained(tmp_path)
    devices = on and mesh(on, AxisType.Explicit)
    model = deepseek.from_pretrained(tmp_path, mesh=devices)
    plain = deepseek.from_pretrained(tmp_path, mesh=devices, quantized=False)
    ids = jnp.asarray(tokens(4, 20))

    def gradient(model):
        def loss(model):
            logits = model(ids)[:, :-1]
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], -1).mean()

        found = jax.tree_util.tree_flatten_with_path(nnx.jit(nnx.grad(loss))(model))[0]
        return {jax.tree_util.keystr(path): np.asarray(x) for path, x in found}

    got, want = gradient(model), gradient(plain)
    assert 10 < len(got) < len(want)
    for name, x in got.items():
        assert relative(x, want[name]) < 0.3, name


def test_which_products_are_fp8():
    """Those of every linear layer, each of which quantises its weight once; neither the router nor the head."""
    model = new_model()
    model.fp8 = True
    program, leaves = Program.of(model)
    forward = jax.make_jaxpr(layers._forward(program))(leaves, tokens(2, 5), None)
    text = str(forward)
    projections = 2 * 5 + 3 + 3 + 3  # attention of two layers, a dense MLP, the experts, the shared expert
    assert len(re.findall(r"jaxkern_quantize\[\s*block_shape=\(128, 128\)", text)) == projections
    assert len(re.findall(r"jaxkern_quantize\[\s*block_shape=\(1, 128\)", text)) == projections
    assert len(re.findall(r"a_block=\(1, 128\)", text)) == projections
    assert len(re.findall(r"a_block=\(0, 0\)", text)) == 2  # the router and the head


def test_no_weight_is_dequantised():
    """A forward pass on an FP8 checkpoint holds no weight in another dtype, and rounds what two layers take once."""
    model = new_model(quantization_config=FP8)
    program, leaves = Program.of(model)
    text = layers._forward(program).lower(leaves, tokens(2, 5), None).compile().as_text()
    shapes = {x.shape for x in leaves if x.dtype == jnp.float8_e4m3fn}
    assert len(shapes) == 8 and "dequantize" not in text
    for shape in shapes:
        assert sized("f8e4m3fn", shape, text) and not sized("f32|bf16|f16", shape, text), shape
    # Attention: the input of q_a and kv_a, q_b's, kv_b's and o's; an MLP: that of gate and up.
    assert len(re.findall(r'custom_call_target="jaxkern.quantize.v1"', text)) == 2 * 4 + 3
    assert len(re.findall(r'custom_call_target="jaxkern.swiglu_quantize.v2"', text)) == 3


@pytest.mark.parametrize("quantized", [True, False])
def test_a_step_of_decoding_makes_no_weight(quantized):
    """What is absorbed of kv_b_proj is made with the prompt; a step reads it, and not kv_b_proj."""
    model = new_model(**({"quantization_config": FP8} if quantized else {}))
    model.dtype = np.dtype(jnp.bfloat16)
    program, leaves = Program.of(model, inference=True)
    prefill, decode = _programs(program, None, 8)
    stops, scalars = np.full(1, -1, np.int32), (np.uint32(0), np.float32(0), np.float32(1))
    table = np.arange(4, dtype=np.int32).reshape(2, 2)
    prompt = tokens(2, 8), np.ones((2, 8), np.int32), table
    token, state, _, absorbed = prefill(leaves, *prompt, stops, scalars, pages=4, packed=False)
    text = decode.lower(leaves, absorbed, token, state, stops, scalars).compile().as_text()
    kv_b = model.model.layers[0].self_attn.kv_b_proj.weight.shape
    assert "dequantize" not in text and not sized("f8e4m3fn|f32|bf16", kv_b, text)
    assert [x.shape for x in absorbed[0]] == [(2, 16, 16), (2, 16, 16)]


def test_training_copies_no_weight_in_bfloat16():
    """Forward and backward in bfloat16 over float32 parameters: a weight is there as it is, in FP8, and as its
    gradient; without FP8 in bfloat16 too."""
    ids, copies = tokens(2, 5), {}
    for fp8 in (True, False):
        model = new_model()
        model.fp8, model.dtype = fp8, jnp.bfloat16
        program, leaves = Program.of(model)
        gradient = jax.grad(lambda leaves, program=program: layers._forward(program)(leaves, ids, None).sum())
        text = jax.jit(gradient).lower(leaves).compile().as_text()
        shapes = {(8, 48, 160), (8, 160, 48), (48, 160), (160, 48), (48, 24), (24, 160)}
        assert shapes < {x.shape for x in leaves} and all(sized("f32", shape, text) for shape in shapes)
        copies[fp8] = [shape for shape in shapes if sized("bf16", shape, text)]
    assert not copies[True] and len(copies[False]) == 6


def sized(dtypes: str, shape, text: str):
    return re.search(rf"\b({dtypes})\[{','.join(map(str, shape))}\]", text)


def train(model, steps=1, batch=BATCH, tx=ADAMW, **options):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = deepseek.make_train_step(**options)
    return [jax.tree.map(np.asarray, step(model, optimizer, batch)) for _ in range(steps)]


def gradients_of(model, tx=SGD, **options):
    before = jax.tree.map(np.array, nnx.state(model, nnx.Param))
    (metrics,) = train(model, tx=tx, bias_update_speed=0.0, **options)
    taken = jax.tree.map(lambda a, b: a - np.asarray(b), before, nnx.state(model, nnx.Param))
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(taken)[0]}, metrics


def fp8_model(on=None, **changes):
    model = new_model(on, **changes)
    model.fp8 = True
    return model


@pytest.fixture(scope="module")
def reference():
    return gradients_of(fp8_model())


def test_gradients_are_close_to_plain():
    """Each of some thirty products in a row brings the 3.7 % of two rounded operands."""
    got, got_metrics = gradients_of(fp8_model(**ALL_EXPERTS))
    want, metrics = gradients_of(new_model(**ALL_EXPERTS))
    np.testing.assert_allclose(got_metrics["loss"], metrics["loss"], rtol=2e-3)
    errors = {name: relative(got[name], x) for name, x in want.items()}
    assert max(errors.values()) < 0.3, max(errors, key=errors.get)
    assert np.median(list(errors.values())) > 1e-3  # it did run in FP8


def test_small_gradients_are_not_lost():
    """A head so small that the mean's gradients are below what FP8 holds: those of the sum are not."""
    found, tx = [], optax.sgd(2.0**16)  # so large that the parameters' own rounding does not show
    for make in (fp8_model, new_model):
        model = make(**ALL_EXPERTS)
        model.lm_head.weight[...] *= 2.0**-22
        found.append(gradients_of(model, tx, balance_factor=0.0)[0])
    for name, x in found[1].items():
        assert relative(found[0][name], x) < 0.3, name


@pytest.mark.parametrize(
    "on, options",
    [
        pytest.param(lambda: None, {"remat": True}, id="remat"),
        pytest.param(lambda: None, {"microbatches": 2}, id="2 parts", marks=pytest.mark.slow),
        pytest.param(lambda: mesh(1), {}, id="mesh of 1", marks=pytest.mark.slow),
        pytest.param(lambda: mesh_of_up_to_four(), {}, id="4 devices", marks=pytest.mark.slow),
        pytest.param(
            lambda: mesh_of_up_to_four(AxisType.Explicit),
            {"microbatches": 2, "remat": True},
            id="4, explicit, 2, remat",
        ),
    ],
)
def test_one_step_on_any_mesh(reference, on, options):
    """The forward pass rounds token by token, the same anywhere: each device has tokens enough for its products to sum
    in the order of many rows. Weight gradients round blocks of the tokens that meet in one part on one device, so that
    they differ by the rounding."""
    got, metrics = gradients_of(fp8_model(on()), **options)
    same_blocks = "microbatches" not in options and on() is None or (on() and on().size == 1)
    np.testing.assert_allclose(metrics["loss"], reference[1]["loss"], rtol=1e-5)
    np.testing.assert_array_equal(metrics["expert_load"], reference[1]["expert_load"])
    for name, x in reference[0].items():
        assert relative(got[name], x) < (1e-5 if same_blocks else 0.1), name


@pytest.mark.slow
def test_ten_steps():
    """In bfloat16 over float32 parameters, as DeepSeek-V3 trains: FP8 learns as bfloat16 does, on one device and on
    four, and the same again to the bit."""
    cases = {
        "bfloat16": (None, False),
        "fp8": (None, True),
        "4 devices": (mesh_of_up_to_four(), True),
        "again": (mesh_of_up_to_four(), True),
    }
    losses = {}
    for name, (on, fp8) in cases.items():
        model = fp8_model(on)
        model.fp8, model.dtype = fp8, jnp.bfloat16
        losses[name] = [float(m["loss"]) for m in train(model, 10)]
        assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {np.dtype(np.float32)}
    assert losses["bfloat16"][-1] < losses["bfloat16"][0] - 1.5
    np.testing.assert_allclose(losses["fp8"], losses["bfloat16"], rtol=0.05)
    np.testing.assert_allclose(losses["4 devices"], losses["fp8"], rtol=0.05)
    assert losses["again"] == losses["4 devices"]


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_generation_with_dynamic_activations(dtype):
    """The same tokens again, and with the experts over four devices."""
    model = deepseek.from_pretrained(GOLDEN / "v3-fp8", dtype=dtype)
    ids = expected("v3-fp8")["input_ids"]
    got = deepseek.generate(model, ids, max_new_tokens=12)
    np.testing.assert_array_equal(deepseek.generate(model, ids, max_new_tokens=12), got)
    spread = deepseek.from_pretrained(GOLDEN / "v3-fp8", dtype=dtype, mesh=mesh_of_up_to_four())
    np.testing.assert_array_equal(deepseek.generate(spread, ids, max_new_tokens=12), got)


@pytest.mark.slow
def test_fp8_training_ends_where_bfloat16_does():
    """The demo's model: no more than half a percent higher, or the program fails. (By itself it goes on for 300 steps,
    five times, as paths part.)"""
    done = run_benchmark("benchmarks.training", "--steps", "60", "--seeds", "1")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    print(done.stdout)
    ends = [[float(x) for x in line.split()[-4:]] for line in done.stdout.splitlines() if "loss  " in line]
    assert len(ends) == 2 and all(fp8 < 2.7 and ratio <= 1.005 for _, fp8, ratio, _ in ends)


@pytest.mark.slow
@pytest.mark.alone
def test_generation_is_faster_from_fp8(tmp_path):
    """Than from the checkpoint's bfloat16 copy, both through our kernels, taking turns; of three runs the fastest of
    each: another program on the same cores stops a step at each of its barriers, whatever the weights. By a fifth, as
    models that are alike differ by a tenth."""
    runs = []
    for _ in range(3):
        done = run_benchmark("benchmarks.model", "--quick", "--json", str(tmp_path / "rows.json"))
        assert done.returncode == 0, done.stderr[-2000:]
        print(done.stdout)
        runs.append(json.loads((tmp_path / "rows.json").read_text())["rows"])
    ratios = {
        rows[0]["name"]: min(row["xla_ms"] for row in rows) / min(row["ours_ms"] for row in rows)
        for rows in zip(*runs, strict=True)
    }
    assert min(ratios.values()) > 1.2, ratios


def run_benchmark(module, *arguments):
    """In a process of its own: it makes its own devices."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
