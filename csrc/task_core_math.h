// SPDX-License-Identifier: Apache-2.0
// z = h M_t and its gradients, and the cores M_t = sum_v U3[t, v] G[:, :, v], for host and device.
//
// Rows belong to entries of equally many rows, entries to tasks. A tile is kRows rows of one entry.
// A block (a CUDA block, or on a CPU its steps one by one) computes a tile, or sums tiles in order:
// each(count, item) runs items in any order and then waits for all.
#pragma once

#include <cstdint>
#include <limits>

#ifndef SAMFAST_HD
#if defined(__CUDACC__)
#define SAMFAST_HD __host__ __device__ __forceinline__
#else
#define SAMFAST_HD inline __attribute__((always_inline))
#endif
#endif

namespace samfast::task_core {

constexpr int kRows = 32, kMaxRank = 64, kPitch = kMaxRank + 1;  // odd: spreads banks
constexpr int kFour = 4;                                         // results of an item

struct Sizes {
  int64_t tokens, entries, tasks, parts;
  int rows, columns;  // of a core, R1 and R2

  SAMFAST_HD int64_t each() const { return entries > 0 ? tokens / entries : 0; }
  SAMFAST_HD int64_t core() const { return static_cast<int64_t>(rows) * columns; }
  SAMFAST_HD int64_t tiles_of_entry() const { return (each() + kRows - 1) / kRows; }
  SAMFAST_HD int64_t tiles() const { return entries * tiles_of_entry(); }
  SAMFAST_HD bool known(int64_t task) const { return task >= 0 && task < tasks; }
};

struct Tile {
  int64_t entry, first;  // row
  int live;              // rows

