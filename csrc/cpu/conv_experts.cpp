// SPDX-License-Identifier: Apache-2.0
// One routed multi-scale convolution expert per sample, evaluated where its output needs it.
//
// A tile is some rows of cells of one sample, over its full width. Sixteen neighbouring cells are
// the lanes of a vector; scalar loops go over the positions and points of a cell. Every load is
// contiguous, and lanes differ only in the zeros past the border. Sources are interpolated along x
// for all rows of the tile, then along y for one row of cells at a time. The backward repeats this.
// Its tiles write their parts of dh and of the weights' sums separately. Both are added in an order
// that depends only on the sizes, so the bits do not depend on the number of threads. Everything is
// computed in float.
#include "capability.h"
#include "common.h"
#include "conv_experts_call.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

namespace samfast {
namespace experts {

template <>
struct Bits<Lanes<16>::Vector> {
  using type = Lanes<16>::Integers;
};
template <>
struct Bits<Lanes<32>::Vector> {
  using type = Lanes<32>::Integers;
};
template <>
struct Bits<Lanes<64>::Vector> {
  using type = Lanes<64>::Integers;
};

namespace {

#define SAMFAST_UNROLL _Pragma("GCC unroll 9")

constexpr int64_t kWholeRows = 16, kTileRows = 8;  // windows in one tile, larger maps in strips
constexpr int64_t kMaxChunks = 64, kChunkFloats = 1 << 22;

// Zeroed vectors, aligned for every instruction set: the compiler's alignment of Vec differs
// between them.
class Vectors {
 public:
  explicit Vectors(int64_t count) : count_(count), room_((count + 1) * kLanes, 0.0f) {}

  int64_t size() const { return count_; }
  float* floats() {
    const uintptr_t bytes = reinterpret_cast<uintptr_t>(room_.data());
    return room_.data() + (sizeof(Vec) - bytes % sizeof(Vec)) % sizeof(Vec) / sizeof(float);
  }
  Vec* data() { return count_ == 0 ? nullptr : reinterpret_cast<Vec*>(floats()); }
  void clear() { std::fill(room_.begin(), room_.end(), 0.0f); }

 private:
  int64_t count_;
  std::vector<float> room_;
};

struct Tile {
  int ratio, rank, inputs;
  bool is_gelu;
  int64_t height, width, first, rows;  // of the sample, and the rows of cells of this tile
  int64_t blocks;                      // vectors of cells in a row
  const float *weight, *bias;          // of the tile's expert
  const float* patch;                  // (rank, rows + 6, source_pitch): sources, borders repeated
  const float* target;                 // (rank, rows, blocks): gradient of the output
  int base[kRows];
  float tap[kRows][kTaps];
  const Vec* weigh;  // (points, blocks): the return filter along x, zero past the width
  Vec* across;       // (rank, rows + 6, positions, blocks): interpolated along x
  Vec* raised;       // (rank, positions, positions): interpolated for sixteen cells

