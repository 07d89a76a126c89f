// SPDX-License-Identifier: Apache-2.0
// What every CPU operation shares: sixteen-wide vectors, row loading, dispatch over dtypes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

namespace samfast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One body compiled for three instruction sets; the loader picks at start-up.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SAMFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SAMFAST_CLONES
#endif

typedef float Vec __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

#define SAMFAST_INLINE inline __attribute__((always_inline))

// Through a reference: a 64-byte vector by value would change the calling convention.
SAMFAST_INLINE void load(Vec& v, const float* p) { std::memcpy(&v, p, sizeof(Vec)); }
SAMFAST_INLINE void store(float* p, const Vec& v) { std::memcpy(p, &v, sizeof(Vec)); }
SAMFAST_INLINE float sum(const Vec& v) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

template <typename T>
inline void to_float(const T* source, float* target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<float>(source[i]);
}

template <typename T>
inline void from_float(const float* source, T* target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<T>(source[i]);
}

// Calls f with a value of the tensor's element type: float, Half or BFloat16.
template <typename F>
void dispatch(const Tensor& t, const char* name, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: STD_TORCH_CHECK(false, name, " takes float32, float16 or bfloat16");
  }
}

}  // namespace samfast
