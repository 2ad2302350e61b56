"""What every op owes its users, whatever it computes. The ops are in contract.py."""

import functools
import inspect
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import CASES, HOPPER, ROWS, SHARDS, Case
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkern
from jaxkern import _ffi

DIFFERENTIABLE = [c for c in CASES if c.grad]
UNTOLD = [c for c in CASES if c.implementation is None]  # lets the platform choose


def over(cases, hopper=()):
    """hopper: marks of the cases that ask for a Hopper kernel."""
    params = [pytest.param(c, id=c.id, marks=() if c.implementation is None else hopper) for c in cases]
    return pytest.mark.parametrize("case", params)


def assert_same(got, expected, rtol=0.0):
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape and g.dtype == e.dtype
        g, e = np.asarray(g).astype(np.float64), np.asarray(e).astype(np.float64)
        finite = np.abs(e[np.isfinite(e)])
        np.testing.assert_allclose(g, e, rtol=rtol, atol=rtol * finite.max() if finite.size else 0)


def tolerance(case: Case) -> float:
    return 0.0 if case.exact else case.rtol


def loss_of(case: Case, call=None, **kwargs):
    """The op's float results against fixed random cotangents: a scalar whose gradient is the op's."""

    def loss(*arrays):
        total = 0.0
        for i, r in enumerate(jax.tree.leaves((call or case.call)(*arrays, **kwargs))):
            if jnp.issubdtype(r.dtype, jnp.floating):
                finite = jnp.where(jnp.isfinite(r), r, 0).astype(jnp.float32)
                total += (finite * jnp.cos(jnp.arange(r.size).reshape(r.shape) + i)).sum()
        return total

    return loss


@over(CASES)
def test_matches_reference_eagerly_and_jitted(case):
    expected = case.call(*case.operands, implementation="xla")
    assert_same(case.call(*case.operands), expected, tolerance(case))
    assert_same(jax.jit(case.call)(*case.operands), expected, tolerance(case))


@over(UNTOLD)
def test_without_jit(case):
    with jax.disable_jit():
        got = case.call(*case.operands)
    assert_same(got, case.call(*case.operands), tolerance(case))


@over(CASES)
def test_runs_its_own_kernel(case):
    jaxpr = str(jax.make_jaxpr(case.call)(*case.operands))
    compiled = jax.jit(case.call).lower(*case.operands).as_text()
    reference = jax.jit(lambda *a: case.call(*a, implementation="xla")).lower(*case.operands).as_text()
    assert "jaxkern." not in reference
    if case.primitive is None:
        assert "jaxkern_" not in jaxpr
    else:
        assert case.primitive in jaxpr
        assert case.target in compiled


@over(CASES)
def test_vmap(case):
    stacked = [jnp.stack([x, jnp.flip(x, 0), x]) for x in case.operands]
    rows = [case.call(*[s[i] for s in stacked]) for i in range(3)]
    expected = jax.tree.map(lambda *r: jnp.stack(r), *rows)
    assert_same(jax.jit(jax.vmap(case.call))(*stacked), expected, tolerance(case))


@pytest.mark.slow
@over(UNTOLD)
def test_vmap_of_the_reference(case):
    stacked = [jnp.stack([x, jnp.flip(x, 0)], -1) for x in case.operands]
    reference = functools.partial(case.call, implementation="xla")
    rows = [case.call(*[s[..., i] for s in stacked]) for i in range(2)]
    assert_same(jax.vmap(reference, -1)(*stacked), jax.tree.map(lambda *r: jnp.stack(r), *rows), tolerance(case))


@over([c for c in CASES if len(c.arrays) > 1], hopper=pytest.mark.slow)
def test_vmap_with_unbatched_operands(case):
    for batched in range(len(case.arrays)):
        operands = case.operands
        stack = jnp.stack([operands[batched], jnp.flip(operands[batched], 0)], axis=-1)
        rows = [case.call(*[stack[..., i] if j == batched else x for j, x in enumerate(operands)]) for i in range(2)]
        axes = [-1 if j == batched else None for j in range(len(operands))]
        got = jax.vmap(case.call, in_axes=axes)(*[stack if j == batched else x for j, x in enumerate(operands)])
        assert_same(got, jax.tree.map(lambda *r: jnp.stack(r), *rows), tolerance(case))


