"""What each op means, in plain JAX: the oracle of its tests, implementation="xla", and the fallback on platforms
without a kernel. Written for reading; nothing here is tuned."""

from jaxkern.reference.mla import gather_pages, mla_decode, mla_prefill, mla_prefill_backward
from jaxkern.reference.quantize import dequantize, quantize

__all__ = ["dequantize", "gather_pages", "mla_decode", "mla_prefill", "mla_prefill_backward", "quantize"]
