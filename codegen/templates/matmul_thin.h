// One to THIN rows of A: a product whose time is that of reading B once. B is read where it lies, in the order of memory;
// the k-sum has the order of matmul_tile.h. Packed A comes in blocks of KB steps of k, THIN_BLOCK elements apart.
#pragma once
#include "matmul_tile.h"

namespace plait::matmul {

constexpr int THIN = MR < 8 ? 4 : 8;  // at most the rows of a packed block of A
constexpr int64_t THIN_BLOCK = PR * AS;
constexpr int64_t THIN_BLOCKS = 64;  // of packed A at most; longer k-sums take the general path
constexpr int64_t STRIP = 512;       // columns of rows-of-k B whose sums stay in L1: THIN x STRIP, twice, fit in KB x NR

// c[r][0:L] = sum over k < K of a[r, k] * src[0:L][k], for B stored as rows of n.
template <class T, int R, int Row, int Step>
[[gnu::noinline]] static void thin_k(int64_t K, const T* a, const T* const* src, T* c) {
  constexpr int L = lanes<T>, E = 16 / sizeof(T);
  reg<T> total[R] = {};
  for (int64_t k0 = 0; k0 < K; k0 += KB, a += THIN_BLOCK) {
    const int64_t kc = least(KB, K - k0);
    reg<T> acc[R] = {};
    const auto step = [&](int64_t k, reg<T> b) PLAIT_BODY {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r] = muladd(a[r * Row + k * Step] - reg<T>{}, b, acc[r]);
    };
    int64_t k = 0;
    for (; k + E <= kc; k += E) {
      reg<T> v[E];
      columns(src, k0 + k, v);
#pragma GCC unroll 4
      for (int i = 0; i < E; i++) step(k + i, v[i]);
    }
    for (; k < kc; k++) {
      reg<T> v;
      for (int j = 0; j < L; j++) v[j] = src[j][k0 + k];
      step(k, v);
    }
    for (int r = 0; r < R; r++) total[r] = k0 ? total[r] + acc[r] : acc[r];
  }
  for (int r = 0; r < R; r++) put(c + r * NR, total[r]);
}

// n lanes at p; the others are zero, and are not stored.
template <class T> PLAIT_FN reg<T> get_part(const T* p, int64_t n) {
  reg<T> r = {};
  __builtin_memcpy(&r, p, n * sizeof(T));
  return r;
}
template <class T> PLAIT_FN void put_part(T* p, reg<T> v, int64_t n) { __builtin_memcpy(p, &v, n * sizeof(T)); }

// acc[r][0:cols] = (first ? 0 : acc) + sum over k < U of a[r, k] * row[k][0:cols]
template <class T, int R, int U, int Row, int Step>
PLAIT_FN void thin_rows(const T* a, const T* const* row, int64_t cols, T* acc, bool first) {
  constexpr int L = lanes<T>;
  const auto one = [&](int64_t j, int64_t n) PLAIT_BODY {
    reg<T> s[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) s[r] = first ? reg<T>{} : get_part(acc + r * STRIP + j, n);
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      const reg<T> b = get_part(row[u] + j, n);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) s[r] = muladd(a[r * Row + u * Step] - reg<T>{}, b, s[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) put_part(acc + r * STRIP + j, s[r], n);
  };
  int64_t j = 0;
  for (; j + L <= cols; j += L) one(j, L);
  if (j < cols) one(j, cols - j);
}

// total[r][0:cols] = sum over k < K of a[r, k] * b[k0 + k][n0:n0 + cols], for B stored as rows of k; cols <= STRIP.
template <class T, int R, int Row, int Step>
[[gnu::noinline]] static void thin_n(int64_t K, const T* a, Rows<T> b, int64_t k0, int64_t n0, int64_t cols, T* total) {
  T* const acc = total + THIN * STRIP;
  constexpr int U = 4;
  for (int64_t done = 0; done < K; done += KB, a += THIN_BLOCK) {
    const int64_t kc = least(KB, K - done);
    T* const into = done ? acc : total;
    int64_t k = 0;
    for (; k + U <= kc; k += U) {
      const T* row[U];
      for (int u = 0; u < U; u++) row[u] = b[k0 + done + k + u] + n0;
      thin_rows<T, R, U, Row, Step>(a + k * Step, row, cols, into, k == 0);
    }
    for (; k < kc; k++) {
      const T* row = b[k0 + done + k] + n0;
      thin_rows<T, R, 1, Row, Step>(a + k * Step, &row, cols, into, k == 0);
    }
    if (done)
      for (int r = 0; r < R; r++)
        for (int64_t j = 0; j < cols; j++) total[r * STRIP + j] += acc[r * STRIP + j];
  }
  if (K == 0)
    for (int r = 0; r < R; r++)
      for (int64_t j = 0; j < cols; j++) total[r * STRIP + j] = T(0);
}

}  // namespace plait::matmul