@over(DIFFERENTIABLE)
def test_gradient_is_that_of_the_reference(case):
    got = jax.jit(jax.grad(loss_of(case), case.grad_argnums))(*case.operands)
    expected = jax.jit(jax.grad(loss_of(case, implementation="xla"), case.grad_argnums))(*case.operands)
    assert_same(got, expected, case.rtol)


@over([c for c in DIFFERENTIABLE if c.smooth], hopper=pytest.mark.slow)
def test_gradient_is_the_slope(case):
    """Against a central difference along a random direction, in float64 arithmetic on float32 results."""
    loss, operands = loss_of(case), case.operands
    gradient = jax.grad(loss, case.grad_argnums)(*operands)
    directions = [jax.random.normal(jax.random.key(i), operands[n].shape) for i, n in enumerate(case.grad_argnums)]

    def moved(step):
        arrays = list(operands)
        for n, d in zip(case.grad_argnums, directions, strict=True):
            arrays[n] = (arrays[n] + step * d).astype(arrays[n].dtype)
        return float(loss(*arrays))

    slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
    expected = sum(float((g * d).sum()) for g, d in zip(gradient, directions, strict=True))
    scale = sum(float(jnp.abs(g * d).sum()) for g, d in zip(gradient, directions, strict=True))
    assert abs(slope - expected) < 1e-2 * scale + 1e-3


@over(DIFFERENTIABLE, hopper=pytest.mark.slow)
def test_vmap_of_gradient(case):
    stacked = [jnp.stack([x, jnp.flip(x, 0)]) for x in case.operands]
    gradient = jax.grad(loss_of(case), case.grad_argnums)
    rows = [gradient(*[s[i] for s in stacked]) for i in range(2)]
    assert_same(jax.jit(jax.vmap(gradient))(*stacked), jax.tree.map(lambda *r: jnp.stack(r), *rows), case.rtol)


@over(DIFFERENTIABLE, hopper=pytest.mark.slow)
def test_remat(case):
    gradient = jax.jit(jax.grad(loss_of(case, jax.checkpoint(case.call)), case.grad_argnums))
    assert_same(gradient(*case.operands), jax.grad(loss_of(case), case.grad_argnums)(*case.operands), case.rtol)


@over(CASES, hopper=pytest.mark.slow)
def test_scan(case):
    stacked = [jnp.stack([x, jnp.flip(x, 0)]) for x in case.operands]
    _, got = jax.jit(lambda *xs: jax.lax.scan(lambda c, x: (c, case.call(*x)), 0, xs))(*stacked)
    rows = [case.call(*[s[i] for s in stacked]) for i in range(2)]
    assert_same(got, jax.tree.map(lambda *r: jnp.stack(r), *rows), tolerance(case))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@over(CASES)
def test_shard_map(case, axis_type):
    """Each of 4 devices, or of 2 GPUs, on its part: the results, and the gradients also of replicated operands."""
    mesh = jax.make_mesh((SHARDS,), ("x",), axis_types=(axis_type,))
    operands = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(case.operands, case.specs, strict=True)]
    call = case.sharded_call or case.call

    def sharded(*arrays):
        # check_vma=True: a result whose varying axes were lost would be refused here.
        return jax.shard_map(call, mesh=mesh, in_specs=case.specs, out_specs=case.out_specs)(*arrays)

    assert_same(jax.jit(sharded)(*operands), case.unsharded(*case.operands), tolerance(case))
    if case.grad:
        got = jax.jit(jax.grad(loss_of(case, sharded), case.grad_argnums))(*operands)
        expected = jax.jit(jax.grad(loss_of(case, case.unsharded), case.grad_argnums))(*case.operands)
        assert_same(got, expected, case.rtol)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@over(UNTOLD)
