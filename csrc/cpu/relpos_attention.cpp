// SPDX-License-Identifier: Apache-2.0
// Attention with a decomposed relative-position bias, in tiles that stay in the cache.
//
// One head of one window (or map) is a task. Its keys and values are copied once, dense and in
// float. Queries form panels of 64, and a few panels at a time meet all tiles of keys. In a tile,
// queries are the columns. Every product is a multiply() with queries or channels as its contiguous
// side. The backward recomputes the logits and makes all three gradients in one pass; dk and dv of
// the task are in float next to the keys. On small maps all weights of a panel are kept, so their
// sum and delta = sum p dp match them to the last bit. On larger maps the weights come from lse, and
// delta comes from dout and out, which rounds once more.
//
// Without tables there is no bias: the logits start at zero, and the bias factors and their
// gradients are not computed and get no memory.
//
// With fewer tasks than threads, threads share the queries of a task in the forward. In the
// backward they share its keys, and the parts of dq are added in order. Only then do the bits
// depend on the number of threads.
#include "common.h"
#include "relpos_attention_call.h"
#include "relpos_attention_tiles.h"
#include "relpos_attention_work.h"
#include "tile_product.h"

#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

namespace samfast {
namespace {

constexpr int64_t kMaxUnits = 128;  // runs of tasks, each with its own sum for the tables

void place(const float* row, int64_t n, int64_t i, float* to) {
  for (int64_t c = 0; c < n; ++c) to[c * kPitch + i] = row[c];
}

float dot(const float* a, const float* b, int64_t n) {
  double sum[8] = {};
  for (int64_t c = 0; c < n; c += 8)
    for (int64_t e = 0; e < 8; ++e)
      sum[e] += static_cast<double>(a[c + e]) * static_cast<double>(b[c + e]);
  for (int64_t e = 1; e < 8; ++e) sum[0] += sum[e];
  return static_cast<float>(sum[0]);
}

// rel[k, i] = queries_i · table[at_i - k + size - 1] for every k < size.
void relate(const Problem& p, const Panel& panel, const float* table, int64_t size,
            const int64_t* at, float* turned, float* rel) {
  const auto [low, high] = std::minmax_element(at, at + panel.count);
  multiply({table + *low * p.head_dim, p.head_dim, panel.queries, kPitch, turned, kPitch,
            *high - *low + size, panel.lanes, p.head_dim, false, false});
  for (int64_t k = 0; k < size; ++k) {
    float* to = rel + k * kPitch;
    const float* from = turned + (size - 1 - k - *low) * kPitch;
    for (int64_t i = 0; i < panel.count; ++i) to[i] = from[at[i] * kPitch + i];
    std::fill(to + panel.count, to + panel.lanes, 0.0f);
  }
}

template <typename T>
void read_queries(const Problem& p, const Task& t, int64_t first, const View<const T>& q,
                  const float* table_h, const float* table_w, Workspace& work, Panel& panel) {
  const int64_t n = p.head_dim;
  panel.count = std::min(kPanel, t.queries() - first);
  panel.lanes = (panel.count + kLanes - 1) / kLanes * kLanes;
  if (panel.count < panel.lanes) std::fill(panel.queries, panel.queries + n * kPitch, 0.0f);
  for (int64_t i = 0; i < panel.count; ++i)
    panel.h[i] = (first + i) / t.columns, panel.w[i] = (first + i) % t.columns;
  for (int64_t i = 0; i < panel.count; ++i) {
    if (i + kAhead < panel.count) fetch(panel.at(q, t, i + kAhead), n);
    read(panel.at(q, t, i), q.stride[4], 1.0f, n, work.rows);
    place(work.rows, n, i, panel.queries);
  }
  if (!p.tables) return;
  relate(p, panel, table_h, p.height, panel.h, work.turned, panel.rel_h);
  relate(p, panel, table_w, p.width, panel.w, work.turned, panel.rel_w);
}

// Calls f(range) for the tiles of keys first to last, of nearly equal size.
template <typename F>
void each_tile(int64_t first, int64_t last, int64_t width, F&& f) {
  const int64_t parts = (last - first + kTileKeys - 1) / kTileKeys;
  const int64_t size = parts == 0 ? 0 : ((last - first + parts - 1) / parts + 5) / 6 * 6;
  for (int64_t at = first; at < last; at += size)
    f(KeyRange{at, std::min(size, last - at), width});
}

void logits(const Problem& p, const Panel& panel, const KeyRange& range, const float* keys,
            float* tile) {
  if (p.tables) fill_bias(range, panel.lanes, panel.rel_h, panel.rel_w, tile);
  multiply({keys, p.head_dim, panel.queries, kPitch, tile, kPitch, range.count, panel.lanes,
            p.head_dim, false, p.tables});
}

// Runs f(job, workspace number) for all jobs on the available threads, in no fixed assignment.
template <typename F>
void run_jobs(int64_t jobs, int64_t workers, F&& f) {
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t job = next++; job < jobs; job = next++) f(job, worker);
  });
}

