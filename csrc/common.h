// SPDX-License-Identifier: Apache-2.0
// Shared by all CPU operations: sixteen-wide vectors, row loading, dispatch over dtypes.
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

// Floats in registers of kBytes, and equally many integers.
template <int kBytes>
struct Lanes {
  typedef float Vector __attribute__((vector_size(kBytes)));
  typedef int32_t Integers __attribute__((vector_size(kBytes)));
  static constexpr int64_t kCount = kBytes / sizeof(float);
};

using Vec = Lanes<64>::Vector;
constexpr int64_t kLanes = 16;

#define SAMFAST_INLINE inline __attribute__((always_inline))

// By reference: a 64-byte vector by value would change the calling convention.
template <typename V>
SAMFAST_INLINE void load(V& v, const float* p) {
  std::memcpy(&v, p, sizeof(V));
}
template <typename V>
SAMFAST_INLINE void store(float* p, const V& v) {
  std::memcpy(p, &v, sizeof(V));
}
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
