// Operators of n3kernels without Python: the library is loaded at run time and registers them with torch's dispatcher,
// where they are found by name. Linked against torch alone.
//
//   n3_from_cpp <n3kernels>/_C.so [model.pt2]
//
// With a package of AOTInductor (see docs/deploy.md) it also runs that model on an input of ones.
#include <dlfcn.h>

#include <iostream>
#include <tuple>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The operator of this schema; the signature has the schema's arguments in order, keyword-only ones at the end.
template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void run_operators() {
  at::manual_seed(0);
  const auto quantize =
      op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                                            c10::string_view, bool, c10::string_view, c10::string_view, bool,
                                            c10::string_view)>("n3::nvfp4_quantize");
  const auto linear = op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                                std::optional<c10::string_view>)>("n3::nvfp4_linear");

  const Tensor weight = at::randn({96, 256}), x = at::randn({4, 256}, at::kBFloat16);
  const auto [q, block_scale, global_scale] =
      quantize.call(weight, {}, {}, {}, "nearest", false, "mae", "1x16", false, "linear");
  const Tensor y = linear.call(x, q, block_scale, global_scale, {}, "relu2");
  const Tensor dense = at::linear(x.to(at::kFloat), weight).relu().square();
  const double difference = ((y.to(at::kFloat) - dense).norm() / dense.norm()).item<double>();
  std::cout << "nvfp4_linear " << y.sizes() << ", " << q.numel() + block_scale.numel() << " bytes of weights, "
            << "relative difference to the dense layer " << difference << "\n";
}

void run_model(const char* package) {
  torch::inductor::AOTIModelPackageLoader model(package);
  for (const Tensor& y : model.run({at::ones({1, 8, 64})})) std::cout << "model " << y.sizes() << " sum " << y.sum().item<double>() << "\n";
}

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: n3_from_cpp <path of n3kernels/_C.so> [model.pt2]\n";
    return 2;
  }
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  run_operators();
  if (argc > 2) run_model(argv[2]);
}
