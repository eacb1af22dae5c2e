// Products by a quantized weight, read as it lies in memory (formats/quantized.py, layout "panels"). Codes become numbers in
// registers, behind the multiplications of the tile: few instructions a code. Only for many rows a block of a panel is
// widened first.
//
//   c[m, n] = sum over groups g of scale[n, g] * (sum over k in g of a[m, k] * (code[n, k] - zero[n, g]))
//
// code - zero is exact. The order is fixed, as in matmul_tile.h: a group is cut into pieces of at most KS; the products of a
// piece are added one after the other, starting from zero; times the scale it is added to the sum with one rounding. Where
// the processor multiplies pairs of bfloat16, x of that type is multiplied so, since code - zero is exact in it too: pairs of
// neighbours, or, where codes are looked up, of what lies in the halves of a word.
#pragma once
#include "matmul_thin.h"

namespace plait {

struct e8m0 {  // a power of two: 2^(bits - 127)
  uint8_t bits;
};
template <int Bits, class Scale, bool Symmetric> struct Quantized {  // its words in memory
  int32_t word;
};
// Their names: u4_f16 has codes of 4 bits, zero points and scales of float16, i4_f16 has no zero points.
#define PLAIT_QUANTIZED(bits, scale, name)                \
  using u##bits##_##name = Quantized<bits, scale, false>; \
  using i##bits##_##name = Quantized<bits, scale, true>;
#define PLAIT_QUANTIZED_BITS(bits) \
  PLAIT_QUANTIZED(bits, f16, f16)  \
  PLAIT_QUANTIZED(bits, bf16, bf16) PLAIT_QUANTIZED(bits, float, f32) PLAIT_QUANTIZED(bits, e8m0, e8m0)
PLAIT_QUANTIZED_BITS(2)
PLAIT_QUANTIZED_BITS(3)
PLAIT_QUANTIZED_BITS(4)
PLAIT_QUANTIZED_BITS(5)
PLAIT_QUANTIZED_BITS(6)
PLAIT_QUANTIZED_BITS(7)
PLAIT_QUANTIZED_BITS(8)

namespace matmul {

template <class UA, int Bits, class S, bool Symmetric> struct element_of<float, UA, Quantized<Bits, S, Symmetric>> {
  using type = typename element_of<float, UA, bf16>::type;
};

constexpr int BLOCK = 32;  // k whose codes lie together: as many words of each column as codes have bits

// The parts of a weight as they lie in memory. Scales and zero points are those of as many columns as a register has lanes.
template <class U> struct Parts;
template <int Bits, class S, bool Symmetric> struct Parts<Quantized<Bits, S, Symmetric>> {
  using Scale = S;
  static constexpr int bits = Bits, zero_bytes = Bits <= 4 ? NR / 2 : NR;
  static constexpr int middle = 1 << (Bits - 1);  // the zero point where none is stored

  const int32_t* codes;
  const Scale* scales;
  const uint8_t* zeros;
  int64_t K, group;

  PLAIT_FN const int32_t* words(int64_t k, int64_t n) const {
    return codes + n / NR * NR * (K / BLOCK * Bits) + k / BLOCK * Bits * NR + n % NR;
  }
  PLAIT_FN int64_t place(int64_t g, int64_t n) const { return n / NR * (K / group) + g; }
  PLAIT_FN reg<float> scale(int64_t g, int64_t n) const {
    const S* p = scales + place(g, n) * NR + n % NR;
    if constexpr (same<S, e8m0>) {
      const reg<int32_t> e = get_as<int32_t>(reinterpret_cast<const uint8_t*>(p));
      return reg<float>(e == 0 ? reg<int32_t>{} + (1 << 22) : e << 23);  // 2^-127 has no exponent of its own
    } else {
      return get_as<float>(p);
    }
  }
  PLAIT_FN reg<float> zero(int64_t g, int64_t n) const {
    if constexpr (Symmetric) return float(middle) - reg<float>{};
    const uint8_t* p = zeros + place(g, n) * zero_bytes;
    if constexpr (Bits > 4) return get_as<float>(p + n % NR);
    const reg<int32_t> pair = get_as<int32_t>(p + n % (NR / 2));
    return __builtin_convertvector(n % NR < NR / 2 ? pair & 15 : pair >> 4, reg<float>);
  }
  // Where the piece that begins at k ends.
  PLAIT_FN int64_t end_of_piece(int64_t k, int64_t step) const { return least((k / group + 1) * group, k + step); }
  // The same of a run of whole groups, or one piece, of at most `step`.
  PLAIT_FN int64_t end_of_run(int64_t k, int64_t step) const {
    return group > step ? end_of_piece(k, step) : least(K, k + step / group * group);
  }
};

// x | (word & mask)
PLAIT_FN reg<int32_t> with_bits(reg<int32_t> x, reg<int32_t> word, int32_t mask) {
#if defined(__AVX512F__)
  return reg<int32_t>(__builtin_ia32_pternlogd512_mask(x, word, mask - reg<int32_t>{}, 0xf8, -1));
#else
  return x | (word & mask);
#endif
}

// How codes of some bits are cut into planes; a step is what a word of the narrowest plane holds.
template <int Bits> struct Planes {
  static constexpr int widest = Bits & 8 ? 8 : Bits & 4 ? 4 : 2, step = 32 / (Bits & -Bits), places = 16 / widest;
  static constexpr int words = step * Bits / 32;

  // Bits of a word from which code i of a step is taken: as they are in the mantissa of a number, or after a shift by half.
  static constexpr int place(int i) { return i % places * widest; }
  // The number whose lowest bit of weight 1 is bit p of its mantissa: a code put there is added to it.
  static constexpr int32_t base(int p) { return (127 + 23 - p) << 23; }
  static constexpr float base_value(int p) { return float(1 << (23 - p)); }

  // Words of step s of a block.
  PLAIT_FN static void load(const int32_t* block, int s, reg<int32_t>* word) {
    int at = 0, plane = 0;
#pragma GCC unroll 4
    for (int w = 8; w > 0; w /= 2)
      if (Bits & w) {
        const int many = step * w / 32;
#pragma GCC unroll 8
        for (int j = 0; j < many; j++) word[at + j] = get(block + (plane + s * many + j) * NR);
        at += many, plane += w;
      }
  }
  // base_value(place(i)) plus code i
  PLAIT_FN static reg<float> code(const reg<int32_t>* word, int i) {
    const int p = place(i);
    reg<int32_t> x = base(p) - reg<int32_t>{};
    int at = 0, low = 0;
#pragma GCC unroll 4
    for (int w = 8; w > 0; w /= 2)
      if (Bits & w) {
        const int per_word = 32 / w, from = i % per_word * w, to = p + low;
        const reg<int32_t> own = word[at + i / per_word];
        const reg<int32_t> moved_word = from > to ? reg<int32_t>(reg<uint32_t>(own) >> (from - to)) : own << (to - from);
        x = with_bits(x, moved_word, ((1 << w) - 1) << to);
        at += step * w / 32, low += w;
      }
    return reg<float>(x);
  }
};

// Codes of 2 and 4 bits as pairs of bfloat16 are looked up: a half of a word has one of a pair, at the same place.
template <class T, class U>
constexpr bool looked_up = same<T, bf16x2> && (Parts<U>::bits == 2 || Parts<U>::bits == 4);

// Declared for all instruction sets: templates name them where they are never called.
template <int Bits> PLAIT_FN reg<float> code_pair(reg<int32_t> word, int i, reg<int32_t> zero);
template <int N, int... I> PLAIT_FN void interleave(uint16_t* p, indices<I...>);

#if defined(__AVX512BF16__) && defined(__AVX512F__)
// bfloat16 of the 5-bit integers: 0 to 15, then -16 to -1.
alignas(64) constexpr uint16_t SMALL_NUMBERS[32] = {
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150,
    0x4160, 0x4170, 0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0,
    0xc080, 0xc040, 0xc000, 0xbf80,
};

template <int Bits> PLAIT_FN reg<float> code_pair(reg<int32_t> word, int i, reg<int32_t> zero) {
  using H = typename raw_of<uint16_t, 32>::type;
  constexpr int32_t mask = ((1 << Bits) - 1) * 0x10001;
  const int at = i * Bits;
  H table;
  __builtin_memcpy(&table, SMALL_NUMBERS, sizeof table);
  const H own = at + Bits == 16 ? H(word) >> at : H(reg<int32_t>(reg<uint32_t>(word) >> at) & mask);
  return reg<float>(__builtin_shuffle(table, H(own - H(zero))));
}
#endif

// Rows of packed A as pairs of what `code_pair` gives: the halves of each run of N numbers, interleaved.
template <int N, int... I> PLAIT_FN void interleave(uint16_t* p, indices<I...>) {
  typename raw_of<uint16_t, N>::type v;
  __builtin_memcpy(&v, p, sizeof v);
  v = __builtin_shufflevector(v, v, (I / 2 + I % 2 * N / 2)...);
  __builtin_memcpy(p, &v, sizeof v);
}

// Rows of A, k0 <= k < k1, as the elements that `each_code` gives meet them.
template <class T, class U, class Driver>
static void pack_quantized(const Driver& driver, const Task& t, int64_t m0, int64_t rows, int64_t k0, int64_t k1,
                           sum<T>* a) {
  driver.pack_a(t, m0, rows, k0, k1 - k0, a);
  if constexpr (looked_up<T, U>) {
    constexpr int N = 32 / Parts<U>::bits;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t e = 0; e < (k1 - k0) / 2; e += N / 2) interleave<N>((uint16_t*)(a + r * AS + e), iota_of<N>{});
  }
}

// f(e, x): the elements k0 <= k < k1 of V registers of columns n on, in order; e counts from `e`. All k lie in one group.
template <class T, class U, int V, class F>
PLAIT_FN void each_code(const Parts<U>& w, int64_t k0, int64_t k1, int64_t n, int64_t e, F f) {
  using P = Planes<Parts<U>::bits>;
  constexpr int L = lanes<float>, D = depth<T>;
  const int32_t* from[V];
  reg<float> zero[P::places][V];
  reg<int32_t> pair[V];  // of zero points as integers
  for (int v = 0; v < V; v++) {
    from[v] = w.words(k0, n + v * L);
    const reg<float> own = w.zero(k0 / w.group, n + v * L);
    pair[v] = __builtin_convertvector(own, reg<int32_t>) * 0x10001;
#pragma GCC unroll 8
    for (int p = 0; p < P::places; p++) zero[p][v] = own + P::base_value(P::place(p));
  }
  for (int64_t k = k0; k < k1; k += BLOCK) {
#pragma GCC unroll 1
    for (int s = 0; s < BLOCK / P::step; s++, e += P::step / D) {
      reg<int32_t> word[V][P::words];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) P::load(from[v], s, word[v]);
#pragma GCC unroll 32
      for (int i = 0; i < P::step; i += D) {
        reg<float> x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          if constexpr (looked_up<T, U>) {
            x[v] = code_pair<Parts<U>::bits>(word[v][0], i / 2, pair[v]);
          } else {
            x[v] = P::code(word[v], i) - zero[i % P::places][v];
            if constexpr (D == 2) {
              const reg<float> odd = P::code(word[v], i + 1) - zero[(i + 1) % P::places][v];
              const auto even = reg<int32_t>(reg<uint32_t>(x[v]) >> 16);
              x[v] = reg<float>(with_bits(even, reg<int32_t>(odd), int32_t(0xffff0000)));
            }
          }
        }
        f(e + i / D, x);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) from[v] += Parts<U>::bits * NR;
  }
}

