// SPDX-License-Identifier: Apache-2.0
// Rotary embedding on the CPU: pairs (a, b) of features become (a cos - b sin, b cos + a sin).
//
// A token's row of the tables is read once for all heads of q and k. Each head's features are read
// before they are written, so out may be x itself. Tokens are independent, so the bits do not
// depend on the number of threads.
#include "capability.h"
#include "common.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace samfast {
namespace {

constexpr int64_t kGrain = 1 << 14;  // features that justify a thread

struct Sizes {
  int64_t batch, image_height, image_width, height, width, parts, heads, pairs;
  bool halves;

  int64_t tokens() const { return batch * image_height * image_width; }
  int64_t features() const { return parts * heads * 2 * pairs; }
};

// A view (batch, H, W, parts, heads, 2 * pairs) with contiguous features.
template <typename T>
struct View {
  T* data;
  int64_t stride[5];

  T* at(int64_t b, int64_t y, int64_t x) const {
    return data + b * stride[0] + y * stride[1] + x * stride[2];
  }
};

// (positions, pairs) of any strides.
struct Table {
  const float* data;
  int64_t row, pair;

  void read(int64_t position, float sign, int64_t pairs, float* to) const {
    const float* from = data + position * row;
    for (int64_t i = 0; i < pairs; ++i) to[i] = sign * from[i * pair];
  }
};

// One token: source and target, its angles, and room for a head's features, twice.
template <typename T>
struct Turn {
  const T* from;
  T* to;
  const int64_t *from_stride, *to_stride;  // of parts and heads
  const float *cos, *sin;
  float *in, *out;
};

SAMFAST_INLINE void turn_halves(const float* __restrict in, const float* __restrict cos,
                                const float* __restrict sin, int64_t pairs,
                                float* __restrict out) {
  for (int64_t i = 0; i < pairs; ++i) {
    out[i] = in[i] * cos[i] - in[pairs + i] * sin[i];
    out[pairs + i] = in[pairs + i] * cos[i] + in[i] * sin[i];
  }
}

SAMFAST_INLINE void turn_interleaved(const float* __restrict in, const float* __restrict cos,
                                     const float* __restrict sin, int64_t pairs,
                                     float* __restrict out) {
  for (int64_t i = 0; i < pairs; ++i) {
    out[2 * i] = in[2 * i] * cos[i] - in[2 * i + 1] * sin[i];
    out[2 * i + 1] = in[2 * i + 1] * cos[i] + in[2 * i] * sin[i];
  }
}

template <typename T>
SAMFAST_INLINE void turn_token_body(const Sizes& z, const Turn<T>& t) {
  const int64_t features = 2 * z.pairs;
  for (int64_t part = 0; part < z.parts; ++part)
    for (int64_t head = 0; head < z.heads; ++head) {
      const T* from = t.from + part * t.from_stride[0] + head * t.from_stride[1];
      T* to = t.to + part * t.to_stride[0] + head * t.to_stride[1];
      for (int64_t c = 0; c < features; ++c) t.in[c] = static_cast<float>(from[c]);
      if (z.halves)
        turn_halves(t.in, t.cos, t.sin, z.pairs, t.out);
      else
        turn_interleaved(t.in, t.cos, t.sin, z.pairs, t.out);
      for (int64_t c = 0; c < features; ++c) to[c] = static_cast<T>(t.out[c]);
    }
}
template <typename T>
constexpr EachProcessor<turn_token_body<T>> turn_token;

template <typename T>
void rotate(const Sizes& z, const View<const T>& x, const View<T>& out, const Table& cos,
            const Table& sin, float sign) {
  const int64_t grain = std::max<int64_t>(1, kGrain / z.features());
  torch::stable::parallel_for(0, z.tokens(), grain, [&](int64_t begin, int64_t end) {
    std::vector<float> room(6 * z.pairs);
    float *const c = room.data(), *const s = c + z.pairs, *const in = s + z.pairs;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t line = token / z.image_width, column = token % z.image_width;
      const int64_t image = line / z.image_height, y = line % z.image_height;
      const int64_t position = y % z.height * z.width + column % z.width;
      cos.read(position, 1.0f, z.pairs, c);
      sin.read(position, sign, z.pairs, s);
      turn_token<T>(z, {x.at(image, y, column), out.at(image, y, column), x.stride + 3,
                        out.stride + 3, c, s, in, in + 2 * z.pairs});
    }
  });
}

Sizes sizes_of(const Tensor& x, const std::vector<int64_t>& windows, bool halves) {
  STD_TORCH_CHECK(windows.size() == 5, "windows are five sizes, not ", windows.size());
  STD_TORCH_CHECK(x.dim() == 6, "x has ", x.dim(), " dimensions, not 6");
  for (int i = 0; i < 3; ++i)
    STD_TORCH_CHECK(x.size(i) == windows[i], "x has size ", x.size(i), " in dimension ", i,
                    ", not ", windows[i]);
  STD_TORCH_CHECK(windows[3] > 0 && windows[4] > 0, "a window is empty");
  STD_TORCH_CHECK(x.size(5) % 2 == 0, "head_dim ", x.size(5), " is odd");
  return {windows[0], windows[1], windows[2], windows[3], windows[4],
          x.size(3),  x.size(4),  x.size(5) / 2, halves};
}

template <typename T>
View<T> view(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " has another element type than x");
  STD_TORCH_CHECK(t.dim() == 6, name, " has ", t.dim(), " dimensions, not 6");
  View<T> v = {};
  for (int i = 0; i < 6; ++i) {
    STD_TORCH_CHECK(t.size(i) == like.size(i), name, " has size ", t.size(i), " in dimension ", i,
                    ", not ", like.size(i));
    if (i < 5) v.stride[i] = t.stride(i);
  }
  STD_TORCH_CHECK(t.stride(5) == 1, name, " has features ", t.stride(5), " elements apart");
  if constexpr (std::is_const_v<T>)
    v.data = static_cast<T*>(t.const_data_ptr());
  else
    v.data = static_cast<T*>(t.mutable_data_ptr());
  return v;
}

Table table(const Tensor& t, const char* name, const Sizes& z) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == z.height * z.width && t.size(1) == z.pairs, name,
                  " must have ", z.height * z.width, " rows of ", z.pairs, " pairs");
  return {static_cast<const float*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

}  // namespace

void rope_rotate(const Tensor& x, const Tensor& cos, const Tensor& sin,
                 std::vector<int64_t> windows, bool halves, bool inverse, Tensor out) {
  const Sizes z = sizes_of(x, windows, halves);
  const Table c = table(cos, "cos", z), s = table(sin, "sin", z);
  if (z.tokens() == 0 || z.features() == 0) return;
  dispatch(x, "rope_rotate", [&](auto type) {
    using T = decltype(type);
    rotate(z, view<const T>(x, "x", x), view<T>(out, "out", x), c, s, inverse ? -1.0f : 1.0f);
  });
}

}  // namespace samfast
