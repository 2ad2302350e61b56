// What the handlers of merge_attention, of the CPU and of Hopper, read off their buffers and check alike.
#pragma once

#include "bindings/check.h"

namespace jaxkern {

struct MergeSizes {
  int64_t parts, rows, width;
};

// The sizes mean something unless the check has failed.
inline MergeSizes check_merge(Check& check, const Buffer& outs, const Buffer& lses, const Buffer& out,
                              const Buffer& lse) {
  using enum ffi::DataType;
  check.rank("outs", outs, 3);
  if (check.failed()) return {};
  MergeSizes s = {.parts = outs.dimensions()[0], .rows = outs.dimensions()[1], .width = outs.dimensions()[2]};
  check.dtype("outs", outs, {F32, BF16, F16});
  check.shape("lses", lses, {s.parts, s.rows});
  check.dtype("lses", lses, {F32});
  check.shape("out", out, {s.rows, s.width});
  check.dtype("out", out, {outs.element_type()});
  check.shape("lse", lse, {s.rows});
  check.dtype("lse", lse, {F32});
  return s;
}

}  // namespace jaxkern
