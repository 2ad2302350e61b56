"""`python -m jaxkern`: what this installation can do."""

import collections
import platform

import jax

import jaxkern
from jaxkern import _ffi


def main():
    built, running = (".".join(map(str, version)) for version in (_ffi.CPU.api_version(), _ffi.running_api_version()))
    devices = collections.Counter(f"{d.platform} ({d.device_kind})" for d in jax.devices())
    print(f"jaxkern   {jaxkern.__version__}")
    print(f"Python    {platform.python_version()} on {platform.machine()}")
    print(f"JAX       {jax.__version__}, XLA FFI {running} (kernels built for {built})")
    print(f"devices   {', '.join(f'{count} x {kind}' for kind, count in devices.items())}")
    print(f"SIMD      {_ffi.CPU.simd_level()}")
    print(f"GPU       {gpu()}")
    print(f"simulator {_ffi.not_built('sim') or 'built'}")
    print()
    print_table()


def gpu() -> str:
    """What a GPU here would get."""
    if reason := _ffi.not_built("cuda"):
        return f"{reason}: GPUs get the reference"
    found = sorted(_ffi.gpu_capabilities())
    if not found:
        return f"none; the CUDA kernels are built, for compute capability {_ffi.HOPPER}"
    if found != [_ffi.HOPPER]:
        return f"compute capability {', '.join(found)} gets the reference; the CUDA kernels are for {_ffi.HOPPER}"
    return f"compute capability {_ffi.HOPPER}: gets the CUDA kernels"


def print_table():
    """For every op the implementation that runs on the default device, and why the others do not."""
    names = {name: f"{name} ({op.part_of})" if op.part_of else name for name, op in _ffi.OPS.items()}
    width = max(map(len, names.values())) + 2
    here = platform_here()
    print(f"{'op':<{width}}{'here':<6}why not the others")
    for name, op in sorted(_ffi.OPS.items()):
        chosen = implementation_on(here, op)
        reasons = collections.defaultdict(list)
        for other in _ffi.IMPLEMENTATIONS:
            if other != chosen:
                reason = _ffi.why_not(op, other) or _ffi.why_not_on(here, other) or not_chosen(chosen, other)
                reasons[reason].append(other)
        told = "; ".join(f"{', '.join(others)}: {why}" for why, others in reasons.items())
        print(f"{names[name]:<{width}}{chosen:<6}{told}")


def platform_here() -> str:
    """The default device's platform, as lowering names it."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" and _ffi.gpu_capabilities() else backend


def implementation_on(platform: str, op: _ffi.Op) -> str:
    try:
        chosen = _ffi.resolve(op, None) or _ffi.best(op, platform)
    except NotImplementedError:
        return "none"
    return "none" if _ffi.why_not_on(platform, chosen) else chosen


def not_chosen(chosen: str, other: str) -> str:
    return "for calls that the kernel refuses" if (chosen, other) == ("cuda", "xla") else "only if asked for by name"


if __name__ == "__main__":
    main()
