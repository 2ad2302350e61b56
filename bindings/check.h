// What every handler needs, of the CPU or of Hopper: buffers, their number, and checks of them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jaxkern {

namespace ffi = xla::ffi;

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

// A size that comes as an attribute, so that sums and products of a few of them fit int64.
inline bool is_size(int64_t size) { return 0 < size && size <= INT32_MAX; }

inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// The buffers that a handler is bound to, after its context and before its attributes:
//   signature(Operands<2>{}, Results<1>{}).Attr<int64_t>("top_k")
template <int n>
struct Operands {};
template <int n>
struct Results {};

// A binding is never moved, only returned as it is made, so the last buffer ends the recursion.
template <int operands, int results, typename Binding>
auto add_buffers(Binding&& binding) {
  if constexpr (operands > 0) {
    return add_buffers<operands - 1, results>(std::move(binding).template Arg<Buffer>());
  } else if constexpr (results > 1) {
    return add_buffers<operands, results - 1>(std::move(binding).template Ret<Buffer>());
  } else {
    return std::move(binding).template Ret<Buffer>();
  }
}

// Checks of one call, remembering the first failure: "gemm: b must have shape [4,8], got [4,9]". Python has checked all
// of this while tracing; an exported module or another caller of the target has not.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  void rank(const char* name, const Buffer& buffer, size_t rank);
  void shape(const char* name, const Buffer& buffer, std::initializer_list<int64_t> expected);
  void dtype(const char* name, const Buffer& buffer, std::initializer_list<ffi::DataType> allowed);
  void that(bool holds, const char* message);

  bool failed() const { return error_.failure(); }
  ffi::Error error() const { return error_; }

 private:
  void fail(const std::string& message);

  const char* op_;
  ffi::Error error_;
};

}  // namespace jaxkern
