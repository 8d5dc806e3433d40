// The operators of a velocity network on the CPU: its walk and its loss, and the way back of both. Compiled on first use
// and called by `fastflow.kernels.cpu`, which documents the arguments.
//
// A task is a block of rows of one member on one thread: it does all steps of its rows. Sums over rows are made in
// chunks, whose number depends on the sizes alone, and are added in order: the number of threads changes no bit.

#include <exception>
#include <type_traits>

#include "network.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

constexpr long BLOCK = 96;                  // rows of a task going forward, and of a step of a chunk on the way back
constexpr long BLOCK_FILM = 48;             // where every row carries a scale and a shift for each layer
constexpr long CHUNK = 512;                 // fewest rows of a chunk of weight gradients
constexpr long CHUNKS = 8;                  // most chunks of a member: each needs room for all its gradients
constexpr double WORTH = 4e6;               // multiplications that are worth waking a thread for
constexpr size_t KEEP = size_t(256) << 20;  // bytes a thread holds on to between calls

// Ask for huge pages before memory is first touched: the system takes a microsecond or two for each page, which is as
// long as what is written there took to compute.
void expect_large(void* memory, size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t huge = size_t(2) << 20;
  const size_t from = (reinterpret_cast<size_t>(memory) + huge - 1) / huge * huge,
               to = (reinterpret_cast<size_t>(memory) + size) / huge * huge;
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)memory, (void)size;
#endif
}

thread_local Workspace own_buffers, packed_weights, packed_others, chunk_sums;

template <class Do>
void for_all(long tasks, long threads, Do what) {
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    for (long i = 0; i < tasks; i++) what(i);
    return;
  }
  std::exception_ptr failed;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(threads))
#endif
  for (long i = 0; i < tasks; i++) {
    try {
      what(i);
    } catch (...) {
#ifdef _OPENMP
#pragma omp critical
#endif
      failed = std::current_exception();
    }
  }
  if (failed) std::rethrow_exception(failed);
}

template <class P>
Weights<P> member_weights(Arguments& a, const Net& net) {
  Weights<P> w;
  for (long i = 0; i < net.L + (net.D > 0); i++)
    w.w.push_back(P(a.pointer<void>())), w.b.push_back(P(a.pointer<void>()));
  for (long i = 0; i < net.L && net.affine(); i++)
    w.scale.push_back(P(a.pointer<void>())), w.shift.push_back(P(a.pointer<void>()));
  for (long i = 0; i < net.L && net.film(); i++) w.film.push_back(P(a.pointer<void>()));
  return w;
}

// Sizes of one member's tensors, in the order of the pointers.
struct Sizes {
  std::vector<long> w, b;
  explicit Sizes(const Net& net) {
    for (long i = 0; i < net.L + (net.D > 0); i++) {
      long rows = i == 0 ? net.cond() + net.F + (net.film() ? 0 : net.T) : i == net.L ? net.layers[net.L - 1].width : 0;
      const long columns = i == net.L ? net.D : net.layers[i].width;
      for (long j = 0; i > 0 && i < net.L && j < net.layers[i].inputs; j++)
        rows += net.layers[net.layers[i].input[j]].width;
      w.push_back(rows * columns), b.push_back(columns);
    }
  }
};

// Member e of a field, whose tensors hold its members one behind the other.
template <class P>
Weights<P> of_member(const Weights<P>& field, const Net& net, const Sizes& sizes, long e) {
  Weights<P> w = field;
  for (size_t i = 0; i < w.w.size(); i++) {
    if (w.w[i]) w.w[i] += e * sizes.w[i];
    if (w.b[i]) w.b[i] += e * sizes.b[i];
  }
  for (size_t i = 0; i < w.scale.size(); i++) {
    if (w.scale[i]) w.scale[i] += e * net.layers[i].width;
    if (w.shift[i]) w.shift[i] += e * net.layers[i].width;
  }
  // Of FiLM's weight [encoded cond and time, 2 width], the rows of time.
  for (size_t i = 0; i < w.film.size(); i++)
    if (w.film[i]) w.film[i] += (e * net.film_inputs + net.film_inputs - net.T) * 2 * net.layers[i].width;
  return w;
}

// What every call has.
struct Call {
  Net net;
  Sizes sizes;
  long fields, per_field, E, B, S, M, N, threads;
  bool shared;
  const float *cond, *features, *film;
  long cond_e, features_n, features_e, features_m, film_e, film_b;
  std::vector<Weights<const float*>> given;

  explicit Call(Arguments& a) : net(a), sizes(net) {
    fields = a.integer(), per_field = a.integer(), B = a.integer(), S = a.integer(), N = a.integer(),
    threads = a.integer();
    shared = a.integer() != 0;
    cond_e = a.integer(), features_n = a.integer(), features_e = a.integer(), features_m = a.integer();
    film_e = a.integer(), film_b = a.integer();
    E = fields * per_field;
    settle();
    cond = a.pointer<float>(), features = a.pointer<float>(), film = a.pointer<float>();
    for (long f = 0; f < fields; f++) {
      const auto field = member_weights<const float*>(a, net);
      for (long e = 0; e < per_field; e++) given.push_back(of_member(field, net, sizes, e));
    }
  }
  // Few rows are not worth waking threads for.
  void settle() {
    M = B * S;
    double weights = 0;
    for (long n : sizes.w) weights += double(n);
    threads = std::max<long>(1, std::min<long>(threads, long(weights * double(E * M) * double(N) / WORTH)));
  }
  long block() const { return net.film() ? BLOCK_FILM : BLOCK; }
  const float* cond_of(long e) const { return cond + e * cond_e; }
  const float* film_of(long e) const { return film + e * film_e; }
};

template <bool BF>
std::vector<Packed> pack_weights(const Call& c, bool back, Workspace& memory = packed_weights) {
  std::vector<Packed> packed(size_t(c.E));
  memory.hold([&](Arena& a) {
    for (Packed& p : packed) p.lay<BF>(a, c.net, c.N, c.shared, back);
  });
  for_all(c.E, c.threads, [&](long e) {
    packed[size_t(e)].pack_all<BF>(c.net, c.given[size_t(e)], c.features + e * c.features_e, c.features_n, c.N,
                                   c.shared, back);
  });
  return packed;
}

// The velocity that a head implies, v = scale * head or a quotient with x; and the way back.
struct Velocity {
  float scale, by = 1.0f, sign = 0.0f;  // v = scale * head, or sign * (scale * head - x) / by
  Velocity(const Net& net, float t) : scale(net.scale) {
    if (net.prediction == ENDPOINT) by = std::max(1.0f - t, TIME_MARGIN), sign = 1.0f;
    if (net.prediction == NOISE) by = std::max(t, TIME_MARGIN), sign = -1.0f;
  }
  float of(float head, float x) const { return sign == 0.0f ? scale * head : sign * (scale * head - x) / by; }
  float to_head(float d_v) const { return sign == 0.0f ? scale * d_v : sign * scale * (d_v / by); }
  float to_x(float d_v) const { return sign == 0.0f ? 0.0f : -sign * (d_v / by); }
};

// Walks ---------------------------------------------------------------------------------------------------------------

// x_{k+1} = x_k + h (b_1 v_1 + b_2 v_2), v_2 at x_k + a h v_1.
struct Walk : Call {
  long K, stages;
  float a, b_1, b_2;
  double start, end;
  const float *t_0, *t_1, *x_0, *noise;

