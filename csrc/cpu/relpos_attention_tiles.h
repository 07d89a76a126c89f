// SPDX-License-Identifier: Apache-2.0
// The arithmetic of relpos_attention between its products, on tiles of keys times queries.
//
// A tile has one row per key; its columns are the queries of a panel, so sixteen queries are the
// lanes of a vector. A softmax runs down the rows. rel_h and rel_w have one row per row and per
// column of the map, whatever its width.
#pragma once

#include "capability.h"
#include "common.h"

#include <algorithm>
#include <cfloat>

namespace samfast {
namespace {

constexpr int64_t kPanel = 64;  // queries of a panel
constexpr int64_t kPitch = 80;  // between rows across queries; 64 would use a quarter of L1
constexpr float kLog2E = 1.44269504f;

// e^y for y up to 88 without branches, to 1.2 ulp with and without fused multiply-adds. NaN stays
// NaN; results below the normal numbers are zero or nearly so. Registers have kBytes, because
// compilers select among the elements of a wider vector one by one.
template <int kBytes>
SAMFAST_INLINE void exponential(const typename Lanes<kBytes>::Vector& y,
                                typename Lanes<kBytes>::Vector& result) {
  using V = typename Lanes<kBytes>::Vector;
  const V bounded = y < -88.0f ? V{} - 88.0f : y;
  const V shifted = bounded * kLog2E + 12582912.0f;  // the low bits hold the power of two
  const V n = shifted - 12582912.0f;
  const V f = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  V p = f * 1.38144672e-3f + 8.36878084e-3f;
  p = p * f + 4.16683927e-2f;
  p = p * f + 1.66665196e-1f;
  p = p * f + 4.99999940e-1f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  typename Lanes<kBytes>::Integers bits;
  std::memcpy(&bits, &shifted, sizeof(V));
  bits = (bits << 23) + 0x3F800000;
  V power;
  std::memcpy(&power, &bits, sizeof(V));
  result = p * power;  // a product: an addition would change the bits of NaN
}

// Keys first, first + 1, … of a map with rows of width.
struct KeyRange {
  int64_t first, count, width;
};

// s[j] = rel_h[row of key j] + rel_w[column of key j].
template <int kBytes>
SAMFAST_INLINE void fill_bias_body(const KeyRange& keys, int64_t lanes, const float* rel_h,
                                   const float* rel_w, float* s) {
  using V = typename Lanes<kBytes>::Vector;
  constexpr int64_t kLanes = Lanes<kBytes>::kCount;
  int64_t h = keys.first / keys.width, w = keys.first % keys.width;
  for (int64_t j = 0; j < keys.count; ++j) {
    for (int64_t i = 0; i < lanes; i += kLanes) {
      V down, along;
      load(down, rel_h + h * kPitch + i);
      load(along, rel_w + w * kPitch + i);
      store(s + j * kPitch + i, down + along);
    }
    if (++w == keys.width) w = 0, ++h;
  }
}
constexpr EachProcessor<fill_bias_body<16>, fill_bias_body<32>, fill_bias_body<64>> fill_bias;

// One more tile of an online softmax: s becomes e^(s - maximum). Returns true if an earlier sum
// must be multiplied by correction. The maximum ignores NaN, which spreads through the weights. The
// first maximum is finite, so that keys of -inf get no weight next to later ones.
template <int kBytes>
SAMFAST_INLINE bool softmax_tile_body(float* s, int64_t keys, int64_t lanes, float* maximum,
                                      float* total, float* correction) {
  using V = typename Lanes<kBytes>::Vector;
  for (int64_t i = 0; i < lanes; i += Lanes<kBytes>::kCount) {
    V before, most, x, e;
    load(before, maximum + i);
    most = before;
    for (int64_t j = 0; j < keys; ++j) {
      load(x, s + j * kPitch + i);
      most = x > most ? x : most;
    }
    V sum = {};
    for (int64_t j = 0; j < keys; ++j) {
      load(x, s + j * kPitch + i);
      exponential<kBytes>(x - most, e);
      store(s + j * kPitch + i, e);
      sum += e;
    }
    exponential<kBytes>(before - most, e);
    load(x, total + i);
    store(total + i, x * e + sum);
    store(maximum + i, most);
    store(correction + i, e);
  }
  bool changed = false;
  for (int64_t i = 0; i < lanes; ++i) changed |= correction[i] != 1.0f;
  return changed;
}
constexpr EachProcessor<softmax_tile_body<16>, softmax_tile_body<32>, softmax_tile_body<64>>
    softmax_tile;

template <int kBytes>
SAMFAST_INLINE void scale_rows_body(float* rows, int64_t count, int64_t lanes,
                                    const float* factor) {
  using V = typename Lanes<kBytes>::Vector;
  constexpr int64_t kLanes = Lanes<kBytes>::kCount;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < lanes; i += kLanes) {
      V x, f;
      load(x, rows + r * kPitch + i);
      load(f, factor + i);
      store(rows + r * kPitch + i, x * f);
    }
}
constexpr EachProcessor<scale_rows_body<16>, scale_rows_body<32>, scale_rows_body<64>> scale_rows;

// s: logits, becomes the weights p = e^(s - lse). Adds their sums over the keys to total, and those
// of p (dp - delta) to moment. The latter are small if delta is already nearly right.
template <int kBytes>
SAMFAST_INLINE void weights_tile_body(int64_t keys, int64_t lanes, const float* lse,
                                      const float* delta, float* s, const float* dp, float* total,
                                      float* moment) {
  using V = typename Lanes<kBytes>::Vector;
  for (int64_t i = 0; i < lanes; i += Lanes<kBytes>::kCount) {
    V most, mean, x, p, sum = {}, dot = {};
    load(most, lse + i);
    load(mean, delta + i);
    for (int64_t j = 0; j < keys; ++j) {
      load(x, s + j * kPitch + i);
      exponential<kBytes>(x - most, p);
      store(s + j * kPitch + i, p);
      load(x, dp + j * kPitch + i);
      sum += p;
      dot += p * (x - mean);
    }
    load(x, total + i);
    store(total + i, x + sum);
    load(x, moment + i);
    store(moment + i, x + dot);
  }
}
constexpr EachProcessor<weights_tile_body<16>, weights_tile_body<32>, weights_tile_body<64>>
    weights_tile;

// p becomes factor p, and dp becomes the logits' gradient p (dp - delta). Adds its sums over rows
// and columns of the map to drel_h and drel_w.
template <int kBytes>
SAMFAST_INLINE void gradient_tile_body(const KeyRange& keys, int64_t lanes, const float* factor,
                                       const float* delta, float* p, float* dp, float* drel_h,
                                       float* drel_w) {
  using V = typename Lanes<kBytes>::Vector;
  constexpr int64_t kLanes = Lanes<kBytes>::kCount;
  int64_t h = keys.first / keys.width, w = keys.first % keys.width;
  for (int64_t j = 0; j < keys.count; ++j) {
    for (int64_t i = 0; i < lanes; i += kLanes) {
      V x, y, g;
      load(x, p + j * kPitch + i);
      load(y, factor + i);
      x *= y;
      store(p + j * kPitch + i, x);
      load(g, dp + j * kPitch + i);
      load(y, delta + i);
      g = x * (g - y);
      store(dp + j * kPitch + i, g);
      load(x, drel_h + h * kPitch + i);
      store(drel_h + h * kPitch + i, x + g);
      load(x, drel_w + w * kPitch + i);
      store(drel_w + w * kPitch + i, x + g);
    }
    if (++w == keys.width) w = 0, ++h;
  }
}
constexpr EachProcessor<gradient_tile_body<16>, gradient_tile_body<32>, gradient_tile_body<64>>
    gradient_tile;

// The same without a bias, which has no sums.
template <int kBytes>
SAMFAST_INLINE void plain_gradient_tile_body(int64_t keys, int64_t lanes, const float* factor,
                                             const float* delta, float* p, float* dp) {
  using V = typename Lanes<kBytes>::Vector;
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t i = 0; i < lanes; i += Lanes<kBytes>::kCount) {
      V x, y, g;
      load(x, p + j * kPitch + i);
      load(y, factor + i);
      x *= y;
      store(p + j * kPitch + i, x);
      load(g, dp + j * kPitch + i);
      load(y, delta + i);
      store(dp + j * kPitch + i, x * (g - y));
    }
}
constexpr EachProcessor<plain_gradient_tile_body<16>, plain_gradient_tile_body<32>,
                        plain_gradient_tile_body<64>>
    plain_gradient_tile;

