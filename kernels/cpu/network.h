// The velocity network of one member on a block of rows: forward, and back to weights and inputs.
//
// Everything between two products stays in a thread's own buffers, which the second-level cache holds. Rows of a buffer
// are padded to COLS; the padding of what products write is zero.

#pragma once

#include <cstdlib>
#include <vector>

#include "product.h"

// Heads with at most this many outputs are dot products: a panel of packed weights would be mostly padding.
constexpr long DOTS = 4;
// Rows whose statistics are computed side by side.
constexpr long GROUP = 8;

enum Norm { NONE, AFTER, BEFORE, FILM };
enum Embedding { IDENTITY, SCALED, HL_GAUSS };
enum Prediction { VELOCITY, ENDPOINT, NOISE };
constexpr float TIME_MARGIN = 1e-3f;

// What Python gives, in the order it is read.
struct Arguments {
  const int64_t* ints;
  const double* reals;
  void* const* pointers;
  long integer() { return long(*ints++); }
  float real() { return float(*reals++); }
  template <class T>
  T* pointer() {
    return static_cast<T*>(*pointers++);
  }
};

// A hidden layer of the trunk; `pad` is its padded width.
struct Layer {
  long width, pad, add, inputs, input[2], film;  // film: where its scale and shift stand in a row of all layers'
};

// D = 0: no head, the last hidden layer's output is the result.
struct Net {
  long D, C, F, T, L, activation, norm, embedding, prediction, film_inputs, film_width = 0, pad_out;
  float low, high, sigma, eps, scale;
  std::vector<Layer> layers;

  explicit Net(Arguments& a) {
    D = a.integer(), C = a.integer(), F = a.integer(), T = a.integer(), L = a.integer();
    activation = a.integer(), norm = a.integer(), embedding = a.integer(), prediction = a.integer(),
    film_inputs = a.integer();
    low = a.real(), high = a.real(), sigma = a.real(), eps = a.real(), scale = a.real();
    pad_out = round_up(D, COLS);
    for (long i = 0; i < L; i++) {
      Layer layer;
      layer.width = a.integer(), layer.add = a.integer(), layer.inputs = a.integer();
      layer.input[0] = a.integer(), layer.input[1] = a.integer();
      layer.pad = round_up(layer.width, COLS), layer.film = film_width;
      film_width += 2 * layer.pad;
      layers.push_back(layer);
    }
  }
  bool film() const { return norm == FILM; }
  bool affine() const { return norm == AFTER || norm == BEFORE; }
  long cond() const { return film() ? 0 : C; }  // rows of cond in the first layer's weight
  long padded_widths() const {                  // of all hidden layers
    long sum = 0;
    for (const Layer& layer : layers) sum += layer.pad;
    return sum;
  }
  long widest() const {
    long most = round_up(std::max({F, T, C, D}), COLS);
    for (const Layer& layer : layers) most = std::max(most, layer.pad);
    return most;
  }
};

// Weights or gradients of one member, as the caller stores them: [in, out], [out]. film: the rows of time alone.
template <class P>
struct Weights {
  std::vector<P> w, b, scale, shift, film;
};

// Memory that is taken piece by piece; without a base it only counts.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <class T = float>
  T* take(long n) {
    T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += size_t(round_up(n * long(sizeof(T)), 64));
    return at;
  }
};
// Kept from call to call: asking the system for zeroed pages costs more than a small walk.
struct Workspace {
  char* memory = nullptr;
  size_t size = 0;
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() { free(memory); }
  template <class Lay>
  void hold(Lay lay) {
    Arena count;
    lay(count);
    if (count.used > size) {
      free(memory);
      size = count.used + count.used / 4;
      size = (size + 63) / 64 * 64;
      memory = static_cast<char*>(aligned_alloc(64, size));
      if (!memory) size = 0, throw std::bad_alloc();
    }
    Arena arena{memory};
    lay(arena);
  }
  void trim(size_t most) {
    if (size > most) free(memory), memory = nullptr, size = 0;
  }
};

// One member's weights as products read them; `t` is transposed, for the way back.
struct Packed {
  uint32_t *cond, *state, *time, *head, *cond_t, *state_t, *time_t, *head_t;
  struct Hidden {
    uint32_t *in[2], *in_t[2], *film[2], *film_t[2];
    float *bias, *scale, *shift;
    float* film_table;  // [N, 2 pad]: time's part of FiLM where all rows share their times
  };
  std::vector<Hidden> layers;
  float *head_bias, *head_rows;  // head_rows [D, pad] for dot products
  float* table;                  // [N, pad]: the first layer's bias, with time's part where all rows share their times

  template <bool BF>
  void lay(Arena& a, const Net& net, long evaluations, bool shared, bool back) {
    const Layer &first = net.layers[0], &last = net.layers[net.L - 1];
    layers.resize(size_t(net.L));
    auto both = [&](uint32_t*& w, uint32_t*& t, long rows, long columns) {
      w = a.take<uint32_t>(packed_size<BF>(rows, columns));
      if (back) t = a.take<uint32_t>(packed_size<BF>(columns, rows));
    };
    both(cond, cond_t, net.cond(), first.width);
    both(state, state_t, net.F, first.width);
    const bool time_rows = !shared && !net.film();
    both(time, time_t, time_rows ? net.T : 0, first.width);
    for (long i = 0; i < net.L; i++) {
      const Layer& layer = net.layers[i];
      Hidden& own = layers[size_t(i)];
      for (long j = 0; j < layer.inputs; j++)
        both(own.in[j], own.in_t[j], net.layers[layer.input[j]].width, layer.width);
      for (long j = 0; j < 2 && net.film() && !shared; j++) both(own.film[j], own.film_t[j], net.T, layer.width);
      own.bias = a.take(layer.pad), own.scale = a.take(layer.pad), own.shift = a.take(layer.pad);
      own.film_table = net.film() && shared ? a.take(evaluations * 2 * layer.pad) : nullptr;
    }
    both(head, head_t, last.width, net.D);  // of no columns without a head
    head_bias = a.take(net.pad_out), head_rows = a.take(net.D <= DOTS ? net.D * last.pad : 0);
    table = a.take((shared ? evaluations : 1) * first.pad);
  }