def test_sharded_operands_outside_shard_map(case, axis_type):
    """They are gathered: slow, but right. A gradient is sharded as its operand."""
    mesh = jax.make_mesh((SHARDS,), ("x",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        operands = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(case.operands, case.specs, strict=True)]
        got = jax.jit(case.call)(*operands)
        gradient = jax.jit(jax.grad(loss_of(case), case.grad_argnums))(*operands) if case.grad else ()
    assert_same(got, case.call(*case.operands), tolerance(case))
    if case.grad:
        assert_same(gradient, jax.jit(jax.grad(loss_of(case), case.grad_argnums))(*case.operands), case.rtol)
        for g, n in zip(gradient, case.grad_argnums, strict=True):
            assert jax.typeof(g).sharding == jax.typeof(operands[n]).sharding


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [None, "xla"])
@over(UNTOLD)
def test_axes_that_only_gathering_can_split(case, implementation):
    """Each operand along its last axis of an even size, as no shard_map over the op could have it."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))

    def split(x):
        even = [axis for axis, size in enumerate(x.shape) if size % 2 == 0]
        return jax.device_put(x, NamedSharding(mesh, P(*["x" if [i] == even[-1:] else None for i in range(x.ndim)])))

    with jax.set_mesh(mesh):
        got = case.call(*map(split, case.operands), implementation=implementation)
    assert_same(got, case.call(*case.operands, implementation=implementation), case.rtol)


@pytest.mark.slow
@over([c for c in UNTOLD if c.grad])
def test_vmap_over_a_sharded_axis(case):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    stacked = [jnp.stack([x, jnp.flip(x, 0)]) for x in case.operands]
    run = jax.jit(lambda *a: (jax.vmap(case.call)(*a), jax.vmap(jax.grad(loss_of(case), case.grad_argnums))(*a)))
    with jax.set_mesh(mesh):
        got = run(*[jax.device_put(x, NamedSharding(mesh, ROWS)) for x in stacked])
    assert_same(got, run(*stacked), case.rtol)


@over(CASES)
def test_export(case):
    expected = case.call(*case.operands)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.operands]
    checks = jaxkern.DISABLE_JAX_EXPORT_CHECKS
    exported = jax.export.export(jax.jit(case.call), disabled_checks=checks)(*shapes)
    restored = jax.export.deserialize(exported.serialize())
    assert_same(restored.call(*case.operands), expected, tolerance(case))


@over([c for c in CASES if c.symbolic], hopper=pytest.mark.slow)
def test_export_with_a_symbolic_batch(case):
    scope = jax.export.SymbolicScope()
    shapes = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(dims, scope=scope), x.dtype)
        for dims, x in zip(case.symbolic, case.operands, strict=True)
    ]
    exported = jax.export.export(jax.jit(case.call), disabled_checks=jaxkern.DISABLE_JAX_EXPORT_CHECKS)(*shapes)
    assert_same(exported.call(*case.operands), case.call(*case.operands), tolerance(case))


@over(CASES)
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donation(case):
    expected = case.call(*case.operands)
    operands = [jnp.array(x, copy=True) for x in case.operands]
    assert_same(jax.jit(case.call, donate_argnums=range(len(operands)))(*operands), expected)


@over(CASES)
def test_same_bits_every_time(case):
    run = jax.jit(case.call)
    first = run(*case.operands)
    for _ in range(5):
        assert_same(run(*case.operands), first)


def results_of_all_cases():
    return {f"{c.id}.{i}": np.asarray(r).astype(np.float64) for c in CASES for i, r in enumerate(_leaves(c))}


def _leaves(case):
    return jax.tree.leaves(case.call(*case.operands))


def _results_in_another_process(tmp_path, cores=None, **env):
    pin = f"import os; os.sched_setaffinity(0, {cores}); " if cores else ""
    path = str(tmp_path / "results.npz")
    code = f"{pin}import sys, numpy as np; sys.path.insert(0, {os.path.dirname(__file__)!r}); "
    code += f"import test_contract as t; np.savez({path!r}, **t.results_of_all_cases())"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **env})
    return np.load(path)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a way to pin a process to one core")
def test_same_bits_on_one_core(tmp_path):
    got, expected = _results_in_another_process(tmp_path, cores={0}), results_of_all_cases()
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


@pytest.mark.parametrize("level", ["portable", *(pytest.param(x, marks=pytest.mark.slow) for x in ("avx2", "avx512"))])
def test_simd_levels_agree(tmp_path, level):
    got, expected = _results_in_another_process(tmp_path, JAXKERN_SIMD=level), results_of_all_cases()
    for case in CASES:
        for i in range(len(_leaves(case))):
            g, e = got[f"{case.id}.{i}"], expected[f"{case.id}.{i}"]
            rtol = 0 if case.exact else max(case.rtol, 1e-5)
            finite = np.abs(e[np.isfinite(e)])
            atol = rtol * finite.max() if finite.size else 0
            np.testing.assert_allclose(g, e, rtol=rtol, atol=atol, err_msg=f"{case.id} {level}")


# Errors, all raised while tracing: op, argument, what was expected, what came.


def _trace(case, arrays, **kwargs):
    return jax.eval_shape(lambda *a: case.call(*a, **kwargs), *arrays)


@over(CASES)
def test_wrong_dtype(case):
    for i, name in enumerate(case.arrays):
        arrays = case.operands
        arrays[i] = jnp.zeros(arrays[i].shape, jnp.complex64)
        with pytest.raises(TypeError, match=rf"^[\w.]+: {name.split('.')[0]}.* must be .*, got complex64\["):
            _trace(case, arrays)


@over(CASES)
def test_wrong_rank(case):
    for i, name in enumerate(case.arrays):
        arrays = case.operands
        arrays[i] = arrays[i].reshape(-1)[0]
        with pytest.raises(ValueError, match=rf"^[\w.]+: {name.split('.')[0]}.* must be .*, got {arrays[i].dtype}\[\]"):
            _trace(case, arrays)


@over([c for c in UNTOLD if c.name != "replay"])  # its case multiplies the operand first
def test_no_array(case):
    with pytest.raises(TypeError, match=rf"^[\w.]+: {next(iter(case.arrays)).split('.')[0]}.* must be .*, got None$"):
        case.call(None, *case.operands[1:])


@over([c for c in CASES if c.mismatch])
def test_mismatched_sizes(case):
    for name, axis in case.mismatch:
        arrays = case.operands
        i = list(case.arrays).index(name)
        arrays[i] = jnp.concatenate([arrays[i], arrays[i]], axis)
        with pytest.raises(ValueError, match=r"^[\w.]+: .*got "):
            _trace(case, arrays)


@over(CASES)
def test_unknown_implementation(case):
    with pytest.raises(ValueError, match=r"^\w+: implementation must be None or one of .*, got 'fast'"):
        _trace(case, case.operands, implementation="fast")


@pytest.mark.parametrize("implementation", ["cuda", "sim"])
@over([c for c in UNTOLD if c not in HOPPER])
def test_without_a_hopper_kernel(case, implementation, monkeypatch):
    pretend(monkeypatch)
    why = "(is not available: no Hopper kernel for this op yet.*; available: .*xla|cannot run this call: .+)"
    with pytest.raises(NotImplementedError, match=rf"^\w+: implementation '{implementation}' {why}"):
        _trace(case, case.operands, implementation=implementation)


@pytest.mark.parametrize("implementation,why", [("cuda", "no CUDA kernels"), ("sim", "no simulator")])
@over(HOPPER)
def test_implementation_that_is_not_built(case, implementation, why, monkeypatch):
    monkeypatch.setattr(_ffi, implementation.upper(), None)
    message = rf"^\w+: implementation '{implementation}' is not available: this build has {why}.*; available: .*xla"
    with pytest.raises(NotImplementedError, match=message):
        _trace(case, case.operands, implementation=implementation)


@over(UNTOLD)
def test_implementation_from_the_environment(case, monkeypatch):
    monkeypatch.setenv("JAXKERN_IMPLEMENTATION", "xla")
    assert "jaxkern." not in jax.jit(lambda *a: case.call(*a)).lower(*case.operands).as_text()
    monkeypatch.setenv("JAXKERN_IMPLEMENTATION", "cuda")
    with pytest.raises(NotImplementedError, match=r"^\w+: implementation 'cuda' "):
        jax.jit(lambda *a: case.call(*a)).lower(*case.operands)


# Static integers. Calls are cached by them, and what equals an integer without being one would stand for it there.


def _statics():
    """(op, argument, the op's call with that argument, a good value)."""
    a, b, sizes = jnp.ones((4, 128)), jnp.ones((2, 8, 128)), jnp.array([1, 2], jnp.int32)
    x, ids, weights = jnp.ones((6, 24)), jnp.zeros((6, 3), jnp.int32), jnp.ones((6, 3))
    q, cache, table = jnp.ones((1, 1, 2, 40)), jnp.ones((2, 16, 40)), jnp.zeros((1, 2), jnp.int32)
    packed = jnp.zeros((2, 656), jnp.uint8)
    kv = jaxkern.kv_cache

    def dispatch(**kwargs):
        return jaxkern.dispatch(x, ids, weights, **{"num_experts": 8, **kwargs})

    def decode(**kwargs):
        lens = jnp.ones(1, jnp.int32)
        return jaxkern.mla_decode(q, cache, table, lens, softmax_scale=0.2, **{"latent_dim": 32, **kwargs})

    return [
        ("grouped_gemm", "group_alignment", functools.partial(jaxkern.grouped_gemm, a, b, sizes), 2),
        ("k_grouped_gemm", "group_alignment", functools.partial(jaxkern.k_grouped_gemm, a, a, sizes), 2),
        ("fp8_grouped_linear", "group_alignment", functools.partial(jaxkern.fp8_grouped_linear, a, b, sizes), 2),
        ("quantize_along_tokens", "group_alignment", functools.partial(jaxkern.quantize_along_tokens, a, sizes), 2),
        ("route", "top_k", functools.partial(jaxkern.route, jnp.ones((4, 8)), jnp.ones(8)), 2),
        ("route", "num_groups", functools.partial(jaxkern.route, jnp.ones((4, 8)), jnp.ones(8), top_k=1), 2),
        ("route", "topk_groups", functools.partial(jaxkern.route, jnp.ones((4, 8)), jnp.ones(8), top_k=1), 1),
        ("dispatch", "num_experts", dispatch, 8),
        ("dispatch", "capacity", dispatch, 18),
        ("dispatch", "wire_capacity", dispatch, 6),
        ("dispatch", "expert_alignment", dispatch, 4),
        ("mla_decode", "latent_dim", decode, 32),
        ("mla_decode", "num_splits", decode, 2),
        (
            "kv_cache.append",
            "latent_dim",
            functools.partial(kv.append, cache, q[0, :, :1], table[:, :1], table[:, :1]),
            32,
        ),
        ("kv_cache.pack", "latent_dim", functools.partial(kv.pack, a), 64),
        ("kv_cache.unpack", "latent_dim", functools.partial(kv.unpack, packed), 512),
        ("kv_cache.unpack", "rope_dim", functools.partial(kv.unpack, packed), 64),
        ("kv_cache.row_bytes", "rope_dim", kv.row_bytes, 64),
    ]


@pytest.mark.parametrize("op,argument,call,good", [pytest.param(*s, id=f"{s[0]}-{s[1]}") for s in _statics()])
def test_static_integers(op, argument, call, good):
    jax.block_until_ready(call(**{argument: np.int32(good)}))
    jax.block_until_ready(call(**{argument: good}))  # finds nothing in the cache that only equals it
    for bad in (float(good), good + 0.5, True, str(good), [good]):
        with pytest.raises(TypeError, match=rf"^{op}: {argument} must be an integer, got {re.escape(repr(bad))}"):
            call(**{argument: bad})


# Implementations and platforms. Lowering needs neither the GPU nor the kernels, so both can be made up.


def exported_for(platform: str, case: Case, **kwargs) -> str:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.operands]
    call = jax.jit(lambda *a: case.call(*a, **kwargs))
    checks = jaxkern.DISABLE_JAX_EXPORT_CHECKS
    return jax.export.export(call, platforms=[platform], disabled_checks=checks)(*shapes).mlir_module()


