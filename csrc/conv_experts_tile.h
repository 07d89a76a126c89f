// SPDX-License-Identifier: Apache-2.0
// The work of one CUDA block of conv_experts: a tile of 8 x 8 output cells of one sample.
//
// The work is a sequence of steps. A step is a number of items that may run in any order or at
// once; each(count, item) runs them and then waits for all. On a GPU the items go to the threads of
// the block; on a CPU a test runs them one by one, forwards or backwards, with the same code.
//
//   patch   14 x 14    sources of one channel, borders repeated     adjoint: to the gather
//   across  14 x 48    interpolated along x                         adjoint, in the same place
//   lines   48 x 48    interpolated both ways                       adjoint, in the same place
//   points  r x 32 x 32   before the activation                     gradient, in the same place
//
// Odd ratios have 24 lines and 8 points per side. The backward goes through the channels in
// reverse, so that the last channel's lines are still there. Its tiles write their parts of dh and
// of the weights' sums separately; gather() and sum_weights() add them in a fixed order.
#pragma once

#include "conv_experts_call.h"

#include <limits>

#if defined(__CUDACC__)
#define SAMFAST_TILE __device__ __forceinline__
#else
#define SAMFAST_TILE inline
#endif

namespace samfast::experts {

constexpr int kTile = 8, kPatch = kTile + 2 * kHalo, kReach = 2 * kHalo + 1;
constexpr int kLineEnd = kTile * kRows + 1, kPointEnd = kTile * kPoints + 1;  // odd, spread banks
constexpr int kSumWidth = 32, kSumParts = 8;

struct Tiling {
  int down, across;  // tiles of a sample

  SAMFAST_HD explicit Tiling(const Windows& w)
      : down(static_cast<int>((w.height + kTile - 1) / kTile)),
        across(static_cast<int>((w.width + kTile - 1) / kTile)) {}

  SAMFAST_HD int count() const { return down * across; }
};

// A position that is not read is skipped: a NaN there would survive a weight of zero.
SAMFAST_HD void add_weighed(float& total, float weight, float value) {
  if (weight != 0.0f) total += weight * value;
}

template <typename T>
struct Buffers {
  const T *h, *dz, *dz_pad;  // dz_pad is null for zeros
  T *z, *z_pad, *dh;
  float* patches;   // (tiles, rank, 14, 14); null if dh is not wanted
  float* partials;  // (tiles, parameters); null if the weights' gradients are not wanted
};

// Floats of shared memory.
SAMFAST_HD constexpr int64_t room_of(int rank, int inputs, bool backward) {
  const int64_t side = kTile * kPoints, sums = (inputs == 1 && rank < 9 ? 9 : rank) * side;
  return kRows * (kTaps + kReach + 1) + kPatch * kPatch + rank * 9 + kPatch * kLineEnd +
         kTile * kRows * kLineEnd + rank * side * kPointEnd +
         (backward ? inputs == 1 ? sums : rank * 9 * side : 0);
}

constexpr int kMaxRank = 16;
static_assert(sizeof(float) * room_of(kMaxRank, kMaxRank, true) <= 99 * 1024, "sm_86 has no more");

template <typename T, int kP, int kT, typename Each>
struct TileWork {
  static constexpr int kK = kP + 2, kLines = kTile * kK, kSide = kTile * kP;

  const Problem& p;
  const Buffers<T>& m;
  const Each& each;
  int64_t expert, top, left;
  int tile, ratio;
  Sample sample;
  float *tap, *dense, *patch, *kernel, *across, *lines, *points, *sums;
  int* base;

  SAMFAST_TILE TileWork(const Problem& p, const Buffers<T>& m, const Each& each, int tile,
                        int64_t expert, int ratio, float* room)
      : p(p), m(m), each(each), expert(expert), tile(tile), ratio(ratio) {
    const Tiling t(p.windows);
    const int within = tile % t.count();
    top = within / t.across * kTile, left = within % t.across * kTile;
    sample = p.windows.sample(tile / t.count());
    base = reinterpret_cast<int*>(room);
    tap = room + kRows;
    dense = tap + kRows * kTaps;
    patch = dense + kRows * kReach;
    kernel = patch + kPatch * kPatch;
    across = kernel + p.rank * 9;
    lines = across + kPatch * kLineEnd;
    points = lines + kTile * kRows * kLineEnd;
    sums = points + p.rank * kTile * kPoints * kPointEnd;
  }