  explicit Walk(Arguments& g) : Call(g) {
    K = g.integer(), stages = g.integer();
    a = g.real(), b_1 = g.real(), b_2 = g.real();
    start = *g.reals++, end = *g.reals++;
    t_0 = g.pointer<float>(), t_1 = g.pointer<float>(), x_0 = g.pointer<float>(), noise = g.pointer<float>();
  }
  float width(long row) const { return t_0 ? (t_1[row] - t_0[row]) / float(K) : float((end - start) / double(K)); }
  float time(long row, long k, bool second) const {
    const double part = (double(k) + (second ? double(a) : 0.0)) / double(K);
    if (!t_0) return float((1 - part) * start + part * end);
    return float(1 - part) * t_0[row] + float(part) * t_1[row];
  }
};

// v [rows, D] of evaluation n of the block's rows, the first of which is `row` of all members' and `first` of its own.
template <bool BF>
void velocity(const Walk& w, Block<BF>& b, long e, long first, long n, const float* x, float* v, long k, bool second) {
  const long D = w.net.D, row = e * w.M + first;
  if (!w.shared) b.set_time(w.features + n * w.features_n + e * w.features_e + first * w.features_m, w.features_m);
  b.set_state(x);
  b.forward(n, w.net.film() ? w.film_of(e) : nullptr, w.film_b, first, w.S);
  for (long r = 0; r < b.rows; r++) {
    const Velocity how(w.net, w.time(row + r, k, second));
    for (long j = 0; j < D; j++) v[r * D + j] = how.of(b.head[r * w.net.pad_out + j], x[r * D + j]);
  }
}

// at_end: where the velocity at x_1 and its time goes, the last of N evaluations; or null.
template <bool BF>
void walk_rows(const Walk& w, const std::vector<Packed>& packed, float* x_1, float* path, float* stages,
               float* at_end) {
  const long D = w.net.D, count = w.E * w.M * D;
  // Small blocks where there are more threads than blocks: rows do not depend on one another.
  const long most = std::max<long>(ROWS, round_up((w.E * w.M + w.threads - 1) / w.threads, ROWS));
  const long block = std::min(w.block(), most), blocks = (w.M + block - 1) / block;
  for_all(w.E * blocks, w.threads, [&](long task) {
    const long e = task / blocks, first = task % blocks * block, row = e * w.M + first;
    Block<BF> b(w.net);
    float *x, *v, *v_2, *at;
    own_buffers.hold([&](Arena& a) {
      b.lay(a, block, w.shared, false);
      x = a.take(block * D), v = a.take(block * D), v_2 = a.take(block * D), at = a.take(block * D);
    });
    b.w = &packed[size_t(e)], b.rows = std::min(block, w.M - first);
    const long size = b.rows * D;
    memcpy(x, w.x_0 + row * D, size_t(size) * 4);
    b.set_cond(w.cond_of(e), first, w.S);
    for (long k = 0; k < w.K; k++) {
      if (path) memcpy(path + k * count + row * D, x, size_t(size) * 4);
      velocity(w, b, e, first, k * w.stages, x, v, k, false);
      if (w.stages == 2) {
        for (long i = 0; i < size; i++) at[i] = x[i] + v[i] * (w.a * w.width(row + i / D));
        if (stages) memcpy(stages + k * count + row * D, at, size_t(size) * 4);
        velocity(w, b, e, first, k * 2 + 1, at, v_2, k, true);
        for (long i = 0; i < size; i++) v[i] = w.b_1 * v[i] + w.b_2 * v_2[i];
      }
      const float* add = w.noise ? w.noise + k * count + row * D : nullptr;
      for (long i = 0; i < size; i++) x[i] = x[i] + v[i] * w.width(row + i / D);
      for (long i = 0; add && i < size; i++) x[i] += add[i];
    }
    memcpy(x_1 + row * D, x, size_t(size) * 4);
    if (at_end) velocity(w, b, e, first, w.K * w.stages, x, at_end + row * D, w.K, false);
    own_buffers.trim(KEEP);
  });
}

template <bool BF>
void walk(Arguments& g) {
  const Walk w(g);
  float *x_1 = g.pointer<float>(), *path = g.pointer<float>(), *stages = g.pointer<float>(),
        *at_end = g.pointer<float>();
  walk_rows<BF>(w, pack_weights<BF>(w, false), x_1, path, stages, at_end);
  packed_weights.trim(KEEP);
}

// A walk whose weights are packed once: fields, steps and times of `Walk`, rows of each call.
struct Frozen {
  Walk walk;
  Workspace memory;
  std::vector<Packed> packed;
  explicit Frozen(Arguments& g) : walk(g), packed(pack_weights<PAIRS>(walk, false, memory)) { walk.given.clear(); }
  void run(long rows, long samples, long threads, bool cond_per_member, const float* cond, const float* x_0,
           const float* noise, float* x_1) const {
    Walk w = walk;
    w.B = rows, w.S = samples, w.threads = threads, w.cond_e = cond_per_member ? rows * w.net.C : 0;
    w.cond = cond, w.x_0 = x_0, w.noise = noise;
    w.settle();
    walk_rows<PAIRS>(w, packed, x_1, nullptr, nullptr, nullptr);
  }
};

// to += factor * from.
void add_scaled(float* to, float factor, const float* from, long n) {
  long k = 0;
  for (; k + LANES <= n; k += LANES) store(to + k, load(to + k) + factor * load(from + k));
  for (; k < n; k++) to[k] += factor * from[k];
}

// Sums over rows ------------------------------------------------------------------------------------------------------

// The weight gradients of all members, made chunk by chunk.
template <bool BF>
struct Chunks {
  const Call& c;
  bool with_weights, with_features;    // with_features: of time features that all rows share
  long chunks, rows;                   // of a member; of a chunk
  std::vector<Weights<float*>> out;    // of all members
  float* d_features;                   // [E, N, T]
  std::vector<Weights<float*>> grads;  // [chunks, E]; the first chunk's are the results themselves
  std::vector<float*> features;
  std::vector<Sums> sums;

  // together: what a chunk's rows are a multiple of.
  Chunks(const Call& call, Arguments& g, bool weights, long together = ROWS) : c(call), with_weights(weights) {
    const Net& net = c.net;
    chunks = weights ? std::max<long>(1, std::min(CHUNKS, c.M / CHUNK)) : (c.M + c.block() - 1) / c.block();
    rows = round_up((c.M + chunks - 1) / chunks, together);
    chunks = std::max<long>(1, (c.M + rows - 1) / rows);
    d_features = g.pointer<float>();
    with_features = d_features && c.shared && weights;
    for (long f = 0; f < c.fields && weights; f++) {
      const auto field = member_weights<float*>(g, net);
      for (long e = 0; e < c.per_field; e++) out.push_back(of_member(field, net, c.sizes, e));
    }
    sums.resize(size_t(chunks * c.E)), grads.resize(size_t(chunks * c.E)), features.resize(size_t(chunks * c.E));
    chunk_sums.hold([&](Arena& a) {
      for (long i = 0; i < chunks * c.E; i++) {
        if (with_weights) sums[size_t(i)].lay(a, net, c.N, c.shared);
        if (with_features) features[size_t(i)] = i < c.E ? d_features + i * c.N * net.T : a.take(c.N * net.T);
        if (!with_weights) continue;
        Weights<float*>& to = grads[size_t(i)];
        if (i < c.E) {
          to = out[size_t(i)];
          continue;
        }
        to = Weights<float*>();
        for (size_t l = 0; l < c.sizes.w.size(); l++)
          to.w.push_back(a.take(c.sizes.w[l])), to.b.push_back(a.take(c.sizes.b[l]));
        for (long l = 0; l < net.L && net.affine(); l++)
          to.scale.push_back(a.take(net.layers[l].width)), to.shift.push_back(a.take(net.layers[l].width));
        for (long l = 0; l < net.L && net.film(); l++) to.film.push_back(a.take(net.T * 2 * net.layers[l].width));
      }
    });
  }

