// Matrix multiplication C[m, n] = sum over k of A[m, k] * B[k, n], in two levels: a register tile (matmul_tile.h,
// matmul_thin.h) under a blocked driver. `codegen/templates/matmul.py` writes the `Call` that fills in operands, prologue
// and epilogue. The k-sum of one output has one order, see matmul_tile.h.
#pragma once
#include <omp.h>

#include "matmul_call.h"
#include "matmul_thin.h"
#include "matmul_window.h"

namespace plait::matmul {

constexpr int64_t MC = 264;        // rows of packed A that stay in L2 while panels of B pass by
constexpr int64_t NC = 2048;       // columns whose partial sums a thread keeps when K > KB
constexpr double GRAIN = 1 << 17;  // multiply-adds below which a second thread costs more than it saves

enum class Kind { plain, prologue };  // how A is packed: as it is, or by the call's prologue

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

// Elements of scratch that one thread needs; `workspace_elements` in matmul.py says the same.
inline int64_t slot_elements(const Dims& d, bool packed) {
  const int64_t rows = ceildiv(least(d.M, MC), PR) * PR, blocks = least(ceildiv(d.K, KB), THIN_BLOCKS);
  const int64_t sums = d.K > KB ? rows * ceildiv(least(d.N, NC), NR) * NR : 0;
  return most(rows * AS, blocks * THIN_BLOCK) + (packed ? 0 : KB * NR) + sums;
}

template <class T, class U, A a_layout, B b_layout, Kind kind> struct Driver {
  const Call& call;
  const Dims& d = call.d;

  static constexpr int a_row = a_layout == A::m ? 1 : int(AS), a_step = a_layout == A::m ? MR : 1;
  static constexpr bool packed = b_layout == B::packed;

  void finish(const Task& t, int64_t m, int64_t rows, int64_t n, int64_t cols, const T* tile, int64_t step) const {
    if constexpr (b_layout == B::window) {  // columns are pixels of images; the epilogue takes them image by image
      const int64_t pixels = d.window.OH * d.window.OW;
      Task part = t;
      for (int64_t j = 0, some; j < cols; j += some) {
        const int64_t p = (n + j) % pixels;
        part.b0 = (n + j) / pixels, some = least(cols - j, pixels - p);
        call.epilogue(call.bufs, call.sizes, part, m, rows, p, some, tile + j, step);
      }
    } else {
      call.epilogue(call.bufs, call.sizes, t, m, rows, n, cols, tile, step);
    }
  }

  void pack_a(const Task& t, int64_t m0, int64_t rows, int64_t k0, int64_t kc, T* dst) const {
    if constexpr (kind == Kind::prologue) {
      call.prologue(call.bufs, call.sizes, t, m0, rows, k0, kc, dst);
    } else if constexpr (a_layout == A::window) {
      pack_a_window((const T*)call.a, d.window, m0, rows, k0, kc, dst);
    } else {
      const T* base = (const T*)call.a + t.b0 * d.a_step[0] + t.b1 * d.a_step[1];
      const Rows<T> a{base, d.lda, call.a_ids};
      if constexpr (a_layout == A::k) pack_a_k(a, m0, rows, k0, kc, dst);
      else pack_a_m(a, m0, rows, k0, kc, dst);
    }
  }

  Rows<U> rows_of_b(const Task& t) const {
    const U* base = (const U*)call.b + t.b0 * d.b_step[0] + t.b1 * d.b_step[1];
    if (call.group == Group::m) base += (call.group_ids ? call.group_ids[t.group] : t.group) * d.group_step;
    return {base, d.ldb, call.b_ids};
  }

  const T* panel(const Task& t, int64_t k0, int64_t kc, int64_t n0, T* scratch) const {
    const Rows<U> b = rows_of_b(t);
    if constexpr (packed) {
      return b.base + n0 * d.K + k0 * NR;
    } else {
      const int64_t cols = least(NR, d.N - n0);
      if constexpr (b_layout == B::k) pack_b_k(b, k0, kc, n0, cols, scratch);
      else if constexpr (b_layout == B::window) pack_b_window((const T*)call.b, d.window, k0, kc, n0, cols, scratch);
      else pack_b_n(b, k0, kc, n0, cols, scratch);
      return scratch;
    }
  }

  // Rows m0:m1 (at most MC) by columns n0:n1 (at most NC).
  void block(const Task& t, int64_t m0, int64_t m1, int64_t n0, int64_t n1, T* scratch) const {
    const int64_t rows = ceildiv(m1 - m0, PR) * PR;
    constexpr int64_t SLICE = NV * lanes<T>;  // of a panel's columns; slices without any are skipped
    T* const a = scratch;
    T* const b = a + rows * AS;
    T* const sums = b + (packed ? 0 : KB * NR);
    alignas(64) T tile[MR * NR];
    const bool one = t.k1 - t.k0 <= KB;  // block of k: the sums of a tile never leave L1
    const bool direct = b_layout == B::window && is_direct<T>(d.window);
    int64_t from[KB];
    int64_t k0 = t.k0;
    do {  // also where K is 0
      const int64_t kc = least(KB, t.k1 - k0);
      if (direct) offsets(d.window, k0, kc, from);
      for (int64_t m = m0; m < m1; m += tile_rows(m1 - m))
        pack_a(t, m, tile_rows(m1 - m), k0, kc, a + ceildiv(m - m0, MR) * MR * AS);
      for (int64_t n = n0; n < n1; n += NR) {
        const T* bp = direct ? nullptr : panel(t, k0, kc, n, b);
        const int64_t cols = least(NR, n1 - n);
        for (int64_t h = 0; h < cols; h += SLICE) {
          const T* at[NV];
          if (direct) corners((const T*)call.b, d.window, n + h, n1, at);
          for (int64_t m = m0; m < m1; m += tile_rows(m1 - m)) {
            const int64_t mr = tile_rows(m1 - m), first = ceildiv(m - m0, MR) * MR;
            T* c = (one ? tile : sums + (n - n0) * rows + first * NR) + h;
            if (direct) micro_window_rows<T, AS>(mr, kc, a + first * AS, at, from, c, k0 > t.k0);
            else micro_rows<T, a_row, a_step, SLICE>(mr, kc, a + first * AS, bp + h, NR, c, k0 > t.k0);
            if (k0 + KB >= t.k1) finish(t, m, mr, n + h, least(SLICE, cols - h), c, NR);
          }
        }
      }
      k0 += KB;
    } while (k0 < t.k1);
  }

  // At most THIN rows: all of k for a few columns, then the next columns.
  template <int R> void thin(const Task& t, T* scratch) const {
    static_assert(R <= MR);
    const int64_t rows = t.m1 - t.m0, K = t.k1 - t.k0;
    T* const a = scratch;
    T* const b = a + most(1, ceildiv(K, KB)) * THIN_BLOCK;
    for (int64_t k = 0; k < K; k += KB) pack_a(t, t.m0, rows, t.k0 + k, least(KB, K - k), a + k / KB * THIN_BLOCK);
    const Rows<U> from = rows_of_b(t);
    if constexpr (b_layout == B::n && same<T, U>) {
      for (int64_t n = t.n0; n < t.n1; n += STRIP) {
        thin_n<T, R, a_row, a_step>(K, a, from, t.k0, n, least(STRIP, t.n1 - n), b);
        finish(t, t.m0, rows, n, least(STRIP, t.n1 - n), b, STRIP);
      }
      return;
    }
    alignas(64) T tile[MR * NR];
    for (int64_t n = t.n0; n < t.n1; n += NR) {
      if constexpr (b_layout == B::k && same<T, U>) {
        const T* src[NR];
        for (int j = 0; j < NR; j++) src[j] = from[least(n + j, t.n1 - 1)] + t.k0;
        for (int h = 0; h < NR; h += lanes<T>) thin_k<T, R, a_row, a_step>(K, a, src + h, tile + h);
      } else {
        int64_t k = 0;
        do {
          const int64_t kc = least(KB, K - k);
          micro<T, R, a_row, a_step>(kc, a + k / KB * THIN_BLOCK, panel(t, t.k0 + k, kc, n, b), NR, tile, k > 0);
          k += KB;
        } while (k < K);
      }
      finish(t, t.m0, rows, n, least(NR, t.n1 - n), tile, NR);
    }
  }

  void run(const Task& t, T* scratch) const {
    const int64_t many = t.m1 - t.m0;
    if (many <= 0) return;
    if (many <= THIN && t.k1 - t.k0 <= THIN_BLOCKS * KB) {
      if constexpr (THIN > 4) {
        if (many > 4) return thin<8>(t, scratch);
      }
      if (many > 2) return thin<4>(t, scratch);
      return many > 1 ? thin<2>(t, scratch) : thin<1>(t, scratch);
    }
    const int64_t rows = ceildiv(ceildiv(many, ceildiv(many, MC)), PR) * PR;
    for (int64_t n = t.n0; n < t.n1; n += NC)
      for (int64_t m = t.m0; m < t.m1; m += rows) block(t, m, least(t.m1, m + rows), n, least(t.n1, n + NC), scratch);
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
    if (call.batch == 2) t.b0 = which / d.batch[1], t.b1 = which % d.batch[1];
    if (call.group != Group::none) {
      t.group = which, t.b0 = 0;
      (call.group == Group::m ? t.m0 : t.k0) = call.offsets[which];
      (call.group == Group::m ? t.m1 : t.k1) = call.offsets[which + 1];
    }
    const int64_t share = ceildiv(ceildiv(t.m1 - t.m0, cut.m), 4) * 4;
    t.m0 += im * share;
    t.m1 = least(t.m1, t.m0 + share);
    return t;
  }

  void operator()(int nt) const {
    const bool by_m = call.group == Group::m, by_k = call.group == Group::k;
    const int64_t count = by_m || by_k ? d.groups : d.batch[0] * d.batch[1];
    if (count <= 0 || d.M <= 0 || d.N <= 0) return;
    const double work = double(d.M) * double(d.N) * double(d.K > 0 ? d.K : 1) * double(by_m || by_k ? 1 : count);
    nt = work < 2 * GRAIN ? 1 : int(least(nt, d.slots));
    const Cut c = cut(count, by_m ? ceildiv(d.M, count) : d.M, nt);
    const int64_t tasks = count * c.m * c.n, step = slot_elements(d, packed);
    T* const scratch = (T*)call.workspace;
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

template <class T, class U, A a, B b, Kind kind> static void run(const Call& call, int nthreads) {
  Driver<T, U, a, b, kind>{call}(nthreads);
}

}  // namespace plait::matmul
