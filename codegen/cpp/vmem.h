// Loops of generated kernels over vec.h: tiles and their partial last one, memory access by lanes, threads.
#pragma once
#include "vec.h"

namespace plait {

// ---- some of the lanes -------------------------------------------------------------------------------------------
// `bits` has bit l set where lane l is read or written; the memory of the others is left alone. AVX-512 has instructions
// for that. AddressSanitizer cannot see into them, so its builds take the plain way, as other machines do.

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    !defined(__SANITIZE_ADDRESS__) && PLAIT_LANES == 16
constexpr bool HAS_MASKS = true;
template <int N> PLAIT_FN uint64_t lane_bits(vec<bool, N> mask) {
  if constexpr (N == 16) return uint16_t(__builtin_ia32_cvtd2mask512(mask.m.v));
  else return lane_bits<N / 2>(low(mask)) | lane_bits<N / 2>(high(mask)) << (N / 2);
}
template <class T, int N> PLAIT_FN vec<T, N> load_register(const T* p, uint64_t bits, vec<T, N> other) {
  using R = typename vec<T, N>::raw;
  static_assert(N == (sizeof(T) == 8 ? 8 : 16));
  if constexpr (sizeof(T) == 1) {
    return R(__builtin_ia32_loaddquqi128_mask((const char*)p, raw_of<char, 16>::type(other.v), bits));
  } else if constexpr (sizeof(T) == 2) {
    return R(__builtin_ia32_loaddquhi256_mask((const short*)p, raw_of<short, 16>::type(other.v), bits));
  } else if constexpr (sizeof(T) == 4) {
    return R(__builtin_ia32_loadups512_mask((const float*)p, raw_of<float, 16>::type(other.v), bits));
  } else {
    return R(__builtin_ia32_loadupd512_mask((const double*)p, raw_of<double, 8>::type(other.v), bits));
  }
}
template <class T, int N> PLAIT_FN void store_register(T* p, vec<T, N> x, uint64_t bits) {
  static_assert(N == (sizeof(T) == 8 ? 8 : 16));
  if constexpr (sizeof(T) == 1) {
    __builtin_ia32_storedquqi128_mask((char*)p, raw_of<char, 16>::type(x.v), bits);
  } else if constexpr (sizeof(T) == 2) {
    __builtin_ia32_storedquhi256_mask((short*)p, raw_of<short, 16>::type(x.v), bits);
  } else if constexpr (sizeof(T) == 4) {
    __builtin_ia32_storeups512_mask((float*)p, raw_of<float, 16>::type(x.v), bits);
  } else {
    __builtin_ia32_storeupd512_mask((double*)p, raw_of<double, 8>::type(x.v), bits);
  }
}
template <class T, int N> constexpr bool is_split = N > (sizeof(T) == 8 ? 8 : 16);
#else
constexpr bool HAS_MASKS = false;
template <int N> PLAIT_FN uint64_t lane_bits(vec<bool, N> mask) {
  uint64_t bits = 0;
  for (int l = 0; l < N; l++) bits |= uint64_t(mask[l]) << l;
  return bits;
}
template <class T, int N> PLAIT_FN vec<T, N> load_register(const T* p, uint64_t bits, vec<T, N> other) {
  T tile[N];
  to_lanes(tile, other);
  for (int l = 0; l < N; l++)
    if (bits >> l & 1) tile[l] = p[l];
  return from_lanes<T, N>(tile);
}
template <class T, int N> PLAIT_FN void store_register(T* p, vec<T, N> x, uint64_t bits) {
  T tile[N];
  to_lanes(tile, x);
  for (int l = 0; l < N; l++)
    if (bits >> l & 1) p[l] = tile[l];
}
template <class T, int N> constexpr bool is_split = false;
#endif

template <class T, int N> PLAIT_FN vec<T, N> load_some(const T* p, uint64_t bits, vec<T, N> other) {
  if constexpr (same<T, bool>) {
    const vec<uint8_t, N> bytes = convert<uint8_t>(other.m & 1);
    return load_some(reinterpret_cast<const uint8_t*>(p), bits, bytes) != uint8_t(0);
  } else if constexpr (is_half<T>) {
    return load_some(reinterpret_cast<const uint16_t*>(p), bits, other.bits);
  } else if constexpr (is_split<T, N>) {
    return join(load_some(p, bits, low(other)), load_some(p + N / 2, bits >> (N / 2), high(other)));
  } else {
    return load_register(p, bits, other);
  }
}
template <class T, int N> PLAIT_FN void store_some(T* p, vec<T, N> x, uint64_t bits) {
  if constexpr (same<T, bool>) {
    store_some(reinterpret_cast<uint8_t*>(p), vec<uint8_t, N>(convert<uint8_t>(x.m & 1)), bits);
  } else if constexpr (is_half<T>) {
    store_some(reinterpret_cast<uint16_t*>(p), x.bits, bits);
  } else if constexpr (is_split<T, N>) {
    store_some(p, low(x), bits), store_some(p + N / 2, high(x), bits >> (N / 2));
  } else {
    store_register(p, x, bits);
  }
}

// The first n < W lanes; without masks by powers of two, as a loop would become a call of memcpy.
template <int Step = W / 2, class T> PLAIT_FN void copy_first(T* to, const T* from, int n) {
  if (n & Step) {
    __builtin_memcpy(to, from, Step * sizeof(T));
    to += Step, from += Step;
  }
  if constexpr (Step > 1) copy_first<Step / 2>(to, from, n);
}
template <class T> PLAIT_FN vec<T> load_first(const T* p, int n) {
  if constexpr (HAS_MASKS) return load_some(p, (uint64_t(1) << n) - 1, vec<T>(T{}));
  T tile[W] = {};
  copy_first(tile, p, n);
  return from_lanes<T, W>(tile);
}
template <class T> PLAIT_FN void store_first(T* p, vec<T> x, int n) {
  if constexpr (HAS_MASKS) return store_some(p, x, (uint64_t(1) << n) - 1);
  T tile[W];
  to_lanes(tile, x);
  copy_first(p, tile, n);
}

// ---- tiles -------------------------------------------------------------------------------------------------------
// A vector loop runs over tiles of W iterations. Its body is one generic lambda, compiled for a full tile and for the
// partial tile at the end; lanes from `n` on are dead in the latter: they read nothing and write nothing.

template <int Width> struct Full {
  static constexpr bool full = true;
  static constexpr int width = Width, n = Width;
};
struct Part {
  static constexpr bool full = false;
  static constexpr int width = W;
  int n;
};
template <int K> struct Int {
  static constexpr int value = K;
  PLAIT_FN constexpr operator int() const { return K; }
};

template <class T, int N, int... I> PLAIT_FN vec<T, N> iota_lanes(indices<I...>) {
  if constexpr (whole<T, N>) return typename vec<T, N>::raw{T(I)...};
  else return {iota_lanes<T, N / 2>(iota_of<N / 2>{}), iota_lanes<T, N / 2>(iota_of<N / 2>{}) + T(N / 2)};
}
template <class T, int N = W> PLAIT_FN vec<T, N> iota() { return iota_lanes<T, N>(iota_of<N>{}); }

// a in live lanes, b in dead ones
template <class V, class L> PLAIT_FN V blend(L lanes, V a, V b) {
  if constexpr (L::full) return a;
  else return where(iota<int32_t>() < vec<int32_t>(lanes.n), a, b);
}
template <class L> PLAIT_FN auto live(L lanes) {
  using M = vec<bool, L::width>;
  return blend(lanes, M(true), M(false));
}

template <class T, class L> PLAIT_FN vec<T, L::width> load(const T* p, L lanes) {
  if constexpr (L::full) return from_lanes<T, L::width>(p);
  else return load_first(p, lanes.n);
}
template <class T, class L> PLAIT_FN void store(T* p, vec<T, L::width> x, L lanes) {
  if constexpr (L::full) to_lanes(p, x);
  else store_first(p, x, lanes.n);
}

// Stores past the caches, a register at a time and only to an address that is a multiple of its size: the line that is
// overwritten need not be fetched. They are ordered with other stores by `streams_done`.
#if defined(__SSE2__) && !defined(__SANITIZE_ADDRESS__)
template <int Bytes> struct float_bits { typedef float type __attribute__((vector_size(Bytes))); };
template <class T, int N> PLAIT_FN void stream_lanes(T* p, vec<T, N> x) {
  if constexpr (same<T, bool>) stream_lanes(reinterpret_cast<uint8_t*>(p), vec<uint8_t, N>(convert<uint8_t>(x.m & 1)));
  else if constexpr (is_half<T>) stream_lanes(reinterpret_cast<uint16_t*>(p), x.bits);
  else if constexpr (!whole<T, N>) stream_lanes(p, x.lo), stream_lanes(p + N / 2, x.hi);
  else {
    using F = typename float_bits<sizeof x.v>::type;
    float* const to = reinterpret_cast<float*>(p);
    if constexpr (sizeof x.v == 16) __builtin_ia32_movntps(to, F(x.v));
#if defined(__AVX__)
    if constexpr (sizeof x.v == 32) __builtin_ia32_movntps256(to, F(x.v));
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof x.v == 64) __builtin_ia32_movntps512(to, F(x.v));
#endif
  }
}
template <class T, class L> PLAIT_FN void stream(T* p, vec<T, L::width> x, L lanes) {
  constexpr int bytes = L::width * sizeof(T);
  if constexpr (L::full && bytes >= 16) {
    if (reinterpret_cast<uintptr_t>(p) % (bytes < REGISTER_BYTES ? bytes : REGISTER_BYTES) == 0) return stream_lanes(p, x);
  }
  store(p, x, lanes);
}
PLAIT_FN void streams_done() { __builtin_ia32_sfence(); }
#else
template <class T, class L> PLAIT_FN void stream(T* p, vec<T, L::width> x, L lanes) { store(p, x, lanes); }
PLAIT_FN void streams_done() {}
#endif

