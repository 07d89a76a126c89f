// SPDX-License-Identifier: Apache-2.0
// The rank-r part of a linear layer with a low-rank update, around the library's GEMM.
//
//   down           h  = drop(x) A^T                      one pass over x
//   up_            y += s z B^T                          one pass over y, in place
//   up_backward    dz = s dy B, dB = s dy^T z            one pass over dy for both
//   down_backward_ dx += drop'(dh A), dA = dh^T drop(x)  one pass over x and dx for both
//
// Blocks of four rows meet four ranks: sixteen accumulators. Rows are summed per chunk, and chunks
// are added in a fixed order. Chunks depend only on the sizes, so the bits do not depend on the
// number of threads. Everything is accumulated in float.
#include "capability.h"
#include "common.h"
#include "philox.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace samfast {
namespace {

constexpr int64_t kRows = 4, kRanks = 4, kMaxChunks = 16, kChunkRows = 64, kTile = 1024;
constexpr int64_t kRunRows = 32;

struct Matrix {  // rows of contiguous elements
  int64_t rows, columns, stride;
};

Matrix matrix(const Tensor& t, const char* name) {
  const bool rows = t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1 || t.numel() == 0);
  STD_TORCH_CHECK(rows, name, " must be a matrix with contiguous rows");
  return {t.size(0), t.size(1), t.stride(0)};
}

// A matrix of known size with elements of one type.
void check(const Tensor& t, const char* name, ScalarType type, int64_t rows, int64_t columns) {
  matrix(t, name);
  STD_TORCH_CHECK(t.size(0) == rows && t.size(1) == columns, name, " is ", t.size(0), " x ",
                  t.size(1), ", not ", rows, " x ", columns);
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has another element type than expected");
}

// A small factor, dense and in float.
void check_factor(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check(t, name, ScalarType::Float, rows, columns);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

int64_t chunks_of(int64_t rows) {
  return std::min(kMaxChunks, (rows + kChunkRows - 1) / kChunkRows);
}

// The rows of a chunk start at multiples of four, except where the matrix ends.
int64_t chunk_start(int64_t chunk, int64_t chunks, int64_t rows) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  return std::min(rows, kRows * (chunk * blocks / chunks));
}

Dropout make_dropout(double p, const std::optional<Tensor>& seed, int64_t threshold) {
  Dropout d;
  if (p > 0.0) {
    STD_TORCH_CHECK(seed.has_value(), "dropout needs a seed");
    d.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
    d.threshold = static_cast<uint32_t>(threshold);
    d.scale = static_cast<float>(1.0 / (1.0 - p));
    d.active = true;
  }
  return d;
}

// Four rows as float pointers. Rows past the end are zeros: their coefficients are zero too, and
// zero times an infinity of a neighbouring row would be NaN.
template <typename T>
struct RowBlock {
  std::vector<float> scratch, factors, zeros;
  const float* row[kRows];
  const float* factor[kRows];

  RowBlock(int64_t columns, bool dropout)
      : scratch(dropout || !std::is_same_v<T, float> ? kRows * columns : 0),
        factors(dropout ? kRows * columns : 0),
        zeros(columns, 0.0f) {}

  void read(const T* data, const Matrix& m, int64_t first, int64_t last, const Dropout& d) {
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t r = first + i;
      factor[i] = nullptr;
      if (r >= last) {
        row[i] = zeros.data();
        if (d.active) factor[i] = zeros.data();
        continue;
      }
      const T* source = data + r * m.stride;
      if (scratch.empty()) {
        row[i] = reinterpret_cast<const float*>(source);
        continue;
      }
      float* target = scratch.data() + i * m.columns;
      to_float(source, target, m.columns);
      row[i] = target;
      if (d.active) {
        float* f = factors.data() + i * m.columns;
        dropout_row(d, r, m.columns, f);
        for (int64_t c = 0; c < m.columns; ++c) target[c] *= f[c];
        factor[i] = f;
      }
    }
  }
};