  int64_t patch_rows() const { return rows + 2 * kHalo; }
  int64_t source_pitch() const { return (blocks + 1) * kLanes; }
  int64_t spread_pitch() const { return (blocks + 2) * kLanes; }
};

// Interpolates along x. Positions are those of every cell in turn, in order of position first.
template <int kP, int kT>
SAMFAST_INLINE void interpolate_across(const Tile& t) {
  constexpr int kK = kP + 2;
  for (int64_t row = 0; row < t.rank * t.patch_rows(); ++row) {
    const float* source = t.patch + row * t.source_pitch() + kHalo;
    for (int k = 0; k < kK; ++k) {
      Vec* out = t.across + (row * kK + k) * t.blocks;
      for (int64_t block = 0; block < t.blocks; ++block) {
        Vec total = {};
        SAMFAST_UNROLL
        for (int tap = 0; tap < kT; ++tap) {
          Vec v;
          load(v, source + block * kLanes + t.base[k] + tap);
          total += t.tap[k][tap] * v;
        }
        out[block] = total;
      }
      float* line = reinterpret_cast<float*>(out);
      if (!inside(t.ratio, k, 0, t.width)) line[0] = 0.0f;
      if (!inside(t.ratio, k, t.width - 1, t.width)) line[t.width - 1] = 0.0f;
    }
  }
}

// Interpolates along y, for one vector of cells of one row and every channel.
template <int kP, int kT>
SAMFAST_INLINE void interpolate_down(const Tile& t, int64_t row, int64_t block) {
  constexpr int kK = kP + 2;
  for (int64_t i = 0; i < t.rank; ++i)
    for (int k = 0; k < kK; ++k) {
      Vec* out = t.raised + (i * kK + k) * kK;
      if (!inside(t.ratio, k, t.first + row, t.height)) {
        SAMFAST_UNROLL
        for (int c = 0; c < kK; ++c) out[c] = Vec{};
        continue;
      }
      const int64_t at = i * t.patch_rows() + row + kHalo + t.base[k];
      const Vec* x = t.across + at * kK * t.blocks + block;
      const float* w = t.tap[k];
      for (int c = 0; c < kK; ++c, x += t.blocks) {
        Vec total = w[0] * x[0];
        SAMFAST_UNROLL
        for (int tap = 1; tap < kT; ++tap) total += w[tap] * x[tap * kK * t.blocks];
        out[c] = total;
      }
    }
}

// acc[j] = what channel o is before its activation at the points (line, j) of sixteen cells.
template <int kP>
SAMFAST_INLINE void convolve(const Tile& t, int64_t o, int line, Vec* acc) {
  constexpr int kK = kP + 2;
  SAMFAST_UNROLL
  for (int j = 0; j < kP; ++j) acc[j] = Vec{} + t.bias[o];
  for (int64_t c = 0; c < t.inputs; ++c) {
    const float* w = t.weight + (o * t.inputs + c) * 9;
    const Vec* u = t.raised + ((t.inputs == 1 ? o : c) * kK + line) * kK;
    SAMFAST_UNROLL
    for (int a = 0; a < 3; ++a)
      SAMFAST_UNROLL
      for (int b = 0; b < 3; ++b)
        SAMFAST_UNROLL
        for (int j = 0; j < kP; ++j) acc[j] += w[a * 3 + b] * u[a * kK + b + j];
  }
}

// In registers of kBytes: compilers choose among the elements of a wider vector one by one.
template <int kBytes>
SAMFAST_INLINE void activate_lanes(bool is_gelu, const Vec& x, Vec& value, Vec& slope) {
  SAMFAST_UNROLL
  for (size_t at = 0; at < sizeof(Vec); at += kBytes) {
    typename Lanes<kBytes>::Vector part, part_value, part_slope;
    std::memcpy(&part, reinterpret_cast<const char*>(&x) + at, kBytes);
    activate<typename Lanes<kBytes>::Vector>(is_gelu, part, part_value, part_slope);
    std::memcpy(reinterpret_cast<char*>(&value) + at, &part_value, kBytes);
    std::memcpy(reinterpret_cast<char*>(&slope) + at, &part_slope, kBytes);
  }
}

template <int kP, int kT, int kBytes>
SAMFAST_INLINE void forward_cells(const Tile& t, Vec* out) {
  interpolate_across<kP, kT>(t);
  for (int64_t row = 0; row < t.rows; ++row)
    for (int64_t block = 0; block < t.blocks; ++block) {
      interpolate_down<kP, kT>(t, row, block);
      for (int64_t o = 0; o < t.rank; ++o) {
        Vec total = {};
        for (int line = 0; line < kP; ++line) {
          Vec acc[kP];
          convolve<kP>(t, o, line, acc);
          const float down = return_weight(t.ratio, line, t.first + row, t.height);
          SAMFAST_UNROLL
          for (int j = 0; j < kP; ++j) {
            Vec value, slope;
            activate_lanes<kBytes>(t.is_gelu, acc[j], value, slope);
            total += down * t.weigh[j * t.blocks + block] * value;
          }
        }
        out[(o * t.rows + row) * t.blocks + block] = total;
      }
    }
}

struct Gradient {
  Vec* points;  // (rank, points, points): gradient before the activation, for sixteen cells
  Vec* kernel;  // (rank * inputs * 9 + rank): sums of this tile, or null
  Vec* across;  // (rank, rows + 6, positions, blocks + 2): adjoint of Tile::across, or null
  float* patch;  // (rank, rows + 6, source_pitch): adjoint of Tile::patch
};

template <int kP, int kBytes>
SAMFAST_INLINE void point_gradients(const Tile& t, const Gradient& g, int64_t row, int64_t block) {
  for (int64_t o = 0; o < t.rank; ++o) {
    Vec target, total = {};
    load(target, t.target + ((o * t.rows + row) * t.blocks + block) * kLanes);
    for (int line = 0; line < kP; ++line) {
      Vec acc[kP];
      convolve<kP>(t, o, line, acc);
      const float down = return_weight(t.ratio, line, t.first + row, t.height);
      SAMFAST_UNROLL
      for (int j = 0; j < kP; ++j) {
        Vec value, slope;
        activate_lanes<kBytes>(t.is_gelu, acc[j], value, slope);
        const Vec point = slope * (down * t.weigh[j * t.blocks + block] * target);
        g.points[(o * kP + line) * kP + j] = point;
        total += point;
      }
    }
    if (g.kernel != nullptr) g.kernel[t.rank * t.inputs * 9 + o] += total;
  }
}

template <int kP>
SAMFAST_INLINE void kernel_gradients(const Tile& t, const Gradient& g) {
  constexpr int kK = kP + 2;
  for (int64_t o = 0; o < t.rank; ++o)
    for (int64_t c = 0; c < t.inputs; ++c) {
      Vec* sums = g.kernel + (o * t.inputs + c) * 9;
      const Vec* u = t.raised + (t.inputs == 1 ? o : c) * kK * kK;
      Vec acc[9];
      SAMFAST_UNROLL
      for (int e = 0; e < 9; ++e) acc[e] = sums[e];
      for (int line = 0; line < kP; ++line) {
        const Vec* p = g.points + (o * kP + line) * kP;
        SAMFAST_UNROLL
        for (int a = 0; a < 3; ++a)
          SAMFAST_UNROLL
          for (int b = 0; b < 3; ++b)
            SAMFAST_UNROLL
            for (int j = 0; j < kP; ++j) acc[a * 3 + b] += p[j] * u[(line + a) * kK + b + j];
      }
      SAMFAST_UNROLL
      for (int e = 0; e < 9; ++e) sums[e] = acc[e];
    }
}

// The adjoints of the convolution and of the interpolation along y.
template <int kP, int kT>
SAMFAST_INLINE void source_gradients(const Tile& t, const Gradient& g, int64_t row,
                                     int64_t block) {
  constexpr int kK = kP + 2;
  const int64_t pitch = t.blocks + 2;
  for (int64_t i = 0; i < t.rank; ++i)
    for (int k = 0; k < kK; ++k) {
      if (!inside(t.ratio, k, t.first + row, t.height)) continue;
      Vec acc[kK] = {};
      const bool own = t.inputs == 1;
      for (int64_t o = own ? i : 0; o < (own ? i + 1 : t.rank); ++o)
        SAMFAST_UNROLL
        for (int a = 0; a < 3; ++a) {
          if (k - a < 0 || k - a >= kP) continue;
          const float* w = t.weight + (o * t.inputs + (own ? 0 : i)) * 9 + a * 3;
          const Vec* p = g.points + (o * kP + k - a) * kP;
          SAMFAST_UNROLL
          for (int b = 0; b < 3; ++b)
            SAMFAST_UNROLL
            for (int j = 0; j < kP; ++j) acc[b + j] += w[b] * p[j];
        }
      const int64_t at = i * t.patch_rows() + row + kHalo + t.base[k];
      SAMFAST_UNROLL
      for (int tap = 0; tap < kT; ++tap) {
        Vec* x = g.across + (at + tap) * kK * pitch + 1 + block;
        SAMFAST_UNROLL
        for (int c = 0; c < kK; ++c) x[c * pitch] += t.tap[k][tap] * acc[c];
      }
    }
}

// The adjoint of the interpolation along x. The vector before a line and the one after are zeros.
template <int kP, int kT>
SAMFAST_INLINE void gather_across(const Tile& t, const Gradient& g) {
  constexpr int kK = kP + 2;
  for (int64_t row = 0; row < t.rank * t.patch_rows(); ++row) {
    float* lines = reinterpret_cast<float*>(g.across + row * kK * (t.blocks + 2)) + kLanes;
    for (int k = 0; k < kK; ++k) {
      float* line = lines + k * t.spread_pitch();
      if (!inside(t.ratio, k, 0, t.width)) line[0] = 0.0f;
      if (!inside(t.ratio, k, t.width - 1, t.width)) line[t.width - 1] = 0.0f;
    }
    for (int64_t x = 0; x < t.source_pitch(); x += kLanes) {
      Vec total = {};
      for (int k = 0; k < kK; ++k)
        SAMFAST_UNROLL
        for (int tap = 0; tap < kT; ++tap) {
          Vec v;
          load(v, lines + k * t.spread_pitch() + x - kHalo - t.base[k] - tap);
          total += t.tap[k][tap] * v;
        }
      store(g.patch + row * t.source_pitch() + x, total);
    }
  }
}

template <int kP, int kT, int kBytes>
SAMFAST_INLINE void backward_cells(const Tile& t, const Gradient& g) {
  interpolate_across<kP, kT>(t);
  for (int64_t row = 0; row < t.rows; ++row)
    for (int64_t block = 0; block < t.blocks; ++block) {
      interpolate_down<kP, kT>(t, row, block);
      point_gradients<kP, kBytes>(t, g, row, block);
      if (g.kernel != nullptr) kernel_gradients<kP>(t, g);
      if (g.across != nullptr) source_gradients<kP, kT>(t, g, row, block);
    }
  if (g.across != nullptr) gather_across<kP, kT>(t, g);
}

template <int kBytes>
SAMFAST_INLINE void forward_tile_body(const Tile& t, Vec* out) {
  if (taps_of(t.ratio) == 1) {
    forward_cells<1, 1, kBytes>(t, out);
  } else if (points_of(t.ratio) == 1) {
    forward_cells<1, kTaps, kBytes>(t, out);
  } else {
    forward_cells<kPoints, kTaps, kBytes>(t, out);
  }
}
constexpr EachProcessor<forward_tile_body<16>, forward_tile_body<32>, forward_tile_body<64>>
    forward_tile;

template <int kBytes>
SAMFAST_INLINE void backward_tile_body(const Tile& t, const Gradient& g) {
  if (taps_of(t.ratio) == 1) {
    backward_cells<1, 1, kBytes>(t, g);
  } else if (points_of(t.ratio) == 1) {
    backward_cells<1, kTaps, kBytes>(t, g);
  } else {
    backward_cells<kPoints, kTaps, kBytes>(t, g);
  }
}
constexpr EachProcessor<backward_tile_body<16>, backward_tile_body<32>, backward_tile_body<64>>
    backward_tile;

// The division of samples into tiles.
struct Tiling {
  int64_t rows, down, tiles, blocks;  // rows of a tile, tiles of a sample, of all, vectors in a row

