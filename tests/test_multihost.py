"""Several processes, as on several hosts: the same results as one process, and no process outlives another for long.

On CPUs two processes of four devices, on GPUs one a GPU.
"""

import re
import signal

import jax
import numpy as np
import pytest
from multihost_worker import chosen_cases, results
from processes import TESTS, Processes

WORKER = TESTS / "multihost_worker.py"
EXAMPLE = TESTS.parent / "examples" / "multihost.py"
ON_CPUS = jax.default_backend() == "cpu"
DEVICES = next(n for n in (8, 4, 2, 1) if n <= jax.device_count())  # of all processes together
NUMBER = 2 if ON_CPUS else DEVICES
# Programs of several processes and of one are compiled apart there, with sums in other orders.
LEAST_TOLERANCE = 0 if ON_CPUS else 1e-4

pytestmark = pytest.mark.skipif(DEVICES < 2, reason="needs two devices")


def worker(*task):
    return lambda address, i: [WORKER, address, NUMBER, i, DEVICES // NUMBER, *task]


def differences(got: dict, want: dict, tolerance: float) -> list[str]:
    """What is further apart than `tolerance`, in parts of the largest value; 0: what has not the same bits."""
    assert got.keys() == want.keys()
    found = []
    for name, x in got.items():
        y = want[name]
        assert x.shape == y.shape and x.dtype == y.dtype, name
        exact = tolerance == 0 or not np.issubdtype(x.dtype, np.floating)
        if exact and x.tobytes() != y.tobytes():
            found.append(f"{name}: not the same bits, {(x != y).sum()} of {x.size} values differ")
        elif not exact and not (distance := np.abs(x - y).max()) <= tolerance * max(np.abs(y).max(), 1e-3):
            found.append(f"{name}: {distance} apart, of {np.abs(y).max()}")
    return found


@pytest.mark.slow
def test_processes_together_are_one_process_of_all_devices(tmp_path):
    """One test, so that the processes start once."""
    cases = chosen_cases()
    with Processes(tmp_path, worker("cases", tmp_path), NUMBER) as processes:
        processes.finish(240)
    one_process = {name: results(case, DEVICES) for name, case in cases.items()}
    # That one device computes the same, tests of one process say too; of a GPU's products not to the bit.
    one_device = {name: results(case, 1) for name, case in cases.items() if ON_CPUS and case.to_one_device is not None}
    failures = []
    for name, case in cases.items():
        first, *others = (dict(np.load(tmp_path / f"{name}.{i}.npz")) for i in range(NUMBER))
        for other in others:
            failures += [f"{name}, the processes differ: {d}" for d in differences(first, other, 0)]
        found = differences(first, one_process[name], case.to_one_process)
        print("\n".join(f"{name}: {d}" for d in found) or f"{name}: as on CPUs")  # seen with -s
        tolerance = max(case.to_one_process, LEAST_TOLERANCE)
        failures += [f"{name}, one process: {d}" for d in differences(first, one_process[name], tolerance)]
        if name in one_device:
            failures += [f"{name}, one device: {d}" for d in differences(first, one_device[name], case.to_one_device)]
    assert not failures, "\n".join(failures)


def test_the_comparison_can_fail():
    x = np.arange(1, 5, dtype=np.float32)
    assert not differences({"x": x}, {"x": x}, 0)
    assert differences({"x": x}, {"x": np.nextafter(x, 9)}, 0)
    assert differences({"x": x}, {"x": x + 1e-3}, 1e-5) and differences({"x": x}, {"x": x * np.nan}, 1e-5)
    assert differences({"n": x.astype(int)}, {"n": x.astype(int) + 1}, 1.0)


@pytest.mark.parametrize(
    "death, who",
    [
        ("killed", 0),  # it holds the coordinator
        ("killed", 1),
        pytest.param("stopped", 1, marks=pytest.mark.slow),
        pytest.param("raises", 1, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_ends_the_other(tmp_path, death, who):
    steps = 1000 if death == "raises" else 0
    with Processes(tmp_path, worker("loop", steps), NUMBER) as processes:
        processes.wait(lambda process: "in the loop" in process.text(), 120)
        assert all(process.popen.poll() is None for process in processes.all)
        if death != "raises":
            processes[who].popen.send_signal(signal.SIGKILL if death == "killed" else signal.SIGSTOP)
        survivors = [i for i in range(NUMBER) if death == "raises" or i != who]
        processes.wait(lambda process: process.popen.poll() is not None, 60, survivors)
        for survivor in survivors:
            assert processes[survivor].popen.returncode != 0
        assert re.search("another task died|Gloo .* failed", processes[1 - who].text()), processes.logs()


def example(*args):
    """As the shells of a laptop start it, or of a host with GPUs."""
    return lambda address, i: [
        *(EXAMPLE, *(("--devices", 4) if ON_CPUS else ("--gpus", i))),
        *("--coordinator", address, "--num-processes", NUMBER, "--process-id", i),
        *("--batch", 8, "--context", 32, "--tokens", 4, "--heartbeat", 10, *args),
    ]


@pytest.mark.slow
def test_example(tmp_path):
    with Processes(tmp_path, example("--steps", 3), NUMBER) as processes:
        first, second, *_ = processes.finish(200)
    losses = [float(x) for x in re.findall(r"loss (\d\.\d+)", first)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert f"over {NUMBER} hosts x {4 if ON_CPUS else 1} devices" in first and "--- HAMLET." in first
    assert "process 1: done" in second and "loss" not in second


@pytest.mark.slow
def test_example_ends_when_a_process_dies(tmp_path):
    with Processes(tmp_path, example("--steps", 10**6), NUMBER) as processes:
        processes.wait(lambda process: "step   10" in process.text(), 120, [0])
        processes[1].popen.kill()
        processes.wait(lambda process: process.popen.poll() is not None, 60, [0])
        assert processes[0].popen.returncode != 0 and "another task died" in processes[0].text(), processes.logs()
