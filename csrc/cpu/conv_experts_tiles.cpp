// SPDX-License-Identifier: Apache-2.0
// The code of conv_experts' CUDA blocks on the CPU, for tests on machines without a GPU.
//
// Every second block runs the items of a step in descending order. Shared memory and the buffers
// between launches start as NaN.
#include "common.h"
#include "conv_experts_tile.h"
#include "cuda_blocks.h"

#include <algorithm>

namespace samfast {

using namespace experts;

namespace {

int64_t tiles_of(const Problem& p) {
  const Tiling t(p.windows);
  return p.windows.samples() * t.count();
}

}  // namespace

void conv_experts_tiles_forward(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                const Tensor& index, std::vector<int64_t> windows,
                                std::vector<int64_t> ratios, bool residual, bool is_gelu, Tensor z,
                                Tensor z_pad) {
  const Problem p = make_problem(h, weight, bias, index, windows, ratios, residual, is_gelu);
  const Windows& w = p.windows;
  check(z, "z", h.scalar_type(), w.tokens() * p.rank, h);
  check(z_pad, "z_pad", h.scalar_type(), w.batch * w.pads() * p.rank, h);
  const std::vector<int> list(ratios.begin(), ratios.end());
  dispatch(h, "conv_experts", [&](auto type) {
    using T = decltype(type);
    Buffers<T> m = {};
    m.h = static_cast<const T*>(h.data_ptr());
    m.z = static_cast<T*>(z.mutable_data_ptr());
    m.z_pad = static_cast<T*>(z_pad.mutable_data_ptr());
    launch(tiles_of(p), room_of(p.rank, p.inputs, false),
           [&](int tile, float* room, const Turns& each) {
             forward_tile<T>(p, list.data(), m, tile, room, each);
           });
  });
}

void conv_experts_tiles_backward(
    const Tensor& dz, std::optional<Tensor> dz_pad, const Tensor& h, const Tensor& weight,
    const Tensor& bias, const Tensor& index, std::vector<int64_t> windows,
    std::vector<int64_t> ratios, bool residual, bool is_gelu, std::optional<Tensor> daux,
    std::optional<Tensor> dpool, std::optional<Tensor> dgate, std::optional<Tensor> dh,
    std::optional<Tensor> dweight, std::optional<Tensor> dbias, std::optional<Tensor> dw_gate,
    std::optional<Tensor> dw_noise) {
  const Problem p = make_problem(h, weight, bias, index, windows, ratios, residual, is_gelu);
  const Balance balance = make_balance(p, daux, dpool, dgate, dw_gate, dw_noise, h);
  const ScalarType type = h.scalar_type(), single = ScalarType::Float;
  check(dz, "dz", type, h.numel(), h);
  const int64_t pads = p.windows.batch * p.windows.pads() * p.rank, tiles = tiles_of(p);
  std::vector<float> patches(dh ? tiles * p.rank * kPatch * kPatch : 0, kPoison);
  std::vector<float> partials(dweight ? tiles * p.parameters() : 0, kPoison);
  const std::vector<int> list(ratios.begin(), ratios.end());
  dispatch(h, "conv_experts", [&](auto element) {
    using T = decltype(element);
    Buffers<T> m = {};
    m.h = static_cast<const T*>(h.data_ptr());
    m.dz = static_cast<const T*>(dz.data_ptr());
    m.dz_pad = optional_data<const T>(dz_pad, "dz_pad", type, pads, h);
    m.dh = optional_data<T>(dh, "dh", type, h.numel(), h);
    m.patches = dh ? patches.data() : nullptr;
    m.partials = dweight ? partials.data() : nullptr;
    float* weights = optional_data<float>(dweight, "dweight", single, weight.numel(), h);
    float* biases = optional_data<float>(dbias, "dbias", single, bias.numel(), h);
    launch(tiles, room_of(p.rank, p.inputs, true),
           [&](int tile, float* room, const Turns& each) {
             backward_tile<T>(p, list.data(), m, tile, room, each);
           });
    launch(dweight ? p.experts * sum_blocks(p) : 0, kSumWidth * kSumParts,
           [&](int64_t block, float* room, const Turns& each) {
             sum_weights(p, m.partials, weights, biases, block, room, each);
           });
    for (int64_t e = 0; dh && e < h.numel(); ++e) gather<T>(p, m, balance, e);
    for (int64_t e = 0; daux && e < p.rank * p.experts; ++e) scale_gate(p, balance, e);
  });
}

}  // namespace samfast
