"""The DeepSeek kernel stack for JAX.

Every op takes `implementation=None | "cpu" | "cuda" | "xla" | "sim"`; None is the best that the platform has.
"""

from jaxkern import kv_cache
from jaxkern._ffi import DISABLE_JAX_EXPORT_CHECKS, implementations_used
from jaxkern.gemm import gemm, grouped_gemm, k_grouped_gemm, masked_grouped_gemm
from jaxkern.linear import fp8_grouped_linear, fp8_linear
from jaxkern.mla import merge_attention, mla_decode, mla_prefill
from jaxkern.moe import combine, dispatch, replay, route
from jaxkern.paging import OutOfPages, PageAllocator
from jaxkern.plan import Plan, plan
from jaxkern.quantize import ScaledArray, dequantize, quantize, quantize_along_tokens, swiglu_quantize
from jaxkern.sums import sum_in_order

__version__ = "0.1.0"

__all__ = [
    "DISABLE_JAX_EXPORT_CHECKS",
    "OutOfPages",
    "PageAllocator",
    "Plan",
    "ScaledArray",
    "combine",
    "dequantize",
    "dispatch",
    "fp8_grouped_linear",
    "fp8_linear",
    "gemm",
    "grouped_gemm",
    "implementations_used",
    "k_grouped_gemm",
    "kv_cache",
    "masked_grouped_gemm",
    "merge_attention",
    "mla_decode",
    "mla_prefill",
    "plan",
    "quantize",
    "quantize_along_tokens",
    "replay",
    "route",
    "sum_in_order",
    "swiglu_quantize",
]
