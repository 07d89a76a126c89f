// SPDX-License-Identifier: Apache-2.0
// conv_experts on a GPU: one block a tile (conv_experts_tile.h), one launch forward, two backward.
#include "conv_experts_tile.h"
#include "launch.h"

namespace samfast {
namespace experts {
namespace {

constexpr int kMaxExperts = 64;
constexpr int kBlocks = 2;  // at a time on a multiprocessor: 128 registers a thread, and no spills

struct Ratios {
  int value[kMaxExperts];
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Ratios ratios,
                   const __grid_constant__ Buffers<T> m) {
  extern __shared__ float room[];
  forward_tile<T>(p, ratios.value, m, blockIdx.x, room, Threads{});
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Ratios ratios,
                    const __grid_constant__ Buffers<T> m) {
  extern __shared__ float room[];
  backward_tile<T>(p, ratios.value, m, blockIdx.x, room, Threads{});
}

// The first blocks sum weights, then come elements of dh, then those of the gate.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    reduce_kernel(const __grid_constant__ Problem p, const __grid_constant__ Buffers<T> m,
                  const __grid_constant__ Balance balance, float* dweight, float* dbias,
                  int64_t weight_blocks, int64_t elements, int64_t gates) {
  __shared__ float room[kSumWidth * kSumParts];
  if (blockIdx.x < weight_blocks) {
    sum_weights(p, m.partials, dweight, dbias, blockIdx.x, room, Threads{});
    return;
  }
  const int64_t at = (blockIdx.x - weight_blocks) * kThreads + threadIdx.x;
  if (at < elements) {
    gather<T>(p, m, balance, at);
  } else if (at < elements + gates) {
    scale_gate(p, balance, at - elements);
  }
}

Ratios pack(const std::vector<int64_t>& ratios) {
  STD_TORCH_CHECK(ratios.size() <= kMaxExperts, ratios.size(), " experts are more than ",
                  kMaxExperts);
  Ratios packed = {};
  for (size_t i = 0; i < ratios.size(); ++i) packed.value[i] = static_cast<int>(ratios[i]);
  return packed;
}

template <typename Kernel>
int shared_bytes(Kernel kernel, const Problem& p, bool backward) {
  STD_TORCH_CHECK(p.rank <= kMaxRank, "rank ", p.rank, " is above ", kMaxRank);
  const int bytes = static_cast<int>(sizeof(float) * room_of(p.rank, p.inputs, backward));
  if (bytes > 48 * 1024)
    launched("conv_experts", cudaFuncSetAttribute(
                                 kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  return bytes;
}

int64_t tiles_of(const Problem& p) {
  const Tiling t(p.windows);
  return p.windows.samples() * t.count();
}

}  // namespace
}  // namespace experts

using namespace experts;

void conv_experts_cuda_forward(const Tensor& h, const Tensor& weight, const Tensor& bias,
                               const Tensor& index, std::vector<int64_t> windows,
                               std::vector<int64_t> ratios, bool residual, bool is_gelu, Tensor z,
                               Tensor z_pad) {
  const Problem p = make_problem(h, weight, bias, index, windows, ratios, residual, is_gelu);
  const Windows& w = p.windows;
  check(z, "z", h.scalar_type(), w.tokens() * p.rank, h);
  check(z_pad, "z_pad", h.scalar_type(), w.batch * w.pads() * p.rank, h);
  if (w.samples() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  const Ratios packed = pack(ratios);
  dispatch(h, "conv_experts", [&](auto type) {
    using T = decltype(type);
    Buffers<T> m = {};
    m.h = static_cast<const T*>(h.data_ptr());
    m.z = static_cast<T*>(z.mutable_data_ptr());
    m.z_pad = static_cast<T*>(z_pad.mutable_data_ptr());
    const int bytes = shared_bytes(forward_kernel<T>, p, false);
    forward_kernel<T><<<grid(tiles_of(p)), kThreads, bytes, current_stream(h)>>>(p, packed, m);
    launched("conv_experts");
  });
}

void conv_experts_cuda_backward(
    const Tensor& dz, std::optional<Tensor> dz_pad, const Tensor& h, const Tensor& weight,
    const Tensor& bias, const Tensor& index, std::vector<int64_t> windows,
    std::vector<int64_t> ratios, bool residual, bool is_gelu, std::optional<Tensor> daux,
    std::optional<Tensor> dpool, std::optional<Tensor> dgate, std::optional<Tensor> dh,
    std::optional<Tensor> dweight, std::optional<Tensor> dbias, std::optional<Tensor> dw_gate,
    std::optional<Tensor> dw_noise) {
  const Problem p = make_problem(h, weight, bias, index, windows, ratios, residual, is_gelu);
  const Balance balance = make_balance(p, daux, dpool, dgate, dw_gate, dw_noise, h);
  const Windows& w = p.windows;
  const ScalarType type = h.scalar_type(), single = ScalarType::Float;
  check(dz, "dz", type, h.numel(), h);
  const int64_t pads = w.batch * w.pads() * p.rank, tiles = tiles_of(p);
  STD_TORCH_CHECK(dweight.has_value() == dbias.has_value(), "dweight and dbias come together");
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  const Ratios packed = pack(ratios);
  const int64_t reach = dh.has_value() ? tiles * p.rank * kPatch * kPatch : 0;
  const int64_t parts = dweight.has_value() ? tiles * p.parameters() : 0;
  const Tensor scratch = torch::stable::new_empty(h, {reach + parts}, single);
  float* const room = static_cast<float*>(scratch.mutable_data_ptr());
  dispatch(h, "conv_experts", [&](auto element) {
    using T = decltype(element);
    Buffers<T> m = {};
    m.h = static_cast<const T*>(h.data_ptr());
    m.dz = static_cast<const T*>(dz.data_ptr());
    m.dz_pad = optional_data<const T>(dz_pad, "dz_pad", type, pads, h);
    m.dh = optional_data<T>(dh, "dh", type, h.numel(), h);
    m.patches = dh.has_value() ? room : nullptr;
    m.partials = dweight.has_value() ? room + reach : nullptr;
    float* weights = optional_data<float>(dweight, "dweight", single, weight.numel(), h);
    float* biases = optional_data<float>(dbias, "dbias", single, bias.numel(), h);
    const cudaStream_t stream = current_stream(h);
    if (reach + parts > 0) {
      const int bytes = shared_bytes(backward_kernel<T>, p, true);
      backward_kernel<T><<<grid(tiles), kThreads, bytes, stream>>>(p, packed, m);
      launched("conv_experts");
    }
    const int64_t weight_blocks = dweight.has_value() ? p.experts * sum_blocks(p) : 0;
    const int64_t elements = dh.has_value() ? h.numel() : 0;
    const int64_t gates = balance.daux == nullptr ? 0 : static_cast<int64_t>(p.rank) * p.experts;
    const int64_t blocks = weight_blocks + (elements + gates + kThreads - 1) / kThreads;
    if (blocks == 0) return;
    reduce_kernel<T><<<grid(blocks), kThreads, 0, stream>>>(p, m, balance, weights, biases,
                                                            weight_blocks, elements, gates);
    launched("conv_experts");
  });
}

}  // namespace samfast