int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Parts of a task: one, or enough for every thread.
int64_t parts_of(const Problem& p, int64_t most) {
  if (p.tasks() == 0 || p.tasks() >= threads()) return 1;
  return std::max<int64_t>(1, std::min(most, (threads() + p.tasks() - 1) / p.tasks()));
}

Tensor make_room(int64_t floats) { return torch::stable::empty({floats}, ScalarType::Float); }

float* data_of(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

template <typename T>
void forward_part(const Problem& p, const Inputs<T>& in, const View<T>& out, float* lse,
                  int64_t number, int64_t part, int64_t parts, Workspace& work) {
  const Task t(p, number);
  const int64_t n = p.head_dim, keys = p.keys(), step = kPanels * kPanel;
  const int64_t blocks = (t.queries() + step - 1) / step;
  const int64_t end = std::min(t.queries(), (part + 1) * blocks / parts * step);
  read_keys<const T>({p, t, in.k, in.pad_k}, 0, keys, p.scale, work.keys);
  read_keys<const T>({p, t, in.v, in.pad_v}, 0, keys, 1.0f, work.values);
  for (int64_t first = part * blocks / parts * step; first < end; first += step) {
    const int64_t panels = std::min(kPanels, (end - first + kPanel - 1) / kPanel);
    for (int64_t i = 0; i < panels; ++i) {
      Panel& panel = work.panels[i];
      read_queries(p, t, first + i * kPanel, in.q, in.table_h, in.table_w, work, panel);
      std::fill(panel.sums, panel.sums + n * kPitch, 0.0f);
      std::fill(panel.total, panel.total + kPanel, 0.0f);
      std::fill(panel.maximum, panel.maximum + kPanel, -FLT_MAX);
    }
    each_tile(0, keys, p.width, [&](const KeyRange& range) {
      for (int64_t i = 0; i < panels; ++i) {
        Panel& panel = work.panels[i];
        logits(p, panel, range, work.keys + range.first * n, work.tile);
        if (softmax_tile(work.tile, range.count, panel.lanes, panel.maximum, panel.total,
                         panel.correction))
          scale_rows(panel.sums, n, panel.lanes, panel.correction);
        multiply({work.values + range.first * n, n, work.tile, kPitch, panel.sums, kPitch, n,
                  panel.lanes, range.count, true, true});
      }
    });
    for (int64_t i = 0; i < panels; ++i) {
      const Panel& panel = work.panels[i];
      for (int64_t j = 0; j < panel.count; ++j) {
        const int64_t y = t.top + panel.h[j], x = t.left + panel.w[j];
        for (int64_t c = 0; c < n; ++c)
          work.rows[c] = panel.sums[c * kPitch + j] / panel.total[j];
        write(work.rows, 1.0f, n, panel.at(out, t, j), out.stride[4]);
        lse[((t.batch * p.heads + t.head) * p.image_height + y) * p.image_width + x] =
            static_cast<float>(panel.maximum[j] + std::log(static_cast<double>(panel.total[j])));
      }
    }
  }
}

template <typename T>
void read_gradients(const Problem& p, const Task& t, const Inputs<T>& in, const Gradients<T>& g,
                    Workspace& work, Panel& panel) {
  const int64_t n = p.head_dim;
  std::fill(panel.lse, panel.lse + kPanel, 0.0f);
  std::fill(panel.delta, panel.delta + kPanel, 0.0f);
  std::fill(panel.total, panel.total + kPanel, 0.0f);
  std::fill(panel.moment, panel.moment + kPanel, 0.0f);
  std::fill(panel.correction, panel.correction + kPanel, 1.0f);
  std::fill(panel.sums, panel.sums + n * kPitch, 0.0f);
  if (p.tables) {
    std::fill(panel.dplain, panel.dplain + n * kPitch, 0.0f);
    std::fill(panel.drel_h, panel.drel_h + p.height * kPitch, 0.0f);
    std::fill(panel.drel_w, panel.drel_w + p.width * kPitch, 0.0f);
  }
  if (panel.count < panel.lanes)
    std::fill(panel.dout_turned, panel.dout_turned + n * kPitch, 0.0f);
  for (int64_t i = 0; i < panel.count; ++i) {
    const int64_t y = t.top + panel.h[i], x = t.left + panel.w[i];
    float* dout = panel.dout + i * n;
    if (i + kAhead < panel.count) {
      fetch(panel.at(g.dout, t, i + kAhead), n);
      fetch(panel.at(g.out, t, i + kAhead), n);
    }
    read(panel.at(in.q, t, i), in.q.stride[4], 1.0f, n, panel.plain + i * n);
    read(panel.at(g.dout, t, i), g.dout.stride[4], 1.0f, n, dout);
    read(panel.at(g.out, t, i), g.out.stride[4], 1.0f, n, work.rows);
    place(dout, n, i, panel.dout_turned);
    panel.delta[i] = dot(dout, work.rows, n);
    panel.lse[i] =
        g.lse[((t.batch * p.heads + t.head) * p.image_height + y) * p.image_width + x];
  }
}

// The weights of a panel's tile and their gradient.
void weights(const Problem& p, const KeyRange& range, const float* keys, const float* values,
             const Panel& panel, float* tile, float* dtile) {
  logits(p, panel, range, keys, tile);
  multiply({values, p.head_dim, panel.dout_turned, kPitch, dtile, kPitch, range.count, panel.lanes,
            p.head_dim, false, false});
  weights_tile(range.count, panel.lanes, panel.lse, panel.delta, tile, dtile, panel.total,
               panel.moment);
}

// Adds all that a panel contributes to the gradients.
void gradients(const Problem& p, const KeyRange& range, const float* keys, Panel& panel,
               float* tile, float* dtile, float* dkeys, float* dvalues) {
  const int64_t n = p.head_dim;
  if (p.tables)
    gradient_tile(range, panel.lanes, panel.correction, panel.delta, tile, dtile, panel.drel_h,
                  panel.drel_w);
  else
    plain_gradient_tile(range.count, panel.lanes, panel.correction, panel.delta, tile, dtile);
  multiply({tile, kPitch, panel.dout, n, dvalues, n, range.count, n, panel.count, false, true});
  multiply({dtile, kPitch, panel.plain, n, dkeys, n, range.count, n, panel.count, false, true});
  multiply({keys, n, dtile, kPitch, panel.sums, kPitch, n, panel.lanes, range.count, true, true});
}

// One task's keys first to last with all its queries. Adds to dtables if wanted; dq goes to partial
// (queries, head_dim) if the keys are only a part.
template <typename T>
void backward_part(const Problem& p, const Inputs<T>& in, const Gradients<T>& g, int64_t number,
                   int64_t key, int64_t end, float* partial, float* dtables, Workspace& work) {
  const Task t(p, number);
  const int64_t n = p.head_dim, own = end - key;
  const bool whole = whole_rows(p);
  const int64_t numbers = dtables == nullptr ? 0 : p.table_h() + p.table_w();
  float* dtable_h = dtables == nullptr ? nullptr : work.dtables;
  float* dtable_w = dtables == nullptr ? nullptr : work.dtables + p.table_h();
  read_keys<const T>({p, t, in.k, in.pad_k}, key, end, p.scale, work.keys);
  read_keys<const T>({p, t, in.v, in.pad_v}, key, end, 1.0f, work.values);
  std::fill(work.dkeys, work.dkeys + own * n, 0.0f);
  std::fill(work.dvalues, work.dvalues + own * n, 0.0f);
  for (int64_t first = 0; first < t.queries(); first += kPanels * kPanel) {
    const int64_t panels = std::min(kPanels, (t.queries() - first + kPanel - 1) / kPanel);
    for (int64_t i = 0; i < panels; ++i) {
      Panel& panel = work.panels[i];
      read_queries(p, t, first + i * kPanel, in.q, in.table_h, in.table_w, work, panel);
      read_gradients(p, t, in, g, work, panel);
    }
    const auto offset = [&](const KeyRange& range) { return (range.first - key) * n; };
    const auto row = [&](const KeyRange& range) { return whole ? range.first * kPitch : 0; };
    const auto weigh = [&](const KeyRange& range, Panel& panel) {
      weights(p, range, work.keys + offset(range), work.values + offset(range), panel,
              work.tile + row(range), work.dtile + row(range));
    };
    const auto differentiate = [&](const KeyRange& range, Panel& panel) {
      gradients(p, range, work.keys + offset(range), panel, work.tile + row(range),
                work.dtile + row(range), work.dkeys + offset(range), work.dvalues + offset(range));
    };
    if (whole) {
      for (int64_t i = 0; i < panels; ++i) {
        Panel& panel = work.panels[i];
        each_tile(key, end, p.width, [&](const KeyRange& range) { weigh(range, panel); });
        for (int64_t j = 0; j < panel.lanes; ++j) {
          panel.delta[j] += panel.moment[j] / panel.total[j];
          panel.correction[j] = 1.0f / panel.total[j];
        }
        each_tile(key, end, p.width, [&](const KeyRange& range) { differentiate(range, panel); });
      }
    } else {
      each_tile(key, end, p.width, [&](const KeyRange& range) {
        for (int64_t i = 0; i < panels; ++i) {
          weigh(range, work.panels[i]);
          differentiate(range, work.panels[i]);
        }
      });
    }
    std::fill(work.dtables, work.dtables + numbers, 0.0f);
    for (int64_t i = 0; i < panels; ++i) {
      const Panel& panel = work.panels[i];
      for (int64_t j = 0; j < panel.count; ++j) {
        const int64_t h = panel.h[j], w = panel.w[j];
        const int64_t at_h = (h + p.height - 1) * n, at_w = (w + p.width - 1) * n;
        float *q = panel.plain + j * n, *dq = p.tables ? panel.dplain + j * n : work.rows;
        if (p.tables) {
          spread_query(panel.drel_h + j, p.height, in.table_h + at_h, q, dq,
                       dtable_h == nullptr ? nullptr : dtable_h + at_h, n);
          spread_query(panel.drel_w + j, p.width, in.table_w + at_w, q, dq,
                       dtable_w == nullptr ? nullptr : dtable_w + at_w, n);
          for (int64_t c = 0; c < n; ++c) dq[c] += panel.sums[c * kPitch + j];
        } else {
          for (int64_t c = 0; c < n; ++c) dq[c] = panel.sums[c * kPitch + j];
        }
        if (partial != nullptr)
          std::copy(dq, dq + n, partial + (first + i * kPanel + j) * n);
        else
          write(dq, 1.0f, n, panel.at(g.dq, t, j), g.dq.stride[4]);
      }
    }
    for (int64_t e = 0; e < numbers; ++e) dtables[e] += work.dtables[e];
  }
  write_keys<T>({p, t, g.dk, g.dpad_k}, key, end, p.scale, work.dkeys);
  write_keys<T>({p, t, g.dv, g.dpad_v}, key, end, 1.0f, work.dvalues);
}

// The forward of both operations; without tables there is no bias.
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& pad_k,
            const std::optional<Tensor>& pad_v, const std::optional<Tensor>& table_h,
            const std::optional<Tensor>& table_w, const std::vector<int64_t>& windows,
            double scale, Tensor& out, Tensor& lse, const char* operation) {
  const Problem p = make_problem(q, windows, scale, table_h.has_value());
  float* lse_data = floats(lse, "lse", lse_size(p));
  const int64_t parts = parts_of(p, (p.keys() + kPanel - 1) / kPanel), jobs = p.tasks() * parts;
  const int64_t workers = std::min(threads(), jobs), each = workspace_floats(p, false, p.keys());
  Tensor room = make_room(workers * each);
  dispatch(q, operation, [&](auto element) {
    using T = decltype(element);
    const auto in = inputs<T>(p, q, k, v, pad_k, pad_v, table_h, table_w);
    const auto target = tokens<T>(p, out, "out", q.scalar_type());
    std::vector<Workspace> work;
    for (int64_t worker = 0; worker < workers; ++worker) {
      Room own(data_of(room) + worker * each);
      work.emplace_back(p, own, false, p.keys());
    }
    run_jobs(jobs, workers, [&](int64_t job, int64_t worker) {
      forward_part<T>(p, in, target, lse_data, job / parts, job % parts, parts, work[worker]);
    });
  });
}

