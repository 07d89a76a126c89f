// SPDX-License-Identifier: Apache-2.0
// z = h M_t and the cores M_t on a GPU (task_core_math.h): one launch each way.
#include "task_core_call.h"
#include "launch.h"

namespace samfast {
namespace task_core {
namespace {

constexpr int kBackwardRoom = kProductRoom > kGradientRoom ? kProductRoom : kGradientRoom;
static_assert(sizeof(float) * kBackwardRoom <= 48 * 1024, "a block has no more without asking");

template <typename T>
__global__ void __launch_bounds__(kThreads)
    product_kernel(const __grid_constant__ Sizes z, const __grid_constant__ Product<T> p) {
  __shared__ float room[kProductRoom];
  product_block(z, p, blockIdx.x, room, Threads{});
}

// The first ``sums`` blocks have a part of dM of one task each, the others a tile of dh.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ Sizes z, const __grid_constant__ Product<T> p,
                    const __grid_constant__ Gradient<T> g, unsigned sums) {
  __shared__ float room[kBackwardRoom];
  if (blockIdx.x < sums)
    gradient_block(z, g, blockIdx.x, room, Threads{});
  else
    product_block(z, p, blockIdx.x - sums, room, Threads{});
}

__global__ void __launch_bounds__(kThreads)
    fold_kernel(const __grid_constant__ FoldSizes z, const float* cores, const float* factors,
                float* m) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e < z.layers * z.tasks * z.core) m[e] = folded(z, cores, factors, e);
}

// The first ``sums`` blocks have columns of dU3 each, the others elements of dG.
__global__ void __launch_bounds__(kThreads)
    fold_backward_kernel(const __grid_constant__ FoldSizes z, const float* dm, const float* cores,
                         const float* factors, float* dcores, float* dfactors, unsigned sums) {
  __shared__ float room[kFactorRoom];
  if (blockIdx.x < sums) {
    factor_gradient(z, dm, cores, dfactors, blockIdx.x, room, Threads{});
    return;
  }
  const int64_t e = static_cast<int64_t>(blockIdx.x - sums) * kThreads + threadIdx.x;
  if (e < z.layers * z.core * z.depth) dcores[e] = core_gradient(z, dm, factors, e);
}

unsigned blocks_for(int64_t elements) { return grid((elements + kThreads - 1) / kThreads); }

}  // namespace
}  // namespace task_core

using namespace task_core;

void task_core_cuda_product(const Tensor& h, const Tensor& m, const Tensor& task, Tensor z) {
  const Sizes sizes = sizes_of(h, m, task, 1);
  check_rank(sizes);
  const torch::stable::accelerator::DeviceGuard guard(m.get_device_index());
  with_product(sizes, h, m, task, z, false, [&](const auto& p) {
    if (sizes.tiles() == 0) return;
    product_kernel<<<grid(sizes.tiles()), kThreads, 0, current_stream(m)>>>(sizes, p);
    launched("task_core");
  });
}

void task_core_cuda_product_backward(const Tensor& dz, const Tensor& h, const Tensor& m,
                                     const Tensor& task, std::optional<Tensor> dh,
                                     std::optional<Tensor> dm, int64_t parts) {
  const Sizes sizes = sizes_of(dz, m, task, parts);
  check_rank(sizes);
  const torch::stable::accelerator::DeviceGuard guard(m.get_device_index());
  const unsigned sums = dm.has_value() ? grid(parts * sizes.tasks) : 0;
  const int64_t tiles = dh.has_value() ? sizes.tiles() : 0;
  if (sums + tiles == 0) return;
  Tensor no_dh = dh.has_value() ? *dh : torch::stable::new_empty(h, {h.size(0), h.size(1)});
  Tensor no_dm = dm.has_value() ? *dm : torch::stable::new_empty(m, {parts * m.numel()});
  with_product(sizes, dz, m, task, no_dh, true, [&](const auto& p) {
    using Kind = std::decay_t<decltype(*p.out)>;
    with_gradient(sizes, dz, h, m, task, no_dm, [&](const auto& g) {
      if constexpr (std::is_same_v<Kind, std::decay_t<decltype(*g.h)>>) {
        backward_kernel<<<grid(sums + tiles), kThreads, 0, current_stream(m)>>>(sizes, p, g, sums);
        launched("task_core");
      }
    });
  });
}

void task_core_cuda_fold(const Tensor& cores, const Tensor& factors, Tensor m) {
  const FoldSizes z = fold_sizes(cores, factors, m, 1);
  const torch::stable::accelerator::DeviceGuard guard(cores.get_device_index());
  fold_kernel<<<blocks_for(m.numel()), kThreads, 0, current_stream(cores)>>>(
      z, floats(cores), floats(factors), out_floats(m));
  launched("task_core");
}

void task_core_cuda_fold_backward(const Tensor& dm, const Tensor& cores, const Tensor& factors,
                                  Tensor dcores, Tensor dfactors, int64_t parts) {
  const FoldSizes z = fold_sizes(cores, factors, dm, parts);
  check(dcores, "dcores", ScalarType::Float, cores.numel(), cores);
  check(dfactors, "dfactors", ScalarType::Float, factors.numel(), cores);
  const torch::stable::accelerator::DeviceGuard guard(cores.get_device_index());
  const unsigned sums = grid(z.layers * z.tasks * column_blocks(z));
  const unsigned blocks = grid(static_cast<int64_t>(sums) + blocks_for(cores.numel()));
  fold_backward_kernel<<<blocks, kThreads, 0, current_stream(cores)>>>(
      z, floats(dm), floats(cores), floats(factors), out_floats(dcores), out_floats(dfactors),
      sums);
  launched("task_core");
}

}  // namespace samfast
