"""On CPUs the tests have 8 devices. On GPUs they have those of the machine, and skip what needs more:

    XLA_FLAGS=--xla_gpu_deterministic_ops=true JAXKERN_TEST_IMPLEMENTATION=cuda python -m pytest tests/test_moe_mesh.py

The flag, as sums that XLA scatters itself have other bits from run to run there. The case "ragged" of several processes
also needs --xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback=true from JAX 0.11 on.
"""

import functools
import math
import os
import pathlib
import platform
import types

# Most of the suite's time is XLA's compiler: what one test has compiled, the other worker, processes that tests start,
# the second part, the run under sanitizers and the next run read; on one machine, as another may lack its instructions.
# Before JAX is imported, which reads these.
CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache" / platform.node()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402

from jaxkern import _ffi  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device


def skips_without_devices(make_mesh):
    @functools.wraps(make_mesh)
    def make(shape, *args, devices=None, **options):
        found = len(jax.devices() if devices is None else devices)
        if jax.default_backend() != "cpu" and math.prod(shape) > found:
            pytest.skip(f"needs {math.prod(shape)} devices, there are {jax.device_count()}")
        return make_mesh(shape, *args, devices=devices, **options)

    return make


jax.make_mesh = skips_without_devices(jax.make_mesh)


def pytest_runtest_setup(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("implementation") == "cpu" and jax.default_backend() != "cpu":
        pytest.skip("the kernels of a CPU")


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Held for one file's tests; all of the suite's are gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def simulator():
    """The simulator's settings, which a test may change; without one nothing to set: the same run again."""
    if _ffi.SIM is None:
        yield types.SimpleNamespace(configure=lambda **_: None)
    else:
        yield _ffi.SIM
        _ffi.SIM.configure()