  static void padded(float* to, const float* from, long n, long pad) {
    memcpy(to, from, size_t(n) * 4);
    memset(to + n, 0, size_t(pad - n) * 4);
  }
  // table [N, pad] = bias + features [N, T] @ w [T, width].
  static void fill(float* table, long ld, const float* bias, const float* w, long ldw, long width,
                   const float* features, long step, long evaluations, long T) {
    for (long n = 0; n < evaluations; n++, table += ld, features += step) {
      if (bias) memcpy(table, bias, size_t(width) * 4);
      else memset(table, 0, size_t(width) * 4);
      for (long k = 0; k < T; k++) {
        const float *row = w + k * ldw, f = features[k];
        long j = 0;
        for (; j + LANES <= width; j += LANES) store(table + j, load(table + j) + f * load(row + j));
        for (; j < width; j++) table[j] += f * row[j];
      }
    }
  }

  // features [N, T] with row stride `step`, where all rows share their times.
  template <bool BF>
  void pack_all(const Net& net, const Weights<const float*>& given, const float* features, long step, long evaluations,
                bool shared, bool back) {
    auto both = [&](uint32_t* w, uint32_t* t, const float* from, long ld, long rows, long columns) {
      pack<BF>(w, from, ld, rows, columns, false);
      if (back) pack<BF>(t, from, ld, columns, rows, true);
    };
    const Layer &first = net.layers[0], &last = net.layers[net.L - 1];
    const float* w0 = given.w[0];
    const long H = first.width, c = net.cond();
    both(cond, cond_t, w0, H, c, H);
    both(state, state_t, w0 + c * H, H, net.F, H);
    const float* w_time = w0 + (c + net.F) * H;
    if (!shared && !net.film()) both(time, time_t, w_time, H, net.T, H);
    for (long i = 0; i < net.L; i++) {
      const Layer& layer = net.layers[i];
      Hidden& own = layers[size_t(i)];
      const float* w = given.w[size_t(i)];
      for (long j = 0; j < layer.inputs; j++) {
        const long rows = net.layers[layer.input[j]].width;
        both(own.in[j], own.in_t[j], w, layer.width, rows, layer.width);
        w += rows * layer.width;
      }
      padded(own.bias, given.b[size_t(i)], layer.width, layer.pad);
      if (net.affine()) {
        padded(own.scale, given.scale[size_t(i)], layer.width, layer.pad);
        padded(own.shift, given.shift[size_t(i)], layer.width, layer.pad);
      }
      if (!net.film()) continue;
      const float* f = given.film[size_t(i)];
      for (long j = 0; j < 2; j++) {
        if (!shared) {
          both(own.film[j], own.film_t[j], f + j * layer.width, 2 * layer.width, net.T, layer.width);
          continue;
        }
        for (long n = 0; n < evaluations; n++)
          memset(own.film_table + (2 * n + j) * layer.pad, 0, size_t(layer.pad) * 4);
        fill(own.film_table + j * layer.pad, 2 * layer.pad, nullptr, f + j * layer.width, 2 * layer.width, layer.width,
             features, step, evaluations, net.T);
      }
    }
    if (net.D > 0) {
      both(head, head_t, given.w[size_t(net.L)], net.D, last.width, net.D);
      padded(head_bias, given.b[size_t(net.L)], net.D, net.pad_out);
    }
    if (net.D <= DOTS)
      for (long d = 0; d < net.D; d++)
        for (long k = 0; k < last.pad; k++)
          head_rows[d * last.pad + k] = k < last.width ? given.w[size_t(net.L)][k * net.D + d] : 0.0f;
    const bool in_table = shared && !net.film();
    for (long n = 0; n < (shared ? evaluations : 1); n++) memset(table + n * first.pad, 0, size_t(first.pad) * 4);
    fill(table, first.pad, given.b[0], w_time, H, H, features, step, shared ? evaluations : 1, in_table ? net.T : 0);
  }
};

// Sums over the rows of a chunk that are not stored as the caller's tensors are.
struct Sums {
  std::vector<float*> bias, scale, shift, film;  // [pad] each; film [N, 2 pad]
  float *head, *head_bias, *table;               // [D, pad], [pad], [N, pad]

  void lay(Arena& a, const Net& net, long evaluations, bool shared) {
    for (auto* list : {&bias, &scale, &shift, &film}) list->resize(size_t(net.L));
    for (long i = 0; i < net.L; i++) {
      const long pad = net.layers[i].pad;
      bias[size_t(i)] = a.take(pad), scale[size_t(i)] = a.take(pad), shift[size_t(i)] = a.take(pad);
      film[size_t(i)] = a.take(net.film() && shared ? evaluations * 2 * pad : 0);
    }
    head = a.take(net.D <= DOTS ? net.D * net.layers[net.L - 1].pad : 0);
    head_bias = a.take(net.pad_out);
    table = a.take(shared ? evaluations * net.layers[0].pad : 0);
  }
  void clear(const Net& net, long evaluations, bool shared) {
    auto zero = [](float* p, long n) { memset(p, 0, size_t(n) * 4); };
    for (long i = 0; i < net.L; i++) {
      const long pad = net.layers[i].pad;
      zero(bias[size_t(i)], pad), zero(scale[size_t(i)], pad), zero(shift[size_t(i)], pad);
      if (net.film() && shared) zero(film[size_t(i)], evaluations * 2 * pad);
    }
    if (net.D <= DOTS) zero(head, net.D * net.layers[net.L - 1].pad);
    zero(head_bias, net.pad_out);
    if (shared) zero(table, evaluations * net.layers[0].pad);
  }
};

// A thread's buffers for one block of rows.
template <bool BF>
struct Block {
  const Net& net;
  const Packed* w = nullptr;
  Sums* sums = nullptr;
  Weights<float*>* grads = nullptr;
  bool shared = true, keep = false;
  long rows = 0;