// p[at[lane]]; dead lanes give 0
template <class T, class L> PLAIT_FN vec<T, L::width> gather(const T* p, vec<int64_t, L::width> at, L lanes) {
  int64_t offset[L::width];
  to_lanes(offset, at);
  T tile[L::width] = {};
  for (int l = 0; l < lanes.n; l++) tile[l] = p[offset[l]];
  return from_lanes<T, L::width>(tile);
}
template <class T, class L> PLAIT_FN void scatter(T* p, vec<int64_t, L::width> at, vec<T, L::width> x, L lanes) {
  int64_t offset[L::width];
  to_lanes(offset, at);
  T tile[L::width];
  to_lanes(tile, x);
  for (int l = 0; l < lanes.n; l++) p[offset[l]] = tile[l];
}
// p[lane * stride]
template <class T, class L> PLAIT_FN vec<T, L::width> load_strided(const T* p, int64_t stride, L lanes) {
  T tile[L::width] = {};
  for (int l = 0; l < lanes.n; l++) tile[l] = p[l * stride];
  return from_lanes<T, L::width>(tile);
}
template <class T, class L> PLAIT_FN void store_strided(T* p, int64_t stride, vec<T, L::width> x, L lanes) {
  T tile[L::width];
  to_lanes(tile, x);
  for (int l = 0; l < lanes.n; l++) p[l * stride] = tile[l];
}

