// The lower level of matmul.h: registers, the formats of operands in memory, and one register tile.
//
// The k-sum of one output has one order, whatever M, N, the row's position, the tiling, the instruction set and the number
// of threads are: k runs in blocks of KB; inside a block one fused multiply-add after the other, starting from zero; block
// sums are added in order. So a batch equals its rows, and a whole equals its chunks, bit for bit. Halves and bytes are
// widened to float exactly and summed like floats; sums of int32 are exact in any order (they wrap, as torch's do). Only
// where the processor multiplies pairs of bfloat16 (__AVX512BF16__) do their sums run in blocks of 2 * KB, the odd k of a
// pair before the even one, with numbers below 2^-126 taken for zero.
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
enum class B { k, n, packed, window, quantized };  // the same of B; packed: panels [ceil(N / NR)][K][NR]; matmul_quant.h

constexpr int64_t ceildiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- one register ----------------------------------------------------------------------------------------------------

// Elements: what a register tile multiplies, see "formats" below. They are told apart by types, and lie in memory and in
// registers as numbers of the type that their products are summed in.
struct bf16x2 {  // two k
  uint32_t bits;
};
template <class UA, class U> struct bytes4 {  // four k, of A as UA and B as U
  uint32_t bits;
};
template <class T> struct sums_of { using type = T; };
template <> struct sums_of<bf16x2> { using type = float; };
template <class UA, class U> struct sums_of<bytes4<UA, U>> { using type = int32_t; };
template <class T> using sum = typename sums_of<T>::type;

template <class T> constexpr int lanes = REGISTER_BYTES / sizeof(T);
template <class T> using reg = typename raw_of<sum<T>, lanes<T>>::type;

