// Error messages and argument checks shared by every operator: `n3::<op>: <argument> must <rule>, got <value>`.
// The Python twin is n3kernels/_checks.py; tests compare the two word for word.
#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

namespace n3 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// STD_TORCH_CHECK would print this file's path to the user; a message names the operator and the argument instead.
template <typename... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << "n3::" << op << ": ";
  (message << ... << args);
  throw std::runtime_error(message.str());
}

#define N3_CHECK(op, cond, ...)                  \
  do {                                           \
    if (!(cond)) ::n3::fail(op, __VA_ARGS__);    \
  } while (0)

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;  // of a vector, a list in braces, or t.sizes()

inline std::string shape_str(Sizes sizes) {
  std::ostringstream s;
  s << '[';
  for (size_t i = 0; i < sizes.size(); ++i) s << (i ? ", " : "") << sizes[i];
  s << ']';
  return s.str();
}

inline std::string shape_str(const Tensor& t) { return shape_str(t.sizes()); }

// Names as torch prints them, without "torch.".
inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}

inline void check_floating(const char* op, const char* name, ScalarType t) {
  N3_CHECK(op, is_floating(t), name, " must be float32, float16 or bfloat16, got ", dtype_name(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType want) {
  N3_CHECK(op, t.scalar_type() == want, name, " must be ", dtype_name(want), ", got ", dtype_name(t.scalar_type()));
}

inline void check_shape(const char* op, const char* name, const Tensor& t, Sizes want) {
  N3_CHECK(op, t.sizes() == want, name, " must have shape ", shape_str(want), ", got ", shape_str(t));
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t want) {
  N3_CHECK(op, t.dim() == want, name, " must have ", want, " dimensions, got ", t.dim());
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other, const Tensor& o) {
  N3_CHECK(op, t.scalar_type() == o.scalar_type(), name, " must have the dtype of ", other, " (",
           dtype_name(o.scalar_type()), "), got ", dtype_name(t.scalar_type()));
}

// As torch prints it: "cpu", "cuda:0".
inline std::string device_str(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "another device:") + std::to_string(t.get_device_index());
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* other, const Tensor& o) {
  const bool same =
      t.is_cpu() ? o.is_cpu() : t.is_cuda() == o.is_cuda() && t.get_device_index() == o.get_device_index();
  N3_CHECK(op, same, name, " must be on the device of ", other, " (", device_str(o), "), got ", device_str(t));
}

}  // namespace n3
