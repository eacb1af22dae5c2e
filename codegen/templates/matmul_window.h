// Operands of matmul.h that are windows of an image: packed as if every window had been copied out, with zeros where it
// leaves the image. Pixels of the output are rows of A (channels-last results) or columns of B (channels first).
#pragma once
#include "matmul_tile.h"

namespace plait::matmul {

// n elements; reads and writes nothing else. Short runs are usual, for which a call of memcpy takes longer than the copy.
template <class T> PLAIT_FN void copy_run(const T* src, T* dst, int64_t n) {
  constexpr int64_t L = lanes<T>, E = 16 / sizeof(T);
  typedef typename raw_of<T, E>::type part;
  if (n >= L) {
    int64_t i = 0;
    for (; i + L <= n; i += L) put(dst + i, get(src + i));
    if (i < n) put(dst + n - L, get(src + n - L));
  } else if (n >= E) {
    part a;
    int64_t i = 0;
    for (; i + E <= n; i += E) __builtin_memcpy(&a, src + i, sizeof a), __builtin_memcpy(dst + i, &a, sizeof a);
    __builtin_memcpy(&a, src + n - E, sizeof a), __builtin_memcpy(dst + n - E, &a, sizeof a);
  } else {
#pragma GCC unroll 1
    for (int64_t i = 0; i < n; i++) dst[i] = src[i];
  }
}

// Elements 0, 2, 4, ... of two registers.
template <class V, int... I> PLAIT_FN V even(V lo, V hi, indices<I...>) { return __builtin_shufflevector(lo, hi, 2 * I...); }

template <class T> PLAIT_FN void zero_run(T* dst, int64_t n) {
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; i++) dst[i] = T(0);
}

// Where a window starts: its image, and the row and column of its first tap, which may lie outside.
template <class T> struct Corner {
  const T* image;
  int64_t y, x;
  Corner() = default;
  Corner(const T* base, const Window& w, int64_t pixel) {
    const int64_t pixels = w.OH * w.OW, p = pixel % pixels;
    image = base + pixel / pixels * w.x_n;
    y = p / w.OW * w.stride_h - w.pad_h;
    x = p % w.OW * w.stride_w - w.pad_w;
  }
};

// Channel and tap of k, in the order of the weight: channels outermost, or innermost.
struct Tap {
  int64_t c, h, w;
  Tap(const Window& s, int64_t k) {
    const int64_t taps = s.KH * s.KW, t = s.taps_first ? k / s.C : k % taps;
    c = s.taps_first ? k % s.C : k / taps;
    h = t / s.KW, w = t % s.KW;
  }
  PLAIT_FN void next(const Window& s) {
    if (s.taps_first) {
      if (++c < s.C) return;
      c = 0;
    }
    if (++w < s.KW) return;
    w = 0;
    if (++h < s.KH) return;
    h = 0, c += !s.taps_first;
  }
};

// n elements that lie `step` apart.
template <class T> PLAIT_FN void copy_strided(const T* src, T* dst, int64_t n, int64_t step) {
  constexpr int64_t L = lanes<T>;
  int64_t i = 0;
  if (step == 2)
    for (; i + L < n; i += L) put(dst + i, even(get(src + 2 * i), get(src + 2 * i + L), iota_of<L>{}));
#pragma GCC unroll 1
  for (; i < n; i++) dst[i] = src[i * step];
}

// B at (k0, n0), kc x cols, a column for each pixel -> panel[k][NR]. One tap of all channels after the other, for pixels of
// one row of the output: what lies inside the image is then found out once for many copies.
template <class T>
static void pack_b_window(const T* base, const Window& w, int64_t k0, int64_t kc, int64_t n0, int64_t cols, T* panel) {
  const int64_t taps = w.KH * w.KW, step = w.stride_w * w.x_w;
  const int64_t k_c = w.taps_first ? 1 : taps, k_tap = w.taps_first ? w.C : 1;
  for (int64_t j = 0, count; j < cols; j += count) {
    const Corner<T> at(base, w, n0 + j);
    count = least(cols - j, w.OW - (n0 + j) % w.OW);
    const int64_t room = cols < NR && j + count == cols ? NR - cols : 0;  // columns behind the last pixel are zeros
    for (int64_t tap = 0; tap < taps; tap++) {
      const int64_t y = at.y + tap / w.KW * w.dilation_h, x = at.x + tap % w.KW * w.dilation_w;
      const int64_t c0 = k0 > tap * k_tap ? ceildiv(k0 - tap * k_tap, k_c) : 0;
      const int64_t c1 = k0 + kc > tap * k_tap ? least(w.C, ceildiv(k0 + kc - tap * k_tap, k_c)) : 0;
      int64_t first = 0, last = 0;  // pixels whose tap lies inside
      if (y >= 0 && y < w.H && x < w.W) {
        first = x >= 0 ? 0 : least(count, ceildiv(-x, w.stride_w));
        last = most(first, least(count, ceildiv(w.W - x, w.stride_w)));
      }
      const int64_t n = last - first, behind = count - last + room;
      const T* src = at.image + c0 * w.x_c + y * w.x_h + x * w.x_w + first * step;
      T* dst = panel + (c0 * k_c + tap * k_tap - k0) * NR + j;
      for (int64_t c = c0; c < c1; c++, src += w.x_c, dst += k_c * NR) {
        zero_run(dst, first);
        if (step == 1) copy_run(src, dst + first, n);
        else copy_strided(src, dst + first, n, step);
        zero_run(dst + last, behind);
      }
    }
  }
}