  // All tensors of a member with their sizes.
  template <class Do>
  void each(const Weights<float*>& g, Do what) const {
    for (size_t l = 0; l < g.w.size(); l++) what(g.w[l], c.sizes.w[l]), what(g.b[l], c.sizes.b[l]);
    for (size_t l = 0; l < g.scale.size(); l++)
      what(g.scale[l], c.net.layers[l].width), what(g.shift[l], c.net.layers[l].width);
    for (size_t l = 0; l < g.film.size(); l++) what(g.film[l], c.net.T * 2 * c.net.layers[l].width);
  }

  void begin(long i) {
    if (!with_weights) return;
    sums[size_t(i)].clear(c.net, c.N, c.shared);
    each(grads[size_t(i)], [](float* p, long n) { memset(p, 0, size_t(n) * 4); });
  }

  // What a chunk summed in its own layout goes to its gradients.
  void finish(long i) {
    if (!with_weights) return;
    const Net& net = c.net;
    const Sums& s = sums[size_t(i)];
    const long T = net.T, e = i % c.E;
    auto feature = [&](long n) { return c.features + e * c.features_e + n * c.features_n; };
    auto add = [](float* to, const float* from, long n) { add_scaled(to, 1.0f, from, n); };
    float* d_f = with_features ? features[size_t(i)] : nullptr;
    if (d_f) memset(d_f, 0, size_t(c.N * T) * 4);
    // The rows of time: d_w [T, columns] += features^T d_table, d_features += d_table w^T.
    auto time_rows = [&](const float* table, long ld, long columns, const float* w, float* d_w, long ldw) {
      for (long n = 0; n < c.N; n++, table += ld)
        for (long k = 0; k < T; k++) {
          const float f = feature(n)[k];
          float dot = 0.0f;
          add_scaled(d_w + k * ldw, f, table, columns);
          for (long j = 0; d_f && j < columns; j++) dot += table[j] * w[k * ldw + j];
          if (d_f) d_f[n * T + k] += dot;
        }
    };
    Weights<float*>* g = &grads[size_t(i)];
    const Weights<const float*>& given = c.given[size_t(e)];
    for (long l = 0; l < net.L; l++) {
      const Layer& layer = net.layers[l];
      const size_t at = size_t(l);
      if (!(l == 0 && c.shared)) add(g->b[at], s.bias[at], layer.width);
      if (net.affine()) add(g->scale[at], s.scale[at], layer.width), add(g->shift[at], s.shift[at], layer.width);
      if (net.film() && c.shared)
        for (long j = 0; j < 2; j++)
          time_rows(s.film[at] + j * layer.pad, 2 * layer.pad, layer.width, given.film[at] + j * layer.width,
                    g->film[at] + j * layer.width, 2 * layer.width);
    }
    const Layer &first = net.layers[0], &last = net.layers[net.L - 1];
    if (c.shared) {
      for (long n = 0; n < c.N; n++) add(g->b[0], s.table + n * first.pad, first.width);
      const long skip = (net.cond() + net.F) * first.width;
      if (!net.film()) time_rows(s.table, first.pad, first.width, given.w[0] + skip, g->w[0] + skip, first.width);
    }
    if (net.D > 0) add(g->b[size_t(net.L)], s.head_bias, net.D);
    for (long d = 0; d < net.D && net.D <= DOTS; d++)
      for (long k = 0; k < last.width; k++) g->w[size_t(net.L)][k * net.D + d] += s.head[d * last.pad + k];
  }

  // Chunks are added in order, whatever finished first.
  void join() {
    if (chunks > 1 && with_weights) {
      for_all(c.E, c.threads, [&](long e) {
        for (long i = e + c.E; i < chunks * c.E; i += c.E) {
          std::vector<std::pair<float*, long>> to, from;
          each(grads[size_t(e)], [&](float* p, long n) { to.push_back({p, n}); });
          each(grads[size_t(i)], [&](float* p, long n) { from.push_back({p, n}); });
          if (with_features)
            to.push_back({features[size_t(e)], c.N * c.net.T}), from.push_back({features[size_t(i)], c.N * c.net.T});
          for (size_t t = 0; t < to.size(); t++) add_scaled(to[t].first, 1.0f, from[t].first, to[t].second);
        }
      });
    }
    chunk_sums.trim(KEEP);
  }
};

// Rows' own gradients that the network's way back leaves in a block, to where the caller wants them.
struct RowGradients {
  float *cond, *film, *features;  // [E, M, C], [E, M, film width], [E, N, M, T]; null where not wanted
  explicit RowGradients(Arguments& g) {
    cond = g.pointer<float>(), film = g.pointer<float>(), features = g.pointer<float>();
  }

  template <bool BF>
  void take(const Call& c, const Block<BF>& b, long e, long first, long n, bool more) const {
    const Net& net = c.net;
    const long row = e * c.M + first;
    for (long r = 0; film && r < b.rows; r++)
      for (long i = 0; i < net.L; i++) {
        const Layer& layer = net.layers[i];
        float* to = film + (row + r) * net.film_width + layer.film;
        const float* from = b.film[size_t(i)] + r * 2 * layer.pad;
        for (long k = 0; k < 2 * layer.pad; k += LANES)
          store(to + k, more ? load(to + k) + load(from + k) : load(from + k));
      }
    for (long r = 0; features && !c.shared && r < b.rows; r++)
      memcpy(features + ((e * c.N + n) * c.M + first + r) * net.T, b.d_time + r * round_up(net.T, COLS),
             size_t(net.T) * 4);
  }
};

