// SPDX-License-Identifier: Apache-2.0 Sums are made in registers in order of depth, a block of rows
// times a few vectors at once. The block has the shape that fits the registers of the instruction
// set.
#include "tile_product.h"

#include "capability.h"
#include "common.h"

namespace samfast {
namespace {

#define SAMFAST_EACH _Pragma("GCC unroll 8")

template <int kBytes, int kAtMost>
struct Registers {
  using Vector = typename Lanes<kBytes>::Vector;
  static constexpr int kLanes = Lanes<kBytes>::kCount, kVectors = kAtMost;
};

template <class R, int kBlock, int kVectors, bool kTurned>
SAMFAST_INLINE void block(const TileProduct& p, int64_t row, int64_t column) {
  using V = typename R::Vector;
  const float* a = kTurned ? p.a + row : p.a + row * p.a_pitch;
  const float* b = p.b + column;
  const int64_t along = kTurned ? p.a_pitch : 1, across = kTurned ? 1 : p.a_pitch;
  V sum[kBlock][kVectors] = {};
  for (int64_t k = 0; k < p.depth; ++k, a += along, b += p.b_pitch) {
    V right[kVectors];
    SAMFAST_EACH
    for (int v = 0; v < kVectors; ++v) std::memcpy(&right[v], b + v * R::kLanes, sizeof(V));
    SAMFAST_EACH
    for (int i = 0; i < kBlock; ++i) {
      const float left = a[i * across];
      SAMFAST_EACH
      for (int v = 0; v < kVectors; ++v) sum[i][v] += left * right[v];
    }
  }
  float* c = p.c + row * p.c_pitch + column;
  SAMFAST_EACH
  for (int i = 0; i < kBlock; ++i) {
    SAMFAST_EACH
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + i * p.c_pitch + v * R::kLanes;
      if (p.add) {
        V old;
        std::memcpy(&old, at, sizeof(V));
        sum[i][v] += old;
      }
      std::memcpy(at, &sum[i][v], sizeof(V));
    }
  }
}

template <class R, int kVectors, bool kTurned>
SAMFAST_INLINE void column_of_blocks(const TileProduct& p, int64_t column) {
  int64_t row = 0;
  for (; row + 6 <= p.rows; row += 6) block<R, 6, kVectors, kTurned>(p, row, column);
  if (row + 4 <= p.rows) block<R, 4, kVectors, kTurned>(p, row, column), row += 4;
  for (; row < p.rows; ++row) block<R, 1, kVectors, kTurned>(p, row, column);
}

template <class R, bool kTurned>
SAMFAST_INLINE void all_columns(const TileProduct& p) {
  const int64_t vectors = p.columns / R::kLanes, parts = (vectors + R::kVectors - 1) / R::kVectors;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * vectors / parts, count = (part + 1) * vectors / parts - first;
    const int64_t column = first * R::kLanes;
    if constexpr (R::kVectors == 4) {
      if (count == 4) {
        column_of_blocks<R, 4, kTurned>(p, column);
        continue;
      }
      if (count == 3) {
        column_of_blocks<R, 3, kTurned>(p, column);
        continue;
      }
    }
    if (count == 2)
      column_of_blocks<R, 2, kTurned>(p, column);
    else
      column_of_blocks<R, 1, kTurned>(p, column);
  }
}

template <class R>
SAMFAST_INLINE void product(const TileProduct& p) {
  if (p.turned)
    all_columns<R, true>(p);
  else
    all_columns<R, false>(p);
}

#if defined(__aarch64__)
using Plain = Registers<16, 4>;  // 32 registers of 16 bytes
#else
using Plain = Registers<16, 2>;  // 16
#endif
// 16 registers of 32 bytes, or 32 of 64.
constexpr EachProcessor<product<Plain>, product<Registers<32, 2>>, product<Registers<64, 4>>> run;

}  // namespace

void multiply(const TileProduct& p) { run(p); }

}  // namespace samfast
