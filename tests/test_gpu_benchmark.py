"""What of `python -m benchmarks.gpu` runs without a GPU: its plan, and all but its events."""

import dataclasses
import functools

import jax.numpy as jnp
import pytest

import jaxkern
from benchmarks import gpu


class FakeClock(gpu.Clock):
    """Every call takes a millisecond."""

    def __init__(self, flush_ms=1e9):
        self.flush_ms, self.samples_late, self.dirty = flush_ms, 0, jnp.zeros(8, jnp.uint8)
        self.flush = lambda x: x
        self.elapsed_ms = lambda begin, end: 1.0

    @staticmethod
    def record_event(index, after, before=(), layouts=()):
        return [jnp.zeros(1, jnp.uint8), *before]


def case_without_gpu(case):
    """Our op by its reference, and without torch."""
    if case.family == "moe":
        return dataclasses.replace(case, forms=case.forms | {"ours": case.forms["XLA"]})
    op = jaxkern.gemm if case.family == "gemm" else functools.partial(jaxkern.quantize, block_shape=(1, 128))
    ours = dataclasses.replace(case.forms["ours"], run=functools.partial(op, implementation="xla"))
    forms = {label: form for label, form in case.forms.items() if not form.torch}
    return dataclasses.replace(case, forms=forms | {"ours": ours})


MACHINE = {"copy_bytes_per_s": 1e12, "bf16_flops_per_s": 1e14}


@pytest.mark.parametrize("arguments, cases", [([], 104), (["--family", "quantize"], 2), (["--quick"], 33)])
def test_plan(arguments, cases, capsys):
    assert gpu.main(["--plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert f"{cases} cases" in out and "quantize 128x128" in out
    if not gpu.why_no_hopper():
        return
    assert gpu.main(arguments) == 0
    assert "Nothing can be measured here" in capsys.readouterr().out


def test_measured_rows():
    case = case_without_gpu(gpu.gemm_case(16, 48, 256))
    rows = {row.form: row for row in gpu.measure(case, FakeClock(), MACHINE)}
    assert list(rows) == list(case.forms)
    ours = rows["ours"]
    assert ours.us == 1000 and ours.gain == 1 and ours.best_alternative in rows and ours.difference < 1e-4
    assert ours.tflops == pytest.approx(2 * 16 * 48 * 256 / 1e-3 / 1e12)
    # Values, scales and result of ours; twice the bytes, no scales, for bfloat16.
    ours_bytes = 16 * 256 + 16 * 2 * 4 + 48 * 256 + 2 * 4 + 16 * 48 * 2
    assert ours.gbytes == pytest.approx(ours_bytes / 1e-3 / 1e9)
    assert rows["XLA bf16 dot"].gbytes == pytest.approx(2 * (16 * 256 + 48 * 256 + 16 * 48) / 1e-3 / 1e9)
    assert rows["XLA bf16 dot"].matrix_fraction == pytest.approx(2 * ours.matrix_fraction)
    quantize = case_without_gpu(gpu.quantize_case(16, 256, (1, 128)))
    assert gpu.measure(quantize, FakeClock(), MACHINE)[0].difference == 0


def test_rows_of_the_moves():
    for case in map(case_without_gpu, gpu.moe_cases(12, 256, 16, 3)):
        rows = {row.form: row for row in gpu.measure(case, FakeClock(), MACHINE)}
        assert list(rows) == list(case.forms) and all(row.us == 1000 for row in rows.values())
        assert rows["ours"].difference < 1e-6
        plain = {form.run(*form.pick(case.tensors(0)))[0].shape for form in case.forms.values()}
        assert len(plain) == 1
        if case.name == "gather_rows":
            moved = 12 * 256 * 2 + 36 * 4 + 36 * 256 * 2
            assert rows["ours"].gbytes == pytest.approx(moved / 1e-3 / 1e9)


def test_what_cannot_run_is_told_and_the_rest_goes_on():
    def fails(*_):
        raise NotImplementedError("not on this machine")

    case = case_without_gpu(gpu.gemm_case(16, 48, 256))
    forms = case.forms | {"ours": dataclasses.replace(case.forms["ours"], run=fails)}
    rows = gpu.measure(dataclasses.replace(case, forms=forms), FakeClock(), MACHINE)
    assert rows[0].skipped == "NotImplementedError: not on this machine" and rows[0].us is None
    assert any(row.us for row in rows[1:])


def test_a_late_host_gives_no_number():
    case = case_without_gpu(gpu.gemm_case(16, 48, 256))
    rows = gpu.measure(case, FakeClock(flush_ms=0), MACHINE)
    assert all(row.us is None and row.skipped for row in rows)