  SAMFAST_TILE float& point(int o, int y, int x) const {
    return points[(o * kSide + y) * kPointEnd + x];
  }

  SAMFAST_TILE bool in_window(int cy, int cx) const {
    return top + cy < p.windows.height && left + cx < p.windows.width;
  }

  SAMFAST_TILE bool own_channel() const { return p.inputs == 1; }

  // The output channels that read an input channel: all, or its own.
  SAMFAST_TILE int outputs() const { return own_channel() ? 1 : p.rank; }
  SAMFAST_TILE int output(int channel, int q) const { return own_channel() ? channel : q; }

  SAMFAST_TILE void weigh_sources() const {
    each(kK, [&](int k) {
      const int first = sources(ratio, k, tap + k * kTaps);
      base[k] = first;
      for (int e = 0; e < kReach; ++e) dense[k * kReach + e] = 0.0f;
      for (int t = 0; t < kT; ++t) dense[k * kReach + kHalo + first + t] = tap[k * kTaps + t];
    });
  }

  // patch, kernel, across and lines of one input channel.
  SAMFAST_TILE void raise(int channel) const {
    const float* weight = p.weight + expert * p.kernel();
    const int size = kPatch * kPatch;
    each(size + outputs() * 9, [&](int item) {
      if (item >= size) {
        const int q = (item - size) / 9, e = (item - size) % 9;
        const int64_t o = output(channel, q);
        kernel[q * 9 + e] = weight[(o * p.inputs + (own_channel() ? 0 : channel)) * 9 + e];
        return;
      }
      const int64_t y = clamped(top - kHalo + item / kPatch, p.windows.height);
      const int64_t x = clamped(left - kHalo + item % kPatch, p.windows.width);
      int64_t row;
      const bool in_image = sample.locate(y, x, row);
      patch[item] = in_image ? static_cast<float>(m.h[row * p.rank + channel]) : 0.0f;
    });
    each(kPatch * kLines, [&](int item) {
      const int y = item / kLines, x = item % kLines, k = x % kK;
      const float* from = patch + y * kPatch + x / kK + kHalo + base[k];
      float total = 0.0f;
      for (int t = 0; t < kT; ++t) total += tap[k * kTaps + t] * from[t];
      across[y * kLineEnd + x] = inside(ratio, k, left + x / kK, p.windows.width) ? total : 0.0f;
    });
    each(kLines * kLines, [&](int item) {
      const int y = item / kLines, x = item % kLines, k = y % kK;
      const float* from = across + (y / kK + kHalo + base[k]) * kLineEnd + x;
      float total = 0.0f;
      for (int t = 0; t < kT; ++t) total += tap[k * kTaps + t] * from[t * kLineEnd];
      lines[y * kLineEnd + x] = inside(ratio, k, top + y / kK, p.windows.height) ? total : 0.0f;
    });
  }

  // Adds one input channel's contribution to the points.
  SAMFAST_TILE void convolve(int channel) const {
    const float* bias = p.bias + expert * p.rank;
    const bool start = own_channel() || channel == 0;
    each(kSide * kTile, [&](int item) {
      const int y = item / kTile, cx = item % kTile;
      const float* from = lines + (y / kP * kK + y % kP) * kLineEnd + cx * kK;
      float u[3][kK];
      for (int a = 0; a < 3; ++a)
        for (int c = 0; c < kK; ++c) u[a][c] = from[a * kLineEnd + c];
      for (int q = 0; q < outputs(); ++q) {
        const int o = output(channel, q);
        float acc[kP];
        for (int j = 0; j < kP; ++j) acc[j] = start ? bias[o] : point(o, y, cx * kP + j);
        for (int a = 0; a < 3; ++a)
          for (int b = 0; b < 3; ++b)
            for (int j = 0; j < kP; ++j) acc[j] += kernel[q * 9 + a * 3 + b] * u[a][b + j];
        for (int j = 0; j < kP; ++j) point(o, y, cx * kP + j) = acc[j];
      }
    });
  }