  float *features, *base, *head, *scratch;
  uint32_t *state, *time, *cond, *row_units, *pair_a, *pair_d, *room_d;
  std::vector<float*> y, out, stats, film, d;
  std::vector<uint32_t*> op;
  std::vector<float*> slope;  // where a layer's derivatives lie for the way back, or null: computed again
  float *d_base, *d_head, *d_features, *d_time;
  std::vector<bool> reached;
  std::vector<long> slot;
  amx::Session session;

  explicit Block(const Net& n) : net(n) {}

  long ld(long width) const { return BF ? round_up(width, 2 * LANES) / 2 : round_up(width, LANES); }
  long ld_out(long i) const { return BF ? net.layers[i].pad / 2 : net.layers[i].pad; }
  // Whether a layer's result is read as floats: where that is the operand, by the head, or by a layer that adds it.
  bool read_as_floats(long i) const {
    bool read = !BF || i == net.L - 1;
    for (const Layer& layer : net.layers) read |= layer.add == i;
    return read;
  }

  // `given_y`: the products' results lie outside, see `place`.
  void lay(Arena& a, long block_rows, bool with_shared_times, bool kept, bool given_y = false) {
    const long n = round_up(block_rows, BF && TILES ? 2 * TILE : 2), L = net.L, first = net.layers[0].pad;
    shared = with_shared_times, keep = kept;
    features = a.take(n * round_up(net.F, COLS));
    state = a.take<uint32_t>(n * ld(net.F));
    time = shared ? nullptr : a.take<uint32_t>(n * ld(net.T));
    cond = net.cond() ? a.take<uint32_t>(n * ld(net.C)) : nullptr;
    base = net.cond() ? a.take(n * first) : nullptr;
    head = a.take(n * net.pad_out);
    scratch = a.take((keep ? 2 * GROUP + 3 : 2) * net.widest() + 4 * LANES);
    for (auto* list : {&y, &out, &stats, &film, &d}) list->assign(size_t(L), nullptr);
    op.assign(size_t(L), nullptr), slope.assign(size_t(L), nullptr);
    if (!keep) {
      // A layer's output needs room until its last reader is done.
      std::vector<long> last(size_t(L), L - 1);
      for (long i = 0; i < L - 1; i++) last[size_t(i)] = i;
      for (long i = 0; i < L; i++) {
        for (long j = 0; j < net.layers[i].inputs; j++) last[size_t(net.layers[i].input[j])] = i;
        if (net.layers[i].add >= 0) last[size_t(net.layers[i].add)] = std::max(last[size_t(net.layers[i].add)], i);
      }
      std::vector<long> busy;  // until which layer
      slot.assign(size_t(L), 0);
      long most = 0;
      for (const Layer& layer : net.layers) most = std::max(most, layer.pad);
      for (long i = 0; i < L; i++) {
        size_t s = 0;
        while (s < busy.size() && busy[s] >= i) s++;
        if (s == busy.size()) busy.push_back(0);
        busy[s] = last[size_t(i)];
        slot[size_t(i)] = long(s);
      }
      std::vector<float*> room;
      std::vector<uint32_t*> room_op;
      for (size_t s = 0; s < busy.size(); s++) {
        room.push_back(a.take(n * most));
        room_op.push_back(BF ? a.take<uint32_t>(n * most / 2) : nullptr);
      }
      float* one_film = net.film() ? a.take(n * 2 * most) : nullptr;
      for (long i = 0; i < L; i++) {
        y[size_t(i)] = out[size_t(i)] = room[size_t(slot[size_t(i)])];
        op[size_t(i)] = BF ? room_op[size_t(slot[size_t(i)])] : reinterpret_cast<uint32_t*>(out[size_t(i)]);
        film[size_t(i)] = one_film;
      }
      return;
    }
    for (long i = 0; i < L; i++) {
      const long pad = net.layers[i].pad;
      y[size_t(i)] = given_y ? nullptr : a.take(n * pad);
      out[size_t(i)] = a.take(n * pad), d[size_t(i)] = a.take(n * pad);
      stats[size_t(i)] = net.norm == NONE ? nullptr : a.take(n * 2);
      film[size_t(i)] = net.film() ? a.take(n * 2 * pad) : nullptr;
      op[size_t(i)] = BF ? a.take<uint32_t>(n * pad / 2) : reinterpret_cast<uint32_t*>(out[size_t(i)]);
      // In place of what no one reads any more.
      if (net.norm == NONE) slope[size_t(i)] = !read_as_floats(i) ? out[size_t(i)] : given_y ? nullptr : y[size_t(i)];
    }
    const long most = net.widest();
    row_units = a.take<uint32_t>(n * most);
    pair_a = BF ? a.take<uint32_t>(n / 2 * most) : nullptr;
    pair_d = BF ? a.take<uint32_t>(n / 2 * most) : nullptr;
    room_d = BF ? nullptr : a.take<uint32_t>(n * COLS);
    d_base = net.cond() ? a.take(n * first) : nullptr;
    d_head = a.take(n * net.pad_out);
    d_features = a.take(n * round_up(net.F, COLS));
    d_time = shared ? nullptr : a.take(n * round_up(net.T, COLS));
    reached.assign(size_t(L), false);
  }

  // Rows of floats as a product's operand.
  void units_of_rows(uint32_t* to, long ld_to, const float* from, long ld_from, long width, long n) const {
    for (long r = 0; r < n; r++) units_of_row(to + r * ld_to, from + r * ld_from, width);
  }
  void units_of_rows(uint32_t* to, long ld_to, const float* from, long ld_from, long width) const {
    units_of_rows(to, ld_to, from, ld_from, width, rows);
  }
  void units_of_row(uint32_t* to, const float* from, long width) const {
    long k = 0;
    for (; k + LANES <= width; k += LANES) operand<BF>(to, load(from + k), int(k / LANES));
    if (k < width) {
      operand<BF>(to, load_some(from + k, width - k), int(k / LANES));
      k += LANES;
    }
    if (BF && k % COLS) operand<BF>(to, Vec{}, int(k / LANES));  // tiles read pairs of vectors
  }