// For one query: dq += sum_k drel[k] row_k and, if wanted, drow_k += drel[k] q. row_k is k rows
// before first; rows that the query does not reach stay untouched.
template <int kVectors>
SAMFAST_INLINE void spread(const float* drel, int64_t size, const float* first, const float* q,
                           float* dq, float* dfirst) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Vec sum[kVectors], query[kVectors], x;
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    load(sum[v], dq + v * kLanes);
    load(query[v], q + v * kLanes);
  }
  for (int64_t k = 0; k < size; ++k) {
    const float d = drel[k * kPitch];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      load(x, first - k * kWidth + v * kLanes);
      sum[v] += d * x;
    }
    if (dfirst == nullptr) continue;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* at = dfirst - k * kWidth + v * kLanes;
      load(x, at);
      store(at, x + d * query[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store(dq + v * kLanes, sum[v]);
}

SAMFAST_INLINE void spread_query_body(const float* drel, int64_t size, const float* first,
                                      const float* q, float* dq, float* dfirst, int64_t head_dim) {
  switch (head_dim / kLanes) {
    case 1: return spread<1>(drel, size, first, q, dq, dfirst);
    case 2: return spread<2>(drel, size, first, q, dq, dfirst);
    case 3: return spread<3>(drel, size, first, q, dq, dfirst);
    case 4: return spread<4>(drel, size, first, q, dq, dfirst);
    case 5: return spread<5>(drel, size, first, q, dq, dfirst);
    case 6: return spread<6>(drel, size, first, q, dq, dfirst);
    case 7: return spread<7>(drel, size, first, q, dq, dfirst);
    default: return spread<8>(drel, size, first, q, dq, dfirst);
  }
}
constexpr EachProcessor<spread_query_body> spread_query;

}  // namespace
}  // namespace samfast