// out[i][k] += sum_c row[i][c] a[k][c] for four rows and four ranks.
SAMFAST_INLINE void dot_block_body(const float* const* row, const float* a, int64_t stride,
                                   int64_t n, float* out) {
  Vec acc[kRows][kRanks] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Vec x[kRows];
    for (int i = 0; i < kRows; ++i) load(x[i], row[i] + c);
    for (int k = 0; k < kRanks; ++k) {
      Vec w;
      load(w, a + k * stride + c);
      for (int i = 0; i < kRows; ++i) acc[i][k] += x[i] * w;
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int k = 0; k < kRanks; ++k) {
      float total = sum(acc[i][k]);
      for (int64_t e = c; e < n; ++e) total += row[i][e] * a[k * stride + e];
      out[i * kRanks + k] += total;
    }
}
constexpr EachProcessor<dot_block_body> dot_block;

// row[i][c] += factor[i][c] sum_k coef[i][k] b[k][c] for four rows and any number of ranks.
template <int kBytes>
SAMFAST_INLINE void axpy_block_body(float* const* row, const float* const* factor,
                                    const float* coef, int64_t ranks, const float* b,
                                    int64_t stride, int64_t n) {
  using V = typename Lanes<kBytes>::Vector;
  constexpr int64_t kLanes = Lanes<kBytes>::kCount;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    V acc[kRows] = {};
    for (int64_t k = 0; k < ranks; ++k) {
      V w;
      load(w, b + k * stride + c);
      for (int i = 0; i < kRows; ++i) acc[i] += coef[i * ranks + k] * w;
    }
    for (int i = 0; i < kRows; ++i) {
      V y;
      load(y, row[i] + c);
      if (factor[i] != nullptr) {
        V f;
        load(f, factor[i] + c);
        acc[i] *= f;
      }
      store(row[i] + c, y + acc[i]);
    }
  }
  for (; c < n; ++c)
    for (int i = 0; i < kRows; ++i) {
      float total = 0.0f;
      for (int64_t k = 0; k < ranks; ++k) total += coef[i * ranks + k] * b[k * stride + c];
      row[i][c] += factor[i] != nullptr ? factor[i][c] * total : total;
    }
}
constexpr EachProcessor<axpy_block_body<16>, axpy_block_body<32>, axpy_block_body<64>> axpy_block;

// grad[k][c] += sum_i coef[i][k] row[i][c] for four rows and four ranks.
template <int kBytes>
SAMFAST_INLINE void outer_block_body(const float* const* row, const float* coef, int64_t ranks,
                                     float* grad, int64_t stride, int64_t n) {
  using V = typename Lanes<kBytes>::Vector;
  constexpr int64_t kLanes = Lanes<kBytes>::kCount;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    V x[kRows];
    for (int i = 0; i < kRows; ++i) load(x[i], row[i] + c);
    for (int k = 0; k < kRanks; ++k) {
      V g, part = coef[k] * x[0];
      for (int i = 1; i < kRows; ++i) part += coef[i * ranks + k] * x[i];
      load(g, grad + k * stride + c);
      store(grad + k * stride + c, g + part);
    }
  }
  for (; c < n; ++c)
    for (int k = 0; k < kRanks; ++k)
      for (int i = 0; i < kRows; ++i) grad[k * stride + c] += coef[i * ranks + k] * row[i][c];
}
constexpr EachProcessor<outer_block_body<16>, outer_block_body<32>, outer_block_body<64>>
    outer_block;

int64_t padded(int64_t ranks) { return (ranks + kRanks - 1) / kRanks * kRanks; }

// Small float copies with the ranks padded by zeros to a multiple of four.
std::vector<float> padded_rows(const Tensor& a) {  // (ranks, n) -> (padded, n)
  std::vector<float> out(padded(a.size(0)) * a.size(1), 0.0f);
  std::memcpy(out.data(), a.data_ptr(), sizeof(float) * a.size(0) * a.size(1));
  return out;
}