def pretend(monkeypatch, *capabilities):
    """As if this build had CUDA kernels, and this machine GPUs of these compute capabilities."""
    monkeypatch.setattr(_ffi, "CUDA", "built")
    monkeypatch.setattr(_ffi, "gpu_capabilities", lambda: set(capabilities))


@over([c for c in UNTOLD if c.primitive])
def test_explicit_cpu_never_falls_back(case):
    """Asked for the CPU kernel, lowering for another platform is an error and not the reference."""
    with pytest.raises(NotImplementedError, match="implementation 'cpu' does not run on platform cuda"):
        exported_for("cuda", case, implementation="cpu")


@over(HOPPER)
def test_explicit_hopper_never_falls_back(case, monkeypatch):
    with pytest.raises(NotImplementedError, match="implementation 'sim' does not run on platform cuda"):
        exported_for("cuda", case, implementation="sim")
    pretend(monkeypatch)
    with pytest.raises(NotImplementedError, match="'cuda' does not run on platform cpu: .*; available: cpu, xla, sim"):
        exported_for("cpu", case, implementation="cuda")
    assert case.target in exported_for("cuda", case, implementation="cuda"), "an export for a GPU of another machine"
    pretend(monkeypatch, "8.0")
    message = r"'cuda' does not run on platform cuda: it needs a GPU of compute capability 9\.0, this one has 8\.0"
    with pytest.raises(NotImplementedError, match=message):
        exported_for("cuda", case, implementation="cuda")


