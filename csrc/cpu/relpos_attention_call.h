// SPDX-License-Identifier: Apache-2.0
// The arguments of relpos_attention, checked once; and the places of the tokens of one head of one
// window, with functions that read and write them.
#pragma once

#include "common.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

namespace samfast {
namespace {

constexpr int64_t kMostHeadDim = 128;
constexpr int64_t kAhead = 4;  // tokens to fetch ahead of the one that is read

struct Problem {
  int64_t batch, image_height, image_width, height, width, down, across, heads, head_dim;
  float scale;
  bool tables;  // true if there is a bias

  int64_t keys() const { return height * width; }
  int64_t tasks() const { return batch * down * across * heads; }
  int64_t pads() const { return down * height * across * width - image_height * image_width; }
  int64_t table_h() const { return (2 * height - 1) * head_dim; }
  int64_t table_w() const { return (2 * width - 1) * head_dim; }
};

// A view of tokens (batch, H, W, heads, head_dim) or of pads (batch, 1, pads, heads, head_dim).
template <typename T>
struct View {
  T* data = nullptr;
  int64_t stride[5] = {};

  T* at(int64_t b, int64_t y, int64_t x, int64_t head) const {
    return data + b * stride[0] + y * stride[1] + x * stride[2] + head * stride[3];
  }
};

// One head of one window.
struct Task {
  int64_t batch, head, top, left;
  int64_t rows, columns;  // of the window inside the image: its queries

  Task(const Problem& p, int64_t number) {
    head = number % p.heads;
    const int64_t window = number / p.heads, count = p.down * p.across;
    batch = window / count;
    top = window % count / p.across * p.height;
    left = window % p.across * p.width;
    rows = std::min(p.height, p.image_height - top);
    columns = std::min(p.width, p.image_width - left);
  }

  int64_t queries() const { return rows * columns; }
};

// The places of a task's keys; null for zeros.
template <typename T>
struct Keys {
  const Problem& p;
  const Task& t;
  const View<T>&tokens, &pads;

