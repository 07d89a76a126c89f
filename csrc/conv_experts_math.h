// SPDX-License-Identifier: Apache-2.0
// The arithmetic of conv_experts per element, for host and device: memory places of samples,
// upsampled positions that an output cell needs, their bicubic weights, the return filter, GELU.
//
// Along an axis of n outputs and ratio s, cell d owns `points` consecutive upsampled positions (one
// for odd s, the centre; four for even s, what the return filter reads). A 3x3 convolution at them
// needs points + 2 positions, one more on either side. Position k of a cell reads four sources from
// d + base[k] on, with weights that do not depend on d: sources past the border repeat the border,
// and positions past the border of the upsampled map are the convolution's zero padding. At s = 1
// nothing is interpolated: a position reads only its own source. Reading others with weight zero
// would carry a NaN along. At s = 2 cells overlap, and two points of a border cell lie outside the
// map. The clamped reads of the return filter then move to their inner neighbours, so the outer
// points have no weight.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SAMFAST_HD __host__ __device__ __forceinline__
#else
#define SAMFAST_HD inline __attribute__((always_inline))
#endif

namespace samfast::experts {

constexpr int kHalo = 3;   // the farthest source that a cell reads
constexpr int kTaps = 4;   // sources of a bicubic value
constexpr int kPoints = 4;  // most points of a cell, along an axis
constexpr int kRows = kPoints + 2;

// Places of one sample's pixels: rows of the image-order buffer or of the pad buffer.
struct Sample {
  int64_t rows, columns;  // pixels inside the image come first, both ways
  int64_t image, image_stride, beside, beside_stride, under, under_stride;

  // True inside the image; row is the pixel's row in the image-order buffer, else in the pads.
  SAMFAST_HD bool locate(int64_t y, int64_t x, int64_t& row) const {
    const bool in_image = y < rows && x < columns;
    row = in_image ? image + y * image_stride + x
          : y < rows ? beside + y * beside_stride + x : under + y * under_stride + x;
    return in_image;
  }
};

// samfast.kernels._common.windows.Windows
struct Windows {
  int64_t batch, image_height, image_width, height, width, down, across;

  SAMFAST_HD int64_t samples() const { return batch * down * across; }
  SAMFAST_HD int64_t tokens() const { return batch * image_height * image_width; }
  SAMFAST_HD int64_t pads() const {
    return down * height * across * width - image_height * image_width;
  }

