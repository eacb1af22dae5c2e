// Attention out[l, :] = sum over s of softmax(scale * q[l, :] . k[s, :] + mask[l, s]) * v[s, :], for batches and heads, by
// blocks of keys with a running maximum and sum: the scores of one register tile of rows live in the first cache, all others
// nowhere. Grouped queries: H / Hkv heads share keys and values, and their rows share a task.
//
// A row has one order of its sums whatever the number of threads, of rows beside it, and the path: keys come in blocks of
// KEYS from the first one on; products have the order of matmul_tile.h; exponentials are summed by lane, then in a tree.
// (Where v holds inf or NaN at keys that a causal row must not see, the row may be NaN, as 0 * inf is; so it is in torch.)
//
// A row all of whose scores are -inf gives 0, and 0 as log-sum-exp, as torch's blocked attention on CPUs does.
#pragma once
#include <omp.h>

#include "matmul_thin.h"
#include "vmath.h"

namespace plait::attention {

using namespace plait::matmul;

constexpr int64_t KEYS = 256;      // keys in a block: fixes the order of sums, changing it changes results
constexpr int64_t ROWS = 192;      // query rows that share one packing of keys and values
constexpr int64_t PLACE = 24;
constexpr double WORK = 1 << 16;   // multiply-adds below which a second thread costs more than it saves
static_assert(KEYS <= KB && KEYS % NR == 0 && ROWS % PR == 0);

// Strides in elements: of batch, head and row; the last axis is contiguous, but for the mask's.
struct Call {
  const void *q, *k, *v, *mask;
  void *out, *lse, *workspace;
  int64_t B, H, Hkv, L, S, E, Ev, causal, slots;
  int64_t qs[3], ks[3], vs[3], ms[4], os[3], ls[3];
  double scale;
};

inline int64_t least_rows(int64_t rows) { return least(ceildiv(rows, PR) * PR, ROWS); }

// Elements of scratch that one thread needs; `workspace_elements` in attention.py says the same.
inline int64_t slot_elements(int64_t rows, int64_t E, int64_t Ev) {
  const int64_t wide = ceildiv(Ev, NR) * NR;
  return least_rows(rows) * (AS * ceildiv(E, KB) + wide + 2) + KEYS * (E + wide + PR + 1) + PR * AS + 8 * STRIP;
}

struct None {};  // no mask

// e^x for x <= 0, as exp but for results that would be subnormal: they are 0.
template <class X> PLAIT_FN X exp_down(X x) {
  if constexpr (!same<lane_t<X>, float>) return exp(x);
  else {
    const ExpReduced<X> e(at_least(x, -87.0f));
    const X power = plait::scale<true>(X(1.0f + (e.r + fma(X(e.r * e.r), poly(e.r, EXP), e.tail))), e.by.n, e.by.k);
    return where(x < -87.0f, X(0.0f), power);
  }
}

// T: of the sums. U: of q, k, v and the result in memory. M: of the mask, None where there is none.
template <class T, class U, class M> struct Driver {
  const Call& c;
  static constexpr int L = lanes<T>;
  static constexpr bool masked = !same<M, None>;
  using V = plait::vec<T, L>;

  struct Scratch {
    T *q, *k, *v, *scores, *powers, *sums, *bias, *out, *top, *total;
  };
  struct Rows1 {  // one head's keys or values
    const U* base;
    int64_t step;
  };

  const int64_t group = c.H / c.Hkv, rows = group * c.L, blocks = ceildiv(c.E, KB), panels = ceildiv(c.Ev, NR);
  const T scale = T(c.scale);

  Scratch carve(T* p) const {
    const int64_t many = least_rows(rows), wide = panels * NR;
    Scratch s;
    s.q = p, p += many * AS * blocks;
    s.out = p, p += many * wide;
    s.top = p, p += many;
    s.total = p, p += many;
    s.k = p, p += KEYS * c.E;
    s.v = p, p += KEYS * wide;
    s.scores = p, p += KEYS * PR;
    s.bias = p, p += KEYS;
    s.powers = p, p += PR * AS;
    s.sums = p;
    return s;
  }

  int64_t head(int64_t hkv, int64_t row) const { return hkv * group + row / c.L; }

  // Keys that a row may see.
  int64_t limit(int64_t row) const { return c.causal ? least(row % c.L + 1, c.S) : c.S; }

  // Rows r0 .. r0 + mr, scaled, as MR x AS for each block of E.
  [[gnu::noinline]] void load_q(int64_t b, int64_t hkv, int64_t r0, int64_t mr, T* dst) const {
    for (int64_t r = 0; r < mr; r++) {
      const int64_t row = r0 + r;
      const U* src = (const U*)c.q + b * c.qs[0] + head(hkv, row) * c.qs[1] + row % c.L * c.qs[2];
      for (int64_t e0 = 0; e0 < c.E; e0 += KB) {
        const int64_t n = least(KB, c.E - e0);
        T* to = dst + e0 / KB * MR * AS + r * AS;
        int64_t e = 0;
        for (; e + L <= n; e += L) put(to + e, get_as<T>(src + e0 + e) * scale);
        for (; e < n; e++) to[e] = cast<T>(src[e0 + e]) * scale;
      }
    }
    for (int64_t r = mr; r < MR; r++)  // the register tile reads them
      for (int64_t e = 0; e < blocks; e++) __builtin_memset(dst + e * MR * AS + r * AS, 0, least(c.E, KB) * sizeof(T));
  }

  // Rows of mask[row, k0 : k0 + n] as numbers to add, padded with zeros.
  [[gnu::noinline]] const T* bias(int64_t b, int64_t hkv, int64_t row, int64_t k0, int64_t n, int64_t padded, T* buffer) const {
    if constexpr (masked) {
      const M* src = (const M*)c.mask + b * c.ms[0] + head(hkv, row) * c.ms[1] + row % c.L * c.ms[2] + k0 * c.ms[3];
      if constexpr (same<M, T>)
        if (c.ms[3] == 1 && n == padded) return src;
      const auto one = [](M x) PLAIT_BODY {
        if constexpr (same<M, bool>) return x ? T(0) : lowest<T>();
        else return cast<T>(x);
      };
      if (c.ms[3] == 1)
        for (int64_t j = 0; j < n; j++) buffer[j] = one(src[j]);
      else
        for (int64_t j = 0; j < n; j++) buffer[j] = one(src[j * c.ms[3]]);
      for (int64_t j = n; j < padded; j++) buffer[j] = T(0);
    }
    return buffer;
  }

  // One row's scores (32 of them every MR * NR elements) of `n` keys, of which it sees `seen`, to exponentials against the
  // new maximum; what came before is to be scaled by the result.
  [[gnu::noinline]] T softmax(T* scores, const T* bias, int64_t n, int64_t seen, T* powers, T& top, T& total) const {
    const int64_t padded = ceildiv(n, NR) * NR;
    for (int64_t j = most(seen, 0); j < padded; j++) scores[j / NR * (MR * NR) + j % NR] = lowest<T>();
    V best(lowest<T>());
    for (int64_t j = 0; j < padded; j += NR) {
      T* at = scores + j * MR;
#pragma GCC unroll 8
      for (int i = 0; i < NR; i += L) {
        V s(get(at + i));
        if constexpr (masked) {
          s = s + V(get(bias + j + i));
          put(at + i, s.v);
        }
        best = more_of(s, best);
      }
    }
    T now = top;
    for (int i = 0; i < L; i++) now = best[i] > now ? best[i] : now;
    const T base = now == lowest<T>() ? T(0) : now;  // -inf - -inf would be NaN
    V sum(T(0));
    for (int64_t j = 0; j < padded; j += NR) {
      const T* at = scores + j * MR;
#pragma GCC unroll 2
      for (int i = 0; i < NR; i += L) {
        const V p = exp_down(V(V(get(at + i)) - base));
        put(powers + j + i, p.v);
        sum = sum + p;
      }
    }
    T part[L];
    put(part, sum.v);
    for (int w = L / 2; w > 0; w /= 2)
      for (int i = 0; i < w; i++) part[i] += part[i + w];
    const T before = top == now ? T(1) : exp_down(T(top - base));
    total = total * before + part[0];
    top = now;
    return before;
  }

  // Whether panel p of the values is read where it lies: copying it for `many` rows would take longer.
  bool in_place(int64_t many, int64_t p) const { return same<T, U> && many <= PLACE && (p + 1) * NR <= c.Ev; }

  // One register tile of rows against keys k0 .. k0 + n. Thin: few rows, whose keys and values are read where they lie.
  void tile(int64_t many, bool thin, int64_t b, int64_t hkv, int64_t r0, int64_t mr, int64_t k0, int64_t n, int64_t at, Rows1 ks, Rows1 vs,
            const Scratch& s) const {
    int64_t most_seen = 0;
    for (int64_t r = 0; r < mr; r++) most_seen = most(most_seen, least(n, limit(r0 + r) - k0));
    if (most_seen <= 0) return;
    n = most_seen;
    const T* q = s.q + at * AS * blocks;
    for (int64_t j = 0; j < n; j += NR) {
      T* to = s.scores + j * MR;
      if (thin) {
        score_thin(mr, q, ks, k0 + j, least(NR, n - j), to, s.k);
      } else {
        for (int64_t e = 0; e < c.E; e += KB)
          micro_rows<T, int(AS), 1>(mr, least(KB, c.E - e), q + e / KB * MR * AS, s.k + j * c.E + e * NR, NR, to, e > 0);
        if (c.E == 0) __builtin_memset(to, 0, MR * NR * sizeof(T));
      }
    }
    const int64_t padded = ceildiv(n, NR) * NR;
    T before[MR];
    bool moved = false;
    for (int64_t r = 0; r < mr; r++) {
      const T* add = bias(b, hkv, r0 + r, k0, n, padded, s.bias);
      const int64_t seen = least(n, limit(r0 + r) - k0);
      before[r] = softmax(s.scores + r * NR, add, n, seen, s.powers + r * AS, s.top[at + r], s.total[at + r]);
      moved |= before[r] != T(1);
    }
    T* out = s.out + at * panels * NR;  // panels of MR x NR
    if (moved && k0 > 0)
      for (int64_t p = 0; p < panels; p++)
        for (int64_t r = 0; r < mr; r++)
          for (int i = 0; i < NR; i += L) {
            T* o = out + (p * MR + r) * NR + i;
            put(o, get(o) * before[r]);
          }
    if (thin) {
      mix_thin(mr, vs, k0, n, k0 > 0, out, s);
    } else {
      for (int64_t p = 0; p < panels; p++) {
        const T* values = s.v + p * KEYS * NR;
        int64_t step = NR;
        if constexpr (same<T, U>)
          if (in_place(many, p)) values = vs.base + k0 * vs.step + p * NR, step = vs.step;
        micro_rows<T, int(AS), 1>(mr, n, s.powers, values, step, out + p * MR * NR, k0 > 0);
      }
    }
  }

  void score_thin(int64_t mr, const T* q, Rows1 ks, int64_t k0, int64_t cols, T* to, T* room) const {
    const T* src[NR];
    for (int64_t j = 0; j < NR; j++) {
      const U* row = ks.base + (k0 + least(j, cols - 1)) * ks.step;
      if constexpr (same<T, U>) src[j] = row;
      else src[j] = widened(row, c.E, room + j * c.E);
    }
    for (int h = 0; h < NR; h += L) {
      if (mr == 1) thin_k<T, T, 1, int(AS), 1>(c.E, q, src + h, to + h);
      else thin_k<T, T, THIN, int(AS), 1>(c.E, q, src + h, to + h);
    }
  }

  void mix_thin(int64_t mr, Rows1 vs, int64_t k0, int64_t n, bool add, T* out, const Scratch& s) const {
    for (int64_t e = 0; e < c.Ev; e += STRIP) {
      const int64_t cols = least(STRIP, c.Ev - e);
      Rows<T> from{nullptr, vs.step, nullptr};
      int64_t first = k0;
      if constexpr (same<T, U>) {
        from.base = vs.base + e;
      } else {
        for (int64_t j = 0; j < n; j++) widened(vs.base + (k0 + j) * vs.step + e, cols, s.v + j * cols);
        from.base = s.v, from.ld = cols, first = 0;
      }
      if (mr == 1) thin_n<T, T, 1, int(AS), 1>(n, s.powers, from, first, 0, cols, s.sums);
      else thin_n<T, T, THIN, int(AS), 1>(n, s.powers, from, first, 0, cols, s.sums);
      for (int64_t r = 0; r < mr; r++)
        for (int64_t j = 0; j < cols; j++) {
          T* o = out + ((e + j) / NR * MR + r) * NR + (e + j) % NR;
          *o = add ? *o + s.sums[r * STRIP + j] : s.sums[r * STRIP + j];
        }
    }
  }

  [[gnu::noinline]] static const T* widened(const U* src, int64_t n, T* dst) {
    int64_t i = 0;
    for (; i + L <= n; i += L) put(dst + i, get_as<T>(src + i));
    for (; i < n; i++) dst[i] = cast<T>(src[i]);
    return dst;
  }

  // Divides by the sums of exponentials.
  [[gnu::noinline]] void finish(int64_t b, int64_t hkv, int64_t r0, int64_t mr, int64_t at, const Scratch& s) const {
    const T* from = s.out + at * panels * NR;
    for (int64_t r = 0; r < mr; r++) {
      const int64_t row = r0 + r, h = head(hkv, row), l = row % c.L;
      const T total = s.total[at + r], by = total == T(0) ? T(1) : total;
      U* to = (U*)c.out + b * c.os[0] + h * c.os[1] + l * c.os[2];
      for (int64_t p = 0; p < panels; p++) {
        const T* sums = from + (p * MR + r) * NR;
        const int64_t cols = least(NR, c.Ev - p * NR);
        int64_t j = 0;
        for (; j + L <= cols; j += L) to_lanes(to + p * NR + j, cast<U>(V(V(get(sums + j)) / by)));
        for (; j < cols; j++) to[p * NR + j] = cast<U>(T(sums[j] / by));
      }
      if (c.lse != nullptr) {
        const T lse = total == T(0) ? T(0) : T(s.top[at + r] + log(total));
        ((T*)c.lse)[b * c.ls[0] + h * c.ls[1] + l * c.ls[2]] = lse;
      }
    }
  }

  void run(int64_t b, int64_t hkv, int64_t r0, int64_t r1, const Scratch& s) const {
    const Rows1 ks{(const U*)c.k + b * c.ks[0] + hkv * c.ks[1], c.ks[2]};
    const Rows1 vs{(const U*)c.v + b * c.vs[0] + hkv * c.vs[1], c.vs[2]};
    const bool thin = r1 - r0 <= THIN && c.E <= KB;
    int64_t last = 0;
    for (int64_t r = r0; r < r1; r += MR) load_q(b, hkv, r, least(MR, r1 - r), s.q + (r - r0) * AS * blocks);
    for (int64_t r = r0; r < r1; r++) {
      s.top[r - r0] = lowest<T>(), s.total[r - r0] = T(0);
      last = most(last, limit(r));
    }
    __builtin_memset(s.out, 0, ceildiv(r1 - r0, MR) * MR * panels * NR * sizeof(T));
    for (int64_t k0 = 0; k0 < last; k0 += KEYS) {
      const int64_t n = least(KEYS, last - k0);
      if (!thin) {
        for (int64_t j = 0; j < n; j += NR)
          pack_b_k<T>(Rows<U>{ks.base, ks.step, nullptr}, 0, c.E, k0 + j, least(NR, n - j), s.k + j * c.E);
        for (int64_t p = 0; p < panels; p++)
          if (!in_place(r1 - r0, p)) pack_b_n<T>(Rows<U>{vs.base, vs.step, nullptr}, k0, n, p * NR, least(NR, c.Ev - p * NR), s.v + p * KEYS * NR);
      }
      for (int64_t r = r0; r < r1; r += MR) tile(r1 - r0, thin, b, hkv, r, least(MR, r1 - r), k0, n, r - r0, ks, vs, s);
    }
    for (int64_t r = r0; r < r1; r += MR) finish(b, hkv, r, least(MR, r1 - r), r - r0, s);
  }

  void operator()(int nt) const {
    const int64_t heads = c.B * c.Hkv;
    if (heads <= 0 || rows <= 0) return;
    const double work = double(heads) * double(rows) * double(c.S) * double(c.E + c.Ev);
    nt = work < 2 * WORK ? 1 : int(least(nt, c.slots));
    // rows of a task: as many as share a packing, fewer where threads would have nothing to do
    const int64_t cuts = most(ceildiv(rows, ROWS), least(ceildiv(nt, heads), ceildiv(rows, MR)));
    const int64_t step = ceildiv(ceildiv(rows, cuts), MR) * MR, count = ceildiv(rows, step), room = slot_elements(rows, c.E, c.Ev);
    const auto task = [&](int64_t i, const Scratch& s) {
      const int64_t which = i / count, r0 = i % count * step;
      run(which / c.Hkv, which % c.Hkv, r0, least(rows, r0 + step), s);
    };
    if (nt <= 1) {
      const Scratch s = carve((T*)c.workspace);
      for (int64_t i = 0; i < heads * count; i++) task(i, s);
      return;
    }
#pragma omp parallel num_threads(nt)
    {
      const Scratch s = carve((T*)c.workspace + omp_get_thread_num() * room);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < heads * count; i++) task(i, s);
    }
  }
};

template <class T, class U, class M> static void run(const Call& call, int nthreads) { Driver<T, U, M>{call}(nthreads); }

}  // namespace plait::attention
