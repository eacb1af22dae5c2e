// Matrix multiplication C[m, n] = sum over k of A[m, k] * B[k, n], in two levels: a register tile (`micro`) under a
// blocked driver (`Driver`). `codegen/templates/matmul.py` writes the `Spec` with operands, prologue and epilogue.
//
// The k-sum of one output has one order, whatever M, N, the row's position, the tiling, the instruction set and the number
// of threads are: k runs in blocks of KB; inside a block one fused multiply-add after the other, starting from zero; block
// sums are added in order. So a batch equals its rows, and a whole equals its chunks, bit for bit.
#pragma once
#include <omp.h>

#include "vops.h"

namespace plait::matmul {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 12;  // rows of a register tile: 12 x 2 accumulators, 2 of B and 1 of A fill 32 registers
#else
constexpr int MR = 6;  // the same for 16 registers
#endif
constexpr int NV = 2;               // vectors of B in a register tile
constexpr int NR = 32;              // columns of a packed panel on every instruction set: packed weights are portable
constexpr int PR = 12;              // scratch holds a multiple of this many rows on every instruction set
constexpr int64_t KB = 256;         // fixes the order of the k-sum: changing it changes results
constexpr int64_t AS = KB + 16;     // row stride of packed A: 17 cache lines, so that rows spread over the cache's sets
constexpr int64_t MC = 240;         // rows of packed A that stay in L2 while panels of B pass by
constexpr int64_t NC = 2048;        // columns whose partial sums a thread keeps when K > KB
constexpr double GRAIN = 1 << 17;   // multiply-adds below which a second thread costs more than it saves

enum class A { k, m };             // the axis of A that is contiguous in memory
enum class B { k, n, packed };     // the same of B; packed: panels [ceil(N / NR)][K][NR]
enum class Group { none, m, k };   // what the offsets of groups cut

inline int64_t ceildiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- one register ----------------------------------------------------------------------------------------------------

template <class T> constexpr int lanes = REGISTER_BYTES / sizeof(T);
template <class T> using reg = typename raw_of<T, lanes<T>>::type;

template <class T> PLAIT_FN reg<T> get(const T* p) {
  reg<T> r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
template <class T, class U> PLAIT_FN reg<T> get_as(const U* p) {
  if constexpr (same<T, U>) return get(p);
  else {
    plait::vec<U, lanes<T>> x;
    __builtin_memcpy(&x, p, sizeof x);
    return cast<T>(x).v;
  }
}
template <class T> PLAIT_FN void put(T* p, reg<T> v) { __builtin_memcpy(p, &v, sizeof v); }

// a * b + c with one rounding, whatever the compiler is told about contraction
#if defined(__clang__)
template <class V> PLAIT_FN V muladd(V a, V b, V c) { return __builtin_elementwise_fma(a, b, c); }
#elif defined(__AVX512F__)
PLAIT_FN reg<float> muladd(reg<float> a, reg<float> b, reg<float> c) {
  return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, 4);
}
PLAIT_FN reg<double> muladd(reg<double> a, reg<double> b, reg<double> c) {
  return __builtin_ia32_vfmaddpd512_mask(a, b, c, -1, 4);
}
#elif defined(__AVX2__) && defined(__FMA__)
PLAIT_FN reg<float> muladd(reg<float> a, reg<float> b, reg<float> c) { return __builtin_ia32_vfmaddps256(a, b, c); }
PLAIT_FN reg<double> muladd(reg<double> a, reg<double> b, reg<double> c) { return __builtin_ia32_vfmaddpd256(a, b, c); }
#elif defined(__aarch64__)
PLAIT_FN reg<float> muladd(reg<float> a, reg<float> b, reg<float> c) { return __builtin_aarch64_fmav4sf(a, b, c); }
PLAIT_FN reg<double> muladd(reg<double> a, reg<double> b, reg<double> c) { return __builtin_aarch64_fmav2df(a, b, c); }
#else  // no such instruction: right, but slow
PLAIT_FN reg<float> muladd(reg<float> a, reg<float> b, reg<float> c) {
  for (int i = 0; i < lanes<float>; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
PLAIT_FN reg<double> muladd(reg<double> a, reg<double> b, reg<double> c) {
  for (int i = 0; i < lanes<double>; i++) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
}
#endif

template <int High, class V, int... I> PLAIT_FN V interleave(V a, V b, indices<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 2 + High * n / 2 + I % 2 * n)...);
}

// A square of registers, by log2(lanes) perfect shuffles.
template <class T> PLAIT_FN void transpose(reg<T>* v) {
  constexpr int L = lanes<T>;
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
    reg<T> w[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; i++) {
      w[2 * i] = interleave<0>(v[i], v[i + L / 2], iota_of<L>{});
      w[2 * i + 1] = interleave<1>(v[i], v[i + L / 2], iota_of<L>{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) v[i] = w[i];
  }
}

// ---- register tile ---------------------------------------------------------------------------------------------------

// c[r][0:NR] = (add ? c : 0) + sum over k < kc of a[r * Row + k * Step] * b[k * ldb + 0:NR], for R rows.
template <class T, int R, int Row, int Step>
[[gnu::noinline]] static void micro(int64_t kc, const T* a, const T* b, int64_t ldb, T* c, bool add) {
  constexpr int L = lanes<T>;
  for (int h = 0; h < NR; h += NV * L) {
    reg<T> acc[R][NV] = {};
    const T* row = b + h;
    for (int64_t k = 0; k < kc; k++, row += ldb) {
      reg<T> bv[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) bv[v] = get(row + v * L);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const reg<T> av = a[r * Row + k * Step] - reg<T>{};
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) acc[r][v] = muladd(av, bv[v], acc[r][v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) {
        T* p = c + r * NR + h + v * L;
        put(p, add ? get(p) + acc[r][v] : acc[r][v]);
      }
  }
}

// Rows of the next tile: full ones, and 8 + 8 rather than 12 + 4 or less.
inline int64_t tile_rows(int64_t left) { return MR == 12 && left > 12 && left <= 16 ? 8 : least(left, MR); }

// May compute and write up to the next of 1, 2, 4, 6, 8, 12 rows.
template <class T, int Row, int Step>
static void micro_rows(int64_t rows, int64_t kc, const T* a, const T* b, int64_t ldb, T* c, bool add) {
  if constexpr (MR == 12) {
    if (rows > 8) return micro<T, 12, Row, Step>(kc, a, b, ldb, c, add);
    if (rows > 4) return micro<T, 8, Row, Step>(kc, a, b, ldb, c, add);
  } else {
    if (rows > 4) return micro<T, 6, Row, Step>(kc, a, b, ldb, c, add);
  }
  if (rows > 2) return micro<T, 4, Row, Step>(kc, a, b, ldb, c, add);
  if (rows > 1) return micro<T, 2, Row, Step>(kc, a, b, ldb, c, add);
  return micro<T, 1, Row, Step>(kc, a, b, ldb, c, add);
}

// ---- packing ---------------------------------------------------------------------------------------------------------

// Rows of a matrix in memory: row i starts `ld` elements after row i - 1, or where the table of row ids says.
template <class T> struct Rows {
  const T* base;
  int64_t ld;
  const int64_t* ids;
  PLAIT_FN const T* operator[](int64_t i) const { return base + (ids ? ids[i] : i) * ld; }
};

// B at (k0, n0), kc x cols, stored as rows of n -> panel[k][NR]; columns from `cols` on are zero.
template <class T, class U> static void pack_b_k(Rows<U> b, int64_t k0, int64_t kc, int64_t n0, int64_t cols, T* panel) {
  constexpr int L = lanes<T>;
  for (int h = 0; h < NR; h += L) {
    const int64_t live = least(L, cols - h);
    const U* src[L];
    for (int j = 0; j < live; j++) src[j] = b[n0 + h + j] + k0;
    int64_t k = 0;
    if (live == L)
      for (; k + L <= kc; k += L) {
        T rows[L * L];  // through memory: sixteen unrolled conversions would take the compiler seconds
        if constexpr (!same<T, U>) {
#pragma GCC unroll 1
          for (int j = 0; j < L; j++) put(rows + j * L, get_as<T>(src[j] + k));
        }
        reg<T> v[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; j++) {
          if constexpr (same<T, U>) v[j] = get(src[j] + k);
          else v[j] = get(rows + j * L);
        }
        transpose<T>(v);
#pragma GCC unroll 16
        for (int j = 0; j < L; j++) put(panel + (k + j) * NR + h, v[j]);
      }
    for (; k < kc; k++)
#pragma GCC unroll 1
      for (int j = 0; j < L; j++) panel[k * NR + h + j] = j < live ? cast<T>(src[j][k]) : T(0);
  }
}

// The same of B stored as rows of k.
template <class T, class U> static void pack_b_n(Rows<U> b, int64_t k0, int64_t kc, int64_t n0, int64_t cols, T* panel) {
  for (int64_t k = 0; k < kc; k++, panel += NR) {
    const U* src = b[k0 + k] + n0;
    if (cols == NR) {
#pragma GCC unroll 1
      for (int h = 0; h < NR; h += lanes<T>) put(panel + h, get_as<T>(src + h));
    } else {
      for (int64_t j = 0; j < NR; j++) panel[j] = j < cols ? cast<T>(src[j]) : T(0);
    }
  }
}

// A at (m0, k0), rows x kc, stored as rows of m -> dst[row][AS].
template <class T> static void pack_a_k(Rows<T> a, int64_t m0, int64_t rows, int64_t k0, int64_t kc, T* dst) {
  for (int64_t r = 0; r < rows; r++) __builtin_memcpy(dst + r * AS, a[m0 + r] + k0, kc * sizeof(T));
}

// A at (m0, k0), rows x kc, stored as rows of k -> dst[k][MR].
template <class T> static void pack_a_m(Rows<T> a, int64_t m0, int64_t rows, int64_t k0, int64_t kc, T* dst) {
  for (int64_t k = 0; k < kc; k++, dst += MR) {
    const T* src = a[k0 + k] + m0;
    if (rows == MR) __builtin_memcpy(dst, src, MR * sizeof(T));
    else
      for (int64_t r = 0; r < rows; r++) dst[r] = src[r];
  }
}

// B, `count` times, -> panels [count][ceil(N / NR)][K][NR]: once for a weight that the caller owns.
template <class T, B layout>
static void pack(const T* src, T* dst, int64_t N, int64_t K, int64_t ldb, int64_t count, int64_t step, int nt) {
  const int64_t panels = ceildiv(N, NR), total = count * panels;
  const auto one = [=](int64_t i) {
    const Rows<T> b{src + i / panels * step, ldb, nullptr};
    const int64_t n0 = i % panels * NR, cols = least(NR, N - n0);
    if constexpr (layout == B::k) pack_b_k(b, 0, K, n0, cols, dst + i * K * NR);
    else pack_b_n(b, 0, K, n0, cols, dst + i * K * NR);
  };
  if (nt <= 1 || double(total) * double(K) * NR < GRAIN) {
    for (int64_t i = 0; i < total; i++) one(i);
  } else {
#pragma omp parallel for num_threads(nt)
    for (int64_t i = 0; i < total; i++) one(i);
  }
}

// ---- driver ----------------------------------------------------------------------------------------------------------

// Runtime sizes; strides in elements. Batch axes beyond those of the spec have extent 1 and stride 0.
struct Dims {
  int64_t M, N, K, lda, ldb, slots;
  int64_t batch[2] = {1, 1}, a_step[2] = {0, 0}, b_step[2] = {0, 0};
  int64_t groups = 1, group_step = 0;
};

// Elements of scratch that one thread needs; `workspace_elements` in matmul.py says the same.
inline int64_t slot_elements(const Dims& d, bool packed) {
  const int64_t rows = ceildiv(least(d.M, MC), PR) * PR;
  const int64_t sums = d.K > KB ? rows * ceildiv(least(d.N, NC), NR) * NR : 0;
  return rows * AS + (packed ? 0 : KB * NR) + sums;
}

// A thread's rectangle of one matrix. b0, b1: its batch indices; group: its group.
struct Task {
  int64_t b0, b1, group, m0, m1, n0, n1, k0, k1;
};

// What `Spec` holds: T; BT, the type of B in memory; a, b, group as above; the buffers' positions A_at, B_at, workspace_at, and a_ids_at, b_ids_at,
// offsets_at, group_ids_at (-1: none); batch (number of axes); has_prologue; and the functions prologue and epilogue.
template <class S> struct Driver {
  using T = typename S::T;
  using U = typename S::BT;
  void* const* bufs;
  const int64_t* sizes;
  Dims d;

  static constexpr int a_row = S::a == A::k ? int(AS) : 1, a_step = S::a == A::k ? 1 : MR;
  static constexpr bool packed = S::b == B::packed;

  template <int at> const int64_t* table() const {
    if constexpr (at < 0) return nullptr;
    else return (const int64_t*)bufs[at];
  }

  void pack_a(const Task& t, int64_t m0, int64_t rows, int64_t k0, int64_t kc, T* dst) const {
    if constexpr (S::has_prologue) {
      S::prologue(bufs, sizes, t, m0, rows, k0, kc, dst);
    } else {
      const T* base = (const T*)bufs[S::A_at] + t.b0 * d.a_step[0] + t.b1 * d.a_step[1];
      const Rows<T> a{base, d.lda, table<S::a_ids_at>()};
      if constexpr (S::a == A::k) pack_a_k(a, m0, rows, k0, kc, dst);
      else pack_a_m(a, m0, rows, k0, kc, dst);
    }
  }

  const T* panel(const Task& t, int64_t k0, int64_t kc, int64_t n0, T* scratch) const {
    const U* base = (const U*)bufs[S::B_at] + t.b0 * d.b_step[0] + t.b1 * d.b_step[1];
    if constexpr (S::group == Group::m) {
      const int64_t* which = table<S::group_ids_at>();
      base += (which ? which[t.group] : t.group) * d.group_step;
    }
    if constexpr (packed) {
      return base + n0 * d.K + k0 * NR;
    } else {
      const Rows<U> b{base, d.ldb, table<S::b_ids_at>()};
      const int64_t cols = least(NR, d.N - n0);
      if constexpr (S::b == B::k) pack_b_k(b, k0, kc, n0, cols, scratch);
      else pack_b_n(b, k0, kc, n0, cols, scratch);
      return scratch;
    }
  }

  // Rows m0:m1 (at most MC) by columns n0:n1 (at most NC).
  void block(const Task& t, int64_t m0, int64_t m1, int64_t n0, int64_t n1, T* scratch) const {
    const int64_t rows = ceildiv(m1 - m0, PR) * PR;
    T* const a = scratch;
    T* const b = a + rows * AS;
    T* const sums = b + (packed ? 0 : KB * NR);
    alignas(64) T tile[MR * NR];
    const bool one = t.k1 - t.k0 <= KB;  // block of k: the sums of a tile never leave L1
    int64_t k0 = t.k0;
    do {  // also where K is 0
      const int64_t kc = least(KB, t.k1 - k0);
      for (int64_t m = m0; m < m1; m += tile_rows(m1 - m))
        pack_a(t, m, tile_rows(m1 - m), k0, kc, a + ceildiv(m - m0, MR) * MR * AS);
      for (int64_t n = n0; n < n1; n += NR) {
        const T* bp = panel(t, k0, kc, n, b);
        for (int64_t m = m0; m < m1; m += tile_rows(m1 - m)) {
          const int64_t mr = tile_rows(m1 - m), first = ceildiv(m - m0, MR) * MR;
          T* c = one ? tile : sums + (n - n0) * rows + first * NR;
          micro_rows<T, a_row, a_step>(mr, kc, a + first * AS, bp, NR, c, k0 > t.k0);
          if (k0 + KB >= t.k1) S::epilogue(bufs, sizes, t, m, mr, n, least(NR, n1 - n), c);
        }
      }
      k0 += KB;
    } while (k0 < t.k1);
  }

  void run(const Task& t, T* scratch) const {
    for (int64_t n = t.n0; n < t.n1; n += NC)
      for (int64_t m = t.m0; m < t.m1; m += MC) block(t, m, least(t.m1, m + MC), n, least(t.n1, n + NC), scratch);
  }

  struct Cut {
    int64_t m, n;
  };

  // How many ways the rows and the panels of each of `count` matrices are cut for nt threads: the cheapest longest share.
  Cut cut(int64_t count, int64_t rows, int nt) const {
    const int64_t panels = ceildiv(d.N, NR);
    Cut best{1, 1};
    double least_cost = -1;
    for (int64_t m = 1; m <= nt; m++)
      for (int64_t n = nt / m;; n = 1) {
        const double share = double(ceildiv(count * m * n, nt));
        const double r = double(ceildiv(ceildiv(rows, m), 4) * 4), c = double(ceildiv(panels, n) * NR);
        const double repack = packed ? 0.0 : 0.4 * c * double(ceildiv(int64_t(r), MC));
        const double cost = share * (r * c / 16 + repack + 0.1 * r);
        if (least_cost < 0 || cost < least_cost) least_cost = cost, best = {m, n};
        if (n == 1) break;
      }
    return best;
  }

  Task task(int64_t i, Cut cut) const {
    const int64_t in = i % cut.n, im = i / cut.n % cut.m, which = i / (cut.n * cut.m), panels = ceildiv(d.N, NR);
    Task t{which, 0, 0, 0, d.M, panels * in / cut.n * NR, least(d.N, panels * (in + 1) / cut.n * NR), 0, d.K};
    if constexpr (S::batch == 2) t.b0 = which / d.batch[1], t.b1 = which % d.batch[1];
    if constexpr (S::group != Group::none) {
      const int64_t* offsets = table<S::offsets_at>();
      t.group = which, t.b0 = 0;
      (S::group == Group::m ? t.m0 : t.k0) = offsets[which];
      (S::group == Group::m ? t.m1 : t.k1) = offsets[which + 1];
    }
    const int64_t share = ceildiv(ceildiv(t.m1 - t.m0, cut.m), 4) * 4;
    t.m0 += im * share;
    t.m1 = least(t.m1, t.m0 + share);
    return t;
  }

  void operator()(int nt) const {
    constexpr bool by_m = S::group == Group::m, by_k = S::group == Group::k;
    const int64_t count = by_m || by_k ? d.groups : d.batch[0] * d.batch[1];
    if (count <= 0 || d.M <= 0 || d.N <= 0) return;
    const double work = double(d.M) * double(d.N) * double(d.K > 0 ? d.K : 1) * double(by_m || by_k ? 1 : count);
    nt = work < 2 * GRAIN ? 1 : int(least(nt, d.slots));
    const Cut c = cut(count, by_m ? ceildiv(d.M, count) : d.M, nt);
    const int64_t tasks = count * c.m * c.n, step = slot_elements(d, packed);
    T* const scratch = (T*)bufs[S::workspace_at];
    if (nt <= 1) {
      for (int64_t i = 0; i < tasks; i++) run(task(i, c), scratch);
      return;
    }
#pragma omp parallel num_threads(nt)
    {
      const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
      for (int64_t i = tasks * id / team; i < tasks * (id + 1) / team; i++) run(task(i, c), scratch + id * step);
    }
  }
};

}  // namespace plait::matmul