// The backward of both operations.
void differentiate(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                   const std::optional<Tensor>& pad_k, const std::optional<Tensor>& pad_v,
                   const std::optional<Tensor>& table_h, const std::optional<Tensor>& table_w,
                   const Tensor& out, const Tensor& lse, const std::vector<int64_t>& windows,
                   double scale, Tensor& dq, Tensor& dk, Tensor& dv,
                   const std::optional<Tensor>& dpad_k, const std::optional<Tensor>& dpad_v,
                   std::optional<Tensor> dtable_h, std::optional<Tensor> dtable_w,
                   const char* operation) {
  const Problem p = make_problem(q, windows, scale, table_h.has_value());
  const ScalarType type = q.scalar_type();
  const float* lse_data = floats(lse, "lse", lse_size(p));
  STD_TORCH_CHECK(dtable_h.has_value() == dtable_w.has_value(),
                  "dtable_h and dtable_w come together");
  const bool tables = dtable_h.has_value();
  float* result_h = tables ? floats(*dtable_h, "dtable_h", p.table_h()) : nullptr;
  float* result_w = tables ? floats(*dtable_w, "dtable_w", p.table_w()) : nullptr;
  const int64_t tiles = (p.keys() + kTileKeys - 1) / kTileKeys;
  const int64_t parts = whole_rows(p) ? 1 : parts_of(p, tiles);
  const int64_t jobs = p.tasks() * parts, all = p.keys() * p.head_dim;
  const int64_t units = std::min(jobs, kMaxUnits), sums = tables ? p.table_h() + p.table_w() : 0;
  const int64_t most_keys = (p.keys() + parts - 1) / parts;
  const int64_t workers = std::min(threads(), units), each = workspace_floats(p, true, most_keys);
  Room layout(nullptr);
  layout.floats(workers * each);
  const int64_t partial_at = layout.used();
  if (parts > 1) layout.floats(jobs * all);
  const int64_t sums_at = layout.used();
  layout.floats(units * sums);
  Tensor room = make_room(layout.used());
  float *base = data_of(room), *dtables = base + sums_at, *partials = base + partial_at;
  dispatch(q, operation, [&](auto element) {
    using T = decltype(element);
    const auto in = inputs<T>(p, q, k, v, pad_k, pad_v, table_h, table_w);
    const Gradients<T> g = {tokens<const T>(p, dout, "dout", type),
                            tokens<const T>(p, out, "out", type),
                            lse_data,
                            tokens<T>(p, dq, "dq", type),
                            tokens<T>(p, dk, "dk", type),
                            tokens<T>(p, dv, "dv", type),
                            padding<T>(p, dpad_k, "dpad_k", type),
                            padding<T>(p, dpad_v, "dpad_v", type)};
    std::vector<Workspace> work;
    for (int64_t worker = 0; worker < workers; ++worker) {
      Room own(base + worker * each);
      work.emplace_back(p, own, true, most_keys);
    }
    run_jobs(units, workers, [&](int64_t unit, int64_t worker) {
      float* mine = tables ? dtables + unit * sums : nullptr;
      if (tables) std::fill(mine, mine + sums, 0.0f);
      for (int64_t job = unit * jobs / units; job < (unit + 1) * jobs / units; ++job) {
        const int64_t part = job % parts, n = p.keys();
        backward_part<T>(p, in, g, job / parts, part * n / parts, (part + 1) * n / parts,
                         parts > 1 ? partials + job * all : nullptr, mine, work[worker]);
      }
    });
    if (parts == 1) return;
    torch::stable::parallel_for(0, p.tasks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t number = begin; number < end; ++number) {
        const Task t(p, number);
        float* total = partials + number * parts * all;
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t e = 0; e < t.queries() * p.head_dim; ++e) total[e] += total[part * all + e];
        for (int64_t i = 0; i < t.queries(); ++i)
          write(total + i * p.head_dim, 1.0f, p.head_dim,
                g.dq.at(t.batch, t.top + i / t.columns, t.left + i % t.columns, t.head),
                g.dq.stride[4]);
      }
    });
  });
  if (!tables) return;
  const auto gather = [&](int64_t first, int64_t count, float* result) {
    std::fill(result, result + count, 0.0f);
    for (int64_t unit = 0; unit < units; ++unit)
      for (int64_t e = 0; e < count; ++e) result[e] += dtables[unit * sums + first + e];
  };
  gather(0, p.table_h(), result_h);
  gather(p.table_h(), p.table_w(), result_w);
}

}  // namespace