  explicit Tiling(const Windows& w)
      : rows(w.height <= kWholeRows ? w.height : kTileRows),
        down((w.height + rows - 1) / rows),
        tiles(w.samples() * down),
        blocks((w.width + kLanes - 1) / kLanes) {}

  int64_t patch_rows() const { return rows + 2 * kHalo; }
  int64_t source_pitch() const { return (blocks + 1) * kLanes; }
};

// The workspace of a thread.
struct Workspace {
  Vectors patch, weigh, across, raised;
  Tile tile;
  Sample sample;

  Workspace(const Problem& p, const Tiling& s)
      : patch(p.rank * s.patch_rows() * (s.blocks + 1)),
        weigh(kPoints * s.blocks),
        across(p.rank * s.patch_rows() * kRows * s.blocks),
        raised(p.rank * kRows * kRows) {}

  template <typename T>
  void enter(const Problem& p, const Tiling& s, const std::vector<int64_t>& ratios, int64_t number,
             const T* h) {
    const Windows& w = p.windows;
    const int64_t n = number / s.down, expert = p.index[n];
    Tile& t = tile;
    sample = w.sample(static_cast<int>(n));
    t.ratio = static_cast<int>(ratios[expert]), t.rank = p.rank, t.inputs = p.inputs;
    t.is_gelu = p.is_gelu, t.height = w.height, t.width = w.width, t.blocks = s.blocks;
    t.first = number % s.down * s.rows, t.rows = std::min(s.rows, w.height - t.first);
    t.weight = p.weight + expert * p.kernel(), t.bias = p.bias + expert * p.rank;
    t.patch = patch.floats(), t.target = nullptr;
    t.weigh = weigh.data(), t.across = across.data(), t.raised = raised.data();
    const int points = points_of(t.ratio);
    for (int k = 0; k < points + 2; ++k) t.base[k] = sources(t.ratio, k, t.tap[k]);
    float* lines = weigh.floats();
    for (int j = 0; j < points; ++j)
      for (int64_t x = 0; x < t.blocks * kLanes; ++x)
        lines[j * t.blocks * kLanes + x] =
            x < t.width ? return_weight(t.ratio, j, x, t.width) : 0.0f;
    float* to = patch.floats();
    const int64_t pitch = t.source_pitch(), plane = t.patch_rows() * pitch;
    for (int64_t row = 0; row < t.patch_rows(); ++row) {
      const int64_t y = clamped(t.first - kHalo + row, t.height);
      for (int64_t x = 0; x < pitch; ++x) {
        int64_t from;
        const bool in_image = sample.locate(y, clamped(x - kHalo, t.width), from);
        const bool used = in_image && x < t.width + 2 * kHalo;
        for (int64_t i = 0; i < t.rank; ++i)
          to[i * plane + row * pitch + x] = used ? static_cast<float>(h[from * t.rank + i]) : 0.0f;
      }
    }
  }
};

void check_index(const Problem& p) {
  for (int64_t n = 0; n < p.windows.samples(); ++n)
    STD_TORCH_CHECK(p.index[n] >= 0 && p.index[n] < p.experts, "expert index ", p.index[n],
                    " of sample ", n, " is outside 0..", p.experts - 1);
}

template <typename F>
void for_each(int64_t count, F&& f) {
  torch::stable::parallel_for(0, count, 1, f);
}

// Runs tile by tile over chunks, each with its own sums for the weights.
struct WeightSums {
  int64_t chunks, size;
  std::vector<float> sums;

