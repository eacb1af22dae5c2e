// The lower level of matmul.h: one register tile, and the packing of operands for it.
//
// The k-sum of one output has one order, whatever M, N, the row's position, the tiling, the instruction set and the number
// of threads are: k runs in blocks of KB; inside a block one fused multiply-add after the other, starting from zero; block
// sums are added in order. So a batch equals its rows, and a whole equals its chunks, bit for bit.
#pragma once
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

enum class A { k, m, window };          // the axis of A that is contiguous in memory; window: see matmul_window.h
enum class B { k, n, packed, window };  // the same of B; packed: panels [ceil(N / NR)][K][NR]

inline int64_t ceildiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
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

// In each 16-byte lane, a0 b0 a1 b1 ... of the lower (High 0) or upper (High 1) half of that lane: one instruction.
template <int E, int High, class V, int... I> PLAIT_FN V unpack(V a, V b, indices<I...>) {
  return __builtin_shufflevector(a, b, (I / E * E + High * E / 2 + I % E / 2 + I % 2 * int(sizeof...(I)))...);
}

template <class V, int... I> PLAIT_FN auto concat_raw(V lo, V hi, indices<I...>) {
  return __builtin_shufflevector(lo, hi, I...);
}

// N elements: 16 bytes at p[0], then at p[E], p[2 * E], ... with E elements to 16 bytes.
template <class T, int N> PLAIT_FN auto get_lanes(const T* const* p, int64_t at) {
  typename raw_of<T, N>::type r;
  if constexpr (N * sizeof(T) == 16) {
    __builtin_memcpy(&r, p[0] + at, sizeof r);
    return r;
  } else {
    return concat_raw(get_lanes<T, N / 2>(p, at), get_lanes<T, N / 2>(p + N / 2, at), iota_of<N>{});
  }
}

// Columns k .. k + E of L rows, as E registers: column k + i over the rows. Loads of 16 bytes put rows E apart side by
// side, so that unpacking inside lanes finishes the job: permutations across lanes are several times slower.
template <class T, int E = 16 / sizeof(T)> PLAIT_FN void columns(const T* const* src, int64_t k, reg<T>* v) {
  constexpr int L = lanes<T>;
#pragma GCC unroll 4
  for (int i = 0; i < E; i++) v[i] = get_lanes<T, L>(src + i, k);
#pragma GCC unroll 2
  for (int stage = 1; stage < E; stage *= 2) {
    reg<T> w[E];
#pragma GCC unroll 2
    for (int i = 0; i < E / 2; i++) {
      w[2 * i] = unpack<E, 0>(v[i], v[i + E / 2], iota_of<L>{});
      w[2 * i + 1] = unpack<E, 1>(v[i], v[i + E / 2], iota_of<L>{});
    }
#pragma GCC unroll 4
    for (int i = 0; i < E; i++) v[i] = w[i];
  }
}

// L rows by L columns of k: src[row][k] -> dst[k * NR + row].
template <class T> PLAIT_FN void transpose(const T* const* src, int64_t k, T* dst) {
  constexpr int L = lanes<T>, E = 16 / sizeof(T);
#pragma GCC unroll 4
  for (int side = 0; side < L; side += E) {
    reg<T> v[E];
    columns(src, k + side, v);
#pragma GCC unroll 4
    for (int i = 0; i < E; i++) put(dst + (side + i) * NR, v[i]);
  }
}

// ---- register tile ---------------------------------------------------------------------------------------------------

// c[r][0:Width] = (add ? c : 0) + sum over k < kc of a[r * Row + k * Step] * b[k * ldb + 0:Width], for R rows of c, NR apart.
template <class T, int R, int Row, int Step, int Width = NR>
[[gnu::noinline]] static void micro(int64_t kc, const T* a, const T* b, int64_t ldb, T* c, bool add) {
  constexpr int L = lanes<T>;
  if (add)
    for (int i = 0; i < R * NR; i += 64 / int(sizeof(T))) __builtin_prefetch(c + i, 1);
  for (int h = 0; h < Width; h += NV * L) {
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

// May compute and write more rows: up to the next of 4, 6, 8, 12. (Products of few rows take the path of matmul_thin.h.)
template <class T, int Row, int Step, int Width>
static void micro_rows(int64_t rows, int64_t kc, const T* a, const T* b, int64_t ldb, T* c, bool add) {
  if constexpr (MR == 12) {
    if (rows > 8) return micro<T, 12, Row, Step, Width>(kc, a, b, ldb, c, add);
    if (rows > 4) return micro<T, 8, Row, Step, Width>(kc, a, b, ldb, c, add);
  } else {
    if (rows > 4) return micro<T, 6, Row, Step, Width>(kc, a, b, ldb, c, add);
  }
  return micro<T, 4, Row, Step, Width>(kc, a, b, ldb, c, add);
}

// ---- packing ---------------------------------------------------------------------------------------------------------

// Rows of a matrix in memory: row i starts `ld` elements after row i - 1, or where the table of row ids says.
template <class T> struct Rows {
  const T* base;
  int64_t ld;
  const int64_t* ids;
  PLAIT_FN const T* operator[](int64_t i) const { return base + (ids ? ids[i] : i) * ld; }
};

// B at (k0, n0), kc x cols, stored as rows of n -> panel[k][NR]. Columns from `cols` on are copies of the last one.
template <class T, class U> static void pack_b_k(Rows<U> b, int64_t k0, int64_t kc, int64_t n0, int64_t cols, T* panel) {
  constexpr int L = lanes<T>;
  for (int h = 0; h < NR; h += L) {
    const U* src[L];
    for (int j = 0; j < L; j++) src[j] = b[n0 + least(h + j, cols - 1)] + k0;
    int64_t k = 0;
    if constexpr (same<T, U>) {
      for (; k + L <= kc; k += L) transpose(src, k, panel + k * NR + h);
      if (k < kc && kc > L) transpose(src, kc - L, panel + (kc - L) * NR + h), k = kc;
    } else {
      for (; k + L <= kc; k += L) {
        T rows[L][L];
        const T* at[L];
#pragma GCC unroll 1
        for (int j = 0; j < L; j++) put(rows[j], get_as<T>(src[j] + k)), at[j] = rows[j];
        transpose(at, 0, panel + k * NR + h);
      }
    }
    for (; k < kc; k++)
#pragma GCC unroll 1
      for (int j = 0; j < L; j++) panel[k * NR + h + j] = cast<T>(src[j][k]);
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

}  // namespace plait::matmul
