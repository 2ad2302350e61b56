"""Checkpoints in the public layout: config.json and safetensors files, one tensor an expert."""

import dataclasses
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkern
from jaxkern.models.deepseek.config import Config, read_json
from jaxkern.models.deepseek.model import (
    WEIGHT_BLOCK,
    DeepseekForCausalLM,
    Extras,
    QuantizedWeight,
    RouterBias,
    WeightScale,
    check_mesh,
    fetch,
    is_spread,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
SCALES = (np.dtype(np.float32), np.dtype(ml_dtypes.float8_e8m0fnu))


def from_pretrained(path, *, mesh=None, dtype=None, quantized: bool = True) -> DeepseekForCausalLM:
    """Reads a checkpoint folder: config.json and model.safetensors, or several files with their index.

    Shapes and dtypes: dtype None keeps the checkpoint's dtypes, activations having the embedding's; otherwise every
        float parameter and the activations get it (the router's bias stays float32, FP8 weights stay FP8).
        quantized=False turns FP8 weights into arrays of dtype (None: the embedding's), as training needs them;
        otherwise products with them are FP8 too, unless the model's `fp8` is set to False.
    Sharding: tensors go straight to the mesh, one at a time; a device gets only its own experts.
    Errors: FileNotFoundError without a checkpoint; ValueError naming the tensor that is missing, unexpected, or of the
        wrong shape or dtype, or naming the config key that is not supported.
    Source: the layout of the DeepSeek-V3 release. The tensors of multi-token-prediction layers are kept in host memory
        as they are (dequantised with quantized=False), for `save_pretrained`.
    """
    path = pathlib.Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file; from_pretrained takes the folder that holds the checkpoint")
    config = Config.from_hf(path)
    check_mesh(config, mesh)
    files = Files(path)
    extras = _check(files, config)
    activations = np.dtype(dtype or files["model.embed_tokens.weight"].dtype)
    if activations not in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        raise ValueError(f"{path}: dtype must be float32 or bfloat16, got {activations}; pass dtype=...")
    if config.quantized and not quantized:
        source = {key: value for key, value in config.source.items() if key != "quantization_config"}
        config = Config.from_dict(source)
    graph, state = nnx.split(nnx.eval_shape(lambda: DeepseekForCausalLM(config, rngs=nnx.Rngs(0))))
    arrays = [_load(files, slot, mesh, dtype, activations) for slot in _slots(state)]
    model = nnx.merge(graph, jax.tree.structure(state).unflatten(arrays))
    model.mesh, model.dtype = mesh, activations
    model.checkpoint = Extras(_read_extras(files, extras, activations if not quantized else None))
    return model


def save_pretrained(model: DeepseekForCausalLM, path, *, max_shard_bytes: int = 5 * 10**9):
    """Writes a checkpoint folder in the layout that `from_pretrained` reads, and that other libraries do.

    Shapes and dtypes: parameters as they are in the model. What was loaded and not changed is written back identical:
        names, bits, dtypes and config.json; but the router's bias is float32, whatever it was read from.
    Units: max_shard_bytes of tensors go into one file; a tensor is never cut. One file has no index. The folder's
        earlier config.json, model.safetensors, model-*-of-*.safetensors and their index are replaced once all tensors
        are written beside them. A save that is interrupted leaves the earlier checkpoint, or one that does not load.
    Sharding: any. Every process must call it; the first writes.
    Errors: ValueError for a max_shard_bytes that is not positive.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"save_pretrained: max_shard_bytes must be positive, got {max_shard_bytes}")
    path = pathlib.Path(path)
    slots = _slots(nnx.split(model)[1])
    sizes = {name: slot.bytes_each for slot in slots for name in slot.names}
    sizes |= {name: tensor.nbytes for name, tensor in model.checkpoint.tensors.items()}
    shards = _plan(sizes, max_shard_bytes)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = [SINGLE] if len(shards) == 1 else files
    pending, waiting = iter(zip(files, shards, strict=True)), {}
    file, shard = next(pending)
    for name, tensor in _tensors(slots, model.checkpoint):
        waiting[name] = tensor
        if len(waiting) == len(shard):
            if jax.process_index() == 0:
                path.mkdir(parents=True, exist_ok=True)
                _write(_aside(path / file), waiting)
            waiting = {}
            file, shard = next(pending, (None, ()))
    if jax.process_index() == 0:
        _finish(path, _config(model), sizes, dict(zip(files, shards, strict=True)))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"save_pretrained {path}")


def _aside(file: pathlib.Path) -> pathlib.Path:
    """Where a file is written before it gets its name."""
    return file.with_name(f"{file.name}.part")


def _finish(path: pathlib.Path, config: dict, sizes: dict[str, int], files: dict[str, list[str]]):
    """Gives the files that were written aside their names, in place of an earlier checkpoint's.

    What makes a folder a checkpoint, the index or the only file, goes first and comes last: nobody who is stopped in
    between leaves the tensors of two models under one index.
    """
    texts = {"config.json": json.dumps(config, indent=1)}
    if len(files) > 1:
        where = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        texts[INDEX] = json.dumps(index, indent=2, sort_keys=True)
    for name, text in texts.items():
        _aside(path / name).write_text(text)
    for name in (INDEX, SINGLE):
        (path / name).unlink(missing_ok=True)
    order = ["config.json", *files, *(name for name in texts if name == INDEX)]
    parts = {_aside(path / name) for name in order}
    for stale in [*path.glob("model-*-of-*.safetensors"), *path.glob("model*.safetensors*.part")]:
        if stale not in parts:
            stale.unlink()
    for name in order:
        os.replace(_aside(path / name), path / name)


@dataclasses.dataclass(frozen=True)
class Slot:
    """One parameter of the model and the tensors that it is made of: one, or one an expert."""

    names: tuple[str, ...]
    kind: type[nnx.Variable]
    value: jax.Array | jax.ShapeDtypeStruct
    spread: bool

    @property
    def shape_each(self) -> tuple[int, ...]:
        return self.value.shape[1:] if self.spread else self.value.shape

    @property
    def bytes_each(self) -> int:
        return math.prod(self.shape_each) * self.value.dtype.itemsize


def _slots(state) -> list[Slot]:
    """In the order of the state's leaves."""
    slots = []
    for keys, variable in jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]:
        value, spread = variable.get_value(), is_spread(keys)
        parts = [str(key.key) for key in keys]
        if spread:
            at = parts.index("experts") + 1
            names = tuple(".".join([*parts[:at], str(e), *parts[at:]]) for e in range(value.shape[0]))
        else:
            names = (".".join(parts),)
        slots.append(Slot(names, type(variable), value, spread))
    return slots


