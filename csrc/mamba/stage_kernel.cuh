// Copies of the states that a launch would overwrite before it has read them.
//
// Every state is read before any is written. A block reads the states of its own sequence before it writes them, so
// without destination slots (or with each sequence writing where it reads) nothing more is needed. A destination slot
// may be the slot that another sequence reads: where destinations are given, this kernel runs first, finds on the
// device which sequences are concerned, and copies the states of those; the others cost the look-up alone.
#pragma once
#include "stage_plan.h"
#include "views.cuh"

namespace n3::mamba {

// The states of one kind: [slots, sizes...], elements of `bytes` bytes (16 where a slot is contiguous and aligned).
struct Source {
  const char* data;
  int64_t strides[4], sizes[3];
  int32_t bytes;
  char* copies;  // [batch, sizes...], contiguous
};

struct Sources {
  Source of[kMaxSources];
  int32_t count;
};

template <typename Word>
N3_DEVICE void copy_slot(const Source& s, int64_t slot, int64_t b, int64_t begin, int64_t end) {
  const Word* from = reinterpret_cast<const Word*>(s.data) + slot * s.strides[0];
  Word* to = reinterpret_cast<Word*>(s.copies) + b * (s.sizes[0] * s.sizes[1] * s.sizes[2]);
  for (int64_t i = begin + threadIdx.x; i < end; i += kStageThreads) {
    const int64_t k = i % s.sizes[2], j = i / s.sizes[2] % s.sizes[1];
    to[i] = from[i / s.sizes[2] / s.sizes[1] * s.strides[1] + j * s.strides[2] + k * s.strides[3]];
  }
}

//   grid  batch * pieces     block kStageThreads     smem  one word per warp
// copied[b] = 1 where the states of sequence b were copied: another sequence may write the slot it reads.
template <int kThreads>
__global__ __launch_bounds__(kThreads) void stage_kernel(const Slots slots, const Sources sources, int pieces,
                                                        uint8_t* __restrict__ copied) {
  const int64_t b = blockIdx.x / uint32_t(pieces), piece = blockIdx.x % uint32_t(pieces);
  const int64_t source = slots.read(b), per_sequence = slots.where == Where::kEach ? slots.tokens : 1;
  uint32_t shared = 0;
  if (source >= 0) {
    for (int64_t i = threadIdx.x; i < slots.batch * per_sequence; i += kThreads) {
      const int64_t other = i / per_sequence;
      shared |= other != b && slots.destination(other, i % per_sequence) == source;
    }
  }
  shared = device::block_max<kThreads>(shared);
  if (piece == 0 && threadIdx.x == 0) copied[b] = uint8_t(shared);
  if (!shared) return;
  for (int k = 0; k < sources.count; ++k) {
    const Source& s = sources.of[k];
    const int64_t elements = s.sizes[0] * s.sizes[1] * s.sizes[2], step = (elements + pieces - 1) / pieces;
    const int64_t begin = piece * step, end = begin + step < elements ? begin + step : elements;
    switch (s.bytes) {
      case 1: copy_slot<uint8_t>(s, source, b, begin, end); break;
      case 2: copy_slot<uint16_t>(s, source, b, begin, end); break;
      case 4: copy_slot<uint32_t>(s, source, b, begin, end); break;
      default: copy_slot<uint4>(s, source, b, begin, end);
    }
  }
}

// Where a sequence's states are read: in their slot, or in the copy that stage_kernel made.
struct Staged {
  const uint8_t* copied;  // [batch]; null: nothing was staged
  const void* copies;     // [batch, ...], contiguous; element type of the states

  N3_DEVICE bool holds(int64_t b) const { return copied && copied[b]; }
};

}  // namespace n3::mamba