  // cond's share of the first layer, once for all evaluations; row r of this block reads row (first + r) / samples of
  // cond, of which it is computed once.
  void set_cond(const float* from, long first, long samples, bool for_products = true) {
    if (!net.cond()) return;
    own_first = first % samples, own_samples = samples;
    const long own = own_rows(), pad = net.layers[0].pad;
    units_of_rows(cond, ld(net.C), from + first / samples * net.C, net.C, net.C, own);
    if (!for_products) return;
    product<BF>(own, net.layers[0].width, units<BF>(net.C), cond, ld(net.C), w->cond, base, pad, {});
    for (long r = rows - 1; samples > 1 && r > 0; r--)  // from behind: no row is written before it was read
      if (own_row(r) < r) memcpy(base + r * pad, base + own_row(r) * pad, size_t(pad) * 4);
  }
  // Where a row finds its cond among the block's own rows of it.
  long own_first = 0, own_samples = 1;
  long own_row(long r) const { return (own_first + r) / own_samples; }
  long own_rows() const { return own_row(rows - 1) + 1; }
  void set_time(const float* from, long step) {
    for (long r = 0; r < rows; r++) units_of_row(time + r * ld(net.T), from + r * step, net.T);
  }

  // HL-Gauss: the Gaussian's cumulative masses at all edges, as erf; the edges are (at - x) * inverse.
  struct Edges {
    float width, inverse, from, to;
  };
  Edges edges() const {
    const float width = (net.high - net.low) / float(net.F), std = net.sigma * width;
    return {width, 1.0f / (1.41421356237309515f * std), net.low - 3 * std, net.high + 3 * std};
  }
  void cumulative(float x, const Edges& e, float* c) const {
    alignas(64) float lane[LANES];
    for (int i = 0; i < LANES; i++) lane[i] = float(i);
    const float at = std::min(std::max(x, e.from), e.to);
    const Vec index = load(lane);
    for (long k = 0; k <= net.F; k += LANES)
      store(c + k, erf_of((net.low + e.width * (index + float(k)) - at) * e.inverse));
  }
  // x [rows, D] embedded.
  void set_state(const float* x) {
    const Edges e = edges();
    const long pad = round_up(net.F, COLS);
    if (net.embedding == IDENTITY) return units_of_rows(state, ld(net.F), x, net.D, net.F);
    for (long r = 0; r < rows; r++) {
      float* f = features + r * pad;
      if (net.embedding == HL_GAUSS) {
        cumulative(x[r], e, scratch);
        const float whole = 1.0f / (scratch[net.F] - scratch[0]);
        for (long k = 0; k < net.F; k += LANES) store(f + k, (load(scratch + k + 1) - load(scratch + k)) * whole);
      } else {
        const float range = net.high - net.low;
        for (long k = 0; k < net.D; k++) f[k] = (x[r * net.D + k] - net.low) / range;
      }
      units_of_row(state + r * ld(net.F), f, net.F);
    }
  }
  // d_x [rows, D] += the gradient that came to the features.
  void state_gradient(const float* x, float* d_x) {
    const Edges e = edges();
    const long pad = round_up(net.F, COLS);
    for (long r = 0; r < rows; r++) {
      const float *f = features + r * pad, *g = d_features + r * pad;
      if (net.embedding != HL_GAUSS) {
        const float range = net.embedding == SCALED ? net.high - net.low : 1.0f;
        for (long k = 0; k < net.D; k++) d_x[r * net.D + k] += g[k] / range;
        continue;
      }
      if (!(x[r] >= e.from && x[r] <= e.to)) continue;  // clamped
      // f_k = (c_{k+1} - c_k) / (c_F - c_0), dc_k/dx = -2 / sqrt(pi) exp(-u_k^2) / (sqrt(2) std).
      cumulative(x[r], e, scratch);
      const float whole = 1.0f / (scratch[net.F] - scratch[0]);
      float* slope = scratch + round_up(net.F + 1, LANES) + LANES;
      alignas(64) float lane[LANES];
      for (int i = 0; i < LANES; i++) lane[i] = float(i);
      for (long k = 0; k <= net.F; k += LANES) {
        Vec u = (net.low + e.width * (load(lane) + float(k)) - x[r]) * e.inverse;
        store(slope + k, exp_of(-u * u) * (-1.1283791670955126f * e.inverse * whole));
      }
      float sum = 0.0f, along = 0.0f;
      for (long k = 0; k < net.F; k++) sum += g[k] * (slope[k + 1] - slope[k]), along += g[k] * f[k];
      d_x[r] += sum - along * (slope[net.F] - slope[0]);
    }
  }

  // Products' results [rows of all members, pad] of every layer, one behind the other, in place of the block's own.
  void place(float* all, long total_rows, long row) {
    for (long i = 0; i < net.L; i++) {
      y[size_t(i)] = all + row * net.layers[i].pad;
      all += total_rows * net.layers[i].pad;
    }
  }

  // Forward ----------------------------------------------------------------------------------------------------------

  // film_rows: cond's part of FiLM, row r at film_rows + index(r). Not inlined: the same bits wherever it is called.
  __attribute__((noinline)) void forward(long n, const float* film_rows, long film_step, long first, long samples) {
    for (long i = 0; i < net.L; i++) {
      const Layer& layer = net.layers[i];
      const Packed::Hidden& own = w->layers[size_t(i)];
      float* to = y[size_t(i)];
      if (i == 0) {
        Begin from{w->table + (shared ? n * layer.pad : 0), base, layer.pad};
        product<BF>(rows, layer.width, units<BF>(net.F), state, ld(net.F), w->state, to, layer.pad, from);
        if (!shared && !net.film())
          product<BF>(rows, layer.width, units<BF>(net.T), time, ld(net.T), w->time, to, layer.pad,
                      {nullptr, to, layer.pad});
      }
      for (long j = 0; j < layer.inputs; j++) {
        const long from = layer.input[j];
        Begin begin;
        if (j == 0) begin.row = own.bias;
        else begin.rows = to, begin.ld = layer.pad;
        product<BF>(rows, layer.width, units<BF>(net.layers[from].width), op[size_t(from)], ld_out(from), own.in[j], to,
                    layer.pad, begin);
      }
      finish_layer(i, n, film_rows, film_step, first, samples);
    }
    head_forward();
  }
  // What follows a layer's product; alone where that was computed before.
  void finish_layer(long i, long n, const float* film_rows, long film_step, long first, long samples) {
    if (net.film()) set_film(i, n, film_rows, film_step, first, samples);
    ACTIVATE[net.activation](*this, i);
  }

