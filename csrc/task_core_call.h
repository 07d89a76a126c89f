// SPDX-License-Identifier: Apache-2.0
// The arguments of the native task_core operators, checked, for every device.
#pragma once

#include "common.h"
#include "task_core_math.h"

#include <optional>

namespace samfast::task_core {

constexpr int64_t kMost = int64_t{1} << 31;  // since sizes are divided in 32 bits

inline void check(const Tensor& t, const char* name, ScalarType type, int64_t numel,
                  const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has another element type than expected");
  STD_TORCH_CHECK(t.numel() == numel, name, " has ", t.numel(), " elements, not ", numel);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(t.device() == like.device(), name, " is on another device than the cores");
}

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
inline float* out_floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline const int64_t* tasks_of(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }

// Checks rows (tokens, R1 or R2), m (tasks, R1, R2) and task (entries,).
inline Sizes sizes_of(const Tensor& rows, const Tensor& m, const Tensor& task, int64_t parts) {
  STD_TORCH_CHECK(rows.dim() == 2 && m.dim() == 3 && task.dim() == 1 && parts > 0,
                  "rows, cores and tasks have two, three and one dimensions");
  STD_TORCH_CHECK(m.numel() > 0 && m.numel() < kMost, "cores of ", m.numel(), " elements");
  const Sizes z = {rows.size(0), task.size(0), m.size(0), parts, static_cast<int>(m.size(1)),
                   static_cast<int>(m.size(2))};
  STD_TORCH_CHECK(z.tokens == z.entries * z.each(), z.entries, " tasks do not divide the ",
                  z.tokens, " rows");
  STD_TORCH_CHECK(z.tiles() < kMost, z.tiles(), " tiles are too many for one launch");
  check(m, "m", ScalarType::Float, m.numel(), m);
  check(task, "task", ScalarType::Long, z.entries, m);
  return z;
}

// Checks that the ranks fit a block's shared memory.
inline void check_rank(const Sizes& z) {
  STD_TORCH_CHECK(z.rows <= kMaxRank && z.columns <= kMaxRank, "a core of ", z.rows, " x ",
                  z.columns, " is above rank ", kMaxRank);
}

// Calls f(product) for rows in -> out with M, or its transpose if turned.
template <typename F>
void with_product(const Sizes& z, const Tensor& in, const Tensor& m, const Tensor& task, Tensor& out,
                  bool turned, F&& f) {
  const ScalarType type = in.scalar_type();
  check(in, turned ? "dz" : "h", type, z.tokens * (turned ? z.columns : z.rows), m);
  check(out, turned ? "dh" : "z", type, z.tokens * (turned ? z.rows : z.columns), m);
  dispatch(in, "task_core_product", [&](auto kind) {
    using T = decltype(kind);
    f(Product<T>{static_cast<const T*>(in.data_ptr()), floats(m), tasks_of(task),
                 static_cast<T*>(out.mutable_data_ptr()), turned});
  });
}

template <typename F>
void with_gradient(const Sizes& z, const Tensor& dz, const Tensor& h, const Tensor& m,
                   const Tensor& task, Tensor& dm, F&& f) {
  check(h, "h", dz.scalar_type(), z.tokens * z.rows, m);
  check(dz, "dz", dz.scalar_type(), z.tokens * z.columns, m);
  check(dm, "dm", ScalarType::Float, z.parts * z.tasks * z.core(), m);
  dispatch(dz, "task_core_product_backward", [&](auto kind) {
    using T = decltype(kind);
    f(Gradient<T>{static_cast<const T*>(h.data_ptr()), static_cast<const T*>(dz.data_ptr()),
                  tasks_of(task), out_floats(dm)});
  });
}

// Checks cores (N, R1, R2, R3), factors (N, T, R3) and m (N, T, R1, R2) or dm (N, P, T, R1, R2).
inline FoldSizes fold_sizes(const Tensor& cores, const Tensor& factors, const Tensor& m,
                            int64_t parts) {
  STD_TORCH_CHECK(cores.dim() == 4 && factors.dim() == 3, "cores and factors of layers are wanted");
  const FoldSizes z = {cores.size(0), factors.size(1), parts, cores.size(1) * cores.size(2),
                       cores.size(3)};
  STD_TORCH_CHECK(cores.numel() > 0 && factors.numel() > 0, "a size is zero");
  STD_TORCH_CHECK(cores.numel() < kMost && z.layers * z.tasks * z.core < kMost,
                  "cores of ", cores.numel(), " elements are more than fit 32 bits");
  check(cores, "cores", ScalarType::Float, cores.numel(), cores);
  check(factors, "factors", ScalarType::Float, z.layers * z.tasks * z.depth, cores);
  check(m, "m", ScalarType::Float, z.layers * parts * z.tasks * z.core, cores);
  return z;
}

}  // namespace samfast::task_core
