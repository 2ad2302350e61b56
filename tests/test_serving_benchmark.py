"""`python -m benchmarks.serving` with a small model, and what it makes of the names in a GPU's trace."""

import json

import jax
import pytest

from benchmarks import serving
from jaxkern.models import deepseek


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's kernels want the large model's widths")
def test_small_model(tmp_path):
    arguments = "--small --layers 2 --devices 2 --batches 4 --prompt 64 --steps 2 --profile --json".split()
    serving.main([*arguments, str(tmp_path / "rows.json")])
    record = json.loads((tmp_path / "rows.json").read_text())
    (row,) = record["rows"]
    assert record["machine"]["devices"] == 2 and row["batch"] == 4 and row["prefill_ms"] > 0
    prefill, step = record["profiles"]
    assert prefill["devices"] == step["devices"] == 2
    assert {"collectives", "gemm", "grouped gemm", "mla_decode", "route", "rows", "quantize"} <= set(step["kinds"])
    assert step["kinds"]["mla_decode"]["count"] == 2  # a layer each


def test_a_model_of_one_dense_layer_has_no_bytes_of_experts():
    config = deepseek.Config(**serving.SMALL, num_hidden_layers=1, first_k_dense_replace=1)
    size = serving.bytes_of(config, 2)
    assert size["experts"] == 0 < size["others"]


def kernel(name):
    return f"void jaxkern::cuda::entry<jaxkern::cuda::kernels::{name}>(jaxkern::cuda::kernels::{name}::Params)"


@pytest.mark.parametrize(
    "name, kind",
    [
        (kernel("Dense<jaxkern::cuda::kernels::Batches, 128, 64, 1, float>"), "gemm"),
        (kernel("Small<jaxkern::cuda::kernels::BlockScaled, float>"), "grouped gemm"),
        ("_ZN7jaxkern4cuda5entryINS0_7kernels5DenseINS2_9RowGroupsELi128ELi128EEEEEvNT_6ParamsE", "grouped gemm"),
        (kernel("MlaDecodeKernel<float>"), "mla_decode"),
        (kernel("TakeQuantizedRows<float>"), "rows"),
        (kernel("QuantizeSwiglu<float>"), "quantize"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("nvjet_hsh_128x8_64x12_2x1_v_bz_TNT", "XLA products"),
        ("MemcpyD2D", "copies"),
        ("loop_convert_fusion_3", "XLA fusions"),
    ],
)
def test_kinds(name, kind):
    assert serving.kind_of(name, "") == kind


def test_streams_of_a_gpu():
    """Of one device: two streams that overlap, and a line that says them again."""
    lines = {1: "Stream #13(Compute)", 2: "Stream #20(Compute)", 3: "XLA Ops"}
    trace = [{"ph": "M", "pid": 7, "name": "process_name", "args": {"name": "/device:GPU:0"}}]
    trace += [
        {"ph": "M", "pid": 7, "tid": i, "name": "thread_name", "args": {"name": name}} for i, name in lines.items()
    ]
    spans = [(1, "loop_fusion", 0, 10), (2, "ncclDevKernel_AllGather", 5, 10), (1, "nvjet", 25, 5), (3, "dot", 0, 30)]
    trace += [{"ph": "X", "pid": 7, "tid": i, "name": name, "ts": ts, "dur": dur} for i, name, ts, dur in spans]
    profile = serving.summarize("step", 1, serving.read_events({"traceEvents": trace}))
    assert (profile["devices"], profile["us"], profile["busy_us"], profile["idle_us"]) == (1, 30, 20, 10)
    assert {kind: row["us"] for kind, row in profile["kinds"].items()} == {
        "XLA fusions": 10,
        "collectives": 10,
        "XLA products": 5,
    }
