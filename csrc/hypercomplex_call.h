// SPDX-License-Identifier: Apache-2.0
// The arguments of the native hypercomplex operators, checked, for every device.
#pragma once

#include "common.h"
#include "hypercomplex_math.h"

#include <optional>

namespace samfast::hypercomplex {

constexpr int64_t kMost = int64_t{1} << 30;  // positions, since they are divided in 32 bits

inline void check(const Tensor& t, const char* name, ScalarType type, int64_t numel,
                  const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has another element type than expected");
  STD_TORCH_CHECK(t.numel() == numel, name, " has ", t.numel(), " elements, not ", numel);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(t.device() == like.device(), name, " is on another device than weights");
}

inline Sizes sizes_of(const Tensor& rules, const Tensor& weights) {
  STD_TORCH_CHECK(rules.dim() == 3 && weights.dim() == 3, "rules and weights have three dimensions");
  const Sizes z = {rules.size(0), rules.size(1), weights.size(1), weights.size(2)};
  STD_TORCH_CHECK(z.terms > 0 && z.n > 0 && z.n < 1024 && z.positions() > 0, "a size is zero");
  STD_TORCH_CHECK(z.rows < kMost && z.columns < kMost && z.positions() < kMost, "weights are of ",
                  z.rows, " x ", z.columns, " elements, more than fit 32 bits");
  check(rules, "rules", ScalarType::Float, z.entries(), weights);
  check(weights, "weights", ScalarType::Float, z.terms * z.positions(), weights);
  return z;
}

inline float* optional_floats(const std::optional<Tensor>& t, const char* name, int64_t numel,
                              const Tensor& like) {
  if (!t.has_value()) return nullptr;
  check(*t, name, ScalarType::Float, numel, like);
  return static_cast<float*>(t->data_ptr());
}

// Calls f(problem) with the element types of h and of base; without a base, those of h.
template <typename F>
void with_built(const Sizes& z, const Tensor& rules, const Tensor& weights,
                const std::optional<Tensor>& base, double scaling, const Tensor& h, F&& f) {
  check(h, "h", h.scalar_type(), z.entries() / z.terms * z.positions(), weights);
  if (base.has_value()) check(*base, "base", base->scalar_type(), h.numel(), weights);
  dispatch(h, "hypercomplex_build", [&](auto out) {
    using T = decltype(out);
    const auto run = [&](auto of_base) {
      using B = decltype(of_base);
      Built<T, B> m = {};
      m.rules = static_cast<const float*>(rules.data_ptr());
      m.weights = static_cast<const float*>(weights.data_ptr());
      if (base.has_value()) m.base = static_cast<const B*>(base->data_ptr());
      m.out = static_cast<T*>(h.mutable_data_ptr());
      m.scaling = static_cast<float>(scaling);
      f(m);
    };
    if (base.has_value())
      dispatch(*base, "hypercomplex_build", run);
    else
      run(out);
  });
}

template <typename F>
void with_contracted(const Sizes& z, const Tensor& grad, const Tensor& rules, const Tensor& weights,
                     double scaling, const std::optional<Tensor>& dweights, F&& f) {
  check(grad, "grad", grad.scalar_type(), z.entries() / z.terms * z.positions(), weights);
  dispatch(grad, "hypercomplex_contract", [&](auto type) {
    using T = decltype(type);
    Contracted<T> m = {};
    m.grad = static_cast<const T*>(grad.data_ptr());
    m.rules = static_cast<const float*>(rules.data_ptr());
    m.weights = static_cast<const float*>(weights.data_ptr());
    m.dweights = optional_floats(dweights, "dweights", weights.numel(), weights);
    m.scaling = static_cast<float>(scaling);
    f(m);
  });
}

}  // namespace samfast::hypercomplex
