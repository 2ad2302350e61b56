#include "cuda/mla_prefill/mla_prefill.h"

#include "bindings/cuda/launch.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

struct Heads {
  int64_t batch, tokens, heads, key_width;
};

// What both handlers ask of q, k and v.
Heads check_heads(Check& check, const Buffer& q, const Buffer& k, const Buffer& v) {
  check.rank("q", q, 4);
  if (check.failed()) return {};
  Heads h = {q.dimensions()[0], q.dimensions()[1], q.dimensions()[2], q.dimensions()[3]};
  check.dtype("q", q, {BF16, F16});
  check.that(h.key_width == 128 || h.key_width == 192, "the last size of q must be 128 or 192");
  check.shape("k", k, {h.batch, h.tokens, h.heads, h.key_width});
  check.dtype("k", k, {q.element_type()});
  check.shape("v", v, {h.batch, h.tokens, h.heads, cuda::prefill_value_width});
  check.dtype("v", v, {q.element_type()});
  return h;
}

ffi::Error mla_prefill(cuda::Stream stream, Buffer q, Buffer k, Buffer v, Buffer first, Buffer last, Result out,
                       Result lse, float softmax_scale) {
  Check check("mla_prefill");
  auto [batch, tokens, heads, width] = check_heads(check, q, k, v);
  if (check.failed()) return check.error();

  check.shape("first", first, {batch, tokens});
  check.dtype("first", first, {S32});
  check.shape("last", last, {batch, tokens});
  check.dtype("last", last, {S32});
  check.shape("out", *out, {batch, tokens, heads, cuda::prefill_value_width});
  check.dtype("out", *out, {q.element_type()});
  check.shape("lse", *lse, {batch, tokens, heads});
  check.dtype("lse", *lse, {F32});
  check.that(is_size(tokens + 256) && is_size(heads * width + 1) && is_size(batch * heads * (tokens / 128 + 1) + 1),
             "tokens, the heads' numbers and the tiles of queries must be int32");
  check.that(aligned({q.untyped_data(), k.untyped_data(), v.untyped_data(), out->untyped_data()}),
             "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("mla_prefill", cuda::mla_prefill({.q = q.untyped_data(),
                                                    .k = k.untyped_data(),
                                                    .v = v.untyped_data(),
                                                    .first = first.typed_data<int32_t>(),
                                                    .last = last.typed_data<int32_t>(),
                                                    .out = out->untyped_data(),
                                                    .lse = lse->typed_data<float>(),
                                                    .type = float_of(q.element_type()),
                                                    .softmax_scale = softmax_scale,
                                                    .batch = batch,
                                                    .tokens = tokens,
                                                    .heads = heads,
                                                    .key_width = width},
                                                   stream));
}

ffi::Error mla_prefill_backward(cuda::Stream stream, Buffer q, Buffer k, Buffer v, Buffer d_out, Buffer lse,
                                Buffer delta, Buffer spans, Buffer bounds, Result dq, Result dk, Result dv,
                                float softmax_scale) {
  Check check("mla_prefill_backward");
  auto [batch, tokens, heads, width] = check_heads(check, q, k, v);
  if (check.failed()) return check.error();
  int64_t tiles = (tokens + cuda::prefill_tile_rows - 1) / cuda::prefill_tile_rows;
  int64_t rows = tiles * cuda::prefill_tile_rows;

  check.dtype("q", q, {BF16});
  check.shape("d_out", d_out, {batch, tokens, heads, cuda::prefill_value_width});
  check.dtype("d_out", d_out, {BF16});
  check.shape("lse", lse, {batch, heads, rows});
  check.dtype("lse", lse, {F32});
  check.shape("delta", delta, {batch, heads, rows});
  check.dtype("delta", delta, {F32});
  check.shape("spans", spans, {2, batch, rows});
  check.dtype("spans", spans, {S32});
  check.shape("bounds", bounds, {batch, rows / cuda::prefill_block_rows, 4});
  check.dtype("bounds", bounds, {S32});
  check.shape("dq", *dq, {batch, tokens, heads, width});
  check.dtype("dq", *dq, {BF16});
  check.shape("dk", *dk, {batch, tokens, heads, width});
  check.dtype("dk", *dk, {BF16});
  check.shape("dv", *dv, {batch, tokens, heads, cuda::prefill_value_width});
  check.dtype("dv", *dv, {BF16});
  check.that(is_size(tokens + 256) && is_size(heads * width + 1) && is_size(batch * heads * (tiles + 1) + 1),
             "tokens, the heads' numbers and the tiles of queries must be int32");
  check.that(aligned({q.untyped_data(), k.untyped_data(), v.untyped_data(), d_out.untyped_data(), lse.untyped_data(),
                      delta.untyped_data(), spans.untyped_data(), bounds.untyped_data(), dq->untyped_data(),
                      dk->untyped_data(), dv->untyped_data()}),
             "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("mla_prefill_backward", cuda::mla_prefill_backward({.q = q.untyped_data(),
                                                                      .k = k.untyped_data(),
                                                                      .v = v.untyped_data(),
                                                                      .d_out = d_out.untyped_data(),
                                                                      .lse = lse.typed_data<float>(),
                                                                      .delta = delta.typed_data<float>(),
                                                                      .spans = spans.typed_data<int32_t>(),
                                                                      .bounds = bounds.typed_data<int32_t>(),
                                                                      .dq = dq->untyped_data(),
                                                                      .dk = dk->untyped_data(),
                                                                      .dv = dv->untyped_data(),
                                                                      .softmax_scale = softmax_scale,
                                                                      .batch = batch,
                                                                      .tokens = tokens,
                                                                      .heads = heads,
                                                                      .key_width = width},
                                                                     stream));
}

}  // namespace

JAXKERN_HOPPER_HANDLERS(mla_prefill, 1, signature(Operands<5>{}, Results<2>{}).Attr<float>("softmax_scale"));

JAXKERN_HOPPER_HANDLERS(mla_prefill_backward, 1, signature(Operands<8>{}, Results<3>{}).Attr<float>("softmax_scale"));

}  // namespace jaxkern