template <class T> PLAIT_FN reg<T> get(const T* p) {
  reg<T> r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
// n lanes at p; the others are zero, and are not stored.
template <class T> PLAIT_FN reg<T> get_part(const T* p, int64_t n) {
  reg<T> r = {};
  __builtin_memcpy(&r, p, n * sizeof(T));
  return r;
}
template <class T> PLAIT_FN void put_part(T* p, reg<T> v, int64_t n) { __builtin_memcpy(p, &v, n * sizeof(T)); }
// The same of lanes that are stored as U.
template <class T, class U> PLAIT_FN reg<T> get_as(const U* p) {
  if constexpr (same<T, U>) return get(p);
  else {
    plait::vec<U, lanes<T>> x;
    __builtin_memcpy(&x, p, sizeof x);
    return cast<T>(x).v;
  }
}
template <class T, class U> PLAIT_FN reg<T> get_part_as(const U* p, int64_t n) {
  if constexpr (same<T, U>) return get_part(p, n);
  else {
    plait::vec<U, lanes<T>> x;
    __builtin_memset(&x, 0, sizeof x);
    __builtin_memcpy(&x, p, n * sizeof(U));
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

// c plus both products of the int16 pairs in each lane of a and b
PLAIT_FN reg<int32_t> muladd(reg<int32_t> a, reg<int32_t> b, reg<int32_t> c) {
#if defined(__AVX512VNNI__)
  asm("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
#elif defined(__AVX512BW__)
  using H = typename raw_of<int16_t, 32>::type;
  return c + reg<int32_t>(__builtin_ia32_pmaddwd512_mask(H(a), H(b), reg<int32_t>{}, -1));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  using H = typename raw_of<int16_t, 16>::type;
  return c + reg<int32_t>(__builtin_ia32_pmaddwd256(H(a), H(b)));
#else
  return c + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// One element in all lanes. Its bits may be those of a float's signalling NaN, which arithmetic would change.
template <class T> PLAIT_FN reg<T> all(const sum<T>* p) {
  if constexpr (same<T, sum<T>>) return *p - reg<T>{};
  else {
    int32_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return reg<T>(bits - reg<int32_t>{});
  }
}

// Products of bytes take one operand as unsigned and the other as signed. Where both are alike, A is moved by 128 when it is
// packed, and the sum over B that this adds or takes away is put right: `moved`.
template <class T> constexpr int moved = 0;
template <> constexpr int moved<bytes4<int8_t, int8_t>> = -128;
template <> constexpr int moved<bytes4<uint8_t, uint8_t>> = 128;
template <class T> PLAIT_FN int32_t in_bytes(int32_t word) { return moved<T> ? word ^ int32_t(0x80808080) : word; }

// c plus the products of elements. The instructions are written out since the names of their functions change with GCC.
template <class T> PLAIT_FN reg<T> dot(reg<T> a, reg<T> b, reg<T> c) {
  if constexpr (same<T, bf16x2>) asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  else if constexpr (same<T, bytes4<int8_t, int8_t>> || same<T, bytes4<uint8_t, int8_t>>)
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  else if constexpr (same<T, bytes4<int8_t, uint8_t>> || same<T, bytes4<uint8_t, uint8_t>>)
    asm("vpdpbusd %1, %2, %0" : "+v"(c) : "v"(a), "v"(b));
  else c = muladd(a, b, c);
  return c;
}
// s plus the k of elements of B.
template <class T> PLAIT_FN reg<T> across(reg<T> b, reg<T> s) { return dot<T>(0x01010101 - reg<T>{}, b, s); }

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

// ---- formats ---------------------------------------------------------------------------------------------------------
// A *word* is as long as a sum and holds consecutive k of one row of A or column of B, as they lie in memory: one float, two
// halves, four bytes. Widened it becomes *elements*, what the register tile multiplies: floats of one k each, or, for sums
// of int32, pairs of int16 of two k each. Where the processor has instructions for words of bfloat16 or of bytes, they are
// elements as they are. Another format of B is another `widen`.

template <class T> constexpr int depth = 1;  // k of an element
template <> constexpr int depth<int32_t> = 2;
template <> constexpr int depth<bf16x2> = 2;
template <class UA, class U> constexpr int depth<bytes4<UA, U>> = 4;
template <class T, class U> constexpr int per = same<T, U> ? depth<T> : int(sizeof(T) / sizeof(U));  // k of a word
template <class T, class U> constexpr int steps = per<T, U> / depth<T>;                              // elements of a word
template <class T> constexpr int64_t KS = KB * depth<T>;                                             // k of a block
template <class T> PLAIT_FN constexpr int64_t elements(int64_t k) {
  return same<T, int32_t> ? ceildiv(k, 4) * 2 : ceildiv(k, depth<T>);
}

// What multiplies A as UA by B as U, summed in T.
template <class T, class UA, class U> struct element_of { using type = T; };
#if defined(__AVX512BF16__) && defined(__AVX512F__)
template <> struct element_of<float, bf16, bf16> { using type = bf16x2; };
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
template <class UA, class U> struct element_of<int32_t, UA, U> { using type = bytes4<UA, U>; };
#endif

template <class U> struct shifts { using half = int16_t; using whole = int32_t; };  // types whose shifts keep U's sign
template <> struct shifts<uint8_t> { using half = uint16_t; using whole = uint32_t; };

// The even halves of L words, then the odd ones: sorted in each quarter first, since that takes one instruction.
template <int L, class V, int... I, int... J> PLAIT_FN auto sorted_halves(V words, indices<I...>, indices<J...>) {
  using H = typename raw_of<uint16_t, 2 * L>::type;
  using Q = typename raw_of<uint64_t, L / 2>::type;
  const Q q = Q(__builtin_shufflevector(H(words), H(words), (I / 8 * 8 + I % 4 * 2 + I % 8 / 4)...));
  return H(__builtin_shufflevector(q, q, (J % (L / 4) * 2 + J / (L / 4))...));
}

template <class T, class U> PLAIT_FN void widen(reg<T> word, reg<T>* x) {
  constexpr int L = lanes<T>;
  if constexpr (steps<T, U> == 1) {
    x[0] = word;
  } else if constexpr (same<U, bf16>) {
    x[0] = reg<T>(reg<uint32_t>(word) << 16);
    x[1] = reg<T>(reg<uint32_t>(word) & 0xffff0000u);
  } else if constexpr (same<U, f16>) {
    const plait::vec<uint16_t, 2 * L> halves = sorted_halves<L>(word, iota_of<2 * L>{}, iota_of<L / 2>{});
    x[0] = cast<T>(plait::vec<f16, L>(low(halves))).v, x[1] = cast<T>(plait::vec<f16, L>(high(halves))).v;
  } else if constexpr (same<T, int32_t>) {  // k and k + 2, then k + 1 and k + 3
    using H = typename raw_of<typename shifts<U>::half, 2 * L>::type;
    x[0] = reg<T>(H(word) << 8 >> 8), x[1] = reg<T>(H(word) >> 8);
  } else {
    using N = reg<typename shifts<U>::whole>;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) x[i] = __builtin_convertvector(reg<int32_t>(N(word) << (24 - 8 * i) >> 24), reg<T>);
  }
}
// The word at k of L rows, of which `left` k exist; the others are zero.
template <class T, class U> PLAIT_FN reg<T> part_words(const U* const* src, int64_t k, int64_t left) {
  alignas(64) sum<T> word[lanes<T>] = {};
#pragma GCC unroll 1
  for (int j = 0; j < lanes<T>; j++) __builtin_memcpy(word + j, src[j] + k, left * sizeof(U));
  return get(word);
}

// f(e, x) with x the element e, over L rows, of src[row][k0 : k0 + kc], in order.
template <class T, class U, class F> PLAIT_FN void each_element(const U* const* src, int64_t k0, int64_t kc, F f) {
  constexpr int E = 16 / sizeof(T), P = per<T, U>, S = steps<T, U>;
  const sum<T>* words[lanes<T>];
  for (int j = 0; j < lanes<T>; j++) words[j] = reinterpret_cast<const sum<T>*>(src[j] + k0);
  int64_t k = 0, e = 0;
  reg<T> v[E], x[S];
  for (; k + E * P <= kc; k += E * P) {
    columns<sum<T>>(words, k / P, v);
#pragma GCC unroll 4
    for (int i = 0; i < E; i++) {
      widen<T, U>(v[i], x);
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) f(e++, x[s]);
    }
  }
  for (; k < kc; k += P) {
    widen<T, U>(part_words<T>(src, k0 + k, least(P, kc - k)), x);
#pragma GCC unroll 4
    for (int s = 0; s < S; s++)
      if (depth<T> > 1 || k + s < kc) f(e++, x[s]);
  }
}

// ---- register tile ---------------------------------------------------------------------------------------------------

// over[0:Width] = the sum over B of n elements that is to be put right, see `moved`.
template <class T, int Width> PLAIT_FN void sum_up(int64_t n, const sum<T>* b, int64_t ldb, sum<T>* over) {
  for (int h = 0; h < Width; h += lanes<T>) {
    reg<T> s = {};
    for (int64_t e = 0; e < n; e++) s = across<T>(get(b + e * ldb + h), s);
    put(over + h, moved<T> * s);
  }
}

// c[r][0:Width] = (add ? c : 0) + sum over e < n of a[r * Row + e * Step] * (element e of b[][0:Width]), for R rows of c, NR
// apart. b holds words of U, rows `ldb` apart: elements themselves where U is T. `over` is what sum_up says, for
// T that needs it; Once finds it out on the way, for a panel that is read once.
template <class T, class U, int R, int Row, int Step, int Width = NR, bool Once = false>
[[gnu::noinline]] static void micro(int64_t n, const sum<T>* a, const sum<T>* b, int64_t ldb, sum<T>* c, bool add,
                                    const sum<T>* over) {
  constexpr int L = lanes<T>, S = steps<T, U>;
  if (add)
    for (int i = 0; i < R * NR; i += 64 / int(sizeof(T))) __builtin_prefetch(c + i, 1);
  for (int h = 0; h < Width; h += NV * L) {
    reg<T> acc[R][NV] = {}, own[NV] = {};
    const sum<T>* row = b + h;
    int64_t e = 0;
    const auto step = [&](int s, reg<T> (*x)[S]) PLAIT_BODY {
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const reg<T> av = all<T>(a + r * Row + (e + s) * Step);
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) acc[r][v] = dot<T>(av, x[v][s], acc[r][v]);
      }
      if constexpr (Once && moved<T> != 0)
        for (int v = 0; v < NV; v++) own[v] = across<T>(x[v][s], own[v]);
    };
    const auto load = [&](reg<T> (*x)[S]) PLAIT_BODY {
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) {
        if constexpr (S == 1) x[v][0] = get(row + v * L);
        else widen<T, U>(get(row + v * L), x[v]);
      }
    };
    for (; e + S <= n; e += S, row += ldb) {
      reg<T> x[NV][S];
      load(x);
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) step(s, x);
    }
    if (S > 1 && e < n) {
      reg<T> x[NV][S];
      load(x);
#pragma GCC unroll 4
      for (int s = 0; s < S - 1; s++)
        if (e + s < n) step(s, x);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) {
        sum<T>* p = c + r * NR + h + v * L;
        if constexpr (moved<T> != 0) acc[r][v] += Once ? moved<T> * own[v] : get(over + h + v * L);
        put(p, add ? get(p) + acc[r][v] : acc[r][v]);
      }
  }
}

// Rows of the next tile: full ones, and 8 + 8 rather than 12 + 4 or less.
inline int64_t tile_rows(int64_t left) { return MR == 12 && left > 12 && left <= 16 ? 8 : least(left, MR); }

// May compute and write more rows: up to the next of 4, 6, 8, 12. (Products of few rows take the path of matmul_thin.h.)
template <class T, int Row, int Step, int Width = NR>
static void micro_rows(int64_t rows, int64_t n, const sum<T>* a, const sum<T>* b, int64_t ldb, sum<T>* c, bool add,
                       const sum<T>* over = nullptr) {
  if constexpr (MR == 12) {
    if (rows > 8) return micro<T, T, 12, Row, Step, Width>(n, a, b, ldb, c, add, over);
    if (rows > 4) return micro<T, T, 8, Row, Step, Width>(n, a, b, ldb, c, add, over);
  } else {
    if (rows > 4) return micro<T, T, 6, Row, Step, Width>(n, a, b, ldb, c, add, over);
  }
  return micro<T, T, 4, Row, Step, Width>(n, a, b, ldb, c, add, over);
}

}  // namespace plait::matmul