  // Divides in 32 bits, which a GPU does inline; a 64-bit division is a call there.
  SAMFAST_HD Sample sample(int n) const {
    const int wide_count = static_cast<int>(across), count = static_cast<int>(down) * wide_count;
    const int window = n % count;
    const int64_t b = n / count, top = window / wide_count * height;
    const int64_t left = window % wide_count * width;
    const int64_t wide = across * width, right = wide - image_width;
    Sample s;
    s.rows = image_height - top < height ? image_height - top : height;
    s.columns = image_width - left < width ? image_width - left : width;
    s.image = (b * image_height + top) * image_width + left, s.image_stride = image_width;
    s.beside = b * pads() + top * right + left - image_width, s.beside_stride = right;
    s.under = b * pads() + image_height * right + (top - image_height) * wide + left;
    s.under_stride = wide;
    return s;
  }
};

SAMFAST_HD int64_t clamped(int64_t i, int64_t n) { return i < 0 ? 0 : i < n ? i : n - 1; }

SAMFAST_HD int points_of(int ratio) { return ratio % 2 != 0 ? 1 : kPoints; }

SAMFAST_HD int taps_of(int ratio) { return ratio == 1 ? 1 : kTaps; }

// Position k of cell d is upsampled position ratio * d + phase(ratio, k).
SAMFAST_HD int phase(int ratio, int k) { return (ratio - points_of(ratio)) / 2 - 1 + k; }

SAMFAST_HD bool inside(int ratio, int k, int64_t d, int64_t n) {
  const int c = phase(ratio, k);
  return !(c < 0 && d == 0) && !(c >= ratio && d == n - 1);
}

// Cubic convolution with A = -3/4: weights of four neighbours at fraction t past the second.
SAMFAST_HD void bicubic(float t, float weight[kTaps]) {
  const float a = -0.75f, u = 1.0f - t;
  weight[0] = a * t * u * u;
  weight[1] = ((a + 2.0f) * t - (a + 3.0f)) * t * t + 1.0f;
  weight[2] = ((a + 2.0f) * u - (a + 3.0f)) * u * u + 1.0f;
  weight[3] = a * u * t * t;
}

// The sources of position k of a cell, with their weights: d + result + {0, 1, 2, 3}, or only the
// first if taps_of(ratio) is 1.
SAMFAST_HD int sources(int ratio, int k, float weight[kTaps]) {
  if (ratio == 1) {
    weight[0] = 1.0f;
    return phase(ratio, k);
  }
  const int twice = 2 * phase(ratio, k) + 1 - ratio, cell = 2 * ratio;  // 2s times the offset
  const int whole = twice >= 0 ? twice / cell : -((cell - 1 - twice) / cell);
  bicubic(static_cast<float>(twice - whole * cell) / static_cast<float>(cell), weight);
  return whole - 1;
}

// Weight of point j of cell d in the cell's output.
SAMFAST_HD float return_weight(int ratio, int j, int64_t d, int64_t n) {
  if (ratio % 2 != 0) return 1.0f;
  const bool outer = j == 0 || j == kPoints - 1;
  const bool border = ratio == 2 && (j < 2 ? d == 0 : d == n - 1);
  if (border) return outer ? 0.0f : 0.5f;
  return outer ? -3.0f / 32.0f : 19.0f / 32.0f;
}

template <typename V>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
};

// exp(y) for y <= 0, without branches: V is float or a vector of floats.
template <typename V>
SAMFAST_HD void exp_negative(const V& y, V& result) {
  using I = typename Bits<V>::type;
  const V bounded = y < -87.0f ? V{} - 87.0f : y;
  const V shifted = bounded * 1.44269504f + 12582912.0f;  // the low bits hold the integer
  const V n = shifted - 12582912.0f;
  const V f = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  const V p = ((((((f * (1.0f / 5040) + 1.0f / 720) * f + 1.0f / 120) * f + 1.0f / 24) * f +
                 1.0f / 6) * f + 0.5f) * f + 1.0f) * f + 1.0f;
  I bits;
  std::memcpy(&bits, &shifted, sizeof(V));
  bits = (bits << 23) + 0x3F800000;
  V scale;
  std::memcpy(&scale, &bits, sizeof(V));
  result = y < -87.0f ? V{} : p * scale;
}

// x Phi(x) and its derivative Phi(x) + x phi(x). The normal tail is exp(-x^2/2) times a polynomial
// in 1 / (1 + 0.3 |x|), fitted to a relative error of 4e-9.
template <typename V>
SAMFAST_HD void gelu(const V& x, V& value, V& slope) {
  const V size = x < 0.0f ? -x : x;
  const V t = 1.0f / (size * 0.3f + 1.0f);
  V e;
  exp_negative<V>(x * x * -0.5f, e);
  V q = t * -0.0206128289f + 0.112375774f;
  q = q * t - 0.228067501f;
  q = q * t + 0.191581673f;
  q = q * t - 0.0792473176f;
  q = q * t + 0.0960578152f;
  q = q * t + 0.0784255853f;
  q = q * t + 0.110227323f;
  q = q * t + 0.119572841f;
  q = (q * t + 0.119686634f) * t * e;
  const V below = x < 0.0f ? q : 1.0f - q;
  value = x * below;
  slope = below + x * e * 0.398942280f;
}

template <typename V>
SAMFAST_HD void activate(bool is_gelu, const V& x, V& value, V& slope) {
  if (is_gelu) {
    gelu<V>(x, value, slope);
  } else {
    value = x;
    slope = V{} + 1.0f;
  }
}

}  // namespace samfast::experts