@pytest.mark.parametrize("capability", [None, "9.0", "8.0"])
@over(UNTOLD)
def test_what_a_gpu_gets(case, capability, monkeypatch):
    pretend(monkeypatch, *[capability] if capability else [])
    targets = re.findall(r"jaxkern\.[\w.]+\.v", exported_for("cuda", case))
    parts = [f"jaxkern.{op}.v" for op in case.hopper_parts] or ([case.target] if case in HOPPER else [])
    assert targets == (parts if capability == "9.0" else [])


@over([c for c in CASES if not c.primitive])
def test_explicit_cpu_without_a_kernel(case):
    with pytest.raises(NotImplementedError, match=r"^\w+: implementation 'cpu' is not available: .*; available: xla"):
        _trace(case, case.operands, implementation="cpu")


def test_every_op_is_in_the_table():
    public = {name for name in jaxkern.__all__ if inspect.isfunction(getattr(jaxkern, name))}
    of_caches = inspect.getmembers(jaxkern.kv_cache, inspect.isfunction)
    kernels = {f"kv_cache.{name}" for name, f in of_caches if "implementation" in inspect.signature(f).parameters}
    assert public - {"implementations_used", "plan"} | kernels == {case.name for case in CASES}
    jaxpr = ""
    for case in CASES:
        jaxpr += str(jax.make_jaxpr(case.call)(*case.operands))
        if case.grad:
            jaxpr += str(jax.make_jaxpr(jax.grad(loss_of(case), case.grad_argnums))(*case.operands))
    for name, op in _ffi.OPS.items():
        assert op.cpu is None or f"jaxkern_{name}" in jaxpr, name


def test_a_build_newer_than_jax_is_refused():
    _ffi.check_api_version((0, 3), (0, 5))
    with pytest.raises(ImportError, match=r"needs XLA FFI 0\.5, but JAX .* offers 0\.3\. Upgrade JAX"):
        _ffi.check_api_version((0, 5), (0, 3))
