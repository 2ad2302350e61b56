import types

import jax
import pytest

from jaxkern import _ffi

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device


@pytest.fixture
def simulator():
    """The simulator's settings, which a test may change; without one nothing to set: the same run again."""
    if _ffi.SIM is None:
        yield types.SimpleNamespace(configure=lambda **_: None)
    else:
        yield _ffi.SIM
        _ffi.SIM.configure()
