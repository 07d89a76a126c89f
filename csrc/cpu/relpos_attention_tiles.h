// SPDX-License-Identifier: Apache-2.0
// The arithmetic of relpos_attention between its products, on tiles of keys times queries.
//
// A tile has one row for each key; its columns are the queries of a panel, so that sixteen queries
// are the lanes of a vector: a softmax runs down the rows, and rel_h and rel_w are one row each for
// a row and for a column of the map, whatever its width. Logits are in units of log 2.
#pragma once

#include "common.h"

#include <algorithm>
#include <cfloat>

namespace samfast {
namespace {

constexpr int64_t kPanel = 64;  // queries of a panel, and the pitch of everything across queries
constexpr int64_t kMostHeadDim = 128;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147182f;

typedef int32_t IntVec __attribute__((vector_size(64)));

// 2^y for y up to 127 without branches, to about one ulp; NaN stays NaN, what would be below the
// normal numbers is zero or nearly so.
SAMFAST_INLINE void exp2(const Vec& y, Vec& result) {
  const Vec bounded = y < -127.0f ? Vec{} - 127.0f : y;
  const Vec shifted = bounded + 12582912.0f;  // the integer stands in the low bits
  const Vec f = bounded - (shifted - 12582912.0f);
  Vec p = f * 1.54697320e-4f + 1.34004322e-3f;
  p = p * f + 9.61802560e-3f;
  p = p * f + 5.55032721e-2f;
  p = p * f + 2.40226512e-1f;
  p = p * f + 6.93147207e-1f;
  p = p * f + 1.0f;
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof(Vec));
  bits = (bits << 23) + 0x3F800000;
  Vec power;
  std::memcpy(&power, &bits, sizeof(Vec));
  result = p * power;  // a product, for NaN has bits that an addition would change
}

// Keys first, first + 1, … of a map with rows of width.
struct KeyRange {
  int64_t first, count, width;
};

// s[j] = rel_h[row of key j] + rel_w[column of key j].
SAMFAST_CLONES
void fill_bias(const KeyRange& keys, int64_t lanes, const float* rel_h, const float* rel_w,
               float* s) {
  int64_t h = keys.first / keys.width, w = keys.first % keys.width;
  for (int64_t j = 0; j < keys.count; ++j) {
    for (int64_t i = 0; i < lanes; i += kLanes) {
      Vec down, along;
      load(down, rel_h + h * kPanel + i);
      load(along, rel_w + w * kPanel + i);
      store(s + j * kPanel + i, down + along);
    }
    if (++w == keys.width) w = 0, ++h;
  }
}

// One more tile of an online softmax: s becomes 2^(s - maximum). Returns whether any of what was
// summed before must be multiplied by correction. The maximum passes over NaN: it spreads through
// the powers. The first maximum is finite, so that keys of -inf weigh nothing beside later ones.
SAMFAST_CLONES
bool softmax_tile(float* s, int64_t keys, int64_t lanes, float* maximum, float* total,
                  float* correction) {
  for (int64_t i = 0; i < lanes; i += kLanes) {
    Vec before, most, x, e;
    load(before, maximum + i);
    most = before;
    for (int64_t j = 0; j < keys; ++j) {
      load(x, s + j * kPanel + i);
      most = x > most ? x : most;
    }
    Vec sum = {};
    for (int64_t j = 0; j < keys; ++j) {
      load(x, s + j * kPanel + i);
      exp2(x - most, e);
      store(s + j * kPanel + i, e);
      sum += e;
    }
    exp2(before - most, e);
    load(x, total + i);
    store(total + i, x * e + sum);
    store(maximum + i, most);
    store(correction + i, e);
  }
  bool changed = false;
  for (int64_t i = 0; i < lanes; ++i) changed |= correction[i] != 1.0f;
  return changed;
}

SAMFAST_CLONES
void scale_rows(float* rows, int64_t count, int64_t lanes, const float* factor) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < lanes; i += kLanes) {
      Vec x, f;
      load(x, rows + r * kPanel + i);
      load(f, factor + i);
      store(rows + r * kPanel + i, x * f);
    }
}

// s: logits, becomes the weights p = 2^(s - lse). dp: gradient of the weights, becomes that of the
// logits, p (dp - delta), whose sums over rows and columns of the map go to drel_h and drel_w.
SAMFAST_CLONES
void gradient_tile(const KeyRange& keys, int64_t lanes, const float* lse, const float* delta,
                   float* s, float* dp, float* drel_h, float* drel_w) {
  int64_t h = keys.first / keys.width, w = keys.first % keys.width;
  for (int64_t j = 0; j < keys.count; ++j) {
    for (int64_t i = 0; i < lanes; i += kLanes) {
      Vec x, y, p, g;
      load(x, s + j * kPanel + i);
      load(y, lse + i);
      exp2(x - y, p);
      store(s + j * kPanel + i, p);
      load(x, dp + j * kPanel + i);
      load(y, delta + i);
      g = p * (x - y);
      store(dp + j * kPanel + i, g);
      load(x, drel_h + h * kPanel + i);
      store(drel_h + h * kPanel + i, x + g);
      load(x, drel_w + w * kPanel + i);
      store(drel_w + w * kPanel + i, x + g);
    }
    if (++w == keys.width) w = 0, ++h;
  }
}

// For one query: dq += sum_k drel[k] row_k and, where wanted, drow_k += drel[k] q. row_k is k rows
// before first; the rows that the query does not reach are not touched.
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
    const float d = drel[k * kPanel];
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

SAMFAST_CLONES
void spread_query(const float* drel, int64_t size, const float* first, const float* q, float* dq,
                  float* dfirst, int64_t head_dim) {
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

}  // namespace
}  // namespace samfast
