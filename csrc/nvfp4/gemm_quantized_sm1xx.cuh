// The last nodes of the epilogue of nvfp4_gemm.quantized, for CUTLASS's visitor trees: float32 results become e2m1 codes,
// which the collective stores by TMA, and block scales, which the nodes store.
//
// They stand in for CUTLASS's own Sm100BlockScaleFactorRowStore and Sm120BlockScaleFactorRowStore, which take
// approximate reciprocals, let an infinity saturate, and leave the padding of the tiles of scales unwritten; here the
// bytes are those of nvfp4_quantize. Which thread has which elements is asked of the collective's coordinates.
#pragma once
#include <cute/tensor.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include "gemm_quantized_block.cuh"

namespace n3::nvfp4_gemm::sm1xx {

namespace visitor = cutlass::epilogue::fusion::detail;
template <class T, int N>
using Fragment = cutlass::Array<T, N>;

// What CUTLASS asks of a node without memory of its own. Arguments are its parameters.
struct CodesNode {
  struct SharedStorage {};
  using Arguments = Codes;
  using Params = Codes;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static bool can_implement(const Shape& shape, const Arguments&) {
    return cute::get<1>(shape) % 16 == 0;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE CodesNode() {}
  CUTLASS_HOST_DEVICE CodesNode(const Params& params, const SharedStorage&) : params(&params) {}
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const visitor::ProducerLoadArgs<Args...>&) {
    return visitor::EmptyProducerLoadCallbacks{};
  }

  const Params* params = nullptr;
};

// Where a thread's elements lie in the result, and what they are quantised with.
template <class Coords>
struct Place {
  Coords coords;  // (element, m, n, epi_m, epi_n) of the thread, relative to its first one
  int first_row, first_col, rows, cols;
  Codes codes;
  Global global;

  // Of the block that begins at this coordinate.
  template <class Coord>
  CUTLASS_DEVICE void store(uint8_t scale, const Coord& at) const {
    const int row = first_row + int(cute::get<0>(at)), col = first_col + int(cute::get<1>(at));
    store_scale(codes, row, col / 16, rows, cols / 16, scale);
  }
};

template <class... Args>
CUTLASS_DEVICE auto place(const visitor::ConsumerStoreArgs<Args...>& args, const Codes& codes) {
  const int rows = cute::get<0>(args.problem_shape_mnkl), cols = cute::get<1>(args.problem_shape_mnkl);
  const int row = rows - int(cute::get<0>(args.residue_tCcD)), col = cols - int(cute::get<1>(args.residue_tCcD));
  const Global g = nvfp4_quantize::global_scale(*codes.global, true, false);
  return Place<decltype(args.tCcD)>{args.tCcD, row, col, rows, cols, codes, g};
}

// sm_100: a thread has columns of one row side by side, 16 and more.
struct CodesOfRows : CodesNode {
  using CodesNode::CodesNode;

  template <class Coords>
  struct Callbacks : visitor::EmptyConsumerStoreCallbacks {
    Place<Coords> place;
    CUTLASS_DEVICE explicit Callbacks(const Place<Coords>& p) : place(p) {}

    template <class Accumulator, int kElements>
    CUTLASS_DEVICE auto visit(const Fragment<Accumulator, kElements>&, int epi_v, int epi_m, int epi_n,
                              const Fragment<float, kElements>& y) {
      static_assert(kElements % 16 == 0);
      Fragment<cutlass::float_e2m1_t, kElements> codes;
      uint32_t* words = reinterpret_cast<uint32_t*>(&codes);
      const auto of_tile = place.coords(cute::_, cute::_, cute::_, epi_m, epi_n);
#pragma unroll
      for (int b = 0; b < kElements / 16; ++b) {
        float v[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) v[i] = activated(y[16 * b + i], place.codes.relu2);
        const Quantised block = quantised(v, place.global);
        words[2 * b] = block.codes.word[0], words[2 * b + 1] = block.codes.word[1];
        place.store(block.scale, of_tile(epi_v * kElements + 16 * b));
      }
      return codes;
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const visitor::ConsumerStoreArgs<Args...>& args) {
    const auto p = place(args, *params);
    return Callbacks<decltype(p.coords)>(p);
  }
};

// sm_120: a fragment is columns 2 t and 2 t + 1 of eight, t the thread in its quad, of two rows eight apart; two
// fragments in a row of them are a block of each of the two rows. The collective rounds what is left of the values.
struct CodesOfQuads : CodesNode {
  using CodesNode::CodesNode;

  template <class Coords>
  struct Callbacks : visitor::EmptyConsumerStoreCallbacks {
    Place<Coords> place;
    int lane;  // in the quad
    CUTLASS_DEVICE Callbacks(const Place<Coords>& p, int thread) : place(p), lane(thread % 4) {}

    template <class Accumulator>
    CUTLASS_DEVICE auto visit(const Fragment<Accumulator, 4>&, int, int, int, const Fragment<float, 4>& y) {
      Fragment<float, 4> active;
#pragma unroll
      for (int i = 0; i < 4; ++i) active[i] = activated(y[i], place.codes.relu2);
      return active;
    }

    template <class Shared, class Sync, class Fragments>
    CUTLASS_DEVICE void reduce(Shared&&, const Sync&, int epi_m, int epi_n, bool, Fragments y) {
      static_assert(decltype(cute::size<0>(y))::value == 1 && decltype(cute::size<2>(y))::value % 2 == 0);
      static_assert(decltype(cute::size<0>(place.coords))::value == 4);
#pragma unroll
      for (int m = 0; m < cute::size<1>(y); ++m) {
#pragma unroll
        for (int n = 0; n < cute::size<2>(y); n += 2) {
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            float v[4] = {y(0, m, n)[i], y(0, m, n)[i + 1], y(0, m, n + 1)[i], y(0, m, n + 1)[i + 1]};
            const uint8_t scale = scaled_by_quad(v, place.global);
            y(0, m, n)[i] = v[0], y(0, m, n)[i + 1] = v[1], y(0, m, n + 1)[i] = v[2], y(0, m, n + 1)[i + 1] = v[3];
            if (lane == 0) place.store(scale, place.coords(i, m, n, epi_m, epi_n));
          }
        }
      }
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const visitor::ConsumerStoreArgs<Args...>& args) {
    const auto p = place(args, *params);
    return Callbacks<decltype(p.coords)>(p, args.thread_idx);
  }
};

}  // namespace n3::nvfp4_gemm::sm1xx
