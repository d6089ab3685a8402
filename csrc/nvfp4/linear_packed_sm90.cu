#include <type_traits>

#include "../common/tensor_map.h"
#include "linear_packed_launch.cuh"
#include "linear_packed_sm90_kernel.cuh"

namespace n3::nvfp4_linear_packed {
namespace {

template <typename T>
void launch_typed(const Problem& p, const Plan& plan, cudaStream_t stream) {
  with_wide(plan.kernel, [&](auto* type) {
    using Shape = std::remove_pointer_t<decltype(type)>;
    const ScalarType dtype = std::is_same_v<T, device::F16> ? ScalarType::Half : ScalarType::BFloat16;
    const CUtensorMap map = tensor_map(op, dtype, p.x, {p.k, p.m, 1, 1}, {p.k, 0, 0}, {64, Shape::kTokens, 1, 1});
    launch(tensor_wide_kernel_sm90<T, Shape>, plan, cores_of(90), stream, map, p);
  });
}

}  // namespace

void launch_wide(const Problem& p, const Plan& plan, bool half, cudaStream_t stream) {
  half ? launch_typed<device::F16>(p, plan, stream) : launch_typed<device::BF16>(p, plan, stream);
}

}  // namespace n3::nvfp4_linear_packed