std::vector<float> padded_transpose(const float* b, int64_t n, int64_t ranks) {  // (n, ranks)
  std::vector<float> out(padded(ranks) * n, 0.0f);
  for (int64_t c = 0; c < n; ++c)
    for (int64_t k = 0; k < ranks; ++k) out[k * n + c] = b[c * ranks + k];
  return out;
}

// Four rows of coefficients as float, scaled, zero past the end of the rows and of the ranks.
template <typename T>
void coefficients(const T* z, int64_t stride, int64_t first, int64_t last, int64_t ranks,
                  float scale, float* coef) {
  const int64_t width = padded(ranks);
  std::fill(coef, coef + kRows * width, 0.0f);
  for (int64_t i = 0; i < kRows && first + i < last; ++i)
    for (int64_t k = 0; k < ranks; ++k)
      coef[i * width + k] = scale * static_cast<float>(z[(first + i) * stride + k]);
}

template <typename F>
void for_chunks(int64_t rows, F&& f) {
  const int64_t chunks = chunks_of(rows);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      f(chunk, chunk_start(chunk, chunks, rows), chunk_start(chunk + 1, chunks, rows));
  });
}

// A sum over the rows of a chunk, by runs.
struct RowSum {
  std::vector<float> run;
  float* total;
  int64_t rows = 0;

  RowSum(float* total, int64_t n) : run(n, 0.0f), total(total) {}

  // After each block of kRows rows.
  void next(bool last) {
    rows += kRows;
    if (rows < kRunRows && !last) return;
    for (size_t i = 0; i < run.size(); ++i) total[i] += run[i], run[i] = 0.0f;
    rows = 0;
  }
};

// out = sum over chunks of partial[chunk], each of n floats, in order.
void reduce_chunks(const std::vector<float>& partial, int64_t chunks, int64_t n, float* out) {
  torch::stable::parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* p = partial.data() + chunk * n;
      for (int64_t i = begin; i < end; ++i) out[i] += p[i];
    }
  });
}

// Updates rows in place; their type may be narrower than float.
template <typename T, typename F>
void update_rows(T* data, const Matrix& m, int64_t first, int64_t last, std::vector<float>& scratch,
                 F&& f) {
  float* row[kRows];
  scratch.resize((std::is_same_v<T, float> ? 1 : kRows) * m.columns);
  for (int64_t i = 0; i < kRows; ++i) {
    const bool inside = first + i < last;
    if constexpr (std::is_same_v<T, float>) {
      row[i] = inside ? data + (first + i) * m.stride : scratch.data();
    } else {
      row[i] = scratch.data() + i * m.columns;
      if (inside) to_float(data + (first + i) * m.stride, row[i], m.columns);
    }
  }
  f(row);
  if constexpr (!std::is_same_v<T, float>)
    for (int64_t i = 0; i < kRows && first + i < last; ++i)
      from_float(row[i], data + (first + i) * m.stride, m.columns);
}

}  // namespace

void lora_down(const Tensor& x, const Tensor& a, Tensor h, double p, std::optional<Tensor> seed,
               int64_t threshold) {
  const Matrix m = matrix(x, "x");
  const int64_t ranks = a.size(0), width = padded(ranks), n = m.columns;
  check_factor(a, "a", ranks, n);
  check(h, "h", x.scalar_type(), m.rows, ranks);
  STD_TORCH_CHECK(h.is_contiguous(), "h must be contiguous");
  const std::vector<float> factor = padded_rows(a);
  const Dropout d = make_dropout(p, seed, threshold);
  dispatch(x, "lora_down", [&](auto type) {
    using T = decltype(type);
    const T* data = static_cast<const T*>(x.data_ptr());
    T* out = static_cast<T*>(h.mutable_data_ptr());
    for_chunks(m.rows, [&](int64_t, int64_t begin, int64_t end) {
      RowBlock<T> block(n, d.active);
      for (int64_t first = begin; first < end; first += kRows) {
        block.read(data, m, first, end, d);
        for (int64_t k = 0; k < width; k += kRanks) {
          float dots[kRows * kRanks] = {};
          dot_block(block.row, factor.data() + k * n, n, n, dots);
          for (int64_t i = 0; i < kRows && first + i < end; ++i)
            for (int64_t j = 0; j < kRanks && k + j < ranks; ++j)
              out[(first + i) * ranks + k + j] = static_cast<T>(dots[i * kRanks + j]);
        }
      }
    });
  });
}

