"""One model over two processes, as on two hosts: load, generate, train, save."""

import jax
import pytest
from deepseek_tools import GOLDEN, raw_tensors
from processes import Processes

WORKER = """
import sys
import jax
index, devices = map(int, sys.argv[2:4])
jax.config.update("jax_num_cpu_devices", devices)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
local = list(range(index * devices, (index + 1) * devices))  # of GPUs; without it each process takes all
jax.distributed.initialize(sys.argv[1], 2, index, local_device_ids=local)
import jax.numpy as jnp
import numpy as np
from deepseek_tools import GOLDEN, expected
from flax import nnx
from jaxkern.models import deepseek

want = expected("v3-padded")
mesh = jax.make_mesh((2, devices), ("hosts", "devices"))
deepseek.from_pretrained(GOLDEN / "v3-padded", mesh=mesh).save_pretrained(sys.argv[4], max_shard_bytes=200_000)
model = deepseek.from_pretrained(sys.argv[4], dtype=jnp.float32, mesh=mesh)
ids, mask = want["input_ids"], want["attention_mask"]
new = deepseek.generate(model, ids, max_new_tokens=12, attention_mask=mask)
np.testing.assert_array_equal(new, want["generated"])
rows = jax.NamedSharding(mesh, jax.P("hosts"))  # an array that no process holds whole
twice = [np.tile(x, (2, 1)) for x in (ids, mask)]
twice = [jax.make_array_from_callback(x.shape, rows, x.__getitem__) for x in twice]
new = deepseek.generate(model, twice[0], max_new_tokens=12, attention_mask=twice[1])
np.testing.assert_array_equal(new, np.tile(want["generated"], (2, 1)))
step = deepseek.make_train_step()
optimizer = nnx.Optimizer(model, deepseek.adamw(1e-3), wrt=nnx.Param)
losses = [float(step(model, optimizer, {"input_ids": ids, "attention_mask": mask})["loss"]) for _ in range(3)]
assert losses[2] < losses[0]
print("done", losses)
"""


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_two_processes(tmp_path):
    saved = tmp_path / "saved"
    devices = 2 if jax.device_count() >= 4 else 1  # of each process
    with Processes(tmp_path, lambda address, i: ["-c", WORKER, address, i, devices, saved]) as processes:
        outputs = processes.finish(300)
    losses = [output[output.index("done") :].splitlines()[0] for output in outputs]
    assert losses[0] == losses[1]
    assert raw_tensors(saved) == raw_tensors(GOLDEN / "v3-padded")