void relpos_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                              std::optional<Tensor> pad_k, std::optional<Tensor> pad_v,
                              const Tensor& table_h, const Tensor& table_w,
                              std::vector<int64_t> windows, double scale, Tensor out, Tensor lse) {
  attend(q, k, v, pad_k, pad_v, table_h, table_w, windows, scale, out, lse, "relpos_attention");
}

void relpos_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                               const Tensor& v, std::optional<Tensor> pad_k,
                               std::optional<Tensor> pad_v, const Tensor& table_h,
                               const Tensor& table_w, const Tensor& out, const Tensor& lse,
                               std::vector<int64_t> windows, double scale, Tensor dq, Tensor dk,
                               Tensor dv, std::optional<Tensor> dpad_k,
                               std::optional<Tensor> dpad_v, std::optional<Tensor> dtable_h,
                               std::optional<Tensor> dtable_w) {
  differentiate(dout, q, k, v, pad_k, pad_v, table_h, table_w, out, lse, windows, scale, dq, dk,
                dv, dpad_k, dpad_v, dtable_h, dtable_w, "relpos_attention");
}

void window_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                              std::optional<Tensor> pad_k, std::optional<Tensor> pad_v,
                              std::vector<int64_t> windows, double scale, Tensor out, Tensor lse) {
  attend(q, k, v, pad_k, pad_v, {}, {}, windows, scale, out, lse, "window_attention");
}

void window_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                               const Tensor& v, std::optional<Tensor> pad_k,
                               std::optional<Tensor> pad_v, const Tensor& out, const Tensor& lse,
                               std::vector<int64_t> windows, double scale, Tensor dq, Tensor dk,
                               Tensor dv, std::optional<Tensor> dpad_k,
                               std::optional<Tensor> dpad_v) {
  differentiate(dout, q, k, v, pad_k, pad_v, {}, {}, out, lse, windows, scale, dq, dk, dv, dpad_k,
                dpad_v, {}, {}, "window_attention");
}

}  // namespace samfast