  void set_film(long i, long n, const float* film_rows, long film_step, long first, long samples) {
    const Layer& layer = net.layers[i];
    const Packed::Hidden& own = w->layers[size_t(i)];
    for (long r = 0; r < rows; r++) {
      const float* from = film_rows + (first + r) / samples * film_step + layer.film;
      float* to = film[size_t(i)] + r * 2 * layer.pad;
      for (long k = 0; k < 2 * layer.pad; k += LANES) {
        Vec x = load(from + k);
        store(to + k, shared ? x + load(own.film_table + n * 2 * layer.pad + k) : x);
      }
    }
    for (long j = 0; j < 2 && !shared; j++) {
      float* to = film[size_t(i)] + j * layer.pad;
      product<BF>(rows, layer.width, units<BF>(net.T), time, ld(net.T), own.film[j], to, 2 * layer.pad,
                  {nullptr, to, 2 * layer.pad});
    }
  }

  void head_forward() {
    const long last = net.L - 1;
    const Layer& layer = net.layers[last];
    if (net.D > DOTS) {
      product<BF>(rows, net.D, units<BF>(layer.width), op[size_t(last)], ld_out(last), w->head, head, net.pad_out,
                  {w->head_bias});
      return;
    }
    for (long r = 0; r < rows; r++)
      for (long d = 0; d < net.D; d++) {
        const float *x = out[size_t(last)] + r * layer.pad, *h = w->head_rows + d * layer.pad;
        Vec sum = {};
        for (long k = 0; k < layer.width; k += LANES) sum += load(x + k) * load(h + k);
        head[r * net.pad_out + d] = total(sum) + w->head_bias[d];
      }
  }

  template <int A>
  static void activate_layer(Block& b, long i) {
    b.activate_rows<A>(i);
  }
  static constexpr void (*ACTIVATE[])(Block&, long) = {
      activate_layer<GELU_TANH>, activate_layer<GELU>, activate_layer<SILU>, activate_layer<RELU>,
      activate_layer<ELU>,       activate_layer<MISH>, activate_layer<TANH>};

  // Mean and 1 / standard deviation of some rows; several at a time, because a row's own sums wait for one another.
  struct Moments {
    float mean[GROUP], inverse[GROUP];
  };
  // mean holds the rows' sums; `x` the rows, zero beyond the width.
  void finish_moments(Moments& m, const float* x, long ld, long width, long n) const {
    alignas(64) float rest[LANES];
    const long whole = width / LANES * LANES;
    for (int i = 0; i < LANES; i++) rest[i] = whole + i < width ? 1.0f : 0.0f;
    float square[GROUP];
    for (long r = 0; r < n; r++) {
      const float mean = m.mean[r] = m.mean[r] / float(width);
      Vec sum = {};
      for (long k = 0; k < whole; k += LANES) {
        Vec c = load(x + r * ld + k) - mean;
        sum += c * c;
      }
      if (whole < width) {
        Vec c = (load(x + r * ld + whole) - mean) * load(rest);
        sum += c * c;
      }
      square[r] = total(sum);
    }
    for (long r = 0; r < n; r++) m.inverse[r] = 1.0f / std::sqrt(square[r] / float(width) + net.eps);
  }

  template <int A>
  void activate_rows(long i) {
    const Layer& layer = net.layers[i];
    const Packed::Hidden& own = w->layers[size_t(i)];
    const long width = layer.width, wide = round_up(width, LANES), pad = layer.pad;
    const bool floats = read_as_floats(i);
    float* slopes = slope[size_t(i)];
    Vec unused;
    for (long r0 = 0; r0 < rows; r0 += GROUP) {
      const long n = std::min<long>(GROUP, rows - r0);
      const float* x = y[size_t(i)] + r0 * pad;
      float* to = out[size_t(i)] + r0 * pad;
      // A row's result: plus that of another layer, and once more as an operand.
      struct Row {
        float* to;
        uint32_t* unit;
        const float* also;
        bool floats;
        INLINE_MEMBER void put(long k, Vec v) const {
          if (also) v += load(also + k);
          if (!BF || floats) store(to + k, v);
          if (BF) operand<BF>(unit, v, int(k / LANES));
        }
      };
      auto row = [&](long r) {
        const float* also = layer.add >= 0 ? out[size_t(layer.add)] + (r0 + r) * net.layers[layer.add].pad : nullptr;
        return Row{to + r * pad, op[size_t(i)] + (r0 + r) * ld_out(i), also, floats};
      };
      if (net.norm == NONE) {
        for (long r = 0; r < n; r++) {
          const Row at = row(r);
          if (slopes) {
            float* to_slope = slopes + (r0 + r) * pad;
            for (long k = 0; k < wide; k += LANES) {
              Vec s, v = activate<A, true, BF>(load(x + r * pad + k), s);
              at.put(k, v), store(to_slope + k, s);
            }
          } else {
            for (long k = 0; k < wide; k += LANES) at.put(k, activate<A, false, BF>(load(x + r * pad + k), unused));
          }
        }
        continue;
      }
      Moments m;
      for (long r = 0; r < n; r++) {
        Vec sum = {};
        for (long k = 0; k < wide; k += LANES) {
          Vec v = load(x + r * pad + k);
          if (net.norm == AFTER) store(to + r * pad + k, v = activate<A, false, BF>(v, unused));
          sum += v;
        }
        m.mean[r] = total(sum);
      }
      finish_moments(m, net.norm == AFTER ? to : x, pad, width, n);
      for (long r = 0; r < n && keep; r++)
        stats[size_t(i)][2 * (r0 + r)] = m.mean[r], stats[size_t(i)][2 * (r0 + r) + 1] = m.inverse[r];
      for (long r = 0; r < n; r++) {
        const Row at = row(r);
        const float mean = m.mean[r], inverse = m.inverse[r], *scale = own.scale, *shift = own.shift;
        if (net.norm == AFTER) {
          for (long k = 0; k < wide; k += LANES)
            at.put(k, (load(to + r * pad + k) - mean) * (load(scale + k) * inverse) + load(shift + k));
          continue;
        }
        const float* f = net.film() ? film[size_t(i)] + (r0 + r) * 2 * pad : nullptr;
        for (long k = 0; k < wide; k += LANES) {
          Vec hat = (load(x + r * pad + k) - mean) * inverse;
          Vec z = f ? hat * (1.0f + load(f + k)) + load(f + pad + k) : hat * load(scale + k) + load(shift + k);
          at.put(k, activate<A, false, BF>(z, unused));
        }
      }
    }
    // Tiles read pairs of vectors.
    for (long r = 0; BF && wide < pad && r < rows; r++)
      operand<BF>(op[size_t(i)] + r * ld_out(i), Vec{}, int(wide / LANES));
  }

