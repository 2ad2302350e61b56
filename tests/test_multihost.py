"""Several processes, as on several hosts: the same results as one process, and no process outlives another for long."""

import re
import signal

import numpy as np
import pytest
from multihost_worker import CASES, DEVICES, results
from processes import TESTS, Processes

WORKER = TESTS / "multihost_worker.py"
EXAMPLE = TESTS.parent / "examples" / "multihost.py"


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


def test_two_processes_of_four_devices_are_one_of_eight(tmp_path):
    """One test, so that the processes start once."""
    with Processes(tmp_path, lambda address, i: [WORKER, address, 2, i, "cases", tmp_path]) as processes:
        processes.finish(240)
    one_process = {name: results(case, DEVICES) for name, case in CASES.items()}
    one_device = {name: results(case, 1) for name, case in CASES.items() if case.to_one_device is not None}
    failures = []
    for name, case in CASES.items():
        first, second = (dict(np.load(tmp_path / f"{name}.{i}.npz")) for i in range(2))
        failures += [f"{name}, the processes differ: {d}" for d in differences(first, second, 0)]
        failures += [f"{name}, one process: {d}" for d in differences(first, one_process[name], case.to_one_process)]
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
    with Processes(tmp_path, lambda address, i: [WORKER, address, 2, i, "loop", steps]) as processes:
        processes.wait(lambda process: "in the loop" in process.text(), 60)
        assert all(process.popen.poll() is None for process in processes.all)
        if death != "raises":
            processes[who].popen.send_signal(signal.SIGKILL if death == "killed" else signal.SIGSTOP)
        survivors = [1 - who] if death != "raises" else [0, 1]
        processes.wait(lambda process: process.popen.poll() is not None, 60, survivors)
        for survivor in survivors:
            assert processes[survivor].popen.returncode != 0
        assert re.search("another task died|Gloo .* failed", processes[1 - who].text()), processes.logs()


def example(*args):
    """As two shells of a laptop start it."""
    return lambda address, i: [
        *(EXAMPLE, "--devices", 4, "--coordinator", address, "--num-processes", 2, "--process-id", i),
        *("--batch", 8, "--context", 32, "--tokens", 4, "--heartbeat", 10, *args),
    ]


@pytest.mark.slow
def test_example(tmp_path):
    with Processes(tmp_path, example("--steps", 3)) as processes:
        first, second = processes.finish(200)
    losses = [float(x) for x in re.findall(r"loss (\d\.\d+)", first)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert "over 2 hosts x 4 devices" in first and "--- HAMLET." in first
    assert "process 1: done" in second and "loss" not in second


@pytest.mark.slow
def test_example_ends_when_a_process_dies(tmp_path):
    with Processes(tmp_path, example("--steps", 10**6)) as processes:
        processes.wait(lambda process: "step   10" in process.text(), 120, [0])
        processes[1].popen.kill()
        processes.wait(lambda process: process.popen.poll() is not None, 60, [0])
        assert processes[0].popen.returncode != 0 and "another task died" in processes[0].text(), processes.logs()