template <bool BF>
void walk_bwd(Arguments& g) {
  const Walk w(g);
  const bool with_weights = g.integer() != 0;
  const float *grad = g.pointer<float>(), *grad_path = g.pointer<float>(), *path = g.pointer<float>(),
              *stages = g.pointer<float>();
  float *d_x_0 = g.pointer<float>(), *d_noise = g.pointer<float>();
  const RowGradients of_rows(g);
  Chunks<BF> chunks(w, g, with_weights);
  const auto packed = pack_weights<BF>(w, true);
  const long D = w.net.D, count = w.E * w.M * D, block = w.block();
  for_all(w.E * chunks.chunks, w.threads, [&](long task) {
    const long e = task % w.E, from = task / w.E * chunks.rows, to = std::min(w.M, from + chunks.rows);
    Block<BF> b(w.net);
    float *d_x, *d_v, *d_at, *v;
    own_buffers.hold([&](Arena& a) {
      b.lay(a, block, w.shared, true);
      d_x = a.take(block * D), d_v = a.take(block * D), d_at = a.take(block * D), v = a.take(block * D);
    });
    b.w = &packed[size_t(e)], b.sums = &chunks.sums[size_t(task)], b.grads = &chunks.grads[size_t(task)];
    chunks.begin(task);
    for (long first = from; first < to; first += block) {
      const long row = e * w.M + first;
      b.rows = std::min(block, to - first);
      const long size = b.rows * D;
      b.set_cond(w.cond_of(e), first, w.S);
      if (w.net.cond()) memset(b.d_base, 0, size_t(b.rows * w.net.layers[0].pad) * 4);
      if (grad) memcpy(d_x, grad + row * D, size_t(size) * 4);
      else memset(d_x, 0, size_t(size) * 4);
      bool more = false;
      // Back through one evaluation at `x`: d_v is the velocity's gradient, `to` grows by the state's.
      auto back = [&](const float* x, long k, bool second, float* to) {
        const long n = k * w.stages + second;
        velocity(w, b, e, first, n, x, v, k, second);
        memset(b.d_head, 0, size_t(b.rows * w.net.pad_out) * 4);
        for (long r = 0; r < b.rows; r++) {
          const Velocity how(w.net, w.time(row + r, k, second));
          for (long j = 0; j < D; j++) {
            b.d_head[r * w.net.pad_out + j] = how.to_head(d_v[r * D + j]);
            to[r * D + j] += how.to_x(d_v[r * D + j]);
          }
        }
        b.backward(n, with_weights, true, of_rows.features != nullptr);
        b.state_gradient(x, to);
        of_rows.take(w, b, e, first, n, more);
        more = true;
      };
      for (long k = w.K - 1; k >= 0; k--) {
        if (d_noise) memcpy(d_noise + k * count + row * D, d_x, size_t(size) * 4);
        const float* x = path + k * count + row * D;
        if (w.stages == 2) {
          for (long i = 0; i < size; i++) d_v[i] = w.b_2 * w.width(row + i / D) * d_x[i], d_at[i] = 0.0f;
          back(stages + k * count + row * D, k, true, d_at);
          for (long i = 0; i < size; i++)
            d_v[i] = w.width(row + i / D) * (w.b_1 * d_x[i] + w.a * d_at[i]), d_x[i] += d_at[i];
        } else {
          for (long i = 0; i < size; i++) d_v[i] = w.width(row + i / D) * d_x[i];
        }
        back(x, k, false, d_x);
        for (long i = 0; grad_path && i < size; i++) d_x[i] += grad_path[k * count + row * D + i];
      }
      b.cond_gradient(with_weights, of_rows.cond ? of_rows.cond + row * w.net.C : nullptr);
      if (d_x_0) memcpy(d_x_0 + row * D, d_x, size_t(size) * 4);
    }
    chunks.finish(task);
    own_buffers.trim(KEEP);
  });
  chunks.join();
  packed_weights.trim(KEEP);
}

// Losses --------------------------------------------------------------------------------------------------------------

// Functions whose result must be the same bits wherever they are called: what is compiled into its caller may take up
// products into sums that another caller rounds first.
#define SAME_BITS __attribute__((noinline))

struct Loss : Call {
  bool interpolate;
  float keep;        // 1 - sigma_min
  long sharing = 1;  // rows that share one of b's
  long apart;        // rows of a, b and t from one member to the next: 0 where members share them
  const float *a, *b, *t;

  explicit Loss(Arguments& g) : Call(g) {
    interpolate = g.integer() != 0, apart = M;
    keep = float(1.0 - *g.reals++);
    a = g.pointer<float>(), b = g.pointer<float>(), t = g.pointer<float>();
  }
  const float* b_of(long row) const { return b + row / sharing * net.D; }
};

// The block's rows: their inputs, with their point x [rows, D].
template <bool BF>
SAME_BITS void set_inputs(const Loss& w, Block<BF>& b, long e, long first, float* x, bool for_products) {
  const long D = w.net.D, row = e * w.apart + first;
  for (long r = 0; r < b.rows; r++) {
    const float *from = w.a + (row + r) * D, *to = w.b_of(row + r), t = w.t[row + r];
    for (long j = 0; j < D; j++)
      x[r * D + j] = w.interpolate ? (1.0f - w.keep * t) * from[j] + t * to[j] : from[j];
  }
  b.set_cond(w.cond_of(e), first, w.S, for_products);
  b.set_time(w.features + e * w.features_e + first * w.features_m, w.features_m);
  b.set_state(x);
}
// error [rows, D] of the velocity.
template <bool BF>
SAME_BITS void errors(const Loss& w, Block<BF>& b, long e, long first, const float* x, float* error) {
  const long D = w.net.D, row = e * w.apart + first;
  b.forward(0, w.net.film() ? w.film_of(e) : nullptr, w.film_b, first, w.S);
  for (long r = 0; r < b.rows; r++) {
    const Velocity how(w.net, w.t[row + r]);
    const float *from = w.a + (row + r) * D, *to = w.b_of(row + r);
    for (long j = 0; j < D; j++)
      error[r * D + j] =
          how.of(b.head[r * w.net.pad_out + j], x[r * D + j]) - (w.interpolate ? to[j] - w.keep * from[j] : to[j]);
  }
}
// losses [rows] of errors [rows, D].
SAME_BITS void mean_squares(const float* error, long rows, long D, float* losses) {
  for (long r = 0; r < rows; r++) {
    float sum = 0.0f;
    for (long j = 0; j < D; j++) sum += error[r * D + j] * error[r * D + j];
    losses[r] = sum / float(D);
  }
}
// A loss of the velocity (error 0) as that of the noise or the end point that the velocity implies, at time t.
inline float error_weight(long error, float t) {
  return error == 0 ? 1.0f : error == 1 ? t * t : (1.0f - t) * (1.0f - t);
}
// What comes from the gradients d_error [rows, D] of the block's errors: the head's, and the points' d_x [rows, D].
template <bool BF>
void begin_back(const Loss& w, Block<BF>& b, long row, const float* d_error, float* d_x) {
  const long D = w.net.D;
  if (w.net.cond()) memset(b.d_base, 0, size_t(b.rows * w.net.layers[0].pad) * 4);
  memset(b.d_head, 0, size_t(b.rows * w.net.pad_out) * 4);
  for (long r = 0; r < b.rows; r++) {
    const Velocity how(w.net, w.t[row + r]);
    for (long j = 0; j < D; j++) {
      b.d_head[r * w.net.pad_out + j] = how.to_head(d_error[r * D + j]);
      d_x[r * D + j] = how.to_x(d_error[r * D + j]);
    }
  }
}