void lora_up_(Tensor y, const Tensor& z, const Tensor& b, double scaling) {
  const Matrix m = matrix(y, "y");
  const int64_t ranks = b.size(1), width = padded(ranks), n = m.columns;
  check_factor(b, "b", n, ranks);
  check(z, "z", y.scalar_type(), m.rows, ranks);
  const std::vector<float> factor =
      padded_transpose(static_cast<const float*>(b.data_ptr()), n, ranks);
  dispatch(y, "lora_up_", [&](auto type) {
    using T = decltype(type);
    T* data = static_cast<T*>(y.mutable_data_ptr());
    const T* zs = static_cast<const T*>(z.data_ptr());
    for_chunks(m.rows, [&](int64_t, int64_t begin, int64_t end) {
      std::vector<float> scratch, coef(kRows * width);
      const float* no_factor[kRows] = {};
      for (int64_t first = begin; first < end; first += kRows) {
        coefficients(zs, z.stride(0), first, end, ranks, static_cast<float>(scaling), coef.data());
        update_rows(data, m, first, end, scratch, [&](float* const* row) {
          axpy_block(row, no_factor, coef.data(), width, factor.data(), n, n);
        });
      }
    });
  });
}

// dz (tokens, r) and dB^T (r, n) of one slice of dy.
std::tuple<Tensor, Tensor> lora_up_backward(const Tensor& dy, const Tensor& z, const Tensor& b,
                                            double scaling) {
  const Matrix m = matrix(dy, "dy");
  const int64_t ranks = b.size(1), width = padded(ranks), n = m.columns;
  check_factor(b, "b", n, ranks);
  check(z, "z", dy.scalar_type(), m.rows, ranks);
  const std::vector<float> factor =
      padded_transpose(static_cast<const float*>(b.data_ptr()), n, ranks);
  Tensor dz = torch::stable::empty({m.rows, ranks}, dy.scalar_type());
  Tensor db = torch::stable::empty({ranks, n}, ScalarType::Float);
  const int64_t chunks = chunks_of(m.rows);
  std::vector<float> partial(chunks * width * n, 0.0f);
  const float s = static_cast<float>(scaling);
  dispatch(dy, "lora_up_backward", [&](auto type) {
    using T = decltype(type);
    const T* data = static_cast<const T*>(dy.data_ptr());
    const T* zs = static_cast<const T*>(z.data_ptr());
    T* out = static_cast<T*>(dz.mutable_data_ptr());
    for_chunks(m.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
      RowBlock<T> block(n, false);
      std::vector<float> coef(kRows * width), dots(kRows * width);
      RowSum grad(partial.data() + chunk * width * n, width * n);
      for (int64_t first = begin; first < end; first += kRows) {
        block.read(data, m, first, end, Dropout{});
        coefficients(zs, z.stride(0), first, end, ranks, s, coef.data());
        std::fill(dots.begin(), dots.end(), 0.0f);
        for (int64_t c = 0; c < n; c += kTile) {
          const int64_t span = std::min(kTile, n - c);
          const float* row[kRows];
          for (int64_t i = 0; i < kRows; ++i) row[i] = block.row[i] + c;
          for (int64_t k = 0; k < width; k += kRanks) {
            dot_block(row, factor.data() + k * n + c, n, span, dots.data() + k * kRows);
            outer_block(row, coef.data() + k, width, grad.run.data() + k * n + c, n, span);
          }
        }
        grad.next(first + kRows >= end);
        for (int64_t i = 0; i < kRows && first + i < end; ++i)
          for (int64_t k = 0; k < ranks; ++k)
            out[(first + i) * ranks + k] = static_cast<T>(
                s * dots[k / kRanks * kRanks * kRows + i * kRanks + k % kRanks]);
      }
    });
  });
  std::vector<float> total(width * n);
  reduce_chunks(partial, chunks, width * n, total.data());
  std::memcpy(db.mutable_data_ptr(), total.data(), sizeof(float) * ranks * n);
  return {dz, db};
}

