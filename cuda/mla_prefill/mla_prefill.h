// Attention of sequences to themselves on Hopper, with keys and values of their own for each head, and its gradients.
// No CUDA header is needed to include it.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace jaxkern::cuda {

constexpr int prefill_value_width = 128;  // and a key is 128 or 192 wide

// out = softmax(scale q k^T) v for each head, of a query and the keys of the tokens [first, last). q, k, v and out are
// of one type, aligned to 16 bytes.
struct MlaPrefill {
  const void* q;         // [batch, tokens, heads, key_width]
  const void* k;         // as q
  const void* v;         // [batch, tokens, heads, prefill_value_width]
  const int32_t* first;  // [batch, tokens]; a token that sees no key is none, and nobody's key: it may hold anything
  const int32_t* last;   // [batch, tokens]
  void* out;             // as v
  float* lse;            // [batch, tokens, heads], natural logarithm
  Float type;            // bfloat16 or float16
  float softmax_scale;
  int64_t batch, tokens, heads, key_width;
};

Error mla_prefill(const MlaPrefill& prefill, Stream stream);

// Its gradients. Of rows that are made for them there is one for each token, and more up to a multiple of
// prefill_tile_rows, which see nothing.
struct MlaPrefillBackward {
  const void *q, *k, *v;  // as above, bfloat16
  const void* d_out;      // as v
  const float* lse;       // [batch, heads, rows], logarithm to base 2
  const float* delta;     // [batch, heads, rows]: the sum of out d_out over columns, less the derivative of lse
  const int32_t* spans;   // [2, batch, rows]: first and last, 0 <= first < last <= tokens, or both 0
  // [batch, rows / prefill_block_rows, 4], of as many rows: least first and most last of those that see keys, most
  // first and least last of all below `tokens`.
  const int32_t* bounds;
  void *dq, *dk, *dv;  // as q, k, v
  float softmax_scale;
  int64_t batch, tokens, heads, key_width;
};
constexpr int prefill_tile_rows = 128, prefill_block_rows = 64;

Error mla_prefill_backward(const MlaPrefillBackward& prefill, Stream stream);

// Load every kernel that they may launch, on the current device.
Error prepare_mla_prefill();
Error prepare_mla_prefill_backward();

}  // namespace jaxkern::cuda
