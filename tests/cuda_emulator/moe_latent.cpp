// The sm_90 kernels of latent_moe_front and latent_moe_tail under the emulator, with one C entry each for
// tests/moe/test_latent_moe_cuda_kernels.py, which describes the tensors as the launcher would.
#include "cuda_emulator.h"
#include "hopper_emulator.h"

#include "moe/latent_sm90_kernel.cuh"

namespace emulator {
template <>
float to_float<n3::device::BF16>(uint16_t bits) {
  return n3::bf16_to_float(bits);
}
}  // namespace emulator

namespace {

namespace sm90 = n3::latent_moe::sm90;
using n3::device::BF16;

struct Operand {
  const void* data;  // null: not given
  int64_t rows, columns, stride, bytes;  // of an element
};

struct Options {
  int64_t lazy, reversed, invariant;  // lazy: 1 the products, 2 the copies of tiles as well
};

emulator::TensorMap map_of(const Operand& t, int rows) {
  const int64_t units = t.bytes / 2, next = 2 * units * t.stride;
  return {static_cast<const char*>(t.data), {units * t.columns, t.rows, 1, 1}, {2, next, next, next},
          {64, rows, 1, 1}, 128};
}

template <typename Form>
void add_weights(int index, const Operand& w, int rows, sm90::Maps& maps, Form& form) {
  form.weights[index] = {static_cast<const char*>(w.data), w.stride * w.bytes, int32_t(w.rows),
                         int32_t(w.columns * w.bytes)};
  maps.weights[index] = map_of(w, rows);
  const char* data = static_cast<const char*>(w.data);
  emulator::prefetchable.emplace_back(data, data + ((w.rows - 1) * w.stride + w.columns) * w.bytes);
}

template <typename Form>
void launch(const sm90::Plan& plan, const sm90::Maps& maps, const Form& form, int64_t tokens, const Options& o) {
  emulator::lazy_products = o.lazy > 0;
  emulator::lazy_copies = o.lazy > 1;
  const sm90::Problem<Form> problem{plan.work, int32_t(tokens), form};
  sm90::with_tile(plan.tokens, [&](auto* type) {
    using Tile = std::remove_pointer_t<decltype(type)>;
    emulator::launch_hopper(plan.blocks, plan.threads, o.reversed != 0,
                            [&] { sm90::tensor_latent_kernel_sm90<Tile, Form>(maps, problem); }, plan.work.cluster);
  });
  emulator::prefetchable.clear();
}

}  // namespace

extern "C" void emulate_front(const Operand* x, const Operand* router, const Operand* fc1, const Operand* up,
                              float* logits, void* z, void* shared, const Options* options) {
  const bool wide = router->bytes == 4;
  const sm90::Plan plan =
      sm90::front_plan(x->rows, x->columns, router->rows, fc1->rows, up->rows, wide, options->invariant != 0);
  sm90::Maps maps = {};
  sm90::Front form{{}, logits, static_cast<BF16*>(z), static_cast<BF16*>(shared), wide};
  add_weights(0, *router, plan.rows, maps, form);
  if (fc1->data) add_weights(1, *fc1, plan.rows, maps, form);
  add_weights(2, *up, plan.rows, maps, form);
  maps.tokens[0] = map_of(*x, plan.tokens);
  launch(plan, maps, form, x->rows, *options);
}

extern "C" void emulate_tail(const Operand* y, const Operand* fc2, const Operand* shared, const Operand* down,
                             const void* residual, void* out, const Options* options) {
  const int64_t latent = fc2->data ? y->columns : 0;
  const sm90::Plan plan = sm90::tail_plan(y->rows, down->rows, latent, shared->columns, options->invariant != 0);
  sm90::Maps maps = {};
  sm90::Tail form{{}, fc2->data ? nullptr : static_cast<const BF16*>(y->data), static_cast<const BF16*>(residual),
                  static_cast<BF16*>(out), sm90::ceil_div(latent, 64)};
  if (fc2->data) {
    add_weights(0, *fc2, plan.rows, maps, form);
    maps.tokens[0] = map_of(*y, plan.tokens);
  }
  add_weights(1, *down, plan.rows, maps, form);
  maps.tokens[1] = map_of(*shared, plan.tokens);
  launch(plan, maps, form, y->rows, *options);
}
