// The element types of activations and weights, as the index of a CPU kernel in a table of three.
#pragma once
#include "check.h"
#include "cpu.h"

namespace n3 {

enum Element { kFloat, kHalf, kBFloat16 };

inline Element element_of(ScalarType dtype) {
  switch (dtype) {  // the checks let nothing else through
    case ScalarType::Float: return kFloat;
    case ScalarType::Half: return kHalf;
    default: return kBFloat16;
  }
}

inline int64_t element_size(Element element) { return element == kFloat ? 4 : 2; }
inline int64_t element_size(ScalarType dtype) { return element_size(element_of(dtype)); }

// Element i of a tensor's data as a float.
inline float float_at(const void* data, ScalarType dtype, int64_t i) {
  switch (element_of(dtype)) {
    case kFloat: return static_cast<const float*>(data)[i];
    case kHalf: return to_float(static_cast<const Half*>(data)[i]);
    case kBFloat16: break;
  }
  return to_float(static_cast<const BFloat16*>(data)[i]);
}

// Writes v, rounded once, to element i.
inline void set_element(void* data, ScalarType dtype, int64_t i, float v) {
  switch (element_of(dtype)) {
    case kFloat: static_cast<float*>(data)[i] = v; break;
    case kHalf: static_cast<Half*>(data)[i] = from_float<Half>(v); break;
    case kBFloat16: static_cast<BFloat16*>(data)[i] = from_float<BFloat16>(v);
  }
}

}  // namespace n3