  SAMFAST_HD Tile(const Sizes& z, int64_t tile) {
    const int per = static_cast<int>(z.tiles_of_entry());  // a 64-bit division is a call
    entry = static_cast<int>(tile) / per;
    const int64_t start = (tile - entry * per) * kRows, left = z.each() - start;
    first = entry * z.each() + start;
    live = left < kRows ? static_cast<int>(left) : kRows;
  }
};

// Rows times M_t, or times its transpose.
template <typename T>
struct Product {
  const T* in;
  const float* m;  // (tasks, rows, columns)
  const int64_t* task;
  T* out;
  bool turned;
};

template <typename T, typename Each>
SAMFAST_HD void stage_rows(float* room, const T* source, const Tile& tile, int width,
                           const Each& each) {
  each(kRows * width, [&](int e) {
    const int r = e / width, c = e % width;
    room[r * kPitch + c] =
        r < tile.live ? static_cast<float>(source[(tile.first + r) * width + c]) : 0.0f;
  });
}

constexpr int kProductRoom = (kMaxRank + kRows) * kPitch;

template <typename T, typename Each>
SAMFAST_HD void product_block(const Sizes& z, const Product<T>& p, int64_t block, float* room,
                              const Each& each) {
  const int depth = p.turned ? z.columns : z.rows, width = p.turned ? z.rows : z.columns;
  const Tile tile(z, block);
  const int64_t t = p.task[tile.entry];
  const bool known = z.known(t);
  float *m = room, *in = room + kMaxRank * kPitch;  // m: (depth, width)
  const float* const own = p.m + (known ? t : 0) * z.core();
  each(static_cast<int>(z.core()), [&](int e) {
    const int r = e / z.columns, c = e % z.columns;
    m[p.turned ? c * kPitch + r : r * kPitch + c] = own[e];
  });
  stage_rows(in, p.in, tile, depth, each);
  each(kRows / kFour * width, [&](int e) {
    const int first = e / width * kFour, c = e % width;
    float sum[kFour] = {};
    for (int k = 0; k < depth; ++k) {
      const float factor = m[k * kPitch + c];
      for (int i = 0; i < kFour; ++i) sum[i] += in[(first + i) * kPitch + k] * factor;
    }
    for (int i = 0; i < kFour && first + i < tile.live; ++i)
      p.out[(tile.first + first + i) * width + c] = static_cast<T>(
          known ? sum[i] : std::numeric_limits<float>::quiet_NaN());
  });
}

template <typename T>
struct Gradient {
  const T *h, *dz;
  const int64_t* task;
  float* dm;  // (parts, tasks, rows, columns)
};

constexpr int kGradientRoom = 2 * kRows * kPitch + kMaxRank * kMaxRank;

// One part of one task's dM: the sum over every parts-th tile, if it is this task's.
template <typename T, typename Each>
SAMFAST_HD void gradient_block(const Sizes& z, const Gradient<T>& g, int64_t block, float* room,
                               const Each& each) {
  const int64_t part = block / z.tasks, task = block % z.tasks;
  float *h = room, *dz = h + kRows * kPitch, *total = dz + kRows * kPitch;
  const int fours = (z.columns + kFour - 1) / kFour;
  each(static_cast<int>(z.core()), [&](int e) { total[e] = 0.0f; });
  for (int64_t number = part; number < z.tiles(); number += z.parts) {
    const Tile tile(z, number);
    if (g.task[tile.entry] != task) continue;
    stage_rows(h, g.h, tile, z.rows, each);
    stage_rows(dz, g.dz, tile, z.columns, each);
    each(z.rows * fours, [&](int e) {
      const int r = e / fours, first = e % fours * kFour;
      float sum[kFour] = {};
      for (int k = 0; k < kRows; ++k) {
        const float factor = h[k * kPitch + r];
        for (int i = 0; i < kFour; ++i)
          if (first + i < z.columns) sum[i] += factor * dz[k * kPitch + first + i];
      }
      for (int i = 0; i < kFour && first + i < z.columns; ++i)
        total[r * z.columns + first + i] += sum[i];
    });
  }
  float* const out = g.dm + block * z.core();
  each(static_cast<int>(z.core()), [&](int e) { out[e] = total[e]; });
}

struct FoldSizes {
  int64_t layers, tasks, parts, core, depth;  // core: R1 R2, depth: R3
};

// Element e of M (layers, tasks, core).
SAMFAST_HD float folded(const FoldSizes& z, const float* cores, const float* factors, int64_t e) {
  const int i = static_cast<int>(e), core = static_cast<int>(z.core);  // dividing in 32 bits
  const int64_t row = i / core, layer = static_cast<int>(row) / static_cast<int>(z.tasks);
  const float* const g = cores + (layer * z.core + i % core) * z.depth;
  float total = 0.0f;
  for (int64_t v = 0; v < z.depth; ++v) total += factors[row * z.depth + v] * g[v];
  return total;
}

// The sum over parts of dm (layers, parts, tasks, core).
SAMFAST_HD float all_parts(const FoldSizes& z, const float* dm, int64_t layer, int64_t task,
                           int64_t i) {
  float total = 0.0f;
  for (int64_t p = 0; p < z.parts; ++p)
    total += dm[((layer * z.parts + p) * z.tasks + task) * z.core + i];
  return total;
}

// Element e of dG (layers, core, depth).
SAMFAST_HD float core_gradient(const FoldSizes& z, const float* dm, const float* factors,
                               int64_t e) {
  const int depth = static_cast<int>(z.depth), row = static_cast<int>(e) / depth;
  const int64_t v = static_cast<int>(e) % depth, layer = row / static_cast<int>(z.core);
  float total = 0.0f;
  for (int64_t t = 0; t < z.tasks; ++t)
    total += all_parts(z, dm, layer, t, row - layer * z.core) *
             factors[(layer * z.tasks + t) * z.depth + v];
  return total;
}

constexpr int kChunk = 1024, kLanesOfSum = 32, kColumns = 8;
constexpr int kFactorRoom = kChunk + kLanesOfSum * kColumns;

SAMFAST_HD int64_t column_blocks(const FoldSizes& z) { return (z.depth + kColumns - 1) / kColumns; }

// kColumns columns of dU3 (layers, tasks, depth) of one layer and task.
template <typename Each>
SAMFAST_HD void factor_gradient(const FoldSizes& z, const float* dm, const float* cores,
                                float* dfactors, int64_t block, float* room, const Each& each) {
  const int64_t row = block / column_blocks(z), start = block % column_blocks(z) * kColumns;
  const int64_t layer = row / z.tasks, task = row % z.tasks, left = z.depth - start;
  const int columns = left < kColumns ? static_cast<int>(left) : kColumns;
  float *sums = room, *lanes = room + kChunk;
  each(kLanesOfSum * columns, [&](int e) { lanes[e] = 0.0f; });
  for (int64_t first = 0; first < z.core; first += kChunk) {
    const int64_t rest = z.core - first;
    const int count = rest < kChunk ? static_cast<int>(rest) : kChunk;
    each(count, [&](int i) { sums[i] = all_parts(z, dm, layer, task, first + i); });
    each(kLanesOfSum * columns, [&](int e) {
      const int lane = e / columns, v = e % columns;
      const float* const g = cores + (layer * z.core + first) * z.depth + start + v;
      float total = 0.0f;
      for (int i = lane; i < count; i += kLanesOfSum) total += sums[i] * g[i * z.depth];
      lanes[e] += total;
    });
  }
  each(columns, [&](int v) {
    float total = 0.0f;
    for (int lane = 0; lane < kLanesOfSum; ++lane) total += lanes[lane * columns + v];
    dfactors[row * z.depth + start + v] = total;
  });
}

}  // namespace samfast::task_core
