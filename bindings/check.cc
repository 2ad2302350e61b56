#include "bindings/check.h"

#include <algorithm>

namespace jaxkern {
namespace {

std::string describe(ffi::Span<const int64_t> dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? "," : "") + std::to_string(dims[i]);
  return text + "]";
}

}  // namespace

void Check::rank(const char* name, const Buffer& buffer, size_t rank) {
  if (buffer.dimensions().size() != rank)
    fail(std::string(name) + " must have rank " + std::to_string(rank) + ", got " + describe(buffer.dimensions()));
}

void Check::shape(const char* name, const Buffer& buffer, std::initializer_list<int64_t> expected) {
  auto dims = buffer.dimensions();
  if (!std::equal(dims.begin(), dims.end(), expected.begin(), expected.end()))
    fail(std::string(name) + " must have shape " + describe({expected.begin(), expected.size()}) + ", got " +
         describe(dims));
}

void Check::dtype(const char* name, const Buffer& buffer, std::initializer_list<ffi::DataType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), buffer.element_type()) == allowed.end())
    fail(std::string(name) + " has a dtype that this op does not take");
}

void Check::that(bool holds, const char* message) {
  if (!holds) fail(message);
}

void Check::fail(const std::string& message) {
  if (!failed()) error_ = ffi::Error::InvalidArgument(std::string(op_) + ": " + message);
}

}  // namespace jaxkern
