"""From op records to JAX primitives: the only file that loads extension modules, registers FFI targets and
lowering rules, and knows JAX versions.

An op is one `Op` record. `call` binds it: on a CPU it lowers to our custom call, on a Hopper GPU to that of its
`Kernel`, if it has one that can run the call, and everywhere else to its reference in plain JAX.
"""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

IMPLEMENTATIONS = ("cpu", "cuda", "xla", "sim")
PLATFORMS = {"cpu": "cpu", "cuda": "cuda", "sim": "cpu"}  # where each runs; "xla" runs everywhere
HOPPER = "9.0"  # the compute capability that the CUDA kernels are compiled for
OPS: dict[str, "Op"] = {}
USED: dict[str, set[str]] = {}
DISABLE_JAX_EXPORT_CHECKS: list[jax.export.DisabledSafetyCheck] = []


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How an op's Hopper kernel is called, as "cuda" on a GPU and as "sim" on the simulator.

    layouts: (**params) -> (the operands', the results'): each array's axes from major to minor, None for row-major.
    attributes: the parameters that the target takes.
    operands: (*arrays, **params) -> what the target takes for the op's own operands; those of `Op.aliases` in place.
    dtypes: (*avals, **params) -> those of the target's results, which are cast to the op's; None: they are the op's.
    refuses: (*avals, **params) -> why the kernel cannot run this call; empty if it can.
    workspaces: (*avals, **params) -> [(shape, dtype), ...]: further results of the target, row-major, kept by nobody.
    version: that of the targets, `jaxkern.<name>.v<version>` on GPUs and `jaxkern.sim.<name>.v<version>` on the CPU.
    """

    layouts: Callable
    attributes: tuple[str, ...] = ()
    operands: Callable = lambda *arrays, **_: arrays
    dtypes: Callable | None = None
    refuses: Callable = lambda *avals, **_: ""
    workspaces: Callable = lambda *avals, **_: []
    version: int = 1


@dataclasses.dataclass(frozen=True)
class Op:
    """What `_ffi` must know of an op.

    name: the op's name; its CPU target is `jaxkern.<name>.v<cpu>`.
    results: (*avals, **params) -> [(shape, dtype), ...].
    reference: (*arrays, **params) -> (array, ...), in plain JAX.
    part_of: the public functions that run this op, where it is none itself.
    cpu: version of the CPU target; None where the reference is the only implementation.
    hopper: the op's Hopper kernel, if there is one.
    why: what there is to say of a kernel that is missing.
    sizes: parameters that are sizes of results. They may be symbolic, so the target reads them off its buffers instead.
    batch: (size, arrays, is_batched, **params) -> (arrays, params, unbatch): how to fold a leading axis of `size` into
        the operands and take it out of each result again. NotImplemented, or None here, maps the op over the axis.
    aliases: {operand: result} that share a buffer: the kernels write such a result over its operand, of the same type,
        which XLA copies first where the caller still needs it (it does not if the operand is donated).
    """

    name: str
    results: Callable
    reference: Callable
    part_of: str = ""
    cpu: int | None = 1
    why: str = ""
    hopper: Kernel | None = None
    sizes: tuple[str, ...] = ()
    batch: Callable | None = None
    aliases: dict[int, int] = dataclasses.field(default_factory=dict)
    primitive: Primitive = dataclasses.field(init=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "primitive", _make_primitive(self))
        OPS[self.name] = self

    def target(self, implementation: str) -> str:
        prefix = "jaxkern.sim" if implementation == "sim" else "jaxkern"
        return f"{prefix}.{self.name}.v{self.cpu if implementation == 'cpu' else self.hopper.version}"


def call(op: Op, *arrays: jax.Array, implementation: str | None = None, **params) -> tuple[jax.Array, ...]:
    """Runs `op` with the chosen implementation. Parameters are static and hashable."""
    implementation = resolve(op, implementation)
    with jax.named_scope(f"jaxkern.{op.name}"):
        return tuple(op.primitive.bind(*align(*arrays), implementation=implementation, **params))


def implementations_used() -> dict[str, list[str]]:
    """Which implementations each op has been compiled with in this process: for telling what really ran."""
    return {name: sorted(used) for name, used in sorted(USED.items())}


def resolve(op: Op, implementation: str | None) -> str | None:
    """The implementation to run: None is "the best that the platform has", chosen when lowering."""
    implementation = implementation or os.environ.get("JAXKERN_IMPLEMENTATION") or None
    if implementation is None:
        return "xla" if op.cpu is None and op.hopper is None else None
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
        more = op.why and f" ({op.why})"
        return f"no Hopper kernel for this op yet{more}" if op.hopper is None else not_built(implementation)
    return ""


def why_not_on(platform: str, implementation: str) -> str:
    """Why `implementation` does not run on `platform`; empty if it does."""
    if PLATFORMS.get(implementation, platform) != platform:
        return f"it needs platform {PLATFORMS[implementation]}"
    if implementation == "cuda" and (others := gpu_capabilities() - {HOPPER}):
        return f"it needs a GPU of compute capability {HOPPER}, this one has {', '.join(sorted(others))}"
    return ""


def best(op: Op, platform: str) -> str:
    """The implementation that None stands for, for all calls that the Hopper kernel does not refuse.

    Lowering for a GPU where there is none gives the reference: nobody knows what it will run on.
    """
    if platform == "cpu" and op.cpu is not None:
        return "cpu"
    hopper = platform == "cuda" and gpu_capabilities() == {HOPPER} and not why_not(op, "cuda")
    return "cuda" if hopper else "xla"


def gpu_capabilities() -> set[str]:
    """The compute capabilities of this process's NVIDIA GPUs."""
    try:
        return {device.compute_capability for device in jax.local_devices(backend="cuda")}
    except RuntimeError:  # no such backend
        return set()


