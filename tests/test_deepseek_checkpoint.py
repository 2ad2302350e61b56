"""Checkpoints: what is read is written back to the bit, and what does not fit is named."""

import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deepseek_tools import GOLDEN, SMALL, expected, mesh, raw_tensors, small_model, tokens
from flax import nnx
from jax.sharding import AxisType
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxkern
from jaxkern.models import deepseek
from jaxkern.models.deepseek import checkpoint

CASES = ["v3-tiny", "v3-latent512", "v3-padded", "v3-fp8", "v3-mtp"]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path):
    deepseek.save_pretrained(deepseek.from_pretrained(GOLDEN / case), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert raw_tensors(tmp_path) == raw_tensors(GOLDEN / case)
    source = json.loads((GOLDEN / case / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == source


@pytest.mark.parametrize("case", ["v3-fp8", "v3-mtp"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_round_trip_in_shards_from_a_mesh(case, kind, tmp_path):
    limit = 200_000
    deepseek.from_pretrained(GOLDEN / case).save_pretrained(tmp_path)  # to be replaced
    deepseek.from_pretrained(GOLDEN / case, mesh=mesh(4, kind)).save_pretrained(tmp_path, max_shard_bytes=limit)
    tensors = raw_tensors(GOLDEN / case)
    assert raw_tensors(tmp_path) == tensors
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and {p.name for p in tmp_path.glob("*.safetensors")} == files
    for file in files:
        with safe_open(tmp_path / file, framework="numpy") as f:  # the library can read it
            assert f.metadata() == {"format": "pt"} and len(f.keys()) > 0
            assert {index["weight_map"][name] for name in f.keys()} == {file}
        # Every tensor is aligned to its element's width, as readers that map the file need it.
        header = json.loads((tmp_path / file).read_bytes()[8:].split(b"}}")[0] + b"}}")
        width = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
        del header["__metadata__"]
        assert all(x["data_offsets"][0] % width[x["dtype"]] == 0 for x in header.values())
    again = deepseek.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    assert raw_tensors(tmp_path) == tensors
    assert not (tmp_path / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("limits", [(20_000, 20_000), (20_000, 10**9), (10**9, 20_000)])
def test_an_interrupted_save_leaves_one_model_or_none(limits, tmp_path, monkeypatch):
    """Stopped before each of its writes, renames and removals in turn."""
    old, new = small_model(seed=0), small_model(seed=1)
    steps = 0

    def stopping(change):
        def changed(*args, **options):
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise KeyboardInterrupt
            return change(*args, **options)

        return changed

    def content(path):
        files = checkpoint.Files(path)
        return {name: files.read(name).tobytes() for name in files}

    old.save_pretrained(tmp_path, max_shard_bytes=limits[0])
    before = content(tmp_path)
    new.save_pretrained(tmp_path / "new", max_shard_bytes=limits[1])
    after = content(tmp_path / "new")
    found = []
    for stop in itertools.count():
        steps = 10**9
        old.save_pretrained(tmp_path, max_shard_bytes=limits[0])
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_write", stopping(checkpoint._write))
            patch.setattr(checkpoint.os, "replace", stopping(checkpoint.os.replace))
            for name in ("unlink", "write_text"):
                patch.setattr(pathlib.Path, name, stopping(getattr(pathlib.Path, name)))
            steps = stop
            try:
                new.save_pretrained(tmp_path, max_shard_bytes=limits[1])
            except KeyboardInterrupt:
                pass
        try:
            found.append([before, after].index(content(tmp_path)))
        except FileNotFoundError as error:
            assert "neither" in str(error)
            found.append(None)
        if steps >= 0:
            break
    assert found[0] == 0 and None in found and found[-1] == 1 and found == sorted(found, key=[0, None, 1].index)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted(
        p.name for p in (tmp_path / "new").iterdir()
    )


def test_a_device_holds_only_its_experts():
    model = deepseek.from_pretrained(GOLDEN / "v3-fp8", mesh=mesh(8))
    single = deepseek.from_pretrained(GOLDEN / "v3-fp8")
    experts, whole = model.model.layers[1].mlp.experts, single.model.layers[1].mlp.experts
    for name in ("weight", "weight_scale_inv"):
        spread = getattr(experts.down_proj, name).get_value()
        want = np.asarray(getattr(whole.down_proj, name).get_value())
        for shard in spread.addressable_shards:
            assert shard.data.shape[0] == 1
            np.testing.assert_array_equal(np.asarray(shard.data), want[shard.index])


def test_dtypes(tmp_path):
    kept = deepseek.from_pretrained(GOLDEN / "v3-mtp")
    assert kept.dtype == jnp.bfloat16 and kept.lm_head.weight.get_value().dtype == jnp.bfloat16
    cast = deepseek.from_pretrained(GOLDEN / "v3-mtp", dtype=jnp.float32)
    assert cast.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(nnx.state(cast))} == {np.dtype(np.float32)}
    bias = small_model().model.layers[1].mlp.gate.e_score_correction_bias
    assert isinstance(bias, deepseek.RouterBias) and not isinstance(bias, nnx.Param)
    half = small_model()
    half.save_pretrained(tmp_path)
    half = deepseek.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert half.model.layers[1].mlp.gate.e_score_correction_bias.get_value().dtype == jnp.float32
    assert half.model.layers[1].mlp.gate.weight.get_value().dtype == jnp.bfloat16
    half.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_routers_bias_is_written_in_float32(tmp_path):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = np.linspace(-1, 1, 8).astype(jnp.bfloat16)
    small_model().save_pretrained(tmp_path)
    before = raw_tensors(tmp_path)
    tensors = {n: x for n, x in load_file(tmp_path / "model.safetensors").items()} | {name: bias}
    checkpoint._write(tmp_path / "model.safetensors", tensors)
    deepseek.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert raw_tensors(tmp_path) == before | {name: ("F32", (8,), bias.astype(np.float32).tobytes())}


def test_dequantized_save_has_no_quantization(tmp_path):
    deepseek.from_pretrained(GOLDEN / "v3-fp8", quantized=False).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    tensors, stored = raw_tensors(tmp_path), raw_tensors(GOLDEN / "v3-fp8")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert tensors[name][:2] == ("F32", (192, 96)) and f"{name}_scale_inv" not in tensors
    values = np.frombuffer(stored[name][2], jnp.float8_e4m3fn).reshape(192, 96).astype(np.float32)
    scales = np.frombuffer(stored[f"{name}_scale_inv"][2], np.float32).reshape(2, 1)
    want = values * scales.repeat(128, 0)[:192]
    np.testing.assert_array_equal(np.frombuffer(tensors[name][2], np.float32).reshape(192, 96), want)


def test_a_new_quantized_model(tmp_path):
    """Initialised in FP8: the scales of its own blocks, written and read like a released one."""
    small = SMALL | {"hidden_size": 160, "num_hidden_layers": 1, "first_k_dense_replace": 0}
    config = deepseek.Config.from_dict(small | {"quantization_config": FP8})
    model = deepseek.DeepseekForCausalLM(config, rngs=nnx.Rngs(0), mesh=mesh(2))
    projection = model.model.layers[0].mlp.experts.down_proj
    assert isinstance(projection.weight, deepseek.QuantizedWeight)
    assert projection.weight_scale_inv.shape == (8, 2, 1)
    model.save_pretrained(tmp_path)
    ids = tokens(2, 5)
    np.testing.assert_allclose(model(ids), deepseek.from_pretrained(tmp_path)(ids), rtol=0, atol=1e-5)


def damaged(tmp_path, change, config=None):
    """A copy of a small checkpoint with other tensors."""
    small_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_missing_tensor_is_named(tmp_path):
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    with pytest.raises(ValueError, match=f"tensor {name} is missing"):
        deepseek.from_pretrained(damaged(tmp_path, lambda t: t.pop(name)))


def test_an_unexpected_tensor_is_named(tmp_path):
    def change(t):
        t["model.layers.2.input_layernorm.weight"] = np.zeros(32, np.float32)
        t["model.layers.0.mlp.gate.weight"] = np.zeros((8, 32), np.float32)

    match = "tensor model.layers.0.mlp.gate.weight is not expected, and 1 more"
    with pytest.raises(ValueError, match=match):
        deepseek.from_pretrained(damaged(tmp_path, change))


def test_a_wrong_shape_is_named(tmp_path):
    def change(t):
        t["model.layers.0.self_attn.o_proj.weight"] = np.zeros((32, 31), np.float32)

    match = r"tensor model.layers.0.self_attn.o_proj.weight must have shape \[32, 32\], got \[32, 31\]"
    with pytest.raises(ValueError, match=match):
        deepseek.from_pretrained(damaged(tmp_path, change))


def test_a_wrong_dtype_is_named(tmp_path):
    def change(t):
        t["model.layers.1.mlp.experts.1.up_proj.weight"] = np.zeros((16, 32), np.float16)
        t["model.norm.weight"] = np.zeros(32, np.int32)

    with pytest.raises(ValueError, match="experts.1.up_proj.weight must be .* for all experts, got float16"):
        deepseek.from_pretrained(damaged(tmp_path, change))


def test_scales_of_the_wrong_shape(tmp_path):
    """96-row blocks, which some readers take silently."""
    shutil.copytree(GOLDEN / "v3-fp8", tmp_path, dirs_exist_ok=True)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = "model.layers.0.self_attn.q_a_proj.weight_scale_inv"
    header[name]["shape"] = [4, 1]
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ValueError, match=rf"{name} must have shape \[2, 2\], got \[4, 1\]"):
        deepseek.from_pretrained(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        deepseek.from_pretrained(tmp_path)
    small_model().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="not a readable safetensors file.*does not fit"):
        deepseek.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        deepseek.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="5 devices must divide n_routed_experts 16"):
        deepseek.from_pretrained(GOLDEN / "v3-tiny", mesh=mesh(5))
    with pytest.raises(ValueError, match="max_shard_bytes"):
        small_model().save_pretrained(tmp_path, max_shard_bytes=0)


def test_what_is_no_folder():
    for path in ("nowhere", "deepseek-ai/DeepSeek-V3"):
        with pytest.raises(FileNotFoundError, match=f"{path} is not there; it takes a local folder"):
            deepseek.from_pretrained(path)
    for file in ("config.json", "model.safetensors"):
        with pytest.raises(ValueError, match=f"{file} is a file; from_pretrained takes the folder"):
            deepseek.from_pretrained(GOLDEN / "v3-tiny" / file)


@pytest.mark.parametrize(
    "file, content, error",
    [
        ("config.json", b"{bad", "config.json is not JSON"),
        ("config.json", b"[]", "config.json must hold a JSON object, got a list"),
        ("model.safetensors.index.json", b"{}", "model.safetensors.index.json has no weight_map"),
        ("model.safetensors.index.json", b"", "model.safetensors.index.json is not JSON"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "model.safetensors: .* its header is no JSON object"),
        ("model.safetensors", (8).to_bytes(8, "little") + b'{"a": 1}', "model.safetensors: not a readable"),
    ],
)
def test_a_damaged_file_is_named(file, content, error, tmp_path):
    small_model().save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=error):
        deepseek.from_pretrained(tmp_path)


def test_further_layers_are_dequantised_with_the_model(tmp_path):
    """An FP8 checkpoint with a multi-token-prediction layer, as the release is: no FP8 is left in the copy."""
    model = deepseek.from_pretrained(GOLDEN / "v3-fp8")
    weight = np.random.default_rng(0).standard_normal((130, 200)).astype(np.float32)
    scaled = jaxkern.quantize(weight, (128, 128))
    extra = f"model.layers.{model.config.num_hidden_layers}.eh_proj.weight"
    model.checkpoint.tensors |= {extra: np.asarray(scaled.values), f"{extra}_scale_inv": np.asarray(scaled.scales)}
    model.save_pretrained(tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8/config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    kept = deepseek.from_pretrained(tmp_path / "fp8").checkpoint.tensors
    assert kept[extra].dtype == scaled.values.dtype and f"{extra}_scale_inv" in kept
    plain = deepseek.from_pretrained(tmp_path / "fp8", quantized=False, dtype=jnp.float32)
    assert set(plain.checkpoint.tensors) == {extra}
    np.testing.assert_array_equal(plain.checkpoint.tensors[extra], jaxkern.dequantize(scaled))
    plain.save_pretrained(tmp_path / "plain")
    assert deepseek.from_pretrained(tmp_path / "plain").checkpoint.tensors[extra].dtype == np.float32


@pytest.mark.slow
def test_fp8_weights_under_bfloat16_activations():
    """How the release is run: close to float32, and it generates."""
    model = deepseek.from_pretrained(GOLDEN / "v3-fp8", dtype=jnp.bfloat16)
    want = expected("v3-fp8")
    logits = np.asarray(model(want["input_ids"]))
    assert logits.dtype == np.float32
    assert np.abs(logits - want["logits"]).mean() < 0.2 * want["logits"].std()
    tokens = deepseek.generate(model, want["input_ids"], max_new_tokens=4)
    assert tokens.shape == (want["input_ids"].shape[0], 4)
