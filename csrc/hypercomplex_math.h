// SPDX-License-Identifier: Apache-2.0
// H = base + s * sum_i rules_i (x) weights_i and its gradients, for host and device.
//
// H has n * n cells of rows x columns positions; cell (p, q), position (a, b) is its element
// (p * rows + a, q * columns + b). Three sums, each over the values of a factor that is one number:
//
//   H at a cell and position    over terms       rules_i[cell]     times  weights_i[position]
//   dweights_i[position]        over cells       rules_i[cell]     times  dH at the cell
//   drules_i[cell]              over positions   weights_i[position] times  dH at the position
//
// mix() is that sum, for a number or for sixteen at once. A block (a CUDA block, or on a CPU its
// steps one by one) has kTile positions at a time: each(count, item) runs items in any order and
// then waits for all.
#pragma once

#include <cstdint>

#ifndef SAMFAST_HD
#if defined(__CUDACC__)
#define SAMFAST_HD __host__ __device__ __forceinline__
#else
#define SAMFAST_HD inline __attribute__((always_inline))
#endif
#endif

namespace samfast::hypercomplex {

constexpr int kTile = 64, kCells = 16, kTerms = 16, kStep = kTile + 1;  // odd: spreads banks
constexpr int64_t kPrograms = 1024;  // blocks, if a block may have many tiles

struct Sizes {
  int64_t terms, n, rows, columns;  // weights: (terms, rows, columns)

  SAMFAST_HD int cells() const { return static_cast<int>(n * n); }
  SAMFAST_HD int64_t positions() const { return rows * columns; }
  SAMFAST_HD int64_t entries() const { return terms * n * n; }

  // Offset in H of position (a, b) of a cell.
  SAMFAST_HD int64_t at(int cell, int64_t a, int64_t b) const {
    const int side = static_cast<int>(n), p = cell / side, q = cell % side;
    return (p * rows + a) * (n * columns) + q * columns + b;
  }