template <bool BF>
void loss(Arguments& g) {
  const Loss w(g);
  // Kept for the way back where it is asked for: the products' results, and the errors [E, M, D].
  float *losses = g.pointer<float>(), *kept = g.pointer<float>(), *kept_error = g.pointer<float>();
  if (kept) expect_large(kept, size_t(w.E * w.M * w.net.padded_widths()) * 4);
  const auto packed = pack_weights<BF>(w, false);
  const long D = w.net.D, most = std::max<long>(ROWS, round_up((w.E * w.M + w.threads - 1) / w.threads, ROWS));
  const long block = std::min(w.block(), most), blocks = (w.M + block - 1) / block;
  for_all(w.E * blocks, w.threads, [&](long task) {
    const long e = task / blocks, first = task % blocks * block;
    Block<BF> b(w.net);
    float *x, *error;
    own_buffers.hold([&](Arena& a) {
      b.lay(a, block, false, false);
      x = a.take(block * D), error = a.take(block * D);
    });
    b.w = &packed[size_t(e)], b.rows = std::min(block, w.M - first);
    if (kept) b.place(kept, w.E * w.M, e * w.M + first), error = kept_error + (e * w.M + first) * D;
    set_inputs(w, b, e, first, x, true);
    errors(w, b, e, first, x, error);
    mean_squares(error, b.rows, D, losses + e * w.M + first);
    own_buffers.trim(KEEP);
  });
  packed_weights.trim(KEEP);
}

template <bool BF>
void loss_bwd(Arguments& g) {
  const Loss w(g);
  const bool with_weights = g.integer() != 0;
  const float* grad = g.pointer<float>();  // [E, M]
  float* kept = g.pointer<float>();
  const float* kept_error = g.pointer<float>();
  float *d_a = g.pointer<float>(), *d_b = g.pointer<float>();
  const RowGradients of_rows(g);
  Chunks<BF> chunks(w, g, with_weights);
  const auto packed = pack_weights<BF>(w, true);
  const long D = w.net.D, block = w.block();
  for_all(w.E * chunks.chunks, w.threads, [&](long task) {
    const long e = task % w.E, from = task / w.E * chunks.rows, to = std::min(w.M, from + chunks.rows);
    Block<BF> b(w.net);
    float *x, *error, *d_x;
    own_buffers.hold([&](Arena& a) {
      b.lay(a, block, false, true, kept != nullptr);
      x = a.take(block * D), error = a.take(block * D), d_x = a.take(block * D);
    });
    b.w = &packed[size_t(e)], b.sums = &chunks.sums[size_t(task)], b.grads = &chunks.grads[size_t(task)];
    chunks.begin(task);
    for (long first = from; first < to; first += block) {
      const long row = e * w.M + first;
      b.rows = std::min(block, to - first);
      set_inputs(w, b, e, first, x, !kept);
      if (kept) {
        b.place(kept, w.E * w.M, row);
        memcpy(error, kept_error + row * D, size_t(b.rows * D) * 4);
        for (long i = 0; i < w.net.L; i++)
          b.finish_layer(i, 0, w.net.film() ? w.film_of(e) : nullptr, w.film_b, first, w.S);
      } else {
        errors(w, b, e, first, x, error);
      }
      for (long i = 0; i < b.rows * D; i++) error[i] *= 2.0f / float(D) * grad[row + i / D];
      begin_back(w, b, row, error, d_x);
      const bool with_state = d_a || (d_b && w.interpolate);
      b.backward(0, with_weights, with_state, of_rows.features != nullptr);
      if (with_state) b.state_gradient(x, d_x);
      of_rows.take(w, b, e, first, 0, false);
      b.cond_gradient(with_weights, of_rows.cond ? of_rows.cond + row * w.net.C : nullptr);
      for (long r = 0; r < b.rows; r++)
        for (long j = 0; j < D; j++) {
          const long i = (row + r) * D + j;
          const float t = w.t[row + r], to_x = d_x[r * D + j], d_error = error[r * D + j];
          // The target is b - keep a, or b itself.
          if (d_a) d_a[i] = w.interpolate ? (1.0f - w.keep * t) * to_x + w.keep * d_error : to_x;
          if (d_b) d_b[i] = w.interpolate ? t * to_x - d_error : -d_error;
        }
    }
    chunks.finish(task);
    own_buffers.trim(KEEP);
  });
  chunks.join();
  packed_weights.trim(KEEP);
}

// Losses and their weights' gradients in one go: a block goes forward and back while its activations are at hand.
// differentiate(e, first, rows, error, of_block, sum) makes of a block's errors [rows, D] the loss's gradients by them,
// with room for a number per row, and may add to its chunk's sum. Returns the chunks' sums together.
template <bool BF, class Differentiate>
double one_pass(const Loss& w, Arguments& g, long block, Differentiate differentiate) {
  const long D = w.net.D;
  Chunks<BF> chunks(w, g, true, block);
  const auto packed = pack_weights<BF>(w, true);
  std::vector<double> sums(size_t(w.E * chunks.chunks));
  for_all(w.E * chunks.chunks, w.threads, [&](long task) {
    const long e = task % w.E, from = task / w.E * chunks.rows, to = std::min(w.M, from + chunks.rows);
    Block<BF> b(w.net);
    float *x, *error, *d_x, *of_block;
    own_buffers.hold([&](Arena& a) {
      b.lay(a, block, false, true);
      x = a.take(block * D), error = a.take(block * D), d_x = a.take(block * D), of_block = a.take(block);
    });
    b.w = &packed[size_t(e)], b.sums = &chunks.sums[size_t(task)], b.grads = &chunks.grads[size_t(task)];
    chunks.begin(task);
    for (long first = from; first < to; first += block) {
      b.rows = std::min(block, to - first);
      set_inputs(w, b, e, first, x, true);
      errors(w, b, e, first, x, error);
      differentiate(e, first, b.rows, error, of_block, sums[size_t(task)]);
      begin_back(w, b, first, error, d_x);
      b.backward(0, true, false, false);
      b.cond_gradient(true, nullptr);
    }
    chunks.finish(task);
    own_buffers.trim(KEEP);
  });
  chunks.join();
  packed_weights.trim(KEEP);
  double sum = 0.0;
  for (double of_task : sums) sum += of_task;
  return sum;
}

// The mean loss of all rows, each with its weight, and `scale` times its gradients.
template <bool BF>
void matching(Arguments& g) {
  Loss w(g);
  w.apart = 0, w.sharing = g.integer();
  const long error_of = g.integer();  // see `error_weight`
  const float scale = g.real();
  const float* weights = g.pointer<float>();                          // [M], or null
  float *mean = g.pointer<float>(), *of_rows = g.pointer<float>();  // [E, M] without their weights, or null
  const long D = w.net.D;
  const float factor = float(2.0 * double(scale) / double(w.E * w.M * D));
  const double sum = one_pass<BF>(
      w, g, w.block(), [&](long e, long first, long rows, float* error, float* losses, double& of_chunk) {
        mean_squares(error, rows, D, losses);
        if (of_rows) memcpy(of_rows + e * w.M + first, losses, size_t(rows) * 4);
        for (long r = 0; r < rows; r++) {
          const float weight = error_weight(error_of, w.t[first + r]) * (weights ? weights[first + r] : 1.0f);
          of_chunk += double(losses[r]) * double(weight);
          for (long j = 0; j < D; j++) error[r * D + j] *= factor * weight;
        }
      });
  mean[0] = float(sum / double(w.E * w.M));
}

// Policies ------------------------------------------------------------------------------------------------------------

// What is made of the losses of an action's N pairs, as `fastflow.surrogate` states it, and its gradients by them.
struct Objective {
  bool per_action, aspo, straight_through;
  long error;                                   // what the losses are the error of: see `error_weight`
  float factor, scale;                          // of a loss: for its reduction over D, and the caller's
  float loss_clamp, difference_clamp;           // 0 for none
  float low, high, clip;                        // bounds of a ratio; their distance from 1
  float count;                                  // of all ratios
  const float *old, *advantages;                // [B, N], [B]

