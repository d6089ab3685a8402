// From the checked operands of a call (operands.h) to what the kernels take (views.cuh), and the staging of states
// (stage_cuda.cu). Host code of the CUDA launchers.
#pragma once
#include <utility>
#include <vector>

#include "../common/cuda.h"
#include "operands.h"
#include "stage_kernel.cuh"

namespace n3::mamba {

inline Type type_of(ScalarType t) {
  switch (t) {  // checks let nothing else through
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::Half: return Type::kHalf;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Char: return Type::kInt8;
    case ScalarType::Bool: return Type::kBool;
    default: return Type::kE4m3;
  }
}

inline View view_of(const Operand& o) {
  return {o.data, type_of(o.dtype), {o.strides[0], o.strides[1], o.strides[2], o.strides[3]}};
}

// Kernels divide the number of a block in 32 bits.
inline void check_grid(const char* op, int64_t blocks) {
  N3_CHECK(op, blocks <= INT32_MAX, "the CUDA kernel takes at most 2^31 - 1 blocks, got ", blocks);
}

// A contiguous output [a, b, c, d]; trailing sizes 1 may be left out.
inline View contiguous_view(void* data, ScalarType type, int64_t b, int64_t c = 1, int64_t d = 1) {
  return {data, type_of(type), {b * c * d, c * d, d, 1}};
}

inline IndexView view_of(const Indices& i) { return {i.data, i.wide, {i.strides[0], i.strides[1]}}; }

// The states of one kind as stage_kernel takes them: [slots, sizes...].
inline Source source_of(const Operand& o, int64_t a, int64_t b, int64_t c, int32_t bytes) {
  Source s{static_cast<const char*>(o.data), {o.strides[0], o.strides[1], o.strides[2], o.strides[3]}, {a, b, c}, bytes,
           nullptr};
  const bool contiguous = (c == 1 || s.strides[3] == 1) && s.strides[2] == c && s.strides[1] == b * c;
  const int64_t words = 16 / bytes;
  const bool aligned = s.strides[0] % words == 0 && reinterpret_cast<uintptr_t>(s.data) % 16 == 0;
  if (contiguous && aligned && a * b * c % words == 0) {
    s.sizes[0] = s.sizes[1] = 1, s.sizes[2] = a * b * c / words;
    s.strides[0] /= words, s.strides[3] = 1, s.bytes = 16;
  }
  return s;
}

// Copies made for one launch; keeps their memory.
struct Copies {
  std::vector<Tensor> memory;  // stays until the launcher returns: later work of the stream may take it over
  const uint8_t* copied = nullptr;
  const void* of[kMaxSources] = {};

  Staged operator[](int i) const { return {copied, of[i]}; }
};

// Copies the states of the sequences whose slots others will write; nothing where each writes the slot it reads. Which
// these are, only the device knows: there is room for all. `like` has the device of the states.
Copies stage(const char* op, const Slots& slots, const std::vector<Source>& list, const Tensor& like,
             cudaStream_t stream);

}  // namespace n3::mamba