  T* at(int64_t j, int64_t& stride) const {
    const int64_t y = t.top + j / p.width, x = t.left + j % p.width;
    stride = tokens.stride[4];
    if (y < p.image_height && x < p.image_width) return tokens.at(t.batch, y, x, t.head);
    if (pads.data == nullptr) return nullptr;
    const int64_t wide = p.across * p.width, right = wide - p.image_width;
    const int64_t pad = y < p.image_height
                            ? y * right + x - p.image_width
                            : p.image_height * right + (y - p.image_height) * wide + x;
    stride = pads.stride[4];
    return pads.at(t.batch, 0, pad, t.head);
  }
};

// Rows of one head are far apart, so hardware does not prefetch them.
template <typename T>
void fetch(const T* from, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (int64_t at = 0; at < n * static_cast<int64_t>(sizeof(T)); at += 64)
    __builtin_prefetch(bytes + at);
}

template <typename T>
void read(const T* from, int64_t stride, float factor, int64_t n, float* to) {
  if (stride == 1) {
    for (int64_t c = 0; c < n; ++c) to[c] = factor * static_cast<float>(from[c]);
  } else {
    for (int64_t c = 0; c < n; ++c) to[c] = factor * static_cast<float>(from[c * stride]);
  }
}

template <typename T>
void write(const float* from, float factor, int64_t n, T* to, int64_t stride) {
  for (int64_t c = 0; c < n; ++c) to[c * stride] = static_cast<T>(factor * from[c]);
}

template <typename T>
void read_keys(const Keys<T>& keys, int64_t first, int64_t last, float factor, float* rows) {
  const int64_t n = keys.p.head_dim;
  int64_t stride;
  for (int64_t j = first; j < last; ++j, rows += n) {
    if (const T* later = j + kAhead < last ? keys.at(j + kAhead, stride) : nullptr) fetch(later, n);
    if (const T* from = keys.at(j, stride))
      read(from, stride, factor, n, rows);
    else
      std::fill(rows, rows + n, 0.0f);
  }
}

template <typename T>
void write_keys(const Keys<T>& keys, int64_t first, int64_t last, float factor, const float* rows) {
  const int64_t n = keys.p.head_dim;
  int64_t stride;
  for (int64_t j = first; j < last; ++j, rows += n)
    if (T* to = keys.at(j, stride)) write(rows, factor, n, to, stride);
}

template <typename T>
struct Inputs {
  View<const T> q, k, v, pad_k, pad_v;
  const float *table_h, *table_w;  // null without a bias
};

template <typename T>
struct Gradients {
  View<const T> dout, out;
  const float* lse;
  View<T> dq, dk, dv, dpad_k, dpad_v;
};

Problem make_problem(const Tensor& q, const std::vector<int64_t>& windows, double scale,
                     bool tables) {
  STD_TORCH_CHECK(windows.size() == 5, "windows are five sizes, not ", windows.size());
  STD_TORCH_CHECK(q.dim() == 5, "q has ", q.dim(), " dimensions, not 5");
  Problem p;
  p.tables = tables;
  p.batch = windows[0], p.image_height = windows[1], p.image_width = windows[2];
  p.height = windows[3], p.width = windows[4];
  STD_TORCH_CHECK(p.image_height > 0 && p.image_width > 0 && p.height > 0 && p.width > 0,
                  "a window is empty");
  p.down = (p.image_height + p.height - 1) / p.height;
  p.across = (p.image_width + p.width - 1) / p.width;
  p.heads = q.size(3), p.head_dim = q.size(4), p.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(p.head_dim > 0 && p.head_dim % kLanes == 0 && p.head_dim <= kMostHeadDim,
                  "head_dim ", p.head_dim, " is not a multiple of 16 up to ", kMostHeadDim);
  return p;
}

template <typename T>
View<T> view(const Tensor& t, const char* name, ScalarType type, std::vector<int64_t> sizes) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has another element type than q");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, " has ", t.dim(),
                  " dimensions, not ", sizes.size());
  View<T> v;
  const int64_t skip = sizes.size() == 4 ? 1 : 0;  // pads have no rows
  for (int64_t i = 0; i < t.dim(); ++i) {
    STD_TORCH_CHECK(t.size(i) == sizes[i], name, " has size ", t.size(i), " in dimension ", i,
                    ", not ", sizes[i]);
    v.stride[i == 0 ? 0 : i + skip] = t.stride(i);
  }
  if constexpr (std::is_const_v<T>)
    v.data = static_cast<T*>(t.const_data_ptr());
  else
    v.data = static_cast<T*>(t.mutable_data_ptr());
  return v;
}

template <typename T>
View<T> tokens(const Problem& p, const Tensor& t, const char* name, ScalarType type) {
  return view<T>(t, name, type, {p.batch, p.image_height, p.image_width, p.heads, p.head_dim});
}

template <typename T>
View<T> padding(const Problem& p, const std::optional<Tensor>& t, const char* name,
                ScalarType type) {
  if (!t.has_value() || p.pads() == 0) return {};
  return view<T>(*t, name, type, {p.batch, p.pads(), p.heads, p.head_dim});
}

float* floats(const Tensor& t, const char* name, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(t.numel() == numel, name, " has ", t.numel(), " elements, not ", numel);
  STD_TORCH_CHECK(numel == 0 || t.is_contiguous(), name, " must be contiguous");
  return static_cast<float*>(t.data_ptr());
}

template <typename T>
Inputs<T> inputs(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& pad_k, const std::optional<Tensor>& pad_v,
                 const std::optional<Tensor>& table_h, const std::optional<Tensor>& table_w) {
  const ScalarType type = q.scalar_type();
  return {tokens<const T>(p, q, "q", type),
          tokens<const T>(p, k, "k", type),
          tokens<const T>(p, v, "v", type),
          padding<const T>(p, pad_k, "pad_k", type),
          padding<const T>(p, pad_v, "pad_v", type),
          p.tables ? floats(*table_h, "table_h", p.table_h()) : nullptr,
          p.tables ? floats(*table_w, "table_w", p.table_w()) : nullptr};
}

int64_t lse_size(const Problem& p) {
  return p.batch * p.heads * p.image_height * p.image_width;
}

}  // namespace
}  // namespace samfast
