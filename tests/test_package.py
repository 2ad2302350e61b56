"""What a newcomer meets first: the README, `python -m jaxkern`, and the examples."""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import jax
import pytest

import jaxkern
from benchmarks import report
from jaxkern import _ffi

ROOT = pathlib.Path(__file__).parent.parent


def run(*args, **env):
    env = {**os.environ, "XLA_FLAGS": "", **env}
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_op_is_told_of():
    out = run("-m", "jaxkern")
    assert jaxkern.__version__ in out and _ffi.CPU.simd_level() in out
    for name, op in _ffi.OPS.items():
        row = re.search(rf"^{name}(?: \(.*?\))? +(\w+) +(.*)$", out, re.M)
        assert row[1] == ("cpu" if op.cpu else "xla")
        assert ("cuda, sim: no Hopper kernel for this op yet" in row[2]) == (op.hopper is None)
    for implementation in ("cuda", "sim"):
        assert _ffi.not_built(implementation) in out


def test_readme():
    readme = report.README.read_text()
    assert report.summary() in readme
    assert report.with_summary(readme) == readme, "python -m benchmarks --commit brings the README up to date"
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"jaxkern\.(\w+)\(", readme):
        assert hasattr(jaxkern, name), name


def test_no_row_of_the_committed_results_is_slower_than_xla():
    for family in ("gemm", "mla", "moe", "quantize"):
        rows = json.loads((report.RESULTS / f"{family}.cpu.json").read_text())["rows"]
        assert rows
        for row in rows:
            assert row["ratio"] >= 1, f"{row['name']} {row['shape']}"


def test_a_wrong_build_is_named_before_it_can_do_harm():
    """The check comes before the registration, which would take JAX's CPU backend down."""
    code = "from jaxkern import _ffi"
    patch = "import re; import jax.ffi, pathlib, tempfile; d = pathlib.Path(tempfile.mkdtemp()); "
    patch += "h = d / 'xla/ffi/api/c_api.h'; h.parent.mkdir(parents=True); "
    patch += "h.write_text('#define XLA_FFI_API_MAJOR 0\\n#define XLA_FFI_API_MINOR 1\\n'); "
    patch += "jax.ffi.include_dir = lambda: str(d)\n"
    patch += f"try:\n  {code}\nexcept ImportError as e:\n  import jax; print(e, len(jax.devices()))"
    out = run("-c", patch)
    built = ".".join(map(str, _ffi.CPU.api_version()))
    assert f"this build needs XLA FFI {built}, but JAX" in out and "offers 0.1. Upgrade JAX" in out
    assert re.search(r"\d+$", out.strip())


FINETUNE = ["examples/finetune.py", "tests/golden/v3-tiny", "examples/data/sonnets.txt", "nowhere"]
GENERATE = ["examples/generate.py", "tests/golden/v3-tiny"]


def test_wrong_options_are_told_before_anything_starts(tmp_path):
    """In one process, which starts no devices before the last."""
    (tmp_path / "short.txt").write_text("short")
    cases = [
        (["examples/shakespeare.py", "--steps", 0], "--steps and --tune-steps must be at least 1"),
        (["examples/multihost.py", "--num-processes", 1, "--steps", 0], "--steps and --tokens must be at least 1"),
        ([*FINETUNE, "--steps", 0], "must be at least 1"),
        ([*FINETUNE, "--batch", 4, "--microbatches", 3], "--microbatches 3 must divide --batch 4"),
        ([*FINETUNE[:2], tmp_path / "short.txt", "nowhere"], "short.txt has 5 tokens; --context 128 needs 130"),
        ([*GENERATE, "a", ""], "every prompt needs a token"),
        ([*GENERATE, "a", "--tokens", 0], "--tokens and --samples must be at least 1"),
        ([*GENERATE, "a", "--top-p", 0], r"--top-p in \(0, 1\]"),
        (["benchmarks/__main__.py", "gem"], "there is no family gem; there are gemm, linear, "),
        (["benchmarks/training.py", "--seeds", 0], "--steps and --seeds must be at least 1"),
        (["benchmarks/training.py", "--steps", 0], "--steps and --seeds must be at least 1"),
    ]
    if jax.default_backend() == "cpu":
        cases.append((["benchmarks/exchange.py"], "this needs GPUs"))
    code = """
import runpy, sys
sys.path[:0] = ["examples"]
for line in sys.argv[1:]:
    sys.argv = line.split("|")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        print("exit", error.code, file=sys.stderr)
    print("---", file=sys.stderr)
"""
    lines = ["|".join(map(str, arguments)) for arguments, _ in cases]
    done = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True, cwd=ROOT)
    told = done.stderr.split("---\n")
    assert done.returncode == 0 and len(told) == len(cases) + 1, done.stderr
    for (arguments, error), text in zip(cases, told, strict=False):
        assert re.search(rf"error: .*{error}", text) and "exit 2" in text, (arguments, text)


def test_a_text_begins_as_the_tokenizer_wants_it(tmp_path, monkeypatch):
    class Tokenizer:
        from_file = staticmethod(lambda file: Tokenizer())
        decode = None

        def encode(self, text):
            return types.SimpleNamespace(ids=[*text.encode()])

    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=Tokenizer))
    text_codec = runpy.run_path(str(ROOT / "examples/generate.py"))["text_codec"]
    config = json.loads((ROOT / "tests/golden/v3-tiny/config.json").read_text()) | {"bos_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").touch()
    for settings, begins in (None, []), ({}, []), ({"add_bos_token": False}, []), ({"add_bos_token": True}, [7]):
        if settings is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        encode, _ = text_codec(tmp_path)
        assert encode("ab") == [*begins, 97, 98] and encode("") == begins
    assert encode("\7a") == [7, 97]  # it was there already


@pytest.mark.slow
def test_example_layer():
    out = run("examples/layer.py")
    losses = re.findall(r"loss on .* (\d\.\d+)", out)
    assert len(losses) == 2 and losses[0] == losses[1]
    assert all(float(x) < 1e-5 for x in re.findall(r"differs by (\S+) of", out))


@pytest.mark.slow
def test_examples_finetune_and_generate(tmp_path):
    run(
        *("examples/finetune.py", "tests/golden/v3-tiny", "examples/data/sonnets.txt", tmp_path / "tuned"),
        *("--steps", 2, "--batch", 4, "--context", 32, "--microbatches", 2, "--devices", 2),
    )
    (tmp_path / "tuned/tokenizer_config.json").write_text("{}")
    run(  # on, in the same folder
        *("examples/finetune.py", tmp_path / "tuned", "examples/data/sonnets.txt", tmp_path / "tuned"),
        *("--steps", 1, "--batch", 4, "--context", 32, "--devices", 2),
    )
    shared = "--prefix", "A sonnet. " * 8, "--samples", 2
    out = run("examples/generate.py", tmp_path / "tuned", "Shall I", "When", "--tokens", 8, "--devices", 2, *shared)
    assert out.count("--- Shall I") == out.count("--- When") == 2


@pytest.mark.slow
def test_demo(tmp_path):
    out = run("examples/shakespeare.py", "--steps", 6, "--tune-steps", 1, "--out", tmp_path)
    assert "loaded back: the same loss, to the bit" in out
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert re.search(r"mla_decode +cpu", out) and re.search(r"grouped_gemm +cpu", out)