  // Backward ---------------------------------------------------------------------------------------------------------

  // d_head [rows, pad_out] holds the head's gradient, zero in its padding; without a head d[L - 1] that of the result.
  // Afterwards d_features holds that of the state
  // features (with_state), d_time that of the rows' own time features (with_time), film[i] those of scale and shift;
  // d_base has grown by cond's share.
  void backward(long n, bool with_weights, bool with_state, bool with_time) {
    const long last = net.L - 1;
    const Layer& top = net.layers[last];
    std::fill(reached.begin(), reached.end(), false);
    if (net.D > 0) {
      if (with_weights) head_weights();
      units_of_rows(row_units, ld(net.D), d_head, net.pad_out, net.D);
      product<BF>(rows, top.width, units<BF>(net.D), row_units, ld(net.D), w->head_t, d[size_t(last)], top.pad, {});
    }
    reached[size_t(last)] = true;
    bool time_reached = false;
    for (long i = last; i >= 0; i--) {
      const Layer& layer = net.layers[i];
      const Packed::Hidden& own = w->layers[size_t(i)];
      float* dy = d[size_t(i)];
      if (layer.add >= 0) {
        float* to = d[size_t(layer.add)];
        const bool there = reached[size_t(layer.add)];
        for (long k = 0; k < rows * layer.pad; k += LANES)
          store(to + k, there ? load(to + k) + load(dy + k) : load(dy + k));
        reached[size_t(layer.add)] = true;
      }
      SLOPE[net.activation](*this, i, n, with_weights);
      if (net.film() && !shared) {
        if (with_weights) film_weights(i);
        for (long j = 0; j < 2 && with_time; j++) {
          units_of_rows(row_units, ld(layer.width), film[size_t(i)] + j * layer.pad, 2 * layer.pad, layer.width);
          time_gradient(own.film_t[j], layer.width, time_reached);
          time_reached = true;
        }
      }
      const uint32_t *dy_pairs = nullptr, *dy_rows = row_units;
      long ld_dy = ld(layer.width);
      if (!BF) {
        // Floats are their own units.
        dy_pairs = dy_rows = reinterpret_cast<const uint32_t*>(dy), ld_dy = layer.pad;
      } else if (net.norm == NONE) {
        if (with_weights) dy_pairs = pair_d, pad_pairs(pair_d, layer.pad);
        const long wide = round_up(layer.width, LANES);
        for (long r = 0; wide < layer.pad && r < rows; r++)
          operand<BF>(row_units + r * ld_dy, Vec{}, int(wide / LANES));
      } else {
        if (with_weights) dy_pairs = pairs_of(pair_d, dy, layer.pad, layer.pad);
        units_of_rows(row_units, ld_dy, dy, layer.pad, layer.width);
      }
      const long ku = units<BF>(layer.width);
      if (i > 0) {
        float* to = with_weights ? grads->w[size_t(i)] : nullptr;
        for (long j = 0; j < layer.inputs; j++) {
          const long from = layer.input[j];
          const Layer& source = net.layers[from];
          if (with_weights) {
            const uint32_t* a = pairs_of_units(op[size_t(from)], ld_out(from), source.width);
            outer<BF>(units<BF>(rows), source.width, layer.width, a, BF ? source.pad : ld_out(from), dy_pairs,
                      layer.pad, to, layer.width, row_units, room_d);
            to += source.width * layer.width;
          }
          Begin begin;
          if (reached[size_t(from)]) begin.rows = d[size_t(from)], begin.ld = source.pad;
          product<BF>(rows, source.width, ku, dy_rows, ld_dy, own.in_t[j], d[size_t(from)], source.pad, begin);
          reached[size_t(from)] = true;
        }
        continue;
      }
      if (with_weights) {
        float* to = grads->w[0] + net.cond() * layer.width;
        const uint32_t* a = pairs_of_units(state, ld(net.F), net.F);
        outer<BF>(units<BF>(rows), net.F, layer.width, a, BF ? round_up(net.F, COLS) : ld(net.F), dy_pairs, layer.pad,
                  to, layer.width, row_units, room_d);
        if (!shared && !net.film()) {
          a = pairs_of_units(time, ld(net.T), net.T);
          outer<BF>(units<BF>(rows), net.T, layer.width, a, BF ? round_up(net.T, COLS) : ld(net.T), dy_pairs, layer.pad,
                    to + net.F * layer.width, layer.width, row_units, room_d);
        }
      }
      if (with_state)
        product<BF>(rows, net.F, ku, dy_rows, ld_dy, w->state_t, d_features, round_up(net.F, COLS), {});
      if (with_time && !shared && !net.film()) {
        if (!BF) units_of_rows(row_units, ld(layer.width), dy, layer.pad, layer.width);
        time_gradient(w->time_t, layer.width, false);
      }
      if (net.cond())
        for (long k = 0; k < rows * layer.pad; k += LANES) store(d_base + k, load(d_base + k) + load(dy + k));
    }
  }

