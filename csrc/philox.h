// SPDX-License-Identifier: Apache-2.0
// Philox 4x32-10: the dropout mask of kernels/_common/philox.py, for one row at a time.
#pragma once

#include <cstdint>

namespace samfast {

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // keep a word that is at least this
  float scale = 1.0f;      // 1 / (1 - p)
  bool active = false;
};

inline void philox(uint64_t seed, uint64_t counter, uint32_t out[4]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b), c3 = static_cast<uint32_t>(a), c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// factor[c] = 0 where the element is dropped, 1 / (1 - p) where it is kept.
inline void dropout_row(const Dropout& d, int64_t row, int64_t columns, float* factor) {
  const int64_t blocks = (columns + 3) / 4;
  for (int64_t j = 0; j < blocks; ++j) {
    uint32_t words[4];
    philox(d.seed, static_cast<uint64_t>(row * blocks + j), words);
    for (int64_t i = 0; i < 4 && 4 * j + i < columns; ++i)
      factor[4 * j + i] = words[i] >= d.threshold ? d.scale : 0.0f;
  }
}

}  // namespace samfast
