// Attention of sequences to themselves, forward and backward: q, k [batch, tokens, heads, key_width] and v [batch,
// tokens, heads, value_width], each of any float type. Query i sees the keys [first[i], last[i]). A token that sees
// none must be nobody's key: what the arrays hold there is not read.
#pragma once

#include "cpu/levels.h"
#include "cpu/types.h"

namespace jaxkern::cpu {

struct Sequences {
  const void *q, *k, *v;
  DType q_type, k_type, v_type;  // f32, bf16, f16
  const int32_t *first, *last;   // [batch, tokens]
  float softmax_scale;
  int64_t batch, tokens, heads, key_width, value_width;
};

struct MlaPrefillParams {
  Sequences sequences;
  void* out;   // [batch, tokens, heads, value_width], of q's type
  float* lse;  // [batch, tokens, heads]
};

struct MlaPrefillBackwardParams {
  Sequences sequences;
  const void *out, *d_out;
  const float *lse, *d_lse;
  float *dq, *dk, *dv;  // of the shapes of q, k, v
};

JAXKERN_KERNEL(mla_prefill, MlaPrefillParams)
JAXKERN_KERNEL(mla_prefill_backward, MlaPrefillBackwardParams)

}  // namespace jaxkern::cpu
