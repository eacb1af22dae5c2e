// One to THIN rows of A: a product whose time is that of reading B once. B is read where it lies, in the order of memory;
// the k-sum has the order of matmul_tile.h. Packed A comes in blocks of KB steps of k, THIN_BLOCK elements apart.
#pragma once
#include "matmul_pack.h"

namespace plait::matmul {

constexpr int64_t MC = 264;   // rows of packed A that stay in L2 while panels of B pass by
constexpr int64_t NC = 2048;  // columns whose partial sums a thread keeps when K > KB
constexpr int THIN = MR < 8 ? 4 : 8;  // at most the rows of a packed block of A
constexpr int64_t THIN_BLOCK = PR * AS;
constexpr int64_t THIN_BLOCKS = 64;  // of packed A at most; longer k-sums take the general path
constexpr int64_t STRIP = 512;       // columns of rows-of-k B whose sums stay in L1: THIN x STRIP, twice, fit in KB x NR

// c[r][0:L] = sum over k < K of a[r, k] * src[0:L][k], for B stored as rows of n.
template <class T, class U, int R, int Row, int Step>
[[gnu::noinline]] static void thin_k(int64_t K, const sum<T>* a, const U* const* src, sum<T>* c) {
  reg<T> total[R] = {};
  for (int64_t k0 = 0; k0 < K; k0 += KS<T>, a += THIN_BLOCK) {
    reg<T> acc[R] = {}, over = {};
    each_element<T>(src, k0, least(KS<T>, K - k0), [&](int64_t e, reg<T> b) PLAIT_BODY {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r] = dot<T>(all<T>(a + r * Row + e * Step), b, acc[r]);
      if constexpr (moved<T> != 0) over = across<T>(b, over);
    });
    if constexpr (moved<T> != 0)
      for (int r = 0; r < R; r++) acc[r] += moved<T> * over;
    for (int r = 0; r < R; r++) total[r] = k0 ? total[r] + acc[r] : acc[r];
  }
  for (int r = 0; r < R; r++) put(c + r * NR, total[r]);
}

// acc[r][0:cols] = (first ? 0 : acc) + the sum over the elements of G rows of k
template <class T, class U, int R, int G, int Row, int Step>
PLAIT_FN void thin_rows(const sum<T>* a, const U* const* row, int64_t cols, sum<T>* acc, bool first) {
  constexpr int L = lanes<T>;
  const auto one = [&](int64_t j, int64_t n) PLAIT_BODY {
    reg<T> s[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) s[r] = first ? reg<T>{} : get_part(acc + r * STRIP + j, n);
#pragma GCC unroll 4
    for (int e = 0; e < elements<T>(G); e++) {
      const reg<T> b = element_of_rows<T, U, G>(row, e, j, n);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) s[r] = dot<T>(all<T>(a + r * Row + e * Step), b, s[r]);
      if constexpr (moved<T> != 0) {
        const reg<T> over = moved<T> * across<T>(b, reg<T>{});
        for (int r = 0; r < R; r++) s[r] += over;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) put_part(acc + r * STRIP + j, s[r], n);
  };
  int64_t j = 0;
  for (; j + L <= cols; j += L) one(j, L);
  if (j < cols) one(j, cols - j);
}

// total[r][0:cols] = sum over k < K of a[r, k] * b[k0 + k][n0:n0 + cols], for B stored as rows of k; cols <= STRIP.
template <class T, class U, int R, int Row, int Step>
[[gnu::noinline]] static void thin_n(int64_t K, const sum<T>* a, Rows<U> b, int64_t k0, int64_t n0, int64_t cols, sum<T>* total) {
  sum<T>* const acc = total + THIN * STRIP;
  for (int64_t done = 0; done < K; done += KS<T>, a += THIN_BLOCK) {
    sum<T>* const into = done ? acc : total;
    each_rows<T>(b, k0 + done, least(KS<T>, K - done), n0, [&](const U* const* row, auto count, int64_t e) PLAIT_BODY {
      thin_rows<T, U, R, count.value, Row, Step>(a + e * Step, row, cols, into, e == 0);
    });
    if (done)
      for (int r = 0; r < R; r++)
        for (int64_t j = 0; j < cols; j++) total[r * STRIP + j] += acc[r * STRIP + j];
  }
  if (K == 0)
    for (int r = 0; r < R; r++)
      for (int64_t j = 0; j < cols; j++) total[r * STRIP + j] = 0;
}

}  // namespace plait::matmul