  void time_gradient(const uint32_t* packed, long width, bool more) {
    Begin begin;
    if (more) begin.rows = d_time, begin.ld = round_up(net.T, COLS);
    product<BF>(rows, net.T, units<BF>(width), row_units, ld(width), packed, d_time, round_up(net.T, COLS), begin);
  }

  // cond's gradients, of all evaluations at once: its weights', and its own [rows, C] where it is asked for.
  void cond_gradient(bool with_weights, float* d_cond) {
    if (!net.cond()) return;
    const Layer& layer = net.layers[0];
    if (d_cond) {
      units_of_rows(row_units, ld(layer.width), d_base, layer.pad, layer.width);
      const long pad = round_up(net.C, COLS);
      // d[0] has been used up.
      float* to = pad <= layer.pad ? d[0] : base_room(pad);
      product<BF>(rows, net.C, units<BF>(layer.width), row_units, ld(layer.width), w->cond_t, to, pad, {});
      for (long r = 0; r < rows; r++) memcpy(d_cond + r * net.C, to + r * pad, size_t(net.C) * 4);
    }
    if (!with_weights) return;
    // Rows of the same cond are added up first.
    const long all = rows, own = own_rows();
    for (long r = 1; own < all && r < all; r++) {
      float* to = d_base + own_row(r) * layer.pad;
      const float* from = d_base + r * layer.pad;
      const bool more = own_row(r) == own_row(r - 1);
      for (long k = 0; k < layer.pad; k += LANES) store(to + k, more ? load(to + k) + load(from + k) : load(from + k));
    }
    rows = own;
    const uint32_t* dy = pairs_of(pair_d, d_base, layer.pad, layer.pad);
    const uint32_t* a = pairs_of_units(cond, ld(net.C), net.C);
    outer<BF>(units<BF>(rows), net.C, layer.width, a, BF ? round_up(net.C, COLS) : ld(net.C), dy, layer.pad,
              grads->w[0], layer.width, row_units, room_d);
    rows = all;
  }
  std::vector<float> room;
  float* base_room(long pad) {
    room.resize(size_t(rows * pad));
    return room.data();
  }

  void film_weights(long i) {
    const Layer& layer = net.layers[i];
    const uint32_t* a = pairs_of_units(time, ld(net.T), net.T);
    for (long j = 0; j < 2; j++) {
      const uint32_t* dy = pairs_of(pair_d, film[size_t(i)] + j * layer.pad, 2 * layer.pad, layer.pad);
      outer<BF>(units<BF>(rows), net.T, layer.width, a, BF ? round_up(net.T, COLS) : ld(net.T), dy,
                BF ? layer.pad : 2 * layer.pad, grads->film[size_t(i)] + j * layer.width, 2 * layer.width, row_units,
                room_d);
    }
  }

  void head_weights() {
    const long last = net.L - 1;
    const Layer& top = net.layers[last];
    for (long k = 0; k < net.D; k++) {
      float sum = 0.0f;
      for (long r = 0; r < rows; r++) sum += d_head[r * net.pad_out + k];
      sums->head_bias[k] += sum;
    }
    if (net.D > DOTS) {
      const uint32_t* a = pairs_of_units(op[size_t(last)], ld_out(last), top.width);
      outer<BF>(units<BF>(rows), top.width, net.D, a, BF ? top.pad : ld_out(last),
                pairs_of(pair_d, d_head, net.pad_out, net.pad_out), net.pad_out, grads->w[size_t(net.L)], net.D,
                row_units, room_d);
      return;
    }
    for (long k = 0; k < net.D; k++)
      for (long j = 0; j < top.width; j += LANES) {
        Vec sum = {};
        for (long r = 0; r < rows; r++) sum += d_head[r * net.pad_out + k] * load(out[size_t(last)] + r * top.pad + j);
        float* to = sums->head + k * top.pad + j;
        store(to, load(to) + sum);
      }
  }

