// SPDX-License-Identifier: Apache-2.0
// Products of small float matrices that fit the cache.
#pragma once

#include <cstdint>

namespace samfast {

// c (rows, columns) = a b, or += with add. b (depth, columns) and c have contiguous rows;
// columns are a multiple of 16. a is (rows, depth), or (depth, rows) if turned.
struct TileProduct {
  const float* a;
  int64_t a_pitch;
  const float* b;
  int64_t b_pitch;
  float* c;
  int64_t c_pitch;
  int64_t rows, columns, depth;
  bool turned, add;
};

void multiply(const TileProduct& p);

}  // namespace samfast