  explicit Objective(Arguments& g) {
    error = g.integer(), per_action = g.integer() != 0, aspo = g.integer() != 0, straight_through = g.integer() != 0;
    factor = g.real(), scale = g.real(), loss_clamp = g.real(), difference_clamp = g.real();
    low = g.real(), high = g.real(), clip = g.real(), count = g.real();
    old = g.pointer<float>(), advantages = g.pointer<float>();
  }

  float weight(float t) const { return error_weight(error, t); }
  // In the order in which `fastflow.policy_loss.pair_losses` multiplies.
  SAME_BITS void scaled(const float* t, long rows, float* losses) const {
    for (long r = 0; r < rows; r++) losses[r] = losses[r] * factor * weight(t[r]) * scale;
  }

  struct Gain {
    float value, slope;  // of the objective, and by the ratio
  };
  // The gradient of a minimum is shared where both are equal, and a clamp lets it pass up to its bounds.
  Gain gain(float ratio, float a) const {
    if (aspo && a < 0.0f) {
      const float pull = a / (2.0f * clip), off = ratio - 1.0f;
      return {ratio * a + pull * (off * off), a + 2.0f * (pull * off)};
    }
    const float kept = ratio > high ? high : ratio < low ? low : ratio, free = ratio * a, held = kept * a;
    const bool inside = ratio >= low && ratio <= high;
    if (free < held) return {free, a};
    if (free > held) return {held, 0.0f};
    return {free, free == held && !inside ? a / 2.0f : a};
  }
  // The change of a pair's loss; whether gradients pass its clamps.
  float difference(float before, float now, bool& passes) const {
    passes = true;
    if (loss_clamp > 0.0f) {
      if (before > loss_clamp) before = loss_clamp;
      if (now > loss_clamp) now = loss_clamp, passes = straight_through;
    }
    const float change = before - now;
    if (!(difference_clamp > 0.0f) || std::fabs(change) <= difference_clamp) return change;
    if (change != change) return change;
    passes &= straight_through;
    return change > 0.0f ? difference_clamp : -difference_clamp;
  }
  // One action: its losses [N] become their gradients; logarithms and ratios, N or one.
  void action(long i, long N, const float* t, const float* losses, float* grads, float* log_ratio,
              float* ratios) const {
    const float a = advantages[i];
    double sum = 0.0;
    for (long j = 0; j < N; j++) {
      bool passes;
      const float change = difference(old[i * N + j], losses[j], passes);
      grads[j] = passes ? factor * weight(t[j]) * scale : 0.0f;
      if (!per_action) log_ratio[j] = change;
      sum += change;
    }
    if (per_action) log_ratio[0] = float(sum / double(N));
    for (long j = 0; j < (per_action ? 1 : N); j++) {
      ratios[j] = std::exp(log_ratio[j]);
      const float by = gain(ratios[j], a).slope * ratios[j] / count;
      if (!per_action) grads[j] *= by;
      for (long k = 0; per_action && k < N; k++) grads[k] *= by / float(N);
    }
  }
};

// What a minibatch is told by: the loss, the share of ratios that were clipped, the mean loss of a pair, the ratios'
// mean, largest, and mean of rho - 1 - log rho.
constexpr long STATISTICS = 6;

// FPO's loss and its gradients; a block holds actions with all their pairs.
template <bool BF>
void policy(Arguments& g) {
  Loss w(g);
  const Objective objective(g);
  w.sharing = w.S;
  float *losses = g.pointer<float>(), *log_ratio = g.pointer<float>(), *ratios = g.pointer<float>(),
        *statistics = g.pointer<float>();
  const long D = w.net.D, N = w.S, per = objective.per_action ? 1 : N;
  const long block = N * std::max<long>(1, w.block() / N);
  one_pass<BF>(w, g, block, [&](long, long first, long rows, float* error, float* grads, double&) {
    mean_squares(error, rows, D, losses + first);
    objective.scaled(w.t + first, rows, losses + first);
    for (long r = 0; r < rows; r += N) {
      const long i = (first + r) / N;
      objective.action(i, N, w.t + first + r, losses + first + r, grads + r, log_ratio + i * per, ratios + i * per);
    }
    for (long r = 0; r < rows; r++)
      for (long j = 0; j < D; j++) error[r * D + j] *= 2.0f / float(D) * grads[r];
  });
  double sums[STATISTICS] = {};
  float largest = -INFINITY;
  for (long i = 0; i < w.B * per; i++) {
    const float rho = ratios[i];
    sums[0] -= objective.gain(rho, objective.advantages[i / per]).value;
    sums[1] += std::fabs(rho - 1.0f) > objective.clip;
    sums[3] += rho;
    largest = largest != largest ? largest : rho > largest || rho != rho ? rho : largest;
    sums[5] += double(rho) - 1.0 - double(log_ratio[i]);
  }
  for (long i = 0; i < w.M; i++) sums[2] += losses[i];
  const double ratio_count = double(w.B * per);
  statistics[0] = float(sums[0] / double(objective.count));
  statistics[1] = float(sums[1]) / float(ratio_count);
  statistics[2] = float(sums[2] / double(w.M));
  statistics[3] = float(sums[3] / ratio_count), statistics[4] = largest, statistics[5] = float(sums[5] / ratio_count);
}

// Plain networks ------------------------------------------------------------------------------------------------------
//
// Dense layers without a flow: their input takes cond's place.

template <bool BF>
void stack(Arguments& g) {
  const Call c(g);
  float *y = g.pointer<float>(), *kept = g.pointer<float>();
  const auto packed = pack_weights<BF>(c, false);
  const long last = c.net.L - 1, D = c.net.D > 0 ? c.net.D : c.net.layers[last].width;
  const long most = std::max<long>(ROWS, round_up((c.E * c.M + c.threads - 1) / c.threads, ROWS));
  const long block = std::min(c.block(), most), blocks = (c.M + block - 1) / block;
  for_all(c.E * blocks, c.threads, [&](long task) {
    const long e = task / blocks, first = task % blocks * block, row = e * c.M + first;
    Block<BF> b(c.net);
    own_buffers.hold([&](Arena& a) { b.lay(a, block, true, false); });
    b.w = &packed[size_t(e)], b.rows = std::min(block, c.M - first);
    if (kept) b.place(kept, c.E * c.M, row);
    b.set_cond(c.cond_of(e), first, 1);
    b.forward(0, nullptr, 0, first, 1);
    const float* from = c.net.D > 0 ? b.head : b.out[size_t(last)];
    const long ld = c.net.D > 0 ? c.net.pad_out : c.net.layers[last].pad;
    for (long r = 0; r < b.rows; r++) memcpy(y + (row + r) * D, from + r * ld, size_t(D) * 4);
    own_buffers.trim(KEEP);
  });
  packed_weights.trim(KEEP);
}

