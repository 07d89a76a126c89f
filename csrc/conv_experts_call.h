// SPDX-License-Identifier: Apache-2.0
// The arguments of conv_experts, checked once, then kept as plain numbers and pointers.
#pragma once

#include "conv_experts_math.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

namespace samfast::experts {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Problem {
  Windows windows;
  int experts, rank;
  int inputs;  // input channels that an output channel reads: rank, or 1 if depthwise
  bool residual, is_gelu;
  const float* weight;   // (experts, rank, inputs, 3, 3)
  const float* bias;     // (experts, rank)
  const int64_t* index;  // (samples)

  // Weights of one expert, followed by its biases if one buffer sums both.
  SAMFAST_HD int64_t kernel() const { return static_cast<int64_t>(rank) * inputs * 9; }
  SAMFAST_HD int64_t parameters() const { return kernel() + rank; }
};

// Sources and targets of the balancing loss's gradient; all null without one.
struct Balance {
  const float *daux, *dpool, *dgate;  // (), (samples, rank), (2, rank, experts)
  float *gate, *noise;                // (rank, experts) each
};

inline void check(const Tensor& t, const char* name, ScalarType type, int64_t numel,
                  const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has another element type than expected");
  STD_TORCH_CHECK(t.numel() == numel, name, " has ", t.numel(), " elements, not ", numel);
  STD_TORCH_CHECK(t.numel() == 0 || t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(t.device() == like.device(), name, " is on another device than h");
}

template <typename T>
T* optional_data(const std::optional<Tensor>& t, const char* name, ScalarType type, int64_t numel,
                 const Tensor& like) {
  if (!t.has_value()) return nullptr;
  check(*t, name, type, numel, like);
  return static_cast<T*>(t->data_ptr());
}

inline Problem make_problem(const Tensor& h, const Tensor& weight, const Tensor& bias,
                            const Tensor& index, const std::vector<int64_t>& windows,
                            const std::vector<int64_t>& ratios, bool residual, bool is_gelu) {
  STD_TORCH_CHECK(windows.size() == 5, "windows are five sizes, not ", windows.size());
  Problem p;
  p.windows = {windows[0], windows[1], windows[2], windows[3], windows[4], 0, 0};
  STD_TORCH_CHECK(p.windows.height > 0 && p.windows.width > 0, "a window is empty");
  p.windows.down = (p.windows.image_height + p.windows.height - 1) / p.windows.height;
  p.windows.across = (p.windows.image_width + p.windows.width - 1) / p.windows.width;
  STD_TORCH_CHECK(p.windows.samples() * ((p.windows.height + 7) / 8) *
                          ((p.windows.width + 7) / 8) < (int64_t{1} << 31),
                  "there are more tiles of 8 x 8 than 2^31");
  STD_TORCH_CHECK(weight.dim() == 5, "weight has ", weight.dim(), " dimensions, not 5");
  p.experts = static_cast<int>(weight.size(0));
  p.rank = static_cast<int>(weight.size(1));
  p.inputs = static_cast<int>(weight.size(2));
  STD_TORCH_CHECK(p.inputs == p.rank || p.inputs == 1, "weight takes ", p.inputs,
                  " input channels, neither ", p.rank, " nor 1");
  STD_TORCH_CHECK(static_cast<int64_t>(ratios.size()) == p.experts, ratios.size(), " ratios for ",
                  p.experts, " experts");
  for (const int64_t ratio : ratios)
    STD_TORCH_CHECK(ratio >= 1 && ratio < (1 << 28), "a ratio is ", ratio);
  p.residual = residual, p.is_gelu = is_gelu;
  check(h, "h", h.scalar_type(), p.windows.tokens() * p.rank, h);
  check(weight, "weight", ScalarType::Float, p.experts * p.kernel(), h);
  check(bias, "bias", ScalarType::Float, static_cast<int64_t>(p.experts) * p.rank, h);
  check(index, "index", ScalarType::Long, p.windows.samples(), h);
  p.weight = static_cast<const float*>(weight.data_ptr());
  p.bias = static_cast<const float*>(bias.data_ptr());
  p.index = static_cast<const int64_t*>(index.data_ptr());
  return p;
}

inline Balance make_balance(const Problem& p, const std::optional<Tensor>& daux,
                            const std::optional<Tensor>& dpool, const std::optional<Tensor>& dgate,
                            const std::optional<Tensor>& gate, const std::optional<Tensor>& noise,
                            const Tensor& like) {
  const int64_t n = static_cast<int64_t>(p.rank) * p.experts;
  const ScalarType type = ScalarType::Float;
  const Balance b = {optional_data<const float>(daux, "daux", type, 1, like),
                     optional_data<const float>(dpool, "dpool", type,
                                                p.windows.samples() * p.rank, like),
                     optional_data<const float>(dgate, "dgate", type, 2 * n, like),
                     optional_data<float>(gate, "dw_gate", type, n, like),
                     optional_data<float>(noise, "dw_noise", type, n, like)};
  const bool all = daux && dpool && dgate && gate && noise;
  STD_TORCH_CHECK(all || !(daux || dpool || dgate || gate || noise),
                  "the five tensors of the balancing loss come together");
  return b;
}

}  // namespace samfast::experts