  // [rows / 2, wide] pairs of neighbouring rows; floats are their own units.
  const uint32_t* pairs_of(uint32_t* to, const float* from, long ld_from, long wide) const {
    if (!BF) return reinterpret_cast<const uint32_t*>(from);
    for (long r = 0; r < rows; r += 2)
      for (long k = 0; k < wide; k += LANES)
        pairs(to + r / 2 * wide + k, load(from + r * ld_from + k),
              r + 1 < rows ? load(from + (r + 1) * ld_from + k) : Vec{});
    pad_pairs(to, wide);
    return to;
  }
  void pad_pairs(uint32_t* to, long wide) const {
    const long full = units<BF>(rows), padded = panel_units<BF>(rows);
    memset(to + full * wide, 0, size_t((padded - full) * wide) * 4);
  }
  // The same of an operand's rows; pairs have a row stride of the width padded to COLS. Transposed for tiles.
  const uint32_t* pairs_of_units(const uint32_t* from, long ld_from, long width) const {
    if (!BF) return from;
#if TILES
    if (amx::allowed) {
      amx::transposed(pair_a, panel_units<BF>(rows), from, ld_from, rows, width);
      return pair_a;
    }
#endif
    const long pad = round_up(width, COLS);
#if defined(__AVX512BF16__)
    for (long r = 0; r < rows; r += 2)
      for (long k = 0; k < round_up(width, LANES); k += LANES) {
        auto row = [&](long at) {
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(
              reinterpret_cast<const __m256i*>(reinterpret_cast<const uint16_t*>(from + at * ld_from) + k)));
        };
        __m512i odd = r + 1 < rows ? _mm512_slli_epi32(row(r + 1), 16) : _mm512_setzero_si512();
        _mm512_storeu_si512(pair_a + r / 2 * pad + k, _mm512_or_si512(row(r), odd));
      }
#endif
    return pair_a;
  }

  template <int A>
  static void slope_layer(Block& b, long i, long n, bool with_weights) {
    b.slope_rows<A>(i, n, with_weights);
  }
  static constexpr void (*SLOPE[])(Block&, long, long, bool) = {
      slope_layer<GELU_TANH>, slope_layer<GELU>, slope_layer<SILU>, slope_layer<RELU>,
      slope_layer<ELU>,       slope_layer<MISH>, slope_layer<TANH>};

  // d[i], the gradient of layer i's output, becomes that of its product; sums over rows grow. Without a norm it becomes
  // the operands of what follows as well, or instead where no one reads floats.
  template <int A>
  void slope_rows(long i, long n, bool with_weights) {
    const Layer& layer = net.layers[i];
    const Packed::Hidden& own = w->layers[size_t(i)];
    const long width = layer.width, wide = round_up(width, LANES), pad = layer.pad;
    const bool tabled = shared && i == 0, floats = !BF || i == 0;
    const long most = net.widest();
    float *hats = scratch, *slopes = hats + GROUP * most;
    // A block's sums first, then those of blocks: a long sum of single rows would lose bits.
    float *bias = with_weights ? slopes + GROUP * most : nullptr, *scale = bias && net.affine() ? bias + most : nullptr;
    float* shift = scale ? scale + most : nullptr;
    if (bias) memset(bias, 0, size_t(pad) * 4);
    if (scale) memset(scale, 0, size_t(pad) * 4), memset(shift, 0, size_t(pad) * 4);
    auto grow = [](float* to, long k, Vec v) { store(to + k, load(to + k) + v); };
    for (long r0 = 0; r0 < rows; r0 += GROUP) {
      const long count = std::min<long>(GROUP, rows - r0);
      const float* x = y[size_t(i)] + r0 * pad;
      float* g = d[size_t(i)] + r0 * pad;
      if (net.norm == NONE) {
        const float* known = slope[size_t(i)] ? slope[size_t(i)] + r0 * pad : nullptr;
        uint32_t *units = row_units + r0 * ld(width), *even_and_odd = pair_d + r0 / 2 * pad;
        for (long k = 0; k < wide; k += LANES) {
          Vec sum = {};
          for (long r = 0; r < count; r += 2) {
            Vec v[2] = {};
            for (long j = 0; j < 2 && r + j < count; j++) {
              const long at = (r + j) * pad + k;
              Vec s;
              if (known) s = load(known + at);
              else activate<A, true, BF>(load(x + at), s);
              v[j] = load(g + at) * s;
              if (floats) store(g + at, v[j]);
              if (BF) operand<BF>(units + (r + j) * ld(width), v[j], int(k / LANES));
              sum += v[j];
            }
            if (BF && with_weights) pairs(even_and_odd + r / 2 * pad + k, v[0], v[1]);
          }
          if (bias) grow(bias, k, sum);
        }
        continue;
      }
      float a[GROUP], b[GROUP];
      for (long r = 0; r < count; r++) {
        const float mean = stats[size_t(i)][2 * (r0 + r)], inverse = stats[size_t(i)][2 * (r0 + r) + 1];
        float* f = net.film() ? film[size_t(i)] + (r0 + r) * 2 * pad : nullptr;
        Vec sum = {}, along = {};
        for (long k = 0; k < wide; k += LANES) {
          Vec s, hat, v = load(g + r * pad + k);
          if (net.norm == AFTER) {
            hat = (activate<A, true, BF>(load(x + r * pad + k), s) - mean) * inverse;
            if (scale) grow(scale, k, v * hat), grow(shift, k, v);
            v *= load(own.scale + k);
            store(slopes + r * most + k, s);
          } else {
            hat = (load(x + r * pad + k) - mean) * inverse;
            Vec z =
                f ? hat * (1.0f + load(f + k)) + load(f + pad + k) : hat * load(own.scale + k) + load(own.shift + k);
            activate<A, true, BF>(z, s);
            v *= s;
            if (f) {
              Vec factor = 1.0f + load(f + k);
              store(f + k, v * hat), store(f + pad + k, v);
              v *= factor;
            } else {
              if (scale) grow(scale, k, v * hat), grow(shift, k, v);
              v *= load(own.scale + k);
            }
          }
          store(hats + r * most + k, hat);
          store(g + r * pad + k, v);
          sum += v, along += v * hat;
        }
        // Lanes beyond the width hold zero gradients.
        a[r] = total(sum), b[r] = total(along);
      }
      for (long r = 0; r < count; r++) {
        const float inverse = stats[size_t(i)][2 * (r0 + r) + 1], mean_g = a[r] / float(width),
                    mean_gh = b[r] / float(width);
        for (long k = 0; k < wide; k += LANES) {
          Vec v = (load(g + r * pad + k) - mean_g - load(hats + r * most + k) * mean_gh) * inverse;
          if (net.norm == AFTER) v *= load(slopes + r * most + k);
          store(g + r * pad + k, v);
          if (bias) grow(bias, k, v);
        }
        for (long k = width; k < wide; k++) g[r * pad + k] = 0.0f;
      }
    }
    for (long k = 0; bias && k < wide; k += LANES) {
      grow(tabled ? sums->table + n * pad : sums->bias[size_t(i)], k, load(bias + k));
      if (scale) grow(sums->scale[size_t(i)], k, load(scale + k)), grow(sums->shift[size_t(i)], k, load(shift + k));
    }
    for (long k = 0; bias && net.film() && shared && k < 2 * pad; k += LANES) {
      Vec sum = {};
      for (long r = 0; r < rows; r++) sum += load(film[size_t(i)] + r * 2 * pad + k);
      grow(sums->film[size_t(i)] + n * 2 * pad, k, sum);
    }
  }
};
