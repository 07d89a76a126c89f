// SPDX-License-Identifier: Apache-2.0 z = h M_t and its gradients on the CPU (task_core_math.h),
// and the CUDA blocks' code on the CPU, for tests on machines without a GPU.
//
// The rows of each entry are split into tiles; each tile is one product that fits the cache. dM is
// summed in registers over a tile, then over the tiles of a chunk, then over chunks in order. Tiles
// and chunks depend only on the sizes, so the bits do not depend on the number of threads.
#include "cuda_blocks.h"
#include "task_core_call.h"
#include "tile_product.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace samfast {

using namespace task_core;

namespace {

constexpr int64_t kMaxChunks = 16, kTilesWorth = 8;  // tiles that justify a thread

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// (rows, columns) as floats in rows of ``pitch``, padded with zeros at the right and bottom.
template <typename T>
void copy_rows(const T* source, int64_t rows, int64_t columns, float* target, int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r) to_float(source + r * columns, target + r * pitch, columns);
}

// All cores with columns padded for the products, turned or not.
std::vector<float> padded_cores(const Sizes& z, const float* m, bool turned) {
  const int64_t depth = turned ? z.columns : z.rows, width = padded(turned ? z.rows : z.columns);
  std::vector<float> out(z.tasks * depth * width, 0.0f);
  for (int64_t t = 0; t < z.tasks; ++t)
    for (int64_t r = 0; r < z.rows; ++r)
      for (int64_t c = 0; c < z.columns; ++c)
        out[(t * depth + (turned ? c : r)) * width + (turned ? r : c)] =
            m[t * z.core() + r * z.columns + c];
  return out;
}

void check_tasks(const Sizes& z, const Tensor& task) {
  const int64_t* const tasks = tasks_of(task);
  for (int64_t e = 0; e < z.entries; ++e)
    STD_TORCH_CHECK(z.known(tasks[e]), "task is ", tasks[e], ", but there are tasks 0 to ",
                    z.tasks - 1);
}

template <typename T>
void multiply_rows(const Sizes& z, const Product<T>& p) {
  const int64_t depth = p.turned ? z.columns : z.rows, width = p.turned ? z.rows : z.columns;
  const int64_t wide = padded(width);
  const bool direct = std::is_same_v<T, float> && wide == width;
  const std::vector<float> cores = padded_cores(z, p.m, p.turned);
  torch::stable::parallel_for(0, z.tiles(), kTilesWorth, [&](int64_t begin, int64_t end) {
    std::vector<float> in(std::is_same_v<T, float> ? 0 : kRows * depth);
    std::vector<float> out(direct ? 0 : kRows * wide);
    for (int64_t number = begin; number < end; ++number) {
      const Tile tile(z, number);
      const T* const source = p.in + tile.first * depth;
      T* const target = p.out + tile.first * width;
      TileProduct product = {nullptr, depth, cores.data() + p.task[tile.entry] * depth * wide,
                             wide, out.data(), wide, tile.live, wide, depth, false, false};
      if constexpr (std::is_same_v<T, float>) {
        product.a = source;
        if (direct) product.c = target;
      } else {
        copy_rows(source, tile.live, depth, in.data(), depth);
        product.a = in.data();
      }
      multiply(product);
      if (direct) continue;
      for (int64_t r = 0; r < tile.live; ++r)
        from_float(out.data() + r * wide, target + r * width, width);
    }
  });
}

template <typename T>
void sum_gradient(const Sizes& z, const Gradient<T>& g) {
  const int64_t wide = padded(z.columns), core = z.rows * wide, tiles = z.tiles();
  const int64_t chunks = std::min(kMaxChunks, tiles), size = z.tasks * core;
  std::vector<float> partial(chunks * size, 0.0f);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> h(kRows * z.rows), dz(kRows * wide, 0.0f);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t n = chunk * tiles / chunks; n < (chunk + 1) * tiles / chunks; ++n) {
        const Tile tile(z, n);
        copy_rows(g.h + tile.first * z.rows, tile.live, z.rows, h.data(), z.rows);
        copy_rows(g.dz + tile.first * z.columns, tile.live, z.columns, dz.data(), wide);
        float* const sum = partial.data() + chunk * size + g.task[tile.entry] * core;
        multiply({h.data(), z.rows, dz.data(), wide, sum, wide, z.rows, wide, tile.live, true,
                  true});
      }
  });
  std::fill(g.dm, g.dm + z.parts * z.tasks * z.core(), 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t row = 0; row < z.tasks * z.rows; ++row)
      for (int64_t c = 0; c < z.columns; ++c)
        g.dm[row * z.columns + c] += partial[chunk * size + row * wide + c];
}

}  // namespace