// block[r * Width + c] = p[c * stride + r] for r < rows and c < columns: read along r and transposed in registers.
// Step d of log2(N) swaps the bits d of row and lane: the lanes of row r that have it with those of row r + d that have not.
#if __GNUC__ >= 12
template <int D, class T, int N, int... I> PLAIT_FN void swap_parts(vec<T, N>& a, vec<T, N>& b, indices<I...>) {
  const vec<T, N> x = a, y = b;
  a = __builtin_shufflevector(x.v, y.v, (I & D ? I - D + N : I)...);
  b = __builtin_shufflevector(x.v, y.v, (I & D ? I + N : I + D)...);
}
template <int D, class T, int N> PLAIT_FN void transpose_lanes(vec<T, N> (&rows)[N]) {
  for (int r = 0; r < N; r++)
    if (!(r & D)) swap_parts<D>(rows[r], rows[r + D], iota_of<N>{});
  if constexpr (D > 1) transpose_lanes<D / 2>(rows);
}
template <class T> constexpr bool can_transpose = whole<T, W> && !is_half<T> && !same<T, bool> && sizeof(T) == 4;
#else
template <class T> constexpr bool can_transpose = false;
#endif
template <int Width, class T>
PLAIT_FN void transpose(T* block, const T* p, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; c += W) {
    for (int64_t r = 0; r < rows; r += W) {
      const T* const from = p + c * stride + r;
      T* const to = block + r * Width + c;
      if constexpr (can_transpose<T>) {
        if (c + W <= columns && r + W <= rows) {
          vec<T> tile[W];
          for (int l = 0; l < W; l++) tile[l] = from_lanes<T, W>(from + l * stride);
          transpose_lanes<W / 2>(tile);
          for (int l = 0; l < W; l++) to_lanes(to + l * Width, tile[l]);
          continue;
        }
      }
      for (int64_t l = 0; l < W && c + l < columns; l++)
        for (int64_t k = 0; k < W && r + k < rows; k++) to[k * Width + l] = from[l * stride + k];
    }
  }
}

