"""From op records to JAX primitives: the only file that loads extension modules, registers FFI targets and
lowering rules, and knows JAX versions.

An op is one `Op` record. `call` binds it: on a CPU it lowers to our custom call, on every other platform to its
reference in plain JAX.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

IMPLEMENTATIONS = ("cpu", "cuda", "xla", "sim")
OPS: dict[str, "Op"] = {}
USED: dict[str, set[str]] = {}
DISABLE_JAX_EXPORT_CHECKS: list[jax.export.DisabledSafetyCheck] = []


@dataclasses.dataclass(frozen=True)
class Op:
    """What `_ffi` must know of an op.

    name: the op's name; its CPU target is `jaxkern.<name>.v<cpu>`.
    results: (*avals, **params) -> [(shape, dtype), ...].
    reference: (*arrays, **params) -> (array, ...), in plain JAX.
    part_of: the public functions that run this op, where it is none itself.
    cpu: version of the CPU target; None where the reference is the only implementation, which `why` then explains.
    sizes: parameters that are sizes of results. They may be symbolic, so the target reads them off its buffers instead.
    batch: (size, arrays, is_batched, **params) -> (arrays, params, unbatch): how to fold a leading axis of `size` into
        the operands and take it out of each result again. NotImplemented, or None here, maps the op over the axis.
    """

    name: str
    results: Callable
    reference: Callable
    part_of: str = ""
    cpu: int | None = 1
    why: str = ""
    sizes: tuple[str, ...] = ()
    batch: Callable | None = None
    primitive: Primitive = dataclasses.field(init=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "primitive", _make_primitive(self))
        OPS[self.name] = self

    @property
    def target(self) -> str:
        return f"jaxkern.{self.name}.v{self.cpu}"


def call(op: Op, *arrays: jax.Array, implementation: str | None = None, **params) -> tuple[jax.Array, ...]:
    """Runs `op` with the chosen implementation. Parameters are static and hashable."""
    implementation = resolve(op, implementation)
    with jax.named_scope(f"jaxkern.{op.name}"):
        if implementation == "xla":
            USED.setdefault(op.name, set()).add("xla")
            return tuple(op.reference(*arrays, **params))
        return tuple(op.primitive.bind(*align(*arrays), implementation=implementation, **params))


def implementations_used() -> dict[str, list[str]]:
    """Which implementations each op has been compiled with in this process: for telling what really ran."""
    return {name: sorted(used) for name, used in sorted(USED.items())}


def resolve(op: Op, implementation: str | None) -> str | None:
    """The implementation to run: None is "the best that the platform has", chosen when lowering."""
    implementation = implementation or os.environ.get("JAXKERN_IMPLEMENTATION") or None
    if implementation is None:
        return None if op.cpu is not None else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op.name}: implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    if reason := why_not(op, implementation):
        available = ", ".join(name for name in IMPLEMENTATIONS if not why_not(op, name))
        raise NotImplementedError(
            f"{op.name}: implementation {implementation!r} is not available: {reason}; available: {available}"
        )
    return implementation


def why_not(op: Op, implementation: str) -> str:
    """Why `implementation` of `op` cannot run in this installation; empty if it can."""
    if implementation == "cpu" and op.cpu is None:
        return op.why
    if implementation in ("cuda", "sim"):
        return "this build has no CUDA kernels"
    return ""


def align(*arrays: jax.Array) -> list[jax.Array]:
    """Casts the operands to the union of their varying mesh axes, as a primitive inside shard_map needs it.

    Its transpose is the psum that makes gradients of replicated operands right, so a `custom_vjp` goes inside.
    """
    arrays = [jnp.asarray(x) for x in arrays]
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(arrays, varying, strict=True)
    ]


def _make_primitive(op: Op) -> Primitive:
    primitive = Primitive(f"jaxkern_{op.name}")
    primitive.multiple_results = True

    def abstract_eval(*avals, implementation, **params):
        return [_like(avals[0], shape, dtype) for shape, dtype in op.results(*avals, **params)]

    def run_eagerly(*arrays, **params):
        return _compiled(primitive, tuple(sorted(params.items())))(*arrays)

    def lower_to_reference(ctx, *operands, implementation, **params):
        if implementation is not None:
            platforms = ", ".join(ctx.module_context.platforms)
            raise NotImplementedError(
                f"{op.name}: implementation {implementation!r} does not run on platform {platforms}; available: xla"
            )
        USED.setdefault(op.name, set()).add("xla")
        return mlir.lower_fun(op.reference, multiple_results=True)(ctx, *operands, **params)

    def lower_to_cpu(ctx, *operands, implementation, **params):
        USED.setdefault(op.name, set()).add("cpu")
        attributes = {name: _attribute(value) for name, value in params.items() if name not in op.sizes}
        return jax.ffi.ffi_lowering(op.target)(ctx, *operands, **attributes)

    def batch(arrays, axes, **params):
        return _batch(op, arrays, axes, params)

    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(run_eagerly)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lower_to_reference)
    if op.cpu is not None:
        mlir.register_lowering(primitive, lower_to_cpu, platform="cpu")
        DISABLE_JAX_EXPORT_CHECKS.append(jax.export.DisabledSafetyCheck.custom_call(op.target))
    return primitive


def _like(aval, shape: Sequence[int], dtype):
    """A result's type made from an operand's, so that its varying mesh axes survive; not its sharding."""
    replicated = aval.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(shape)))
    return aval.update(shape=tuple(shape), dtype=np.dtype(dtype), sharding=replicated, weak_type=False)


def _attribute(value):
    """A Python value as a typed FFI attribute: XLA would make a Python float a float64."""
    match value:
        case bool() | int():
            return np.int64(value)
        case float():
            return np.float32(value)
        case tuple():
            return np.array(value, np.int64)
        case _:
            return value


@functools.cache
def _compiled(primitive: Primitive, params: tuple):
    return jax.jit(lambda *arrays: primitive.bind(*arrays, **dict(params)))


def _batch(op: Op, arrays, axes, params):
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    is_batched = [axis is not None for axis in axes]
    arrays = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(arrays, axes, strict=True)]
    implementation = params.pop("implementation")

    def bind(*arrays, **params):
        return op.primitive.bind(*align(*arrays), implementation=implementation, **params)

    folded = op.batch(size, arrays, is_batched, **params) if op.batch else NotImplemented
    if folded is not NotImplemented:
        arrays, params, unbatch = folded
        results = [unbatch(i, r) for i, r in enumerate(bind(*arrays, **params))]
    else:

        def one(mapped):
            rows = iter(mapped)
            return bind(*[next(rows) if b else x for x, b in zip(arrays, is_batched, strict=True)], **params)

        results = jax.lax.map(one, [x for x, b in zip(arrays, is_batched, strict=True) if b])
    return results, [0] * len(results)


def _load():
    """Loads the CPU kernels and registers them with XLA, after checking that this JAX can run them.

    The check must come first: a handler that is newer than the runtime, once registered, makes the creation of JAX's
    CPU backend fail for the whole process.
    """
    try:
        from jaxkern import _cpu
    except ImportError as error:
        raise ImportError(
            f"jaxkern: the compiled module jaxkern._cpu could not be loaded ({error}). Install the package "
            "(pip install . or pip install -e . in the source tree); the source tree alone is not enough."
        ) from error
    check_api_version(_cpu.api_version(), running_api_version())
    for name, handler in _cpu.handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return _cpu


def running_api_version() -> tuple[int, int]:
    """The FFI version of the installed JAX, which only its C header tells."""
    header = (pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    return tuple(int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1]) for part in ("MAJOR", "MINOR"))


def check_api_version(built: tuple[int, int], running: tuple[int, int]):
    """Raises ImportError if kernels built for FFI version `built` cannot run under `running`."""
    if built[0] != running[0] or built[1] > running[1]:
        raise ImportError(
            f"jaxkern: this build needs XLA FFI {built[0]}.{built[1]}, but JAX {jax.__version__} offers "
            f"{running[0]}.{running[1]}. Upgrade JAX (pip install -U jax), or rebuild jaxkern against the JAX that is "
            "installed (pip install --no-build-isolation --force-reinstall --no-deps jaxkern)."
        )


CPU = _load()