template <bool BF>
void stack_bwd(Arguments& g) {
  const Call c(g);
  const bool with_weights = g.integer() != 0;
  const float* grad = g.pointer<float>();
  float *kept = g.pointer<float>(), *d_x = g.pointer<float>();
  Chunks<BF> chunks(c, g, with_weights);
  const auto packed = pack_weights<BF>(c, true);
  const long block = c.block(), last = c.net.L - 1, D = c.net.D > 0 ? c.net.D : c.net.layers[last].width;
  for_all(c.E * chunks.chunks, c.threads, [&](long task) {
    const long e = task % c.E, from = task / c.E * chunks.rows, to = std::min(c.M, from + chunks.rows);
    Block<BF> b(c.net);
    own_buffers.hold([&](Arena& a) { b.lay(a, block, true, true, kept != nullptr); });
    b.w = &packed[size_t(e)], b.sums = &chunks.sums[size_t(task)], b.grads = &chunks.grads[size_t(task)];
    chunks.begin(task);
    for (long first = from; first < to; first += block) {
      const long row = e * c.M + first;
      b.rows = std::min(block, to - first);
      b.set_cond(c.cond_of(e), first, 1, !kept);
      if (kept) b.place(kept, c.E * c.M, row);
      for (long i = 0; kept && i < c.net.L; i++) b.finish_layer(i, 0, nullptr, 0, first, 1);
      if (!kept) b.forward(0, nullptr, 0, first, 1);
      memset(b.d_base, 0, size_t(b.rows * c.net.layers[0].pad) * 4);
      float* d = c.net.D > 0 ? b.d_head : b.d[size_t(last)];
      const long ld = c.net.D > 0 ? c.net.pad_out : c.net.layers[last].pad;
      memset(d, 0, size_t(b.rows * ld) * 4);
      for (long r = 0; r < b.rows; r++) memcpy(d + r * ld, grad + (row + r) * D, size_t(D) * 4);
      b.backward(0, with_weights, false, false);
      b.cond_gradient(with_weights, d_x ? d_x + row * c.net.C : nullptr);
    }
    chunks.finish(task);
    own_buffers.trim(KEEP);
  });
  chunks.join();
  packed_weights.trim(KEEP);
}

// The mean squared error of plain networks' results and `scale` times its gradients in one go, a block of rows at a
// time as in `policy`. Results y [E, M, D]; all members have the same target.
template <bool BF>
void regression(Arguments& g) {
  const Call c(g);
  const float scale = g.real();
  const float* target = g.pointer<float>();  // [M, D]
  float *y = g.pointer<float>(), *mean = g.pointer<float>();
  const long block = c.block(), D = c.net.D, count = c.E * c.M * D;
  Chunks<BF> chunks(c, g, true, block);
  const auto packed = pack_weights<BF>(c, true);
  const float factor = float(2.0 * double(scale) / double(count));
  for_all(c.E * chunks.chunks, c.threads, [&](long task) {
    const long e = task % c.E, from = task / c.E * chunks.rows, to = std::min(c.M, from + chunks.rows);
    Block<BF> b(c.net);
    own_buffers.hold([&](Arena& a) { b.lay(a, block, true, true); });
    b.w = &packed[size_t(e)], b.sums = &chunks.sums[size_t(task)], b.grads = &chunks.grads[size_t(task)];
    chunks.begin(task);
    for (long first = from; first < to; first += block) {
      b.rows = std::min(block, to - first);
      b.set_cond(c.cond_of(e), first, 1);
      b.forward(0, nullptr, 0, first, 1);
      memset(b.d_base, 0, size_t(b.rows * c.net.layers[0].pad) * 4);
      memset(b.d_head, 0, size_t(b.rows * c.net.pad_out) * 4);
      for (long r = 0; r < b.rows; r++)
        for (long j = 0; j < D; j++) {
          const long i = (first + r) * D + j;
          const float found = y[e * c.M * D + i] = b.head[r * c.net.pad_out + j];
          b.d_head[r * c.net.pad_out + j] = factor * (found - target[i]);
        }
      b.backward(0, true, false, false);
      b.cond_gradient(true, nullptr);
    }
    chunks.finish(task);
    own_buffers.trim(KEEP);
  });
  chunks.join();
  packed_weights.trim(KEEP);
  double sum = 0.0;
  for (long i = 0; i < count; i++) {
    const double off = double(y[i]) - double(target[i % (c.M * D)]);
    sum += off * off;
  }
  mean[0] = float(sum / double(count));
}

// A policy that climbs a critic: the mean squared distance of its actions y from given ones, alpha times, less the mean
// value of (obs, y within [-1, 1]), and the gradients of the policy's weights, in one go as in `regression`. Its input
// is [obs, noise]; the critic's members are averaged.
template <bool BF>
void climb(Arguments& g) {
  const Call c(g), critic(g);
  const double alpha = *g.reals++;
  const float* toward = g.pointer<float>();  // [M, D]
  float* told = g.pointer<float>();          // the mean squared distance, the mean value
  const long block = c.block(), D = c.net.D, O = critic.net.C - D, E = critic.E;
  Chunks<BF> chunks(c, g, true, block);
  const auto packed = pack_weights<BF>(c, true), packed_critic = pack_weights<BF>(critic, true, packed_others);
  std::vector<double> distance(size_t(chunks.chunks)), value(size_t(chunks.chunks));
  const float pull = float(2.0 * alpha / double(c.M * D)), share = float(1.0 / double(c.M * E));
  for_all(chunks.chunks, c.threads, [&](long task) {
    const long from = task * chunks.rows, to = std::min(c.M, from + chunks.rows);
    Block<BF> b(c.net), q(critic.net);
    float *x, *d_x, *rise;  // the critic's inputs, their gradients, the sum of those of actions
    own_buffers.hold([&](Arena& a) {
      b.lay(a, block, true, true), q.lay(a, block, true, true);
      x = a.take(block * (O + D)), d_x = a.take(block * (O + D)), rise = a.take(block * D);
    });
    b.w = &packed[0], b.sums = &chunks.sums[size_t(task)], b.grads = &chunks.grads[size_t(task)];
    chunks.begin(task);
    for (long first = from; first < to; first += block) {
      const long n = b.rows = q.rows = std::min(block, to - first);
      b.set_cond(c.cond_of(0), first, 1);
      b.forward(0, nullptr, 0, first, 1);
      auto action = [&](long r, long j) { return b.head[r * c.net.pad_out + j]; };
      for (long r = 0; r < n; r++) {
        memcpy(x + r * (O + D), c.cond + (first + r) * c.net.C, size_t(O) * 4);
        for (long j = 0; j < D; j++) {
          const float y = action(r, j);
          x[r * (O + D) + O + j] = y > 1.0f ? 1.0f : y < -1.0f ? -1.0f : y;
        }
      }
      memset(rise, 0, size_t(n * D) * 4);
      for (long e = 0; e < E; e++) {
        q.w = &packed_critic[size_t(e)];
        q.set_cond(x, 0, 1);
        q.forward(0, nullptr, 0, 0, 1);
        memset(q.d_base, 0, size_t(n * critic.net.layers[0].pad) * 4);
        memset(q.d_head, 0, size_t(n * critic.net.pad_out) * 4);
        for (long r = 0; r < n; r++) {
          value[size_t(task)] += q.head[r * critic.net.pad_out];
          q.d_head[r * critic.net.pad_out] = 1.0f;
        }
        q.backward(0, false, false, false);
        q.cond_gradient(false, d_x);
        for (long r = 0; r < n; r++)
          for (long j = 0; j < D; j++) rise[r * D + j] += d_x[r * (O + D) + O + j];
      }
      memset(b.d_base, 0, size_t(n * c.net.layers[0].pad) * 4);
      memset(b.d_head, 0, size_t(n * c.net.pad_out) * 4);
      for (long r = 0; r < n; r++)
        for (long j = 0; j < D; j++) {
          const float y = action(r, j), away = y - toward[(first + r) * D + j];
          const bool inside = x[r * (O + D) + O + j] == y;
          distance[size_t(task)] += double(away) * double(away);
          b.d_head[r * c.net.pad_out + j] = pull * away - (inside ? share * rise[r * D + j] : 0.0f);
        }
      b.backward(0, true, false, false);
      b.cond_gradient(true, nullptr);
    }
    chunks.finish(task);
    own_buffers.trim(KEEP);
  });
  chunks.join();
  packed_weights.trim(KEEP), packed_others.trim(KEEP);
  double sums[2] = {};
  for (long i = 0; i < chunks.chunks; i++) sums[0] += distance[size_t(i)], sums[1] += value[size_t(i)];
  told[0] = float(sums[0] / double(c.M * D)), told[1] = float(sums[1] / double(c.M * E));
}