// Masked forms: a lane whose mask is false reads nothing (and gives `other`), or writes nothing.
template <class T, class L>
PLAIT_FN vec<T, L::width> load_if(vec<bool, L::width> mask, const T* p, L lanes, T other) {
  const vec<bool, L::width> reads = mask & live(lanes);
  if (!HAS_MASKS && all_lanes(reads)) return from_lanes<T, L::width>(p);
  return load_some(p, lane_bits(reads), vec<T, L::width>(other));
}
template <class T, class L>
PLAIT_FN vec<T, L::width> gather_if(vec<bool, L::width> mask, const T* p, vec<int64_t, L::width> at, L lanes, T other) {
  T tile[L::width];
  for (int l = 0; l < L::width; l++) tile[l] = l < lanes.n && mask[l] ? p[at[l]] : other;
  return from_lanes<T, L::width>(tile);
}
template <class T, class L> PLAIT_FN void store_if(vec<bool, L::width> mask, T* p, vec<T, L::width> x, L lanes) {
  store_some(p, x, lane_bits(mask & live(lanes)));
}
template <class T, class L>
PLAIT_FN void scatter_if(vec<bool, L::width> mask, T* p, vec<int64_t, L::width> at, vec<T, L::width> x, L lanes) {
  for (int l = 0; l < lanes.n; l++)
    if (mask[l]) p[at[l]] = x[l];
}

template <class T> PLAIT_FN void atomic_add(T* p, T x) {
#pragma omp atomic
  *p += x;
}
template <class T, class L>
PLAIT_FN void atomic_scatter_if(vec<bool, L::width> mask, T* p, vec<int64_t, L::width> at, vec<T, L::width> x, L lanes) {
#pragma GCC unroll 1
  for (int l = 0; l < lanes.n; l++)
    if (mask[l]) atomic_add(p + at[l], x[l]);
}

// f(lane) for every lane, as int64: index expressions that are not affine in the vector axis
template <int N = W, class F> PLAIT_FN vec<int64_t, N> per_lane(F f) {
  int64_t at[N];
  for (int l = 0; l < N; l++) at[l] = f(l);
  return from_lanes<int64_t, N>(at);
}

// body(first iteration, lanes, Int<k>) over [begin, end) in tiles.
// `Partials` = 4 unrolls: tile t of each group of four updates partial accumulator k = t, which hides the latency of
// dependent additions; the order in which values meet is fixed by the position alone.
// `Tiles` = 4 takes four tiles as one where it can: a column is walked once for 4 W lanes, which saves cache and page misses.
template <int Partials, int Tiles = 1, class F> PLAIT_FN void tiles(int64_t begin, int64_t end, F body) {
  static_assert(Partials == 1 || Partials == 4);
  int64_t i = begin;
  if constexpr (Tiles > 1) {
    for (; i + Tiles * W <= end; i += Tiles * W) body(i, Full<Tiles * W>{}, Int<0>{});
  }
  if constexpr (Partials == 4) {
    for (; i + 4 * W <= end; i += 4 * W) {
      body(i, Full<W>{}, Int<0>{});
      body(i + W, Full<W>{}, Int<1>{});
      body(i + 2 * W, Full<W>{}, Int<2>{});
      body(i + 3 * W, Full<W>{}, Int<3>{});
    }
  }
  for (; i + W <= end; i += W) body(i, Full<W>{}, Int<0>{});
  if (i < end) body(i, Part{int(end - i)}, Int<Partials - 1>{});
}

// The same with four partial accumulators for bodies that are too long to unroll: each tile meets the one that it meets
// there, so that the bits of a sum do not depend on how much is computed beside it.
template <class F> PLAIT_FN void tiles_in_turn(int64_t begin, int64_t end, F body) {
  const int64_t fours = begin + (end - begin) / (4 * W) * (4 * W);
  int64_t i = begin;
  for (; i + W <= end; i += W) body(i, Full<W>{}, i < fours ? int((i - begin) / W % 4) : 0);
  if (i < end) body(i, Part{int(end - i)}, Int<3>{});
}

// ---- threads -----------------------------------------------------------------------------------------------------

extern "C" int omp_get_thread_num() noexcept;
extern "C" int omp_get_num_threads() noexcept;

#ifndef PLAIT_GRAIN
#define PLAIT_GRAIN (1 << 14)
#endif
constexpr int64_t GRAIN = PLAIT_GRAIN;  // scalar statements that are worth waking a thread for

// By value and out of line: the closure's fields are then locals of one function, which no store can alias.
template <class F> [[gnu::noinline]] void run_span(F body, int64_t begin, int64_t end) { body(begin, end); }

// body(begin, end) over [0, n), split evenly over at most `nthreads` threads. No parallel region is opened for one
// thread: a forked child, whose OpenMP pool is gone, must be able to run with nthreads = 1.
template <class F> PLAIT_FN void parallel(int64_t n, int64_t work, int nthreads, F body) {
  if (n <= 0) return;
  int64_t threads = nthreads < n ? nthreads : n;
  if (threads > work / GRAIN) threads = work / GRAIN;
  if (threads <= 1) return run_span(body, 0, n);
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t t = omp_get_thread_num(), count = omp_get_num_threads();
    run_span(body, n * t / count, n * (t + 1) / count);
  }
}

PLAIT_FN int64_t tile_count(int64_t n) { return (n + W - 1) / W; }

}  // namespace plait