  WeightSums(const Problem& p, int64_t tiles, bool wanted)
      : chunks(std::min({tiles, kMaxChunks, 1 + kChunkFloats / (p.experts * p.parameters())})),
        size(p.experts * p.parameters()),
        sums(wanted ? chunks * size : 0, 0.0f) {}

  void add(int64_t chunk, const Problem& p, int64_t expert, const float* tile) {
    float* to = sums.data() + chunk * size + expert * p.parameters();
    for (int64_t e = 0; e < p.parameters(); ++e)
      for (int64_t lane = 0; lane < kLanes; ++lane) to[e] += tile[e * kLanes + lane];
  }

  void write(const Problem& p, float* dweight, float* dbias) const {
    for (int64_t m = 0; m < p.experts; ++m)
      for (int64_t e = 0; e < p.parameters(); ++e) {
        float total = 0.0f;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          total += sums[chunk * size + m * p.parameters() + e];
        if (e < p.kernel()) {
          dweight[m * p.kernel() + e] = total;
        } else {
          dbias[m * p.rank + e - p.kernel()] = total;
        }
      }
  }
};

// Adds the tiles' parts of one sample, borders folded back, into (rank, height, width).
void fold_patches(const Problem& p, const Tiling& s, int64_t n, const float* patches, float* out) {
  const int64_t height = p.windows.height, width = p.windows.width, pitch = s.source_pitch();
  std::fill(out, out + p.rank * height * width, 0.0f);
  for (int64_t part = 0; part < s.down; ++part) {
    const float* patch = patches + (n * s.down + part) * p.rank * s.patch_rows() * pitch;
    const int64_t rows = std::min(s.rows, height - part * s.rows) + 2 * kHalo;
    for (int64_t i = 0; i < p.rank; ++i)
      for (int64_t row = 0; row < rows; ++row) {
        const float* from = patch + (i * rows + row) * pitch;
        float* to = out + (i * height + clamped(part * s.rows - kHalo + row, height)) * width;
        for (int64_t x = 0; x < width; ++x) to[x] += from[x + kHalo];
        for (int64_t x = 0; x < kHalo; ++x) {
          to[0] += from[x];
          to[width - 1] += from[width + kHalo + x];
        }
      }
  }
}

}  // namespace
}  // namespace experts

using namespace experts;

void conv_experts_forward(const Tensor& h, const Tensor& weight, const Tensor& bias,
                          const Tensor& index, std::vector<int64_t> windows,
                          std::vector<int64_t> ratios, bool residual, bool is_gelu, Tensor z,
                          Tensor z_pad) {
  const Problem p = make_problem(h, weight, bias, index, windows, ratios, residual, is_gelu);
  const Windows& w = p.windows;
  check(z, "z", h.scalar_type(), w.tokens() * p.rank, h);
  check(z_pad, "z_pad", h.scalar_type(), w.batch * w.pads() * p.rank, h);
  check_index(p);
  const Tiling s(w);
  dispatch(h, "conv_experts", [&](auto type) {
    using T = decltype(type);
    const T* source = static_cast<const T*>(h.data_ptr());
    T* image = static_cast<T*>(z.mutable_data_ptr());
    T* pad = static_cast<T*>(z_pad.mutable_data_ptr());
    for_each(s.tiles, [&](int64_t begin, int64_t end) {
      Workspace work(p, s);
      Vectors out(p.rank * s.rows * s.blocks);
      const float* result = out.floats();
      for (int64_t number = begin; number < end; ++number) {
        work.enter(p, s, ratios, number, source);
        const Tile& t = work.tile;
        forward_tile(t, out.data());
        for (int64_t y = 0; y < t.rows; ++y)
          for (int64_t x = 0; x < t.width; ++x) {
            int64_t row;
            const bool in_image = work.sample.locate(t.first + y, x, row);
            T* to = (in_image ? image : pad) + row * p.rank;
            const T* own = source + row * p.rank;
            for (int64_t o = 0; o < p.rank; ++o) {
              const float value = result[(o * t.rows + y) * t.blocks * kLanes + x];
              const bool add = p.residual && in_image;
              to[o] = static_cast<T>(add ? static_cast<float>(own[o]) + value : value);
            }
          }
      }
    });
  });
}

void conv_experts_backward(const Tensor& dz, std::optional<Tensor> dz_pad, const Tensor& h,
                           const Tensor& weight, const Tensor& bias, const Tensor& index,
                           std::vector<int64_t> windows, std::vector<int64_t> ratios,
                           bool residual, bool is_gelu, std::optional<Tensor> daux,
                           std::optional<Tensor> dpool, std::optional<Tensor> dgate,
                           std::optional<Tensor> dh, std::optional<Tensor> dweight,
                           std::optional<Tensor> dbias, std::optional<Tensor> dw_gate,
                           std::optional<Tensor> dw_noise) {
  const Problem p = make_problem(h, weight, bias, index, windows, ratios, residual, is_gelu);
  const Windows& w = p.windows;
  const Balance balance = make_balance(p, daux, dpool, dgate, dw_gate, dw_noise, h);
  const ScalarType type = h.scalar_type();
  check(dz, "dz", type, h.numel(), h);
  const void* pads = optional_data<void>(dz_pad, "dz_pad", type, w.batch * w.pads() * p.rank, h);
  void* result = optional_data<void>(dh, "dh", type, h.numel(), h);
  float* sums = optional_data<float>(dweight, "dweight", ScalarType::Float, weight.numel(), h);
  float* bias_sums = optional_data<float>(dbias, "dbias", ScalarType::Float, bias.numel(), h);
  STD_TORCH_CHECK((sums == nullptr) == (bias_sums == nullptr),
                  "dweight and dbias come together");
  check_index(p);
  const Tiling s(w);
  WeightSums weight_sums(p, s.tiles, dweight.has_value());
  const int64_t reach = p.rank * s.patch_rows() * s.source_pitch();
  const std::unique_ptr<float[]> patches(dh.has_value() ? new float[s.tiles * reach] : nullptr);
  dispatch(h, "conv_experts", [&](auto element) {
    using T = decltype(element);
    const T* source = static_cast<const T*>(h.data_ptr());
    const T* image = static_cast<const T*>(dz.data_ptr());
    const T* pad = static_cast<const T*>(pads);
    for_each(weight_sums.chunks, [&](int64_t begin, int64_t end) {
      Workspace work(p, s);
      const int64_t spread = p.rank * s.patch_rows() * kRows * (s.blocks + 2);
      Vectors target(p.rank * s.rows * s.blocks), points(p.rank * kPoints * kPoints);
      Vectors kernel(dweight.has_value() ? p.parameters() : 0), across(dh.has_value() ? spread : 0);
      float* targets = target.floats();
      for (int64_t chunk = begin; chunk < end; ++chunk)
        for (int64_t number = chunk * s.tiles / weight_sums.chunks;
             number < (chunk + 1) * s.tiles / weight_sums.chunks; ++number) {
          work.enter(p, s, ratios, number, source);
          Tile& t = work.tile;
          target.clear();
          for (int64_t y = 0; y < t.rows; ++y)
            for (int64_t x = 0; x < t.width; ++x) {
              int64_t row;
              const T* from = work.sample.locate(t.first + y, x, row) ? image : pad;
              for (int64_t o = 0; o < p.rank && from != nullptr; ++o)
                targets[(o * t.rows + y) * t.blocks * kLanes + x] =
                    static_cast<float>(from[row * p.rank + o]);
            }
          t.target = targets;
          kernel.clear();
          across.clear();
          const Gradient g = {points.data(), kernel.data(), across.data(),
                              patches.get() + number * reach};
          backward_tile(t, g);
          if (kernel.size() > 0)
            weight_sums.add(chunk, p, p.index[number / s.down], kernel.floats());
        }
    });
    if (!dh.has_value()) return;
    T* out = static_cast<T*>(result);
    for_each(w.samples(), [&](int64_t begin, int64_t end) {
      std::vector<float> total(p.rank * w.height * w.width);
      for (int64_t n = begin; n < end; ++n) {
        fold_patches(p, s, n, patches.get(), total.data());
        const Sample sample = w.sample(static_cast<int>(n));
        for (int64_t y = 0; y < sample.rows; ++y)
          for (int64_t x = 0; x < sample.columns; ++x) {
            int64_t row;
            sample.locate(y, x, row);
            for (int64_t i = 0; i < p.rank; ++i) {
              float value = total[(i * w.height + y) * w.width + x];
              if (p.residual) value += static_cast<float>(image[row * p.rank + i]);
              if (balance.daux != nullptr) value += *balance.daux * balance.dpool[n * p.rank + i];
              out[row * p.rank + i] = static_cast<T>(value);
            }
          }
      }
    });
  });
  if (dweight.has_value()) weight_sums.write(p, sums, bias_sums);
  if (balance.daux != nullptr) {
    const int64_t n = static_cast<int64_t>(p.rank) * p.experts;
    for (int64_t e = 0; e < n; ++e) {
      balance.gate[e] = *balance.daux * balance.dgate[e];
      balance.noise[e] = *balance.daux * balance.dgate[n + e];
    }
  }
}

}  // namespace samfast
