// SPDX-License-Identifier: Apache-2.0 The hypercomplex passes on the CPU (hypercomplex_math.h), and
// the CUDA blocks' code on the CPU, for tests on machines without a GPU.
//
//   build      rows of H, sixteen elements at a time, one pass over H
//   contract   all n rows of dH that belong to a row of the parts, one pass over dH
//
// drules is summed per chunk of rows and added in order. Chunks depend only on the sizes, so the
// bits do not depend on the number of threads. Everything is accumulated in float.
#include "capability.h"
#include "cuda_blocks.h"
#include "hypercomplex_call.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

namespace samfast {

using namespace hypercomplex;

namespace {

constexpr int64_t kMaxChunks = 32;
constexpr int64_t kGrain = 1 << 15;  // elements of H that justify a thread

// out[c] = scale * sum_i factor[i * step] * values[i * plane + c] for n elements.
template <int kBytes>
SAMFAST_INLINE void mix_row_body(float* out, int64_t count, const float* factor, int64_t step,
                                 const float* values, int64_t plane, float scale, int64_t n) {
  using V = typename Lanes<kBytes>::Vector;
  constexpr int64_t kLanes = Lanes<kBytes>::kCount;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    V total = {};
    mix(total, count, factor, step,
        [&](int64_t i, V& v) { load(v, values + i * plane + c); });
    store(out + c, scale * total);
  }
  for (; c < n; ++c) {
    float total = 0.0f;
    mix(total, count, factor, step, [&](int64_t i, float& v) { v = values[i * plane + c]; });
    out[c] = scale * total;
  }
}
constexpr EachProcessor<mix_row_body<16>, mix_row_body<32>, mix_row_body<64>> mix_row;

// out[c] = scale * sum over the cells (p, q) of factor[p * n + q] * row_p[q * columns + c], summed
// by rows of cells, so that no sum is long.
template <int kBytes>
SAMFAST_INLINE void mix_cells_body(float* out, const Sizes& z, const float* factor,
                                   const float* const* row, float scale) {
  using V = typename Lanes<kBytes>::Vector;
  constexpr int64_t kLanes = Lanes<kBytes>::kCount;
  int64_t c = 0;
  for (; c + kLanes <= z.columns; c += kLanes) {
    V all = {};
    for (int64_t p = 0; p < z.n; ++p) {
      V total = {};
      mix(total, z.n, factor + p * z.n, 1,
          [&](int64_t q, V& v) { load(v, row[p] + q * z.columns + c); });
      all += total;
    }
    store(out + c, scale * all);
  }
  for (; c < z.columns; ++c) {
    float all = 0.0f;
    for (int64_t p = 0; p < z.n; ++p) {
      float total = 0.0f;
      mix(total, z.n, factor + p * z.n, 1,
          [&](int64_t q, float& v) { v = row[p][q * z.columns + c]; });
      all += total;
    }
    out[c] = scale * all;
  }
}
constexpr EachProcessor<mix_cells_body<16>, mix_cells_body<32>, mix_cells_body<64>> mix_cells;

// sum_c x[c] * y[c]
SAMFAST_INLINE float dot_row_body(const float* x, const float* y, int64_t n) {
  Vec acc = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Vec u, v;
    load(u, x + c);
    load(v, y + c);
    acc += u * v;
  }
  float total = 0.0f;
  mix(total, n - c, x + c, 1, [&](int64_t i, float& v) { v = y[c + i]; });
  return sum(acc) + total;
}
constexpr EachProcessor<dot_row_body> dot_row;

template <typename T, typename B>
void build(const Sizes& z, const Built<T, B>& m) {
  const int64_t width = z.n * z.columns, height = z.n * z.rows;
  torch::stable::parallel_for(0, height, std::max<int64_t>(1, kGrain / width),
                              [&](int64_t begin, int64_t end) {
    std::vector<float> room(std::is_same_v<T, float> ? 0 : width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t p = row / z.rows, a = row % z.rows;
      T* const out = m.out + row * width;
      float* line = room.data();
      if constexpr (std::is_same_v<T, float>) line = out;
      for (int64_t q = 0; q < z.n; ++q)
        mix_row(line + q * z.columns, z.terms, m.rules + p * z.n + q, z.n * z.n,
                m.weights + a * z.columns, z.positions(), m.scaling, z.columns);
      if (m.base != nullptr) {
        const B* const base = m.base + row * width;
        for (int64_t c = 0; c < width; ++c) line[c] += static_cast<float>(base[c]);
      }
      if constexpr (!std::is_same_v<T, float>) from_float(line, out, width);
    }
  });
}