// Targets -------------------------------------------------------------------------------------------------------------

// What a flow critic learns from where walks end, and what is told of it: `fastflow.agents.backup` states it.
void backup(Arguments& g) {
  const long E = g.integer(), B = g.integer(), S = g.integer();
  const bool least = g.integer() != 0, each = g.integer() != 0;
  const float discount = g.real(), noise_scale = g.real(), low = g.real(), high = g.real();
  const float clip_low = g.real(), clip_high = g.real();
  const float *z = g.pointer<float>(), *q = g.pointer<float>();            // [E, B, S]: the target's, the online ones
  const float *rewards = g.pointer<float>(), *masks = g.pointer<float>();  // [B]; without masks rewards are returns
  const float* noise = g.pointer<float>();                                 // [B] or null
  float *target = g.pointer<float>(), *value = g.pointer<float>();         // [B] or [B, S], [B]
  float* told = g.pointer<float>();
  const long N = each ? S : 1;
  double of_targets = 0.0, of_values = 0.0, spread = 0.0, away = 0.0;
  float lowest = INFINITY, highest = -INFINITY;
  auto smaller = [](float a, float b) { return b < a || b != b ? b : a; };
  for (long b = 0; b < B; b++) {
    double whole = 0.0, next = 0.0;
    for (long s = 0; s < S; s++) {
      float smallest = z[b * S + s];
      double sum = 0.0;
      for (long e = 0; e < E; e++) {
        const float x = z[(e * B + b) * S + s];
        sum += x, smallest = smallest != smallest ? smallest : smaller(smallest, x);
      }
      const float one = std::min(std::max(least ? smallest : float(sum / double(E)), clip_low), clip_high);
      next += one;
      if (each) target[b * S + s] = rewards[b] + discount * masks[b] * one;
    }
    if (!each) target[b] = masks ? rewards[b] + discount * masks[b] * float(next / double(S)) : rewards[b];
    for (long e = 0; e < E; e++) {
      double sum = 0.0, squares = 0.0;
      for (long s = 0; s < S; s++) sum += q[(e * B + b) * S + s];
      for (long s = 0; s < S; s++) {
        const double off = q[(e * B + b) * S + s] - sum / double(S);
        squares += off * off;
      }
      whole += sum, spread += squares / double(S);
    }
    const float v = value[b] = float(whole / double(E * S));
    of_values += v;
    lowest = lowest != lowest ? lowest : smaller(lowest, v);
    highest = highest != highest ? highest : v > highest || v != v ? v : highest;
    for (long s = 0; s < N; s++) {
      float& y = target[b * N + s];
      if (noise) y += noise_scale * noise[b];
      of_targets += y, away += std::fabs(y - v);
    }
  }
  long outside = 0;
  for (long i = 0; i < E * B * S; i++)
    outside += !(z[i] >= low && z[i] <= high) + !(q[i] >= low && q[i] <= high);
  told[0] = float(of_targets / double(B * N)), told[1] = float(of_values / double(B));
  told[2] = lowest, told[3] = highest;
  told[4] = float(spread / double(E * B)), told[5] = float(away / double(B * N));
  told[6] = float(double(outside) / double(2 * E * B * S));
}

// 0, or what went wrong: 1 for no memory.
template <class Do>
int guarded(Do what) {
  try {
    what();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  } catch (...) {
    return 2;
  }
}
int run(void (*what)(Arguments&), const int64_t* ints, const double* reals, void* const* pointers) {
  return guarded([&] {
    Arguments arguments{ints, reals, pointers};
    what(arguments);
  });
}

}  // namespace

// Built once per kind of operand, PAIRS for those of bfloat16: half of it is all that most processes use.
extern "C" {
int fastflow_walk(const int64_t* i, const double* r, void* const* p) { return run(walk<PAIRS>, i, r, p); }
int fastflow_walk_bwd(const int64_t* i, const double* r, void* const* p) { return run(walk_bwd<PAIRS>, i, r, p); }
int fastflow_loss(const int64_t* i, const double* r, void* const* p) { return run(loss<PAIRS>, i, r, p); }
int fastflow_loss_bwd(const int64_t* i, const double* r, void* const* p) { return run(loss_bwd<PAIRS>, i, r, p); }
int fastflow_matching(const int64_t* i, const double* r, void* const* p) { return run(matching<PAIRS>, i, r, p); }
int fastflow_policy(const int64_t* i, const double* r, void* const* p) { return run(policy<PAIRS>, i, r, p); }
int fastflow_regression(const int64_t* i, const double* r, void* const* p) { return run(regression<PAIRS>, i, r, p); }
int fastflow_climb(const int64_t* i, const double* r, void* const* p) { return run(climb<PAIRS>, i, r, p); }
int fastflow_backup(const int64_t* i, const double* r, void* const* p) { return run(backup, i, r, p); }
int fastflow_stack(const int64_t* i, const double* r, void* const* p) { return run(stack<PAIRS>, i, r, p); }
int fastflow_stack_bwd(const int64_t* i, const double* r, void* const* p) { return run(stack_bwd<PAIRS>, i, r, p); }
// A handle to `Frozen`, or null.
void* fastflow_freeze(const int64_t* i, const double* r, void* const* p) {
  Frozen* frozen = nullptr;
  guarded([&] {
    Arguments arguments{i, r, p};
    frozen = new Frozen(arguments);
  });
  return frozen;
}
int fastflow_walk_frozen(const void* frozen, int64_t rows, int64_t samples, int64_t threads, int64_t cond_per_member,
                         const float* cond, const float* x_0, const float* noise, float* x_1) {
  return guarded([&] {
    static_cast<const Frozen*>(frozen)->run(rows, samples, threads, cond_per_member != 0, cond, x_0, noise, x_1);
  });
}
void fastflow_release(void* frozen) { delete static_cast<Frozen*>(frozen); }
// Width of vectors in floats; whether bfloat16 products are there, whether by tiles, whether threads are.
int fastflow_lanes() { return LANES; }
int fastflow_bf16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}
int fastflow_tiles() { return amx::ask(); }
int fastflow_threads() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
}
