#include <vector>

#include "operands_cuda.h"

namespace n3::mamba {

Copies stage(const char* op, const Slots& slots, const std::vector<Source>& list, const Tensor& like,
             cudaStream_t stream) {
  Copies copies;
  if (slots.where == Where::kSource || slots.batch <= 1) return copies;  // there is no other who could write
  Sources sources{};
  int64_t bytes = 0;
  for (Source s : list) {
    const int64_t size = s.sizes[0] * s.sizes[1] * s.sizes[2] * s.bytes;
    const Tensor room = torch::stable::new_empty(like, std::vector<int64_t>{slots.batch * size}, ScalarType::Byte);
    s.copies = static_cast<char*>(room.mutable_data_ptr());
    copies.of[sources.count] = s.copies;
    copies.memory.push_back(room);
    sources.of[sources.count++] = s;
    bytes += size;
  }
  const Tensor flags = torch::stable::new_empty(like, std::vector<int64_t>{slots.batch}, ScalarType::Byte);
  copies.copied = static_cast<const uint8_t*>(flags.const_data_ptr());
  copies.memory.push_back(flags);
  const int pieces = stage_pieces(bytes);
  stage_kernel<kStageThreads><<<uint32_t(slots.batch * pieces), kStageThreads, 0, stream>>>(
      slots, sources, pieces, static_cast<uint8_t*>(flags.mutable_data_ptr()));
  N3_CUDA_CHECK(op, cudaGetLastError());
  return copies;
}

}  // namespace n3::mamba
