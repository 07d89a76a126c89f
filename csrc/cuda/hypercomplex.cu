// SPDX-License-Identifier: Apache-2.0
// The hypercomplex passes on a GPU (hypercomplex_math.h): one launch forward, two backward.
#include "hypercomplex_call.h"
#include "launch.h"

namespace samfast {
namespace hypercomplex {
namespace {

static_assert(kBuildItems == kThreads && kSumWidth * kSumParts == kThreads);
static_assert(sizeof(float) * kRoom <= 48 * 1024, "a block has no more without asking");

template <typename T, typename B>
__global__ void __launch_bounds__(kThreads)
    build_kernel(const __grid_constant__ Sizes z, const __grid_constant__ Built<T, B> m) {
  build_item(z, m, blockIdx.x, blockIdx.y, threadIdx.x);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    contract_kernel(const __grid_constant__ Sizes z, const __grid_constant__ Contracted<T> m) {
  __shared__ float room[kRoom];
  contract_block(z, m, blockIdx.x, room, Threads{});
}

__global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ Sizes z, const float* partials, float* drules) {
  __shared__ float room[kSumWidth * kSumParts];
  sum_block(z, partials, drules, blockIdx.x, room, Threads{});
}

}  // namespace
}  // namespace hypercomplex

using namespace hypercomplex;

void hypercomplex_cuda_build(const Tensor& rules, const Tensor& weights, std::optional<Tensor> base,
                             double scaling, Tensor h) {
  const Sizes z = sizes_of(rules, weights);
  const torch::stable::accelerator::DeviceGuard guard(weights.get_device_index());
  with_built(z, rules, weights, base, scaling, h, [&](const auto& m) {
    const dim3 blocks(grid(z.tiles()), (z.cells() + kCells - 1) / kCells);
    build_kernel<<<blocks, kThreads, 0, current_stream(weights)>>>(z, m);
    launched("hypercomplex");
  });
}

void hypercomplex_cuda_contract(const Tensor& grad, const Tensor& rules, const Tensor& weights,
                                double scaling, std::optional<Tensor> drules,
                                std::optional<Tensor> dweights) {
  const Sizes z = sizes_of(rules, weights);
  STD_TORCH_CHECK(z.terms <= kTerms, z.terms, " terms are more than ", kTerms);
  float* const sums = optional_floats(drules, "drules", z.entries(), weights);
  const torch::stable::accelerator::DeviceGuard guard(weights.get_device_index());
  const int64_t shares = sums == nullptr ? 0 : z.blocks() * z.entries();
  const Tensor scratch = torch::stable::new_empty(weights, {shares}, ScalarType::Float);
  float* const partials = sums == nullptr ? nullptr : static_cast<float*>(scratch.mutable_data_ptr());
  const cudaStream_t stream = current_stream(weights);
  with_contracted(z, grad, rules, weights, scaling, dweights, [&](auto m) {
    m.partials = partials;
    contract_kernel<<<grid(z.blocks()), kThreads, 0, stream>>>(z, m);
    launched("hypercomplex");
  });
  if (sums == nullptr) return;
  const int64_t groups = (z.entries() + kSumWidth - 1) / kSumWidth;
  sum_kernel<<<grid(groups), kThreads, 0, stream>>>(z, partials, sums);
  launched("hypercomplex");
}

}  // namespace samfast
