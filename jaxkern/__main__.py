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
    print()
    print_table()


def print_table():
    """For every op the implementation that runs on the default device, and why the others do not."""
    names = {name: f"{name} ({op.part_of})" if op.part_of else name for name, op in _ffi.OPS.items()}
    width = max(map(len, names.values())) + 2
    print(f"{'op':<{width}}{'here':<6}why not the others")
    for name, op in sorted(_ffi.OPS.items()):
        chosen = implementation_here(op)
        reasons = collections.defaultdict(list)
        for other in _ffi.IMPLEMENTATIONS:
            if other != chosen:
                reasons[_ffi.why_not(op, other) or why_not_here(other)].append(other)
        told = "; ".join(f"{', '.join(others)}: {why}" for why, others in reasons.items())
        print(f"{names[name]:<{width}}{chosen:<6}{told}")


def implementation_here(op: _ffi.Op) -> str:
    try:
        asked = _ffi.resolve(op, None)
    except NotImplementedError:
        return "none"
    return asked or ("cpu" if jax.default_backend() == "cpu" else "xla")


def why_not_here(implementation: str) -> str:
    if implementation == "cpu" and jax.default_backend() != "cpu":
        return "runs on CPU devices only"
    return f"not the choice here; implementation={implementation!r} runs it"


if __name__ == "__main__":
    main()