def not_built(implementation: str) -> str:
    """Why this build has not got the kernels of `implementation`; empty if it has."""
    if implementation == "cuda" and CUDA is None:
        return "this build has no CUDA kernels (it was built without nvcc)"
    if implementation == "sim" and SIM is None:
        return "this build has no simulator (it was built with JAXKERN_SIM=OFF)"
    return ""


def exportable(node: type) -> type:
    """Lets jax.export serialise what takes or returns this pytree: its static fields as JSON, without lists."""

    def tuples(value):
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return jax.export.register_pytree_node_serialization(
        node,
        serialized_name=f"jaxkern.{node.__name__}",
        serialize_auxdata=lambda fields: json.dumps(fields).encode(),
        deserialize_auxdata=lambda data: tuples(json.loads(bytes(data))),
    )


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


def whole(x: jax.Array) -> jax.Array:
    """`x`, gathered from the Explicit mesh axes that it may be split along: our calls cannot be split.

    Its cotangent gets x's own sharding. shard_map's manual axes stay as they are, XLA itself gathers from Auto ones.
    """
    explicit = jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
    return _WHOLE.bind(x) if explicit else x


def only_on(platforms: Sequence[str], x: jax.Array, message: str) -> jax.Array:
    """`x`; compiling for another platform raises NotImplementedError with `message`."""
    return _ONLY_ON.bind(x, platforms=tuple(platforms), message=message)


def _make_only_on() -> Primitive:
    primitive = Primitive("jaxkern_only_on")

    def lower(ctx, x, *, platforms, message):
        if others := set(ctx.module_context.platforms) - set(platforms):
            raise NotImplementedError(f"{message}, only on {', '.join(platforms)}; compiling for {', '.join(others)}")
        return [x]

    primitive.def_abstract_eval(lambda x, **_: x)
    batching.primitive_batchers[primitive] = lambda arrays, axes, **params: (primitive.bind(*arrays, **params), axes[0])
    mlir.register_lowering(primitive, lower)
    return primitive


_ONLY_ON = _make_only_on()


def _make_whole() -> Primitive:
    """A primitive, so that vmap gathers the axis that it took from `x` as well."""
    primitive = Primitive("jaxkern_whole")

    def gather(x):
        aval = jax.typeof(x)
        return jax.sharding.reshard(x, _like(aval, aval.shape, aval.dtype).sharding)

    primitive.def_abstract_eval(lambda x: _like(x, x.shape, x.dtype))
    primitive.def_impl(gather)
    ad.deflinear2(primitive, lambda cotangent, x: [jax.sharding.reshard(cotangent, x.aval.sharding)])
    batching.primitive_batchers[primitive] = lambda arrays, axes: (primitive.bind(*arrays), axes[0])
    mlir.register_lowering(primitive, mlir.lower_fun(gather, multiple_results=False))
    return primitive


_WHOLE = _make_whole()


