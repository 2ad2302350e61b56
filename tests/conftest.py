import jax
import pytest

from jaxkern import _ffi

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device


@pytest.fixture
def simulator():
    """The simulator's settings, which a test may change."""
    yield _ffi.SIM
    if _ffi.SIM is not None:
        _ffi.SIM.configure()