int64_t chunks_of(int64_t rows) { return std::min(kMaxChunks, rows); }

template <typename T>
void contract(const Sizes& z, const Contracted<T>& m, float* drules) {
  const int64_t width = z.n * z.columns, cells = z.n * z.n, chunks = chunks_of(z.rows);
  std::vector<float> partials(drules == nullptr ? 0 : chunks * z.entries(), 0.0f);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> room(std::is_same_v<T, float> ? 0 : z.n * width);
    std::vector<const float*> row(z.n);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* const share = partials.data() + chunk * z.entries();
      for (int64_t a = chunk * z.rows / chunks; a < (chunk + 1) * z.rows / chunks; ++a) {
        for (int64_t p = 0; p < z.n; ++p) {
          const T* const source = m.grad + (p * z.rows + a) * width;
          if constexpr (std::is_same_v<T, float>) {
            row[p] = source;
          } else {
            to_float(source, room.data() + p * width, width);
            row[p] = room.data() + p * width;
          }
        }
        for (int64_t i = 0; i < z.terms; ++i) {
          const int64_t at = i * z.positions() + a * z.columns;
          if (m.dweights != nullptr)
            mix_cells(m.dweights + at, z, m.rules + i * cells, row.data(), m.scaling);
          if (drules == nullptr) continue;
          for (int64_t cell = 0; cell < cells; ++cell)
            share[i * cells + cell] += dot_row(
                m.weights + at, row[cell / z.n] + cell % z.n * z.columns, z.columns);
        }
      }
    }
  });
  if (drules == nullptr) return;
  std::fill(drules, drules + z.entries(), 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t e = 0; e < z.entries(); ++e) drules[e] += partials[chunk * z.entries() + e];
  for (int64_t e = 0; e < z.entries(); ++e) drules[e] *= m.scaling;
}

}  // namespace

void hypercomplex_build(const Tensor& rules, const Tensor& weights, std::optional<Tensor> base,
                        double scaling, Tensor h) {
  const Sizes z = sizes_of(rules, weights);
  with_built(z, rules, weights, base, scaling, h, [&](const auto& m) { build(z, m); });
}

void hypercomplex_contract(const Tensor& grad, const Tensor& rules, const Tensor& weights,
                           double scaling, std::optional<Tensor> drules,
                           std::optional<Tensor> dweights) {
  const Sizes z = sizes_of(rules, weights);
  float* const sums = optional_floats(drules, "drules", z.entries(), weights);
  with_contracted(z, grad, rules, weights, scaling, dweights,
                  [&](const auto& m) { contract(z, m, sums); });
}

void hypercomplex_blocks_build(const Tensor& rules, const Tensor& weights,
                               std::optional<Tensor> base, double scaling, Tensor h) {
  const Sizes z = sizes_of(rules, weights);
  with_built(z, rules, weights, base, scaling, h, [&](const auto& m) {
    for (int64_t tile = 0; tile < z.tiles(); ++tile)
      for (int chunk = 0; chunk * kCells < z.cells(); ++chunk)
        Turns{tile % 2 == 1}(kBuildItems, [&](int item) { build_item(z, m, tile, chunk, item); });
  });
}

void hypercomplex_blocks_contract(const Tensor& grad, const Tensor& rules, const Tensor& weights,
                                  double scaling, std::optional<Tensor> drules,
                                  std::optional<Tensor> dweights) {
  const Sizes z = sizes_of(rules, weights);
  STD_TORCH_CHECK(z.terms <= kTerms, z.terms, " terms are more than ", kTerms);
  float* const sums = optional_floats(drules, "drules", z.entries(), weights);
  std::vector<float> partials(sums == nullptr ? 0 : z.blocks() * z.entries(), kPoison);
  with_contracted(z, grad, rules, weights, scaling, dweights, [&](auto m) {
    m.partials = sums == nullptr ? nullptr : partials.data();
    launch(z.blocks(), kRoom, [&](int64_t block, float* room, const Turns& each) {
      contract_block(z, m, block, room, each);
    });
  });
  if (sums == nullptr) return;
  launch((z.entries() + kSumWidth - 1) / kSumWidth, kSumWidth * kSumParts,
         [&](int64_t block, float* room, const Turns& each) {
           sum_block(z, partials.data(), sums, block, room, each);
         });
}

}  // namespace samfast
