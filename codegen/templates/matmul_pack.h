// Operands on their way to the register tile: blocks of A and panels of B as elements, see matmul_tile.h.
#pragma once
#include "matmul_tile.h"

namespace plait::matmul {

// Rows of a matrix in memory: row i starts `ld` elements after row i - 1, or where the table of row ids says.
template <class T> struct Rows {
  const T* base;
  int64_t ld;
  const int64_t* ids;
  PLAIT_FN const T* operator[](int64_t i) const { return base + (ids ? ids[i] : i) * ld; }
};

// Pairs of int16 from int32 lanes.
PLAIT_FN reg<int32_t> paired(reg<int32_t> first, reg<int32_t> second) { return (first & 0xffff) | (second << 16); }

template <int Bytes> struct bits;
template <> struct bits<1> { using type = uint8_t; };
template <> struct bits<2> { using type = uint16_t; };

// Which of the rows of a word is k number `at` of element i.
template <class T> constexpr int row_of(int i, int at) { return same<T, int32_t> ? i + 2 * at : i * depth<T> + at; }

// Lanes j to j + n of element i of a word whose k are rows in memory, of which G exist.
template <class T, class U, int G> PLAIT_FN reg<T> element_of_rows(const U* const* row, int i, int64_t j, int64_t n) {
  if constexpr (depth<T> == 1) return get_part_as<T>(row[i] + j, n);
  else if constexpr (same<T, int32_t>)
    return paired(i < G ? get_part_as<T>(row[i] + j, n) : reg<T>{}, i + 2 < G ? get_part_as<T>(row[i + 2] + j, n) : reg<T>{});
  else {
    using N = typename bits<sizeof(U)>::type;
    reg<int32_t> word = {};
#pragma GCC unroll 4
    for (int at = 0; at < depth<T>; at++)
      if (row_of<T>(i, at) < G)
        word |= get_part_as<int32_t>(reinterpret_cast<const N*>(row[row_of<T>(i, at)] + j), n) << (at * 8 * int(sizeof(U)));
    return reg<T>(word);
  }
}

template <int N> struct Count {
  static constexpr int value = N;
};

// f(rows, G, e) for runs of G rows from k0 to k0 + kc, each pointing to column n0: four, then the rest.
// e is the first element that they make.
template <class T, class U, class F> PLAIT_FN void each_rows(Rows<U> b, int64_t k0, int64_t kc, int64_t n0, F f) {
  const U* row[4];
  int64_t k = 0;
  const auto run = [&](auto count) PLAIT_BODY {
    constexpr int G = count.value;
    for (int g = 0; g < G; g++) row[g] = b[k0 + k + g] + n0;
    f(row, count, elements<T>(k));
    k += G;
  };
  while (k + 4 <= kc) run(Count<4>{});
  if constexpr (depth<T> == 1) {
    while (k < kc) run(Count<1>{});
  } else {
    if (kc - k == 3) run(Count<3>{});
    else if (kc - k == 2) run(Count<2>{});
    else if (kc - k == 1) run(Count<1>{});
  }
}

// B at (k0, n0), kc x cols, stored as rows of n -> panel[element][NR]. Columns from `cols` on are copies of the last one.
template <class T, class U> static void pack_b_k(Rows<U> b, int64_t k0, int64_t kc, int64_t n0, int64_t cols, sum<T>* panel) {
  for (int h = 0; h < NR; h += lanes<T>) {
    const U* src[lanes<T>];
    for (int j = 0; j < lanes<T>; j++) src[j] = b[n0 + least(h + j, cols - 1)];
    each_element<T>(src, k0, kc, [&](int64_t e, reg<T> x) PLAIT_BODY { put(panel + e * NR + h, x); });
  }
}

// The same of B stored as rows of k. Columns from `cols` on are zero.
template <class T, class U> static void pack_b_n(Rows<U> b, int64_t k0, int64_t kc, int64_t n0, int64_t cols, sum<T>* panel) {
  constexpr int L = lanes<T>;
  each_rows<T>(b, k0, kc, n0, [&](const U* const* row, auto count, int64_t e) PLAIT_BODY {
    constexpr int G = count.value;
    for (int i = 0; i < elements<T>(G); i++) {
      sum<T>* const to = panel + (e + i) * NR;
#pragma GCC unroll 1
      for (int64_t h = 0; h < NR; h += L) {
        if (h + L <= cols) put(to + h, element_of_rows<T, U, G>(row, i, h, L));
        else put(to + h, element_of_rows<T, U, G>(row, i, least(h, cols), most(0, cols - h)));
      }
    }
  });
}

// A panel of words -> panel[element][NR].
template <class T, class U> static void widen_panel(const sum<T>* words, int64_t kc, sum<T>* panel) {
  constexpr int S = steps<T, U>;
  const int64_t n = elements<T>(kc);
  for (int64_t e = 0; e < n; e += S, words += NR) {
    const int many = int(least(S, n - e));
#pragma GCC unroll 1
    for (int h = 0; h < NR; h += lanes<T>) {
      reg<T> x[S];
      widen<T, U>(get(words + h), x);
#pragma GCC unroll 4
      for (int s = 0; s < S; s++)
        if (s < many) put(panel + (e + s) * NR + h, x[s]);
    }
  }
}

// B, `count` times, -> panels of words [count][ceil(N / NR)][ceil(K / per)][NR]: once for a weight that the caller owns.
// T: what has the size of a word. k past the last are zero.
template <class T, class U, B layout>
static void pack_words(Rows<U> b, int64_t K, int64_t n0, int64_t cols, U* panel) {
  constexpr int P = per<T, U>;
  const int64_t whole = ceildiv(K, P) * P;
  for (int64_t j = 0; j < NR; j++)
    for (int64_t k = 0; k < whole; k++) {
      const int64_t n = n0 + least(j, cols - 1);
      panel[(k / P * NR + j) * P + k % P] = k >= K ? U{} : layout == B::k ? b[n][k] : b[k][n];
    }
}

// The word of A at src, of which `left` k exist; the others are zero.
template <class T, class U> PLAIT_FN sum<T> word_of_a(const U* src, int64_t left) {
  int32_t word = 0;
  __builtin_memcpy(&word, src, least(left, per<T, U>) * sizeof(U));
  word = in_bytes<T>(word);
  sum<T> out;
  __builtin_memcpy(&out, &word, sizeof out);
  return out;
}

// A at (m0, k0), rows x kc, stored as rows of m -> dst[row][AS].
template <class T, class U> static void pack_a_k(Rows<U> a, int64_t m0, int64_t rows, int64_t k0, int64_t kc, sum<T>* dst) {
  constexpr int L = lanes<T>;
  for (int64_t r = 0; r < rows; r++, dst += AS) {
    const U* src = a[m0 + r] + k0;
    if constexpr (same<T, U>) {
      __builtin_memcpy(dst, src, kc * sizeof(T));
    } else if constexpr (depth<T> == 1) {
      int64_t k = 0;
      for (; k + L <= kc; k += L) put(dst + k, get_as<T>(src + k));
      if (k < kc) put_part(dst + k, get_part_as<T>(src + k, kc - k), kc - k);
    } else if constexpr (steps<T, U> == 1) {
      constexpr int P = per<T, U>;
      const int64_t whole = kc / P;
      if constexpr (moved<T> == 0) __builtin_memcpy(dst, src, whole * sizeof(T));
      else
        for (int64_t e = 0; e < whole; e++) dst[e] = word_of_a<T>(src + e * P, P);
      if (whole * P < kc) dst[whole] = word_of_a<T>(src + whole * P, kc - whole * P);
    } else {
      for (int64_t k = 0; k < kc; k += 4) {
        U word[4] = {};
        if (k + 4 <= kc) __builtin_memcpy(word, src + k, 4);
        else
          for (int64_t i = 0; i < kc - k; i++) word[i] = src[k + i];
        for (int i = 0; i < 2; i++) dst[k / 2 + i] = (word[i] & 0xffff) | int32_t(uint32_t(word[i + 2]) << 16);
      }
    }
  }
}

// A at (m0, k0), rows x kc, stored as rows of k -> dst[element][MR].
template <class T, class U> static void pack_a_m(Rows<U> a, int64_t m0, int64_t rows, int64_t k0, int64_t kc, sum<T>* dst) {
  each_rows<T>(a, k0, kc, m0, [&](const U* const* row, auto count, int64_t e) PLAIT_BODY {
    constexpr int G = count.value;
    for (int i = 0; i < elements<T>(G); i++) {
      sum<T>* const to = dst + (e + i) * MR;
      if constexpr (same<T, U>) {
        if (rows == MR) {
          __builtin_memcpy(to, row[i], MR * sizeof(T));
          continue;
        }
      }
      for (int64_t r = 0; r < rows; r++) {
        if constexpr (depth<T> == 1) to[r] = cast<T>(row[i][r]);
        else if constexpr (steps<T, U> == 1) {
          U word[depth<T>] = {};
          for (int at = 0; at < depth<T>; at++)
            if (row_of<T>(i, at) < G) word[at] = row[row_of<T>(i, at)][r];
          to[r] = word_of_a<T>(word, depth<T>);
        } else {
          to[r] = ((i < G ? row[i][r] : 0) & 0xffff) | int32_t(uint32_t(i + 2 < G ? row[i + 2][r] : 0) << 16);
        }
      }
    }
  });
}

}  // namespace plait::matmul
