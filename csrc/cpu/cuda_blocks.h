// SPDX-License-Identifier: Apache-2.0
// CUDA blocks run on the CPU, for the tests of machines without a GPU.
//
// Every second block runs the items of a step in descending order. Shared memory starts as NaN.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace samfast {

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

struct Turns {
  bool descending;

  template <typename F>
  void operator()(int count, const F& item) const {
    for (int i = 0; i < count; ++i) item(descending ? count - 1 - i : i);
  }
};

// Runs f(block, shared memory, turns) for every block.
template <typename F>
void launch(int64_t blocks, int64_t floats, F&& f) {
  std::vector<float> room(floats);
  for (int64_t block = 0; block < blocks; ++block) {
    std::fill(room.begin(), room.end(), kPoison);
    f(block, room.data(), Turns{block % 2 == 1});
  }
}

}  // namespace samfast