void task_core_product(const Tensor& h, const Tensor& m, const Tensor& task, Tensor z) {
  const Sizes sizes = sizes_of(h, m, task, 1);
  check_tasks(sizes, task);
  with_product(sizes, h, m, task, z, false, [&](const auto& p) { multiply_rows(sizes, p); });
}

void task_core_product_backward(const Tensor& dz, const Tensor& h, const Tensor& m,
                                const Tensor& task, std::optional<Tensor> dh,
                                std::optional<Tensor> dm, int64_t parts) {
  const Sizes sizes = sizes_of(dz, m, task, parts);
  check_tasks(sizes, task);
  if (dh.has_value())
    with_product(sizes, dz, m, task, *dh, true, [&](const auto& p) { multiply_rows(sizes, p); });
  if (dm.has_value())
    with_gradient(sizes, dz, h, m, task, *dm, [&](const auto& g) { sum_gradient(sizes, g); });
}

void task_core_fold(const Tensor& cores, const Tensor& factors, Tensor m) {
  const FoldSizes z = fold_sizes(cores, factors, m, 1);
  const float *const g = floats(cores), *const u = floats(factors);
  float* const out = out_floats(m);
  torch::stable::parallel_for(0, m.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) out[e] = folded(z, g, u, e);
  });
}

void task_core_fold_backward(const Tensor& dm, const Tensor& cores, const Tensor& factors,
                             Tensor dcores, Tensor dfactors, int64_t parts) {
  const FoldSizes z = fold_sizes(cores, factors, dm, parts);
  check(dcores, "dcores", ScalarType::Float, cores.numel(), cores);
  check(dfactors, "dfactors", ScalarType::Float, factors.numel(), cores);
  const float *const d = floats(dm), *const g = floats(cores), *const u = floats(factors);
  float *const dg = out_floats(dcores), *const du = out_floats(dfactors);
  torch::stable::parallel_for(0, cores.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) dg[e] = core_gradient(z, d, u, e);
  });
  torch::stable::parallel_for(0, z.layers * z.tasks * column_blocks(z), 8,
                              [&](int64_t begin, int64_t end) {
    std::vector<float> room(kFactorRoom);
    for (int64_t block = begin; block < end; ++block)
      factor_gradient(z, d, g, du, block, room.data(), Turns{false});
  });
}

void task_core_blocks_product(const Tensor& h, const Tensor& m, const Tensor& task, Tensor z) {
  const Sizes sizes = sizes_of(h, m, task, 1);
  check_rank(sizes);
  with_product(sizes, h, m, task, z, false, [&](const auto& p) {
    launch(sizes.tiles(), kProductRoom, [&](int64_t block, float* room, const Turns& each) {
      product_block(sizes, p, block, room, each);
    });
  });
}

void task_core_blocks_product_backward(const Tensor& dz, const Tensor& h, const Tensor& m,
                                       const Tensor& task, std::optional<Tensor> dh,
                                       std::optional<Tensor> dm, int64_t parts) {
  const Sizes sizes = sizes_of(dz, m, task, parts);
  check_rank(sizes);
  if (dh.has_value())
    with_product(sizes, dz, m, task, *dh, true, [&](const auto& p) {
      launch(sizes.tiles(), kProductRoom, [&](int64_t block, float* room, const Turns& each) {
        product_block(sizes, p, block, room, each);
      });
    });
  if (dm.has_value())
    with_gradient(sizes, dz, h, m, task, *dm, [&](const auto& g) {
      launch(parts * sizes.tasks, kGradientRoom,
             [&](int64_t block, float* room, const Turns& each) {
               gradient_block(sizes, g, block, room, each);
             });
    });
}

void task_core_blocks_fold(const Tensor& cores, const Tensor& factors, Tensor m) {
  task_core_fold(cores, factors, m);
}

void task_core_blocks_fold_backward(const Tensor& dm, const Tensor& cores, const Tensor& factors,
                                    Tensor dcores, Tensor dfactors, int64_t parts) {
  task_core_fold_backward(dm, cores, factors, dcores, dfactors, parts);
  const FoldSizes z = fold_sizes(cores, factors, dm, parts);
  launch(z.layers * z.tasks * column_blocks(z), kFactorRoom,
         [&](int64_t block, float* room, const Turns& each) {
           factor_gradient(z, floats(dm), floats(cores), out_floats(dfactors), block, room, each);
         });
}

}  // namespace samfast