// Adds the low-rank part to dx if there is one, and returns dA (r, n) if x is given.
Tensor lora_down_backward_(std::optional<Tensor> dx, const Tensor& dh, std::optional<Tensor> x,
                           const Tensor& a, double p, std::optional<Tensor> seed,
                           int64_t threshold) {
  STD_TORCH_CHECK(dx.has_value() || x.has_value(), "neither dx nor dA is wanted");
  const Matrix m = x.has_value() ? matrix(*x, "x") : matrix(*dx, "dx");
  const int64_t ranks = a.size(0), width = padded(ranks), n = a.size(1);
  check_factor(a, "a", ranks, n);
  check(dh, "dh", dh.scalar_type(), m.rows, ranks);
  if (x.has_value()) check(*x, "x", dh.scalar_type(), m.rows, n);
  if (dx.has_value()) check(*dx, "dx", dh.scalar_type(), m.rows, n);
  const std::vector<float> factor = padded_rows(a);
  const Dropout d = make_dropout(p, seed, threshold);
  const int64_t chunks = x.has_value() ? chunks_of(m.rows) : 0;
  std::vector<float> partial(chunks * width * n, 0.0f);
  dispatch(dh, "lora_down_backward_", [&](auto type) {
    using T = decltype(type);
    const T* dhs = static_cast<const T*>(dh.data_ptr());
    for_chunks(m.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
      RowBlock<T> block(n, d.active);
      std::vector<float> scratch, coef(kRows * width), factors(d.active ? kRows * n : 0);
      const bool wanted = x.has_value();
      RowSum grad(partial.data() + (wanted ? chunk * width * n : 0), wanted ? width * n : 0);
      for (int64_t first = begin; first < end; first += kRows) {
        coefficients(dhs, dh.stride(0), first, end, ranks, 1.0f, coef.data());
        const float* drop[kRows] = {};
        if (wanted) {
          block.read(static_cast<const T*>(x->data_ptr()), m, first, end, d);
          std::copy(block.factor, block.factor + kRows, drop);
          for (int64_t k = 0; k < width; k += kRanks)
            outer_block(block.row, coef.data() + k, width, grad.run.data() + k * n, n, n);
          grad.next(first + kRows >= end);
        } else if (d.active) {
          for (int64_t i = 0; i < kRows; ++i) {
            dropout_row(d, std::min(first + i, end - 1), n, factors.data() + i * n);
            drop[i] = factors.data() + i * n;
          }
        }
        if (dx.has_value())
          update_rows(static_cast<T*>(dx->mutable_data_ptr()), matrix(*dx, "dx"), first, end,
                      scratch, [&](float* const* row) {
                        axpy_block(row, drop, coef.data(), width, factor.data(), n, n);
                      });
      }
    });
  });
  Tensor da = torch::stable::empty({x.has_value() ? ranks : 0, n}, ScalarType::Float);
  if (x.has_value()) {
    std::vector<float> total(width * n);
    reduce_chunks(partial, chunks, width * n, total.data());
    std::memcpy(da.mutable_data_ptr(), total.data(), sizeof(float) * ranks * n);
  }
  return da;
}

}  // namespace samfast
