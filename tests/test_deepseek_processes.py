"""One model over two processes, as on two hosts: load, generate, train, save."""

import pytest
from deepseek_tools import GOLDEN, raw_tensors
from processes import Processes

WORKER = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp
import numpy as np
from deepseek_tools import GOLDEN, expected
from flax import nnx
from jaxkern.models import deepseek

want = expected("v3-padded")
mesh = jax.make_mesh((2, 2), ("hosts", "devices"))
deepseek.from_pretrained(GOLDEN / "v3-padded", mesh=mesh).save_pretrained(sys.argv[3], max_shard_bytes=200_000)
model = deepseek.from_pretrained(sys.argv[3], dtype=jnp.float32, mesh=mesh)
ids, mask = want["input_ids"], want["attention_mask"]
new = deepseek.generate(model, ids, max_new_tokens=12, attention_mask=mask)
np.testing.assert_array_equal(new, want["generated"])
step = deepseek.make_train_step()
optimizer = nnx.Optimizer(model, deepseek.adamw(1e-3), wrt=nnx.Param)
losses = [float(step(model, optimizer, {"input_ids": ids, "attention_mask": mask})["loss"]) for _ in range(3)]
assert losses[2] < losses[0]
print("done", losses)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    saved = tmp_path / "saved"
    with Processes(tmp_path, lambda address, i: ["-c", WORKER, address, i, saved]) as processes:
        outputs = processes.finish(300)
    losses = [output[output.index("done") :].splitlines()[0] for output in outputs]
    assert losses[0] == losses[1]
    assert raw_tensors(saved) == raw_tensors(GOLDEN / "v3-padded")
