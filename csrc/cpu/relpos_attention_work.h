// SPDX-License-Identifier: Apache-2.0
// The workspace of a relpos_attention thread: panels of queries, a tile, and the keys of a task.
#pragma once

#include "relpos_attention_call.h"
#include "relpos_attention_tiles.h"

#include <algorithm>
#include <vector>

namespace samfast {
namespace {

constexpr int64_t kPanels = 2;        // panels of queries at a time
constexpr int64_t kTileKeys = 96;     // most keys of a tile
constexpr int64_t kWholeKeys = 1024;  // most keys of a map that keeps all weights of a panel

bool whole_rows(const Problem& p) { return p.keys() <= kWholeKeys; }

// Hands out parts of one allocation, aligned to 64 bytes; without memory it only counts.
class Room {
 public:
  explicit Room(float* base) : base_(base) {}

  float* floats(int64_t n) {
    float* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (n + 15) / 16 * 16;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

// Up to 64 queries with their share of the bias. Shapes (…, 64) have the queries as columns.
struct Panel {
  int64_t count, lanes;  // queries, and their number rounded up to whole vectors
  int64_t h[kPanel], w[kPanel];
  float *queries;                  // (head_dim, 64)
  float *rel_h, *rel_w;            // (height, 64), (width, 64)
  float *sums;                     // (head_dim, 64): of values, or of the gradients of the queries
  float *maximum, *total, *moment, *correction;  // of the softmax and its gradient
  float *plain, *dplain;           // (64, head_dim): queries, and the bias's part of their dq
  float *dout, *dout_turned;       // (64, head_dim), (head_dim, 64)
  float *drel_h, *drel_w, *lse, *delta;

  template <typename T>
  T* at(const View<T>& view, const Task& t, int64_t i) const {
    return view.at(t.batch, t.top + h[i], t.left + w[i], t.head);
  }

  Panel(const Problem& p, Room& room, bool backward) {
    const int64_t tile = p.head_dim * kPitch;
    const int64_t lines = p.tables ? p.height * kPitch : 0;
    const int64_t columns = p.tables ? p.width * kPitch : 0;
    queries = room.floats(tile);
    rel_h = room.floats(lines), rel_w = room.floats(columns);
    sums = room.floats(tile);
    total = room.floats(kPanel), correction = room.floats(kPanel);
    if (!backward) {
      maximum = room.floats(kPanel);
      return;
    }
    plain = room.floats(tile), dplain = room.floats(p.tables ? tile : 0);
    dout = room.floats(tile), dout_turned = room.floats(tile);
    drel_h = room.floats(lines), drel_w = room.floats(columns);
    lse = room.floats(kPanel), delta = room.floats(kPanel), moment = room.floats(kPanel);
  }
};

// The workspace of a thread.
struct Workspace {
  std::vector<Panel> panels;
  float *tile, *dtile;    // (keys of a tile, 64)
  float *rows, *turned;   // a row of a token; a table times a panel's queries
  float *keys, *values, *dkeys, *dvalues;  // (keys, head_dim), keys multiplied by scale
  float* dtables;  // sums of the current panels, kept apart because long sums round more

  Workspace(const Problem& p, Room& room, bool backward, int64_t most_keys) {
    const int64_t size = (backward && whole_rows(p) ? p.keys() : kTileKeys) * kPitch;
    tile = room.floats(size);
    dtile = backward ? room.floats(size) : nullptr;
    rows = room.floats(p.head_dim);
    turned = room.floats(p.tables ? (2 * std::max(p.height, p.width) - 1) * kPitch : 0);
    for (int64_t i = 0; i < kPanels; ++i) panels.emplace_back(p, room, backward);
    const int64_t all = most_keys * p.head_dim;
    keys = room.floats(all), values = room.floats(all);
    dkeys = backward ? room.floats(all) : nullptr, dvalues = backward ? room.floats(all) : nullptr;
    dtables = backward && p.tables ? room.floats(p.table_h() + p.table_w()) : nullptr;
  }
};

int64_t workspace_floats(const Problem& p, bool backward, int64_t most_keys) {
  Room room(nullptr);
  Workspace(p, room, backward, most_keys);
  return room.used();
}

}  // namespace
}  // namespace samfast