  SAMFAST_TILE void forward() const {
    weigh_sources();
    for (int channel = 0; channel < p.rank; ++channel) {
      raise(channel);
      convolve(channel);
    }
    each(kSide * kTile, [&](int item) {  // the return filter along x, into a cell's first point
      const int y = item / kTile, cx = item % kTile;
      for (int o = 0; o < p.rank; ++o) {
        float total = 0.0f;
        for (int j = 0; j < kP; ++j) {
          float value, slope;
          activate<float>(p.is_gelu, point(o, y, cx * kP + j), value, slope);
          total += return_weight(ratio, j, left + cx, p.windows.width) * value;
        }
        point(o, y, cx * kP) = total;
      }
    });
    each(kTile * kTile * p.rank, [&](int item) {
      const int o = item % p.rank, cx = item / p.rank % kTile, cy = item / p.rank / kTile;
      if (!in_window(cy, cx)) return;
      float total = 0.0f;
      for (int j = 0; j < kP; ++j)
        total += return_weight(ratio, j, top + cy, p.windows.height) *
                 point(o, cy * kP + j, cx * kP);
      int64_t row;
      const bool in_image = sample.locate(top + cy, left + cx, row);
      const int64_t at = row * p.rank + o;
      if (in_image) {
        m.z[at] = static_cast<T>(p.residual ? static_cast<float>(m.h[at]) + total : total);
      } else {
        m.z_pad[at] = static_cast<T>(total);
      }
    });
  }

  // Turns the points into their gradients.
  SAMFAST_TILE void point_gradients() const {
    each(kSide * kTile, [&](int item) {
      const int y = item / kTile, cx = item % kTile, cy = y / kP;
      int64_t row = 0;
      const T* from = nullptr;
      if (in_window(cy, cx)) from = sample.locate(top + cy, left + cx, row) ? m.dz : m.dz_pad;
      const float down = return_weight(ratio, y % kP, top + cy, p.windows.height);
      for (int o = 0; o < p.rank; ++o) {
        const float target =
            from == nullptr ? 0.0f : down * static_cast<float>(from[row * p.rank + o]);
        for (int j = 0; j < kP; ++j) {
          float value, slope;
          activate<float>(p.is_gelu, point(o, y, cx * kP + j), value, slope);
          const float weight = return_weight(ratio, j, left + cx, p.windows.width);
          point(o, y, cx * kP + j) = from == nullptr ? 0.0f : slope * (weight * target);
        }
      }
    });
  }

  SAMFAST_TILE void bias_gradients() const {
    each(p.rank * kSide, [&](int item) {
      float total = 0.0f;
      for (int x = 0; x < kSide; ++x) total += point(item / kSide, item % kSide, x);
      sums[item] = total;
    });
    each(p.rank, [&](int o) {
      float total = 0.0f;
      for (int y = 0; y < kSide; ++y) total += sums[o * kSide + y];
      m.partials[static_cast<int64_t>(tile) * p.parameters() + p.kernel() + o] = total;
    });
  }

  SAMFAST_TILE void kernel_gradients(int channel) const {
    each(outputs() * kSide, [&](int item) {
      const int q = item / kSide, y = item % kSide, o = output(channel, q);
      const float* from = lines + (y / kP * kK + y % kP) * kLineEnd;
      float acc[9] = {};
      for (int cx = 0; cx < kTile; ++cx) {
        float g[kP];
        for (int j = 0; j < kP; ++j) g[j] = point(o, y, cx * kP + j);
        for (int a = 0; a < 3; ++a) {
          float u[kK];
          for (int c = 0; c < kK; ++c) u[c] = from[a * kLineEnd + cx * kK + c];
          for (int b = 0; b < 3; ++b)
            for (int j = 0; j < kP; ++j) acc[a * 3 + b] += g[j] * u[b + j];
        }
      }
      for (int e = 0; e < 9; ++e) sums[(q * 9 + e) * kSide + y] = acc[e];
    });
    each(outputs() * 9, [&](int item) {
      float total = 0.0f;
      for (int y = 0; y < kSide; ++y) total += sums[item * kSide + y];
      const int64_t o = output(channel, item / 9);
      const int64_t at = (o * p.inputs + (own_channel() ? 0 : channel)) * 9 + item % 9;
      m.partials[static_cast<int64_t>(tile) * p.parameters() + at] = total;
    });
  }

