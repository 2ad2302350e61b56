"""What the tests of models/deepseek share: small models, their checkpoints, meshes."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from jaxkern.models import deepseek

GOLDEN = pathlib.Path(__file__).parent / "golden"

# A model that compiles fast: one dense layer and one with experts.
SMALL = {
    "model_type": "deepseek_v3",
    "torch_dtype": "float32",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 640,
    "tie_word_embeddings": False,
    "eos_token_id": None,
}


def small_model(mesh=None, seed=0, **changes) -> deepseek.DeepseekForCausalLM:
    """A model of SMALL with `changes`, its weights random and so large that a wrong formula shows.

    Filled from NumPy: that compiles nothing.
    """
    config = deepseek.Config.from_dict(SMALL | changes)
    graph, state = nnx.split(nnx.eval_shape(lambda: deepseek.DeepseekForCausalLM(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    arrays = []
    for path, leaf in leaves:
        names = [str(key.key) for key in path if hasattr(key, "key")]
        x = rng.normal(0, 0.25, leaf.shape)
        if len(leaf.shape) == 1 and names[-1] == "weight":
            x += 1  # a norm
        x = x.astype(leaf.dtype)
        spec = P(mesh.axis_names) if mesh is not None and "experts" in names else P()
        arrays.append(jnp.asarray(x) if mesh is None else jax.device_put(x, NamedSharding(mesh, spec)))
    model = nnx.merge(graph, tree.unflatten(arrays))
    model.mesh = mesh
    return model


def tokens(*shape, seed=0, vocab=64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape, dtype=np.int32)


def mesh(devices: int, kind: AxisType = AxisType.Auto, shape=None, names=("x",)):
    return jax.make_mesh(shape or (devices,), names, axis_types=(kind,) * len(names), devices=jax.devices()[:devices])


def mesh_of_up_to_four(kind: AxisType = AxisType.Auto):
    """Of four devices, or of both where there are but two GPUs."""
    return mesh(2 if jax.device_count() == 2 else 4, kind)


def expected(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / case / "expected.npz"))


def read_tensors(path) -> dict[str, np.ndarray]:
    """With the safetensors library: not the model's own reader."""
    return {name: x for file in sorted(pathlib.Path(path).glob("*.safetensors")) for name, x in load_file(file).items()}


def raw_tensors(path) -> dict[str, tuple]:
    """name -> (dtype, shape, bytes) of every tensor in a folder."""
    tensors = {}
    for file in sorted(pathlib.Path(path).glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, x in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in x["data_offsets"])
                assert name not in tensors
                tensors[name] = x["dtype"], tuple(x["shape"]), data[begin:end]
    return tensors


def public(gradients) -> dict[str, np.ndarray]:
    """A state of the model as arrays by public tensor name, one an expert."""
    named = {}
    for path, x in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        parts = [str(key.key) for key in path if hasattr(key, "key")]
        if "experts" in parts:
            at = parts.index("experts") + 1
            for e, one in enumerate(np.asarray(x)):
                named[".".join([*parts[:at], str(e), *parts[at:]])] = one
        else:
            named[".".join(parts)] = np.asarray(x)
    return named