def _make_primitive(op: Op) -> Primitive:
    primitive = Primitive(f"jaxkern_{op.name}")
    primitive.multiple_results = True

    def abstract_eval(*avals, implementation, **params):
        if implementation in ("cuda", "sim") and (reason := op.hopper.refuses(*avals, **params)):
            raise NotImplementedError(f"{op.name}: implementation {implementation!r} cannot run this call: {reason}")
        return [_like(avals[0], shape, dtype) for shape, dtype in op.results(*avals, **params)]

    def run_eagerly(*arrays, **params):
        with jax.disable_jit(False):  # or the call would come back here
            return _compiled(primitive, tuple(sorted(params.items())))(*arrays)

    def lower(platform, ctx, *operands, implementation, **params):
        platform = platform or ", ".join(ctx.module_context.platforms)
        chosen = implementation or best(op, platform)
        if implementation is None and chosen == "cuda" and op.hopper.refuses(*ctx.avals_in, **params):
            chosen = "xla"
        if reason := why_not_on(platform, chosen):
            available = [i for i in IMPLEMENTATIONS if not why_not(op, i) and not why_not_on(platform, i)]
            raise NotImplementedError(
                f"{op.name}: implementation {chosen!r} does not run on platform {platform}: {reason}; "
                f"available: {', '.join(available)}"
            )
        USED.setdefault(op.name, set()).add(chosen)
        if chosen == "cpu":
            attributes = {name: _attribute(value) for name, value in params.items() if name not in op.sizes}
            lowering = jax.ffi.ffi_lowering(op.target("cpu"), operand_output_aliases=op.aliases)
            return lowering(ctx, *operands, **attributes)
        run = op.reference if chosen == "xla" else functools.partial(_call_hopper, op, chosen, ctx.avals_out)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *operands, **params)

    def differentiate(primals, tangents, *, implementation, **params):
        if implementation != "xla":
            raise NotImplementedError(
                f"{op.name}: a kernel has no derivative; use stop_gradient, or implementation='xla'"
            )
        moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

        def of_moving(*arrays):
            operands = dict(enumerate(primals)) | dict(zip(moving, arrays, strict=True))
            return tuple(op.reference(*operands.values(), **params))

        return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])

    def batch(arrays, axes, **params):
        return _batch(op, arrays, axes, params)

    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(run_eagerly)
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = differentiate
    targets = {op.target("cpu")} if op.cpu is not None else set()
    if op.hopper is not None:
        targets |= {op.target("cuda"), op.target("sim")}
        mlir.register_lowering(primitive, functools.partial(lower, "cuda"), platform="cuda")
    if targets:
        mlir.register_lowering(primitive, functools.partial(lower, "cpu"), platform="cpu")
    mlir.register_lowering(primitive, functools.partial(lower, None))
    DISABLE_JAX_EXPORT_CHECKS.extend(map(jax.export.DisabledSafetyCheck.custom_call, sorted(targets)))
    return primitive


def _call_hopper(op: Op, implementation: str, results, *arrays, **params):
    operand_layouts, result_layouts = op.hopper.layouts(**params)
    workspaces = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in op.hopper.workspaces(*arrays, **params)]
    dtypes = op.hopper.dtypes(*arrays, **params) if op.hopper.dtypes else [r.dtype for r in results]
    call = jax.ffi.ffi_call(
        op.target(implementation),
        [*(r.update(dtype=np.dtype(dtype)) for r, dtype in zip(results, dtypes, strict=True)), *workspaces],
        input_layouts=operand_layouts,
        output_layouts=(*result_layouts, *[None] * len(workspaces)),
        input_output_aliases=op.aliases,
    )
    attributes = {name: _attribute(params[name]) for name in op.hopper.attributes}
    given = call(*op.hopper.operands(*arrays, **params), **attributes)
    return [x.astype(r.dtype) for x, r in zip(given[: len(results)], results, strict=True)]


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
    arrays = [whole(x if axis is None else jnp.moveaxis(x, axis, 0)) for x, axis in zip(arrays, axes, strict=True)]
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
    CPU backend fail for the whole process. All modules are built with the same FFI.
    """
    try:
        from jaxkern import _cpu
    except ImportError as error:
        raise ImportError(
            f"jaxkern: the compiled module jaxkern._cpu could not be loaded ({error}). In the source tree install the "
            "package with pip install -e .; one that was installed without -e is hidden by the tree's folder jaxkern "
            "when Python starts there."
        ) from error
    check_api_version(_cpu.api_version(), running_api_version())
    _register(_cpu, "cpu")
    return _cpu


def _load_if_built(name: str, platform: str):
    try:
        module = importlib.import_module(f"jaxkern.{name}")
    except ModuleNotFoundError:
        return None
    _register(module, platform)
    return module


def _register(module, platform: str):
    for name, handler in module.handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform=platform)


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
CUDA = _load_if_built("_cuda", "CUDA")
SIM = _load_if_built("_sim", "cpu")
