// Rows on their way between tokens and the buffers of experts, see runtime/moe.py: places for pairs of a token and an expert,
// rows copied to those places and summed back, buffers joined. Kernels of one thread or of many give the same bits.
//
// A pair whose expert or row is not there sets the status word, and is taken for one that was dropped.
#pragma once
#include <omp.h>

#include "vmem.h"
#include "vops.h"

namespace plait::moe {

constexpr int64_t MUCH = 1 << 18;    // bytes to move from which several threads are worth waking
constexpr int64_t BLOCK = 1 << 16;   // bytes of a buffer that one task writes
constexpr int64_t CHOICES = 64;      // of a token, at most; `CHOICES` in codegen/moe.py says the same
constexpr int64_t NONE = -1, WRONG = -2;

struct None {};  // no weights
template <bool> struct wider { using type = float; };
template <> struct wider<true> { using type = double; };
template <class A, class B = None> using wide = typename wider<same<A, double> || same<B, double>>::type;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t within(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// f(i) for i below n, in threads where `bytes` are many.
template <class F> void each(int64_t n, int64_t bytes, int nthreads, F f) {
  if (nthreads <= 1 || bytes < MUCH) {
    for (int64_t i = 0; i < n; i++) f(i);
  } else {
#pragma omp parallel for num_threads(nthreads)
    for (int64_t i = 0; i < n; i++) f(i);
  }
}

// f(i, lanes) for tiles of h columns.
template <class F> PLAIT_FN void columns(int64_t h, F f) {
  int64_t i = 0;
  for (; i + W <= h; i += W) f(i, Full<W>{});
  if (i < h) f(i, Part{int(h - i)});
}

// f(first row, past the last one) for blocks of all rows of a buffer, in threads.
template <class F> void blocks(int64_t rows, int64_t row_bytes, int nthreads, F f) {
  const int64_t step = 1 + BLOCK / (row_bytes + 1);
  each((rows + step - 1) / step, rows * row_bytes, nthreads, [&](int64_t i) { f(i * step, least(rows, (i + 1) * step)); });
}

// Sizes of ops on pairs, in the order of `_pairs` in codegen/moe.py; the strides of rows of tokens and of a buffer's groups
// and rows are in elements.
struct Pairs {
  int64_t S, k, E, C, h, slots, choice_s, choice_k, slot_s, slot_k, weight_s, weight_k, token, group, row;

  static Pairs of(const int64_t* sizes) {
    Pairs p;
    __builtin_memcpy(&p, sizes, sizeof p);
    return p;
  }
  // The expert and the row of a pair; the row alone is NONE or WRONG for a pair without one.
  void find(const int64_t* choice, const int64_t* slot, int64_t s, int64_t j, int64_t& expert, int64_t& place) const {
    place = slot[s * slot_s + j * slot_k];
    if (place < 0) return void(place = NONE);
    expert = choice[s * choice_s + j * choice_k];
    if (expert < 0 || expert >= E || place >= C) place = WRONG;
  }
};

// bufs: tokens, choice, slot, weights if G is not None, the buffer, status, scratch [E * C]. The last size says whether rows
// that are not used are cleared.
template <class T, class G> void encode(void* const* bufs, const int64_t* sizes, int nthreads) {
  const Pairs p = Pairs::of(sizes);
  const T* const x = static_cast<const T*>(bufs[0]);
  const int64_t *const choice = static_cast<const int64_t*>(bufs[1]), *const slot = static_cast<const int64_t*>(bufs[2]);
  constexpr int more = same<G, None> ? 3 : 4;
  T* const out = static_cast<T*>(bufs[more]);
  int64_t* const pair = static_cast<int64_t*>(bufs[more + 2]);  // that each row is from, counted from 1; 0: none
  __builtin_memset(pair, 0, p.E * p.C * sizeof *pair);
  const bool clear = sizes[sizeof(Pairs) / sizeof(int64_t)];
  bool wrong = false;
  for (int64_t s = 0; s < p.S; s++)
    for (int64_t j = 0; j < p.k; j++) {
      int64_t expert, place;
      p.find(choice, slot, s, j, expert, place);
      wrong |= place == WRONG;
      if (place >= 0) pair[expert * p.C + place] = s * p.k + j + 1;
    }
  if (wrong) *static_cast<int64_t*>(bufs[more + 1]) = 1;
  blocks(p.E * p.C, p.h * sizeof(T), nthreads, [=](int64_t row, int64_t end) {
    while (row < end) {
      if (pair[row] == 0) {
        const int64_t first = row;
        while (row < end && pair[row] == 0) row++;
        if (clear) __builtin_memset(out + first * p.h, 0, (row - first) * p.h * sizeof(T));
        continue;
      }
      const int64_t s = (pair[row] - 1) / p.k;
      const T* const from = x + s * p.token;
      T* const to = out + row * p.h;
      if constexpr (same<G, None>) __builtin_memcpy(to, from, p.h * sizeof(T));
      else {
        using X = wide<T, G>;
        const int64_t j = (pair[row] - 1) % p.k;
        const X weight = cast<X>(static_cast<const G*>(bufs[3])[s * p.weight_s + j * p.weight_k]);
        columns(p.h, [=](int64_t i, auto lanes) { store(to + i, cast<T>(cast<X>(load(from + i, lanes)) * weight), lanes); });
      }
      row++;
    }
  });
}

// bufs: the buffer, choice, slot, weights if G is not None, tokens, status.
template <class T, class G> void decode(void* const* bufs, const int64_t* sizes, int nthreads) {
  using X = wide<T, G>;
  const Pairs p = Pairs::of(sizes);
  const T* const buf = static_cast<const T*>(bufs[0]);
  const int64_t *const choice = static_cast<const int64_t*>(bufs[1]), *const slot = static_cast<const int64_t*>(bufs[2]);
  constexpr int more = same<G, None> ? 3 : 4;
  T* const out = static_cast<T*>(bufs[more]);
  int64_t* const status = static_cast<int64_t*>(bufs[more + 1]);
  each(p.S, p.S * (p.k + 1) * p.h * sizeof(T), nthreads, [=](int64_t s) {
    const T* from[CHOICES];
    X weight[CHOICES];
    int64_t n = 0;
    for (int64_t j = 0; j < p.k; j++) {
      int64_t expert, place;
      p.find(choice, slot, s, j, expert, place);
      if (place == WRONG) __atomic_store_n(status, 1, __ATOMIC_RELAXED);
      if (place < 0) continue;
      from[n] = buf + expert * p.group + place * p.row;
      if constexpr (!same<G, None>) weight[n] = cast<X>(static_cast<const G*>(bufs[3])[s * p.weight_s + j * p.weight_k]);
      n++;
    }
    columns(p.h, [&](int64_t i, auto lanes) {
      vec<X> sum(X(0));
      for (int64_t j = 0; j < n; j++) {
        const vec<X> found = cast<X>(load(from[j] + i, lanes));
        if constexpr (same<G, None>) sum = sum + found;
        else sum = sum + vec<X>(found * weight[j]);
      }
      store(out + s * p.h + i, cast<T>(sum), lanes);
    });
  });
}

// a . b over h columns in halves, as `_halved` in runtime/moe.py; `held` has room for h / 2 sums.
template <class X, class A, class B> PLAIT_FN X dot(const A* a, const B* b, int64_t h, X* held) {
  const auto at = [=](int64_t i, auto lanes) { return cast<X>(load(a + i, lanes)) * cast<X>(load(b + i, lanes)); };
  X total = 0;
  int64_t half = h / 2;
  if (h % 2) total = total + cast<X>(a[h - 1]) * cast<X>(b[h - 1]);
  columns(half, [=](int64_t i, auto lanes) { store(held + i, at(i, lanes) + at(half + i, lanes), lanes); });
  for (int64_t n = half; n > 0; n = half) {
    half = n / 2;
    if (n % 2) total = total + held[n - 1];
    columns(half, [=](int64_t i, auto lanes) { store(held + i, load(held + i, lanes) + load(held + half + i, lanes), lanes); });
  }
  return total;
}

// bufs: the buffer, choice, slot, gradients of tokens, those of weights [S, k], status, scratch [slots * h].
template <class T, class G> void decode_weight(void* const* bufs, const int64_t* sizes, int nthreads) {
  using X = wide<T, G>;
  const Pairs p = Pairs::of(sizes);
  const T* const buf = static_cast<const T*>(bufs[0]);
  const int64_t *const choice = static_cast<const int64_t*>(bufs[1]), *const slot = static_cast<const int64_t*>(bufs[2]);
  const G* const grad = static_cast<const G*>(bufs[3]);
  X* const out = static_cast<X*>(bufs[4]);
  int64_t* const status = static_cast<int64_t*>(bufs[5]);
  X* const scratch = static_cast<X*>(bufs[6]);
  each(p.S, p.S * p.k * p.h * (sizeof(T) + sizeof(G)), int(least(nthreads, p.slots)), [=](int64_t s) {
    for (int64_t j = 0; j < p.k; j++) {
      int64_t expert, place;
      p.find(choice, slot, s, j, expert, place);
      if (place == WRONG) __atomic_store_n(status, 1, __ATOMIC_RELAXED);
      X* const held = scratch + omp_get_thread_num() * p.h;
      out[s * p.k + j] = place < 0 ? X(0) : dot(buf + expert * p.group + place * p.row, grad + s * p.token, p.h, held);
    }
  });
}

// bufs: choice, used, slot, used afterwards, rows [E, 2], status. sizes: S, k, E, C, strides of choice, of used.
inline void slots(void* const* bufs, const int64_t* sizes, int) {
  const int64_t S = sizes[0], k = sizes[1], E = sizes[2], C = sizes[3];
  const int64_t *const choice = static_cast<const int64_t*>(bufs[0]), *const used = static_cast<const int64_t*>(bufs[1]);
  int64_t *const slot = static_cast<int64_t*>(bufs[2]), *const after = static_cast<int64_t*>(bufs[3]);
  int64_t *const rows = static_cast<int64_t*>(bufs[4]);
  for (int64_t e = 0; e < E; e++) after[e] = rows[2 * e] = used[e * sizes[6]];
  bool wrong = false;
  for (int64_t s = 0; s < S; s++)
    for (int64_t j = 0; j < k; j++) {
      const int64_t e = choice[s * sizes[4] + j * sizes[5]];
      const bool one = e >= 0 && e < E;
      wrong |= !one && e != -1;
      slot[s * k + j] = one && after[e] < C ? after[e]++ : -1;
    }
  for (int64_t e = 0; e < E; e++) rows[2 * e + 1] = after[e] = least(after[e], C);
  if (wrong) *static_cast<int64_t*>(bufs[5]) = 1;
}

// bufs: choice, the order if `ordered`, choice that is kept, status, scratch [E]. sizes: S, k, E, C, whether all first choices
// come before all second ones, strides of choice, of the order.
template <bool ordered> void keep(void* const* bufs, const int64_t* sizes, int) {
  const int64_t S = sizes[0], k = sizes[1], E = sizes[2], C = sizes[3];
  const int64_t* const choice = static_cast<const int64_t*>(bufs[0]);
  int64_t* const kept = static_cast<int64_t*>(bufs[1 + ordered]);
  int64_t* const claims = static_cast<int64_t*>(bufs[3 + ordered]);
  __builtin_memset(claims, 0, E * sizeof *claims);
  bool wrong = false;
  if (ordered)
    for (int64_t i = 0; i < S * k; i++) kept[i] = -1;
  const auto claim = [&](int64_t i, int64_t j) {
    const int64_t s = ordered ? static_cast<const int64_t*>(bufs[1])[i * sizes[7]] : i;
    if (s < 0 || s >= S) return void(wrong = true);
    const int64_t e = choice[s * sizes[5] + j * sizes[6]];
    const bool one = e >= 0 && e < E;
    wrong |= !one && e != -1;
    kept[s * k + j] = one && claims[e]++ < C ? e : -1;
  };
  if (sizes[4]) {
    for (int64_t j = 0; j < k; j++)
      for (int64_t i = 0; i < S; i++) claim(i, j);
  } else {
    for (int64_t i = 0; i < S; i++)
      for (int64_t j = 0; j < k; j++) claim(i, j);
  }
  if (wrong) *static_cast<int64_t*>(bufs[2 + ordered]) = 1;
}

// bufs: parts, the rows of each, the whole. sizes: how many parts, groups, rows of a group, bytes of a row; of each part the
// bytes from a group and from a row to the next, and the strides of its rows' table.
inline void join(void* const* bufs, const int64_t* sizes, int nthreads) {
  const int64_t parts = sizes[0], groups = sizes[1], C = sizes[2], bytes = sizes[3];
  char* const out = static_cast<char*>(bufs[2 * parts]);
  blocks(groups * C, bytes, nthreads, [=](int64_t at, int64_t end) {
    while (at < end) {  // a group after the other
      const int64_t g = at / C, stop = least(C, end - g * C);
      int64_t row = at - g * C;
      char* const own = out + g * C * bytes;
      while (row < stop) {  // the part that is used next
        int64_t part = -1, first = stop, last = stop;
        for (int64_t i = 0; i < parts; i++) {
          const int64_t* const used = static_cast<const int64_t*>(bufs[parts + i]) + g * sizes[6 + 4 * i];
          const int64_t begins = within(used[0], row, C), ends = within(used[sizes[7 + 4 * i]], begins, stop);
          if (begins < ends && begins < first) part = i, first = begins, last = ends;
        }
        __builtin_memset(own + row * bytes, 0, (first - row) * bytes);
        if (part < 0) break;
        const int64_t step = sizes[5 + 4 * part];
        const char* const from = static_cast<const char*>(bufs[part]) + g * sizes[4 + 4 * part] + first * step;
        if (step == bytes) __builtin_memcpy(own + first * bytes, from, (last - first) * bytes);
        else
          for (int64_t r = 0; r < last - first; r++) __builtin_memcpy(own + (first + r) * bytes, from + r * step, bytes);
        row = last;
      }
      at = g * C + stop;
    }
  });
}

}  // namespace plait::moe