// ---- windows without a copy ------------------------------------------------------------------------------------------

// Whether a register of pixels is one piece of the image for every tap: it needs no packing then.
template <class T> bool is_direct(const Window& w) {
  return w.KH * w.KW > 1 && w.stride_w == 1 && w.x_w == 1 && w.pad_h == 0 && w.pad_w == 0 && w.OW % lanes<T> == 0;
}

// Where step k of every window lies, counted from its corner.
inline void offsets(const Window& w, int64_t k0, int64_t kc, int64_t* from) {
  Tap tap(w, k0);
  for (int64_t k = 0; k < kc; k++, tap.next(w))
    from[k] = tap.c * w.x_c + tap.h * w.dilation_h * w.x_h + tap.w * w.dilation_w * w.x_w;
}

// The corners of NV registers of pixels from n on; registers from n1 on, which nobody stores, repeat the first.
template <class T> static void corners(const T* base, const Window& w, int64_t n, int64_t n1, const T** at) {
  for (int v = 0; v < NV; v++) {
    const int64_t pixel = n + v * lanes<T> < n1 ? n + v * lanes<T> : n;
    const Corner<T> c(base, w, pixel);
    at[v] = c.image + c.y * w.x_h + c.x * w.x_w;
  }
}

// `micro` with B read where it lies: column v * L + i of step k is at[v][from[k] + i].
template <class T, int R, int Row>
[[gnu::noinline]] static void micro_window(int64_t kc, const T* a, const T* const* at, const int64_t* from, T* c, bool add) {
  constexpr int L = lanes<T>;
  reg<T> acc[R][NV] = {};
  const T* const lo = at[0];
  const T* const hi = at[1];
  for (int64_t k = 0; k < kc; k++) {
    const reg<T> bv[NV] = {get(lo + from[k]), get(hi + from[k])};
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const reg<T> av = a[r * Row + k] - reg<T>{};
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) acc[r][v] = muladd(av, bv[v], acc[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) {
      T* p = c + r * NR + v * L;
      put(p, add ? get(p) + acc[r][v] : acc[r][v]);
    }
}

template <class T, int Row>
static void micro_window_rows(int64_t rows, int64_t kc, const T* a, const T* const* at, const int64_t* from, T* c, bool add) {
  if constexpr (MR == 12) {
    if (rows > 8) return micro_window<T, 12, Row>(kc, a, at, from, c, add);
    if (rows > 4) return micro_window<T, 8, Row>(kc, a, at, from, c, add);
  } else {
    if (rows > 4) return micro_window<T, 6, Row>(kc, a, at, from, c, add);
  }
  return micro_window<T, 4, Row>(kc, a, at, from, c, add);
}

// ---- rows of A -------------------------------------------------------------------------------------------------------

// A at (m0, k0), rows x kc, a row for each pixel -> dst[row][AS], from channels that lie side by side, taps outermost.
template <class T>
static void pack_a_runs(const T* base, const Window& w, int64_t m0, int64_t rows, int64_t k0, int64_t kc, T* dst) {
  const bool joined = w.dilation_w == 1 && w.x_w == w.C;  // a row of taps is one run
  for (int64_t r = 0; r < rows; r++, dst += AS) {
    const Corner<T> at(base, w, m0 + r);
    const bool inside = joined && at.x >= 0 && at.x + w.KW <= w.W;
    Tap tap(w, k0);
    for (int64_t k = 0; k < kc;) {
      const int64_t y = at.y + tap.h * w.dilation_h, x = at.x + tap.w * w.dilation_w;
      const int64_t n = least(kc - k, (inside ? (w.KW - tap.w) * w.C : w.C) - tap.c);
      if (y >= 0 && y < w.H && x >= 0 && x < w.W) copy_run(at.image + y * w.x_h + x * w.x_w + tap.c, dst + k, n);
      else zero_run(dst + k, n);
      k += n;
      tap.c = 0;
      if (inside || ++tap.w == w.KW) tap.w = 0, tap.h++;
    }
  }
}

// The same of any layout, in either order.
template <class T>
static void pack_a_window(const T* base, const Window& w, int64_t m0, int64_t rows, int64_t k0, int64_t kc, T* dst) {
  if (w.taps_first && w.x_c == 1) return pack_a_runs(base, w, m0, rows, k0, kc, dst);
  int64_t from[KB], y[KB], x[KB];
  Tap tap(w, k0);
  for (int64_t k = 0; k < kc; k++, tap.next(w)) {
    y[k] = tap.h * w.dilation_h, x[k] = tap.w * w.dilation_w;
    from[k] = tap.c * w.x_c + y[k] * w.x_h + x[k] * w.x_w;
  }
  const int64_t high = (w.KH - 1) * w.dilation_h, wide = (w.KW - 1) * w.dilation_w;
  for (int64_t r = 0; r < rows; r++, dst += AS) {
    const Corner<T> at(base, w, m0 + r);
    const T* const src = at.image + at.y * w.x_h + at.x * w.x_w;
    if (at.y >= 0 && at.x >= 0 && at.y + high < w.H && at.x + wide < w.W) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < kc; k++) dst[k] = src[from[k]];
    } else {
      for (int64_t k = 0; k < kc; k++) {
        const bool in = at.y + y[k] >= 0 && at.y + y[k] < w.H && at.x + x[k] >= 0 && at.x + x[k] < w.W;
        dst[k] = in ? src[from[k]] : T(0);
      }
    }
  }
}

}  // namespace plait::matmul