  SAMFAST_TILE void source_gradients(int channel) const {
    each(kLines * kTile, [&](int item) {
      const int y = item / kTile, cx = item % kTile, cy = y / kK, k = y % kK;
      float acc[kK] = {};
      for (int q = 0; q < outputs(); ++q)
        for (int a = 0; a < 3; ++a) {
          if (k - a < 0 || k - a >= kP) continue;
          const int o = output(channel, q), line = cy * kP + k - a;
          for (int j = 0; j < kP; ++j) {
            const float g = point(o, line, cx * kP + j);
            for (int b = 0; b < 3; ++b) acc[b + j] += kernel[q * 9 + a * 3 + b] * g;
          }
        }
      const bool row = inside(ratio, k, top + cy, p.windows.height);
      for (int c = 0; c < kK; ++c) {
        const bool keep = row && inside(ratio, c, left + cx, p.windows.width);
        lines[y * kLineEnd + cx * kK + c] = keep ? acc[c] : 0.0f;
      }
    });
    each(kPatch * kLines, [&](int item) {
      const int y = item / kLines, x = item % kLines;
      float total = 0.0f;
      for (int cell = 0; cell < kTile; ++cell) {
        if (y - cell < 0 || y - cell >= kReach) continue;
        for (int k = 0; k < kK; ++k)
          add_weighed(total, dense[k * kReach + y - cell], lines[(cell * kK + k) * kLineEnd + x]);
      }
      across[y * kLineEnd + x] = total;
    });
    each(kPatch * kPatch, [&](int item) {
      const int y = item / kPatch, x = item % kPatch;
      float total = 0.0f;
      for (int cell = 0; cell < kTile; ++cell) {
        if (x - cell < 0 || x - cell >= kReach) continue;
        for (int k = 0; k < kK; ++k)
          add_weighed(total, dense[k * kReach + x - cell], across[y * kLineEnd + cell * kK + k]);
      }
      m.patches[(static_cast<int64_t>(tile) * p.rank + channel) * kPatch * kPatch + item] = total;
    });
  }