def _check(files: "Files", config: Config) -> list[str]:
    """Raises unless the files hold just the tensors of `config`; the names of those of further layers."""
    slots = _slots(nnx.split(nnx.eval_shape(lambda: DeepseekForCausalLM(config, rngs=nnx.Rngs(0))))[1])
    kinds = {QuantizedWeight: (FP8,), WeightScale: SCALES}
    wanted = {name: slot for slot in slots for name in slot.names}
    further = tuple(f"model.layers.{config.num_hidden_layers + i}." for i in range(config.num_nextn_predict_layers))
    extras = [name for name in files if name not in wanted and name.startswith(further)] if further else []
    if missing := [name for name in wanted if name not in files]:
        raise ValueError(f"{files.path}: tensor {missing[0]} is missing{_and_more(missing)}")
    if unexpected := sorted(set(files) - set(wanted) - set(extras)):
        raise ValueError(f"{files.path}: tensor {unexpected[0]} is not expected{_and_more(unexpected)}")
    for name, slot in wanted.items():
        stored, dtypes = files[name], kinds.get(slot.kind, FLOATS)
        if stored.shape != slot.shape_each:
            raise ValueError(
                f"{files.path}: tensor {name} must have shape {list(slot.shape_each)}, got {list(stored.shape)}"
            )
        if stored.dtype not in dtypes or stored.dtype != files[slot.names[0]].dtype:
            allowed = " or ".join(d.name for d in dtypes)
            raise ValueError(f"{files.path}: tensor {name} must be {allowed} for all experts, got {stored.dtype}")
    return extras


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _read_extras(files: "Files", names: list[str], dtype) -> dict[str, np.ndarray]:
    """The tensors of further layers as they are; with a dtype, FP8 ones dequantised to it as the model's are."""
    if dtype is None:
        return {name: files.read(name) for name in names}
    scales = {name for name in names if name.endswith("_scale_inv")}
    return {
        name: _dequantize(files, name, dtype) if f"{name}_scale_inv" in scales else files.read(name)
        for name in names
        if name not in scales
    }