  SAMFAST_HD int64_t tiles() const { return (positions() + kTile - 1) / kTile; }
  // A block sums over its tiles only if all cells fit at once.
  SAMFAST_HD int64_t tiles_of_block() const {
    return cells() <= kCells ? (tiles() + kPrograms - 1) / kPrograms : 1;
  }
  SAMFAST_HD int64_t blocks() const {
    return (tiles() + tiles_of_block() - 1) / tiles_of_block();
  }
};

// out += sum_i factor[i * step] * v_i; value(i, v) sets v_i.
template <typename V, typename Value>
SAMFAST_HD void mix(V& out, int64_t count, const float* factor, int64_t step, const Value& value) {
  V v;
  for (int64_t i = 0; i < count; ++i) {
    value(i, v);
    out += factor[i * step] * v;
  }
}

template <typename T, typename B>
struct Built {
  const float *rules, *weights;
  const B* base;  // or null
  T* out;
  float scaling;
};

// Items of a block that builds: each has one position and four of the block's kCells cells.
constexpr int kItemCells = 4, kBuildItems = kTile * kCells / kItemCells;

// One item of the block at (tile, chunk of cells).
template <typename T, typename B>
SAMFAST_HD void build_item(const Sizes& z, const Built<T, B>& m, int64_t tile, int chunk,
                           int item) {
  // In 32 bits: a GPU calls a function for 64-bit divisions.
  const int position = static_cast<int>(tile * kTile + item % kTile);
  const int columns = static_cast<int>(z.columns), a = position / columns, b = position % columns;
  if (position >= z.positions()) return;
  const int first = chunk * kCells + item / kTile * kItemCells;
  for (int cell = first; cell < first + kItemCells && cell < z.cells(); ++cell) {
    float h = 0.0f;
    mix(h, z.terms, m.rules + cell, z.cells(),
        [&](int64_t i, float& v) { v = m.weights[i * z.positions() + position]; });
    h *= m.scaling;
    const int64_t at = z.at(cell, a, b);
    if (m.base != nullptr) h += static_cast<float>(m.base[at]);
    m.out[at] = static_cast<T>(h);
  }
}

template <typename T>
struct Contracted {
  const T* grad;
  const float *rules, *weights;
  float* dweights;  // or null
  float* partials;  // (blocks, terms, cells), or null
  float scaling;
};

// Floats of shared memory of a block that contracts.
constexpr int kRoom = (2 * kTerms + kCells) * kStep + kTerms * kCells;

// dweights at the block's positions, and these positions' share of drules.
template <typename T, typename Each>
SAMFAST_HD void contract_block(const Sizes& z, const Contracted<T>& m, int64_t block, float* room,
                               const Each& each) {
  const int terms = static_cast<int>(z.terms), cells = z.cells(), columns =
      static_cast<int>(z.columns);
  const int64_t per_block = z.tiles_of_block(), positions = z.positions();
  float *weights = room, *grad = weights + kTerms * kStep, *dweights = grad + kCells * kStep;
  float* sums = dweights + kTerms * kStep;  // (terms, cells), if all cells fit at once
  const bool one = cells <= kCells;
  for (int64_t turn = 0; turn < per_block; ++turn) {
    const int64_t start = (block * per_block + turn) * kTile;
    if (start >= positions && turn > 0) break;
    const int row = static_cast<int>(start) / columns, column = static_cast<int>(start) % columns;
    const int live = positions - start < kTile ? static_cast<int>(positions - start) : kTile;
    each(terms * kTile, [&](int e) {
      const int i = e / kTile, t = e % kTile;
      weights[i * kStep + t] = t < live ? m.weights[i * positions + start + t] : 0.0f;
      dweights[i * kStep + t] = 0.0f;
    });
    for (int first = 0; first < cells; first += kCells) {
      const int count = cells - first < kCells ? cells - first : kCells;
      each(count * kTile, [&](int e) {
        const int c = e / kTile, t = e % kTile, offset = column + t;
        const int64_t at = z.at(first + c, row + offset / columns, offset % columns);
        grad[c * kStep + t] = t < live ? static_cast<float>(m.grad[at]) : 0.0f;
      });
      each(terms * (kTile + count), [&](int e) {
        float total = 0.0f;
        if (e < terms * kTile) {
          const int i = e / kTile, t = e % kTile;
          mix(total, count, m.rules + i * cells + first, 1,
              [&](int64_t c, float& v) { v = grad[c * kStep + t]; });
          dweights[i * kStep + t] += total;
        } else if (m.partials != nullptr) {
          const int entry = e - terms * kTile, i = entry / count, c = entry % count;
          mix(total, kTile, weights + i * kStep, 1,
              [&](int64_t t, float& v) { v = grad[c * kStep + t]; });
          if (one) {
            sums[entry] = turn > 0 ? sums[entry] + total : total;
          } else {
            m.partials[block * z.entries() + i * cells + first + c] = m.scaling * total;
          }
        }
      });
    }
    if (m.dweights != nullptr) {
      each(terms * kTile, [&](int e) {
        const int i = e / kTile, t = e % kTile;
        if (t < live) m.dweights[i * positions + start + t] = m.scaling * dweights[i * kStep + t];
      });
    }
  }
  if (one && m.partials != nullptr) {
    each(terms * cells, [&](int e) { m.partials[block * z.entries() + e] = m.scaling * sums[e]; });
  }
}

constexpr int kSumWidth = 8, kSumParts = 32;

// kSumWidth entries of drules: sums the blocks' shares per part, then the parts, in fixed order.
template <typename Each>
SAMFAST_HD void sum_block(const Sizes& z, const float* partials, float* drules, int64_t block,
                          float* room, const Each& each) {
  const int64_t first = block * kSumWidth, entries = z.entries(), blocks = z.blocks();
  each(kSumWidth * kSumParts, [&](int e) {
    const int64_t entry = first + e % kSumWidth;
    float total = 0.0f;
    for (int64_t b = e / kSumWidth; b < blocks && entry < entries; b += kSumParts)
      total += partials[b * entries + entry];
    room[e] = total;
  });
  each(kSumWidth, [&](int e) {
    float total = 0.0f;
    for (int part = 0; part < kSumParts; ++part) total += room[part * kSumWidth + e];
    if (first + e < entries) drules[first + e] = total;
  });
}

}  // namespace samfast::hypercomplex