// A panel's elements k0 <= k < k1 -> panel[element][NR]. k0 and k1 are ends of pieces.
template <class T, class U>
[[gnu::noinline]] static void widen_codes(const Parts<U>& w, int64_t k0, int64_t k1, int64_t n, float* panel) {
  constexpr int L = lanes<float>;
  for (int64_t k = k0, end; k < k1; k = end) {
    end = least(k1, w.end_of_piece(k, KS<T>));
    for (int h = 0; h < NR; h += NV * L)
      each_code<T, U, NV>(w, k, end, n + h, (k - k0) / depth<T>, [&](int64_t e, const reg<float>* x) PLAIT_BODY {
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) put(panel + e * NR + h + v * L, x[v]);
      });
  }
}

// c[r][0:V * lanes] = (add ? c : 0) + the sum over k0 <= k < k1, for R rows of a (AS apart, from k0 on) and of c (`step`
// apart), and columns n on. k0 and k1 are ends of pieces. Wide: `panel` has the elements of these columns, else codes are read.
template <class T, class U, int R, int V, bool Wide = false>
[[gnu::noinline]] static void micro_quantized(const Parts<U>& w, int64_t k0, int64_t k1, int64_t n, const float* panel,
                                              const sum<T>* a, float* c, int64_t step, bool add) {
  constexpr int L = lanes<float>, D = depth<T>;
  if (add)
    for (int r = 0; r < R; r++)
      for (int j = 0; j < V * L; j += 16) __builtin_prefetch(c + r * step + j, 1);
  for (int64_t k = k0, end; k < k1; k = end, add = true) {
    end = least(k1, w.end_of_piece(k, KS<T>));
    reg<float> acc[R][V] = {};
    const auto one = [&](int64_t e, const reg<float>* x) PLAIT_BODY {
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const reg<T> av = all<T>(a + r * AS + e);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[r][v] = dot<T>(av, x[v], acc[r][v]);
      }
    };
    if constexpr (Wide) {
      for (int64_t e = (k - k0) / D; e < (end - k0) / D; e++) {
        reg<float> x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) x[v] = get(panel + e * NR + v * L);
        one(e, x);
      }
    } else {
      each_code<T, U, V>(w, k, end, n, (k - k0) / D, one);
    }
    for (int v = 0; v < V; v++) {
      const reg<float> scale = w.scale(k / w.group, n + v * L);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        float* const p = c + r * step + v * L;
        put(p, muladd(scale, acc[r][v], add ? get(p) : reg<float>{}));
      }
    }
  }
}