  SAMFAST_TILE void backward() const {
    weigh_sources();
    for (int channel = 0; channel < p.rank; ++channel) {
      raise(channel);
      convolve(channel);
    }
    point_gradients();
    if (m.partials != nullptr) bias_gradients();
    for (int channel = p.rank - 1; channel >= 0; --channel) {
      if (channel + 1 < p.rank) raise(channel);
      if (m.partials != nullptr) kernel_gradients(channel);
      if (m.patches != nullptr) source_gradients(channel);
    }
  }
};

// An expert that does not exist gives NaN in place of its sample's output.
template <typename T, typename Each>
SAMFAST_TILE void forward_tile(const Problem& p, const int* ratios, const Buffers<T>& m,
                               int tile, float* room, const Each& each) {
  const Tiling t(p.windows);
  const int64_t expert = p.index[tile / t.count()];
  if (expert < 0 || expert >= p.experts) {
    const TileWork<T, 1, 1, Each> work(p, m, each, tile, 0, 1, room);
    each(kTile * kTile * p.rank, [&](int item) {
      const int o = item % p.rank, cx = item / p.rank % kTile, cy = item / p.rank / kTile;
      int64_t row;
      if (!work.in_window(cy, cx)) return;
      T* to = work.sample.locate(work.top + cy, work.left + cx, row) ? m.z : m.z_pad;
      to[row * p.rank + o] = static_cast<T>(std::numeric_limits<float>::quiet_NaN());
    });
  } else if (taps_of(ratios[expert]) == 1) {
    TileWork<T, 1, 1, Each>(p, m, each, tile, expert, ratios[expert], room).forward();
  } else if (points_of(ratios[expert]) == 1) {
    TileWork<T, 1, kTaps, Each>(p, m, each, tile, expert, ratios[expert], room).forward();
  } else {
    TileWork<T, kPoints, kTaps, Each>(p, m, each, tile, expert, ratios[expert], room).forward();
  }
}

template <typename T, typename Each>
SAMFAST_TILE void backward_tile(const Problem& p, const int* ratios, const Buffers<T>& m,
                                int tile, float* room, const Each& each) {
  const Tiling t(p.windows);
  const int64_t expert = p.index[tile / t.count()];
  if (expert < 0 || expert >= p.experts) {
    const int size = p.rank * kPatch * kPatch;
    if (m.patches == nullptr) return;
    each(size, [&](int item) {
      m.patches[static_cast<int64_t>(tile) * size + item] = std::numeric_limits<float>::quiet_NaN();
    });
  } else if (taps_of(ratios[expert]) == 1) {
    TileWork<T, 1, 1, Each>(p, m, each, tile, expert, ratios[expert], room).backward();
  } else if (points_of(ratios[expert]) == 1) {
    TileWork<T, 1, kTaps, Each>(p, m, each, tile, expert, ratios[expert], room).backward();
  } else {
    TileWork<T, kPoints, kTaps, Each>(p, m, each, tile, expert, ratios[expert], room).backward();
  }
}

// dh of one element of the image-order buffer.
template <typename T>
SAMFAST_TILE void gather(const Problem& p, const Buffers<T>& m, const Balance& balance,
                         int64_t element) {
  const Windows& w = p.windows;
  const Tiling t(w);
  const int64_t channel = element % p.rank, token = element / p.rank;
  const int64_t X = token % w.image_width, Y = token / w.image_width % w.image_height;
  const int64_t b = token / w.image_width / w.image_height;
  const int64_t n = (b * w.down + Y / w.height) * w.across + X / w.width;
  const int64_t y = Y % w.height, x = X % w.width;
  float value = p.residual ? static_cast<float>(m.dz[element]) : 0.0f;
  // A border pixel also gets the gradient of reads past the border.
  for (int64_t r = y == 0 ? -kHalo : y; r <= (y == w.height - 1 ? y + kHalo : y); ++r)
    for (int64_t i = r < kPatch - kHalo ? 0 : (r - kHalo) / kTile;
         i < t.down && i * kTile - kHalo <= r; ++i)
      for (int64_t c = x == 0 ? -kHalo : x; c <= (x == w.width - 1 ? x + kHalo : x); ++c)
        for (int64_t j = c < kPatch - kHalo ? 0 : (c - kHalo) / kTile;
             j < t.across && j * kTile - kHalo <= c; ++j) {
          const int64_t tile = (n * t.down + i) * t.across + j;
          const int64_t line = (tile * p.rank + channel) * kPatch + r - i * kTile + kHalo;
          value += m.patches[line * kPatch + c - j * kTile + kHalo];
        }
  if (balance.daux != nullptr) value += *balance.daux * balance.dpool[n * p.rank + channel];
  m.dh[element] = static_cast<T>(value);
}

// Number of blocks of 32 parameters per expert in sum_weights.
SAMFAST_HD int64_t sum_blocks(const Problem& p) {
  return (p.parameters() + kSumWidth - 1) / kSumWidth;
}

// dweight and dbias of 32 parameters of one expert, over the tiles of its samples.
template <typename Each>
SAMFAST_TILE void sum_weights(const Problem& p, const float* partials, float* dweight, float* dbias,
                              int64_t block, float* room, const Each& each) {
  const Tiling t(p.windows);
  const int64_t expert = block / sum_blocks(p), first = block % sum_blocks(p) * kSumWidth;
  const int tiles = static_cast<int>(p.windows.samples() * t.count());
  each(kSumWidth * kSumParts, [&](int item) {
    const int64_t e = first + item % kSumWidth;
    float total = 0.0f;
    for (int tile = item / kSumWidth; tile < tiles; tile += kSumParts)
      if (e < p.parameters() && p.index[tile / t.count()] == expert)
        total += partials[static_cast<int64_t>(tile) * p.parameters() + e];
    room[item] = total;
  });
  each(kSumWidth, [&](int item) {
    const int64_t e = first + item;
    float total = 0.0f;
    for (int part = 0; part < kSumParts; ++part) total += room[part * kSumWidth + item];
    if (e < p.kernel()) {
      dweight[expert * p.kernel() + e] = total;
    } else if (e < p.parameters()) {
      dbias[expert * p.rank + e - p.kernel()] = total;
    }
  });
}

// The balancing loss's gradient for the gate: one element of both matrices.
SAMFAST_TILE void scale_gate(const Problem& p, const Balance& b, int64_t element) {
  const int64_t n = static_cast<int64_t>(p.rank) * p.experts;
  b.gate[element] = *b.daux * b.dgate[element];
  b.noise[element] = *b.daux * b.dgate[n + element];
}

}  // namespace samfast::experts
