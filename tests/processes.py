"""Programs of several JAX processes on this machine, for the tests that need them."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable

TESTS = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Process:
    popen: subprocess.Popen
    log: pathlib.Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Processes:
    """`python *command(address, index)` for each index, the address being a free port; a log of each in `folder`. A
    context that leaves none alive."""

    def __init__(self, folder: pathlib.Path, command: Callable[[str, int], list], number: int = 2):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            address = f"localhost:{s.getsockname()[1]}"
        paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the process of the tests has the GPUs too
        self.all = []
        for i in range(number):
            log = folder / f"process{i}.log"
            line = [sys.executable, *command(address, i)]
            with log.open("w") as out:
                popen = subprocess.Popen(list(map(str, line)), env=environment, stdout=out, stderr=subprocess.STDOUT)
            self.all.append(Process(popen, log))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.popen.kill()
            process.popen.wait()

    def __getitem__(self, index: int) -> Process:
        return self.all[index]

    def wait(self, holds: Callable[[Process], bool], seconds: float, which: list[int] | None = None):
        """Until it holds for all processes, or those of `which`; all logs are in the error if it takes too long."""
        wanted = self.all if which is None else [self.all[i] for i in which]
        end = time.monotonic() + seconds
        while not all(map(holds, wanted)):
            assert time.monotonic() < end, f"not within {seconds} s\n{self.logs()}"
            time.sleep(0.05)

    def finish(self, seconds: float) -> list[str]:
        """-> what each printed, after all have ended well. The first that fails ends the wait."""
        codes = lambda: [process.popen.poll() for process in self.all]  # noqa: E731
        self.wait(lambda process: process.popen.poll() is not None or any(codes()), seconds)
        assert codes() == [0] * len(self.all), f"exit codes {codes()}\n{self.logs()}"
        return [process.text() for process in self.all]

    def logs(self) -> str:
        return "\n".join(f"--- {process.log.name}\n{process.text()[-4000:]}" for process in self.all)