def _dequantize(files: "Files", name: str, dtype) -> np.ndarray:
    scaled = jaxkern.ScaledArray(files.read(name), files.read(f"{name}_scale_inv"), WEIGHT_BLOCK)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(jaxkern.dequantize(scaled, dtype))


def _load(files: "Files", slot: Slot, mesh, dtype, activations) -> jax.Array:
    def read(name):
        x = files.read(name)
        if slot.kind is RouterBias:
            return x.astype(np.float32)
        if slot.kind is not nnx.Param:
            return x
        if x.dtype == FP8:
            return _dequantize(files, name, activations)
        return x.astype(dtype or x.dtype)

    if mesh is None:
        return jnp.asarray(np.stack([read(name) for name in slot.names]) if slot.spread else read(slot.names[0]))
    if not slot.spread:
        x = read(slot.names[0])
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda index: x[index])

    def experts(index):
        return np.stack([read(name) for name in slot.names[index[0]]])

    return jax.make_array_from_callback(slot.value.shape, NamedSharding(mesh, P(mesh.axis_names)), experts)


def _tensors(slots: list[Slot], extras: Extras):
    """(name, array) of every tensor of a model, on the host."""
    for slot in slots:
        x = fetch(slot.value)
        yield from zip(slot.names, x if slot.spread else [x], strict=True)
    yield from extras.tensors.items()


def _plan(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """The names of the tensors of each file, in order."""
    shards, room = [], -1
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _config(model: DeepseekForCausalLM) -> dict:
    """config.json, with the dtype that the tensors have now."""
    config = model.config.to_hf()
    dtype = model.model.embed_tokens.weight.get_value().dtype.name
    if model.config.source is None:
        config["torch_dtype"] = dtype
    for key in ("torch_dtype", "dtype"):
        if config.get(key):
            config[key] = dtype
    return config


# The safetensors format: the length of the header (8 bytes, little endian), the header in JSON, the tensors' bytes. It
# is read and written here because the library's numpy interface knows no float8, and its others copy through a device.

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_DTYPES = {name: np.dtype(dtype) for name, dtype in _DTYPES.items()}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class Files(dict[str, Stored]):
    """The tensors of a checkpoint folder by name, none read yet."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        if (path / INDEX).exists():
            where = read_json(path / INDEX).get("weight_map")
            if not isinstance(where, dict):
                raise ValueError(f"{path / INDEX} has no weight_map")
            headers = {file: _header(path / file) for file in sorted(set(where.values()))}
            for name, file in where.items():
                if name not in headers[file]:
                    raise ValueError(f"{path}: tensor {name} is missing: {file} does not hold it, as {INDEX} says")
                self[name] = headers[file][name]
        elif (path / SINGLE).exists():
            self.update(_header(path / SINGLE))
        else:
            raise FileNotFoundError(f"{path}: neither {SINGLE} nor {INDEX} is there")

    def read(self, name: str) -> np.ndarray:
        """A copy, so that nothing depends on the file afterwards."""
        stored = self[name]
        count = math.prod(stored.shape)
        with open(stored.file, "rb") as file:
            file.seek(stored.offset)
            return np.fromfile(file, stored.dtype, count).reshape(stored.shape)


def _header(file: pathlib.Path) -> dict[str, Stored]:
    try:
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            size = os.fstat(f.fileno()).st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(f.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        tensors = {}
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            dtype, shape = _DTYPES[tensor["dtype"]], tuple(tensor["shape"])
            if 8 + length + end > size or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name} does not fit in it")
            tensors[name] = Stored(file, dtype, shape, 8 + length + begin)
        return tensors
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from error


def _write(file: pathlib.Path, tensors: dict[str, np.ndarray]):
    # Wide types first: every tensor is then aligned to its own width.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        offsets = [offset, offset + x.nbytes]
        header[name] = {"dtype": _DTYPE_NAMES[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        offset += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            f.write(np.ascontiguousarray(x).data if x.dtype.kind in "fiub" else np.ascontiguousarray(x).tobytes())