// The same for up to MR rows of c, NR apart, and NR columns; may compute and write more rows: to the next of 4, 6, 8, 12.
template <class T, class U, bool Wide>
static void tile_quantized(int64_t rows, const Parts<U>& w, int64_t k0, int64_t k1, int64_t n, const float* panel,
                           const sum<T>* a, float* c, bool add) {
  const auto tile = [&](auto count, int h) {
    micro_quantized<T, U, count.value, NV, Wide>(w, k0, k1, n + h, panel + h, a, c + h, NR, add);
  };
#pragma GCC unroll 1
  for (int h = 0; h < NR; h += NV * lanes<float>) {
    if (MR > 8 && rows > 8) tile(Count<MR>{}, h);
    else if (rows > 4) tile(Count<MR < 8 ? MR : 8>{}, h);
    else tile(Count<4>{}, h);
  }
}

// Whether tiles of more than two rows read codes: long steps would be too much code.
template <class U> constexpr bool fused = Planes<Parts<U>::bits>::step <= 16;
constexpr int64_t WIDE = 24;  // rows above which codes are widened into memory once rather than in the registers of each tile
constexpr int64_t RUNS = 2 * THIN_BLOCKS;  // of packed A at most, each longer than half a block or a piece of a group

// At most MR rows: all of k for a few columns, then the next columns. R: 1, 2, or more for what tile_quantized has.
template <class T, class U, int R, class Driver>
static void thin_quantized(const Driver& driver, const Parts<U>& w, const Task& t, sum<T>* a) {
  const int64_t rows = t.m1 - t.m0;
  int64_t runs = 0;
  for (int64_t k = 0, end; k < w.K; k = end, runs++) {
    end = w.end_of_run(k, KS<T>);
    pack_quantized<T, U>(driver, t, t.m0, rows, k, end, a + runs * THIN_BLOCK);
  }
  float* const panel = a + runs * THIN_BLOCK;
  constexpr bool twice = R == 1 && Planes<Parts<U>::bits>::step <= 8;  // so that enough sums are under way
  constexpr int WIDTH = twice ? 2 * NR : NR;
  alignas(64) float tile[MR * NR];
  for (int64_t n = t.n0, cols; n < t.n1; n += cols) {
    cols = least(t.n1 - n > NR ? WIDTH : NR, t.n1 - n);
    const sum<T>* from = a;
    for (int64_t k = 0; k < w.K; from += THIN_BLOCK) {
      const int64_t end = w.end_of_run(k, KS<T>);
      if constexpr (R > 2) {
        if (!fused<U>) widen_codes<T>(w, k, end, n, panel);
        tile_quantized<T, U, !fused<U>>(rows, w, k, end, n, panel, from, tile, k > 0);
      } else {
        constexpr int V = twice ? 2 * NV : NV;
        int64_t h = 0;
        for (; h + V * lanes<float> <= ceildiv(cols, NR) * NR; h += V * lanes<float>)
          micro_quantized<T, U, R, V>(w, k, end, n + h, nullptr, from, tile + h, WIDTH, k > 0);
        if constexpr (V * lanes<float> > NR) {
          if (h < cols) micro_quantized<T, U, R, NV>(w, k, end, n + h, nullptr, from, tile + h, WIDTH, k > 0);
        }
      }
      k = end;
    }
    driver.finish(t, t.m0, rows, n, cols, tile, WIDTH);
  }
}

