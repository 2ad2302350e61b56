"""What each op means, in plain JAX: the oracle of its tests, implementation="xla", and the fallback on platforms
without a kernel. Written for reading; nothing here is tuned."""

from jaxkern.reference.gemm import gemm, grouped_gemm, k_grouped_gemm
from jaxkern.reference.kv_cache import kv_cache_append, pack_rows, row_bytes, unpack_rows
from jaxkern.reference.mla import gather_pages, merge_attention, mla_decode, mla_prefill, mla_prefill_backward
from jaxkern.reference.moe import assign_slots, dot_rows, gather_quantize_rows, gather_rows, route, sum_rows
from jaxkern.reference.quantize import dequantize, quantize, quantize_along_tokens, swiglu_quantize

__all__ = [
    "assign_slots",
    "dequantize",
    "dot_rows",
    "gather_pages",
    "gather_quantize_rows",
    "gather_rows",
    "gemm",
    "grouped_gemm",
    "k_grouped_gemm",
    "kv_cache_append",
    "merge_attention",
    "mla_decode",
    "mla_prefill",
    "mla_prefill_backward",
    "pack_rows",
    "quantize",
    "quantize_along_tokens",
    "route",
    "row_bytes",
    "sum_rows",
    "swiglu_quantize",
    "unpack_rows",
]
