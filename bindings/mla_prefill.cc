#include "cpu/mla_prefill.h"

#include "bindings/common.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

cpu::Sequences sequences(Check& check, const Buffer& q, const Buffer& k, const Buffer& v, const Buffer& first,
                         const Buffer& last, float softmax_scale) {
  check.rank("q", q, 4);
  check.rank("v", v, 4);
  if (check.failed()) return {};
  int64_t batch = q.dimensions()[0], tokens = q.dimensions()[1], heads = q.dimensions()[2];
  int64_t key_width = q.dimensions()[3], value_width = v.dimensions()[3];
  check.that(tokens <= INT32_MAX, "the tokens must be countable in int32");
  check.dtype("q", q, {F32, BF16, F16});
  check.shape("k", k, {batch, tokens, heads, key_width});
  check.dtype("k", k, {F32, BF16, F16});
  check.shape("v", v, {batch, tokens, heads, value_width});
  check.dtype("v", v, {F32, BF16, F16});
  check.shape("first", first, {batch, tokens});
  check.dtype("first", first, {S32});
  check.shape("last", last, {batch, tokens});
  check.dtype("last", last, {S32});
  if (check.failed()) return {};
  return {.q = q.untyped_data(),
          .k = k.untyped_data(),
          .v = v.untyped_data(),
          .q_type = dtype_of(q.element_type()),
          .k_type = dtype_of(k.element_type()),
          .v_type = dtype_of(v.element_type()),
          .first = first.typed_data<int32_t>(),
          .last = last.typed_data<int32_t>(),
          .softmax_scale = softmax_scale,
          .batch = batch,
          .tokens = tokens,
          .heads = heads,
          .key_width = key_width,
          .value_width = value_width};
}

ffi::Error mla_prefill(ffi::ThreadPool pool, Buffer q, Buffer k, Buffer v, Buffer first, Buffer last, Result out,
                       Result lse, float softmax_scale) {
  Check check("mla_prefill");
  cpu::Sequences s = sequences(check, q, k, v, first, last, softmax_scale);
  if (check.failed()) return check.error();
  check.shape("out", *out, {s.batch, s.tokens, s.heads, s.value_width});
  check.dtype("out", *out, {q.element_type()});
  check.shape("lse", *lse, {s.batch, s.tokens, s.heads});
  check.dtype("lse", *lse, {F32});
  if (check.failed()) return check.error();

  cpu::mla_prefill({.sequences = s, .out = out->untyped_data(), .lse = lse->typed_data<float>()}, threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error mla_prefill_backward(ffi::ThreadPool pool, Buffer q, Buffer k, Buffer v, Buffer out, Buffer lse,
                                Buffer d_out, Buffer d_lse, Buffer first, Buffer last, Result dq, Result dk, Result dv,
                                float softmax_scale) {
  Check check("mla_prefill_backward");
  cpu::Sequences s = sequences(check, q, k, v, first, last, softmax_scale);
  if (check.failed()) return check.error();
  check.shape("out", out, {s.batch, s.tokens, s.heads, s.value_width});
  check.dtype("out", out, {q.element_type()});
  check.shape("lse", lse, {s.batch, s.tokens, s.heads});
  check.dtype("lse", lse, {F32});
  check.shape("d_out", d_out, {s.batch, s.tokens, s.heads, s.value_width});
  check.dtype("d_out", d_out, {q.element_type()});
  check.shape("d_lse", d_lse, {s.batch, s.tokens, s.heads});
  check.dtype("d_lse", d_lse, {F32});
  check.shape("dq", *dq, {s.batch, s.tokens, s.heads, s.key_width});
  check.dtype("dq", *dq, {F32});
  check.shape("dk", *dk, {s.batch, s.tokens, s.heads, s.key_width});
  check.dtype("dk", *dk, {F32});
  check.shape("dv", *dv, {s.batch, s.tokens, s.heads, s.value_width});
  check.dtype("dv", *dv, {F32});
  if (check.failed()) return check.error();

  cpu::mla_prefill_backward({.sequences = s,
                             .out = out.untyped_data(),
                             .d_out = d_out.untyped_data(),
                             .lse = lse.typed_data<float>(),
                             .d_lse = d_lse.typed_data<float>(),
                             .dq = dq->typed_data<float>(),
                             .dk = dk->typed_data<float>(),
                             .dv = dv->typed_data<float>()},
                            threads_of(pool));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_prefill_v1, mla_prefill,
                              signature(Operands<5>{}, Results<2>{}).Attr<float>("softmax_scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_prefill_backward_v1, mla_prefill_backward,
                              signature(Operands<9>{}, Results<3>{}).Attr<float>("softmax_scale"));

}  // namespace jaxkern