// Rows m0:m1 (at most MC) by columns n0:n1 (at most NC).
template <class T, class U, class Driver>
static void block_quantized(const Driver& driver, const Parts<U>& w, const Task& t, int64_t m0, int64_t m1, int64_t n0,
                            int64_t n1, sum<T>* a) {
  const int64_t rows = ceildiv(m1 - m0, PR) * PR;
  float* const panel = a + rows * AS;
  float* const sums = panel + KB * NR;
  alignas(64) float tile[MR * NR];
  const bool wide = !fused<U> || m1 - m0 > WIDE;
  const bool one = w.end_of_run(0, KS<T>) == w.K;
  for (int64_t k = 0, end; k < w.K; k = end) {
    end = w.end_of_run(k, KS<T>);
    for (int64_t m = m0; m < m1; m += tile_rows(m1 - m))
      pack_quantized<T, U>(driver, t, m, tile_rows(m1 - m), k, end, a + ceildiv(m - m0, MR) * MR * AS);
    for (int64_t n = n0; n < n1; n += NR) {
      if (wide) widen_codes<T>(w, k, end, n, panel);
      for (int64_t m = m0; m < m1; m += tile_rows(m1 - m)) {
        const int64_t many = tile_rows(m1 - m), first = ceildiv(m - m0, MR) * MR;
        float* const c = one ? tile : sums + (n - n0) * rows + first * NR;
        if (wide) tile_quantized<T, U, true>(many, w, k, end, n, panel, a + first * AS, c, k > 0);
        else tile_quantized<T, U, !fused<U>>(many, w, k, end, n, panel, a + first * AS, c, k > 0);
        if (end == w.K) driver.finish(t, m, many, n, least(NR, n1 - n), c, NR);
      }
    }
  }
}

template <class T, class U, class Driver>
static void run_quantized(const Driver& driver, const Parts<U>& w, const Task& t, sum<T>* scratch) {
  const int64_t many = t.m1 - t.m0;
  if (many <= MR && 2 * w.K <= RUNS * KS<T>) {
    if (many > 2) return thin_quantized<T, U, MR>(driver, w, t, scratch);
    return many > 1 ? thin_quantized<T, U, 2>(driver, w, t, scratch) : thin_quantized<T, U, 1>(driver, w, t, scratch);
  }
  const int64_t rows = ceildiv(ceildiv(many, ceildiv(many, MC)), PR) * PR;
  for (int64_t n = t.n0; n < t.n1; n += NC)
    for (int64_t m = t.m0; m < t.m1; m += rows)
      block_quantized<T>(driver, w, t, m, least(t.m1, m + rows), n, least(t.n1, n + NC), scratch);
}

}  // namespace matmul
}  // namespace plait
