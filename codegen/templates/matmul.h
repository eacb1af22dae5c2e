// Matrix multiplication C[m, n] = sum over k of A[m, k] * B[k, n], in two levels: a register tile (matmul_tile.h,
// matmul_thin.h) under a blocked driver. `codegen/templates/matmul.py` writes the `Call` that fills in operands, prologue
// and epilogue. The k-sum of one output has one order, see matmul_tile.h.
#pragma once
#include <omp.h>

#include "matmul_call.h"
#include "matmul_quant.h"
#include "matmul_window.h"

namespace plait::matmul {

constexpr double GRAIN = 1 << 17;  // multiply-adds below which a second thread costs more than it saves

enum class Kind { plain, prologue };  // how A is packed: as it is, or by the call's prologue

// B, `count` times, -> panels of words [count][ceil(N / NR)][ceil(K / per)][NR]: once for a weight that the caller owns.
template <class T, class U, B layout>
static void pack(const U* src, U* dst, int64_t N, int64_t K, int64_t ldb, int64_t count, int64_t step, int nt) {
  const int64_t panels = ceildiv(N, NR), total = count * panels, size = ceildiv(K, per<T, U>) * per<T, U> * NR;
  const auto one = [=](int64_t i) {
    const Rows<U> b{src + i / panels * step, ldb, nullptr};
    const int64_t n0 = i % panels * NR, cols = least(NR, N - n0);
    U* const panel = dst + i * size;
    if constexpr (!same<T, U>) pack_words<T, U, layout>(b, K, n0, cols, panel);
    else if constexpr (layout == B::k) pack_b_k<T>(b, 0, K, n0, cols, panel);
    else pack_b_n<T>(b, 0, K, n0, cols, panel);
  };
  if (nt <= 1 || double(total) * double(K) * NR < GRAIN) {
    for (int64_t i = 0; i < total; i++) one(i);
  } else {
#pragma omp parallel for num_threads(nt)
    for (int64_t i = 0; i < total; i++) one(i);
  }
}

// ---- driver ----------------------------------------------------------------------------------------------------------

// Elements of scratch that one thread needs; `workspace_elements` in matmul.py says no less.
template <class T> int64_t slot_elements(const Dims& d, bool in_place, bool in_runs) {
  const int64_t thin = in_runs ? least(ceildiv(2 * d.K, KS<T>), RUNS) : least(ceildiv(d.K, KS<T>), THIN_BLOCKS);
  const int64_t rows = ceildiv(least(d.M, MC), PR) * PR;
  const int64_t sums = d.K > KS<T> ? rows * ceildiv(least(d.N, NC), NR) * NR : 0;
  return most(rows * AS, thin * THIN_BLOCK) + (in_place ? 0 : KB * NR) + sums;
}

// Elements T, A in memory as UA, B as U.
template <class T, class UA, class U, A a_layout, B b_layout, Kind kind> struct Driver {
  const Call& call;
  const Dims& d = call.d;

  static constexpr int a_row = a_layout == A::m ? 1 : int(AS), a_step = a_layout == A::m ? MR : 1;
  static constexpr bool packed = b_layout == B::packed, in_place = packed && steps<T, U> == 1;
  static constexpr bool windows = b_layout == B::window, quantized = b_layout == B::quantized;

  void finish(const Task& t, int64_t m, int64_t rows, int64_t n, int64_t cols, const sum<T>* tile, int64_t step) const {
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

  void pack_a(const Task& t, int64_t m0, int64_t rows, int64_t k0, int64_t kc, sum<T>* dst) const {
    if constexpr (kind == Kind::prologue) {
      call.prologue(call.bufs, call.sizes, t, m0, rows, k0, kc, dst);
    } else if constexpr (a_layout == A::window) {
      pack_a_window((const sum<T>*)call.a, d.window, m0, rows, k0, kc, dst);
    } else {
      const UA* base = (const UA*)call.a + t.b0 * d.a_step[0] + t.b1 * d.a_step[1];
      const Rows<UA> a{base, d.lda, call.a_ids};
      if constexpr (a_layout == A::k) pack_a_k<T>(a, m0, rows, k0, kc, dst);
      else pack_a_m<T>(a, m0, rows, k0, kc, dst);
    }
  }

  Rows<U> rows_of_b(const Task& t) const {
    const U* base = (const U*)call.b + t.b0 * d.b_step[0] + t.b1 * d.b_step[1];
    if (call.group == Group::m) base += (call.group_ids ? call.group_ids[t.group] : t.group) * d.group_step;
    return {base, d.ldb, call.b_ids};
  }

  // The words of a packed B from column n0 and step k0 on.
  const sum<T>* words(const Task& t, int64_t k0, int64_t n0) const {
    constexpr int P = per<T, U>;
    return (const sum<T>*)rows_of_b(t).base + n0 * ceildiv(d.K, P) + k0 / P * NR;
  }

  const sum<T>* panel(const Task& t, int64_t k0, int64_t kc, int64_t n0, sum<T>* scratch) const {
    if constexpr (in_place) {
      return words(t, k0, n0);
    } else if constexpr (packed) {
      widen_panel<T, U>(words(t, k0, n0), kc, scratch);
      return scratch;
    } else {
      const Rows<U> b = rows_of_b(t);
      const int64_t cols = least(NR, d.N - n0);
      if constexpr (b_layout == B::k) pack_b_k<T>(b, k0, kc, n0, cols, scratch);
      else if constexpr (b_layout == B::window) pack_b_window((const sum<T>*)call.b, d.window, k0, kc, n0, cols, scratch);
      else pack_b_n<T>(b, k0, kc, n0, cols, scratch);
      return scratch;
    }
  }

  // Rows m0:m1 (at most MC) by columns n0:n1 (at most NC).
  void block(const Task& t, int64_t m0, int64_t m1, int64_t n0, int64_t n1, sum<T>* scratch) const {
    const int64_t rows = ceildiv(m1 - m0, PR) * PR;
    constexpr int64_t SLICE = windows ? NV * lanes<T> : NR;  // of a panel's columns
    sum<T>* const a = scratch;
    sum<T>* const b = a + rows * AS;
    sum<T>* const sums = b + (in_place ? 0 : KB * NR);
    alignas(64) sum<T> tile[MR * NR], over[NR];
    const bool one = t.k1 - t.k0 <= KS<T>;  // block of k: the sums of a tile never leave L1
    const bool direct = windows && is_direct<sum<T>>(d.window);
    int64_t from[windows ? KB : 1];
    int64_t k0 = t.k0;
    do {  // also where K is 0
      const int64_t kc = least(KS<T>, t.k1 - k0);
      if (direct) offsets(d.window, k0, kc, from);
      for (int64_t m = m0; m < m1; m += tile_rows(m1 - m))
        pack_a(t, m, tile_rows(m1 - m), k0, kc, a + ceildiv(m - m0, MR) * MR * AS);
      for (int64_t n = n0; n < n1; n += NR) {
        const sum<T>* bp = direct ? nullptr : panel(t, k0, kc, n, b);
        const int64_t cols = least(NR, n1 - n);
        if constexpr (moved<T> != 0) sum_up<T, NR>(elements<T>(kc), bp, NR, over);
        for (int64_t h = 0; h < cols; h += SLICE) {
          const sum<T>* at[NV];
          if (direct) corners((const sum<T>*)call.b, d.window, n + h, n1, at);
          for (int64_t m = m0; m < m1; m += tile_rows(m1 - m)) {
            const int64_t mr = tile_rows(m1 - m), first = ceildiv(m - m0, MR) * MR;
            sum<T>* c = (one ? tile : sums + (n - n0) * rows + first * NR) + h;
            const sum<T>* ap = a + first * AS;
            if (direct) micro_window_rows<sum<T>, AS>(mr, kc, ap, at, from, c, k0 > t.k0);
            else micro_rows<T, a_row, a_step, SLICE>(mr, elements<T>(kc), ap, bp + h, NR, c, k0 > t.k0, over + h);
            if (k0 + KS<T> >= t.k1) finish(t, m, mr, n + h, least(SLICE, cols - h), c, NR);
          }
        }
      }
      k0 += KS<T>;
    } while (k0 < t.k1);
  }

  // At most THIN rows: all of k for a few columns, then the next columns.
  template <int R> void thin(const Task& t, sum<T>* scratch) const {
    static_assert(R <= MR);
    const int64_t rows = t.m1 - t.m0, K = t.k1 - t.k0;
    sum<T>* const a = scratch;
    sum<T>* const b = a + most(1, ceildiv(K, KS<T>)) * THIN_BLOCK;
    for (int64_t k = 0; k < K; k += KS<T>)
      pack_a(t, t.m0, rows, t.k0 + k, least(KS<T>, K - k), a + k / KS<T> * THIN_BLOCK);
    if constexpr (b_layout == B::n) {
      const Rows<U> from = rows_of_b(t);
      for (int64_t n = t.n0; n < t.n1; n += STRIP) {
        thin_n<T, U, R, a_row, a_step>(K, a, from, t.k0, n, least(STRIP, t.n1 - n), b);
        finish(t, t.m0, rows, n, least(STRIP, t.n1 - n), b, STRIP);
      }
      return;
    }
    alignas(64) sum<T> tile[MR * NR];
    for (int64_t n = t.n0; n < t.n1; n += NR) {
      if constexpr (b_layout == B::k) {
        const Rows<U> from = rows_of_b(t);
        const U* src[NR];
        for (int j = 0; j < NR; j++) src[j] = from[least(n + j, t.n1 - 1)] + t.k0;
        for (int h = 0; h < NR; h += lanes<T>) thin_k<T, U, R, a_row, a_step>(K, a, src + h, tile + h);
      } else {
        int64_t k = 0;
        do {
          const int64_t kc = least(KS<T>, K - k);
          const sum<T>* at = a + k / KS<T> * THIN_BLOCK;
          const sum<T>* const from = windows ? panel(t, t.k0 + k, kc, n, b) : words(t, t.k0 + k, n);
          micro<T, U, R, a_row, a_step, NR, true>(elements<T>(kc), at, from, NR, tile, k > 0, nullptr);
          k += KS<T>;
        } while (k < K);
      }
      finish(t, t.m0, rows, n, least(NR, t.n1 - n), tile, NR);
    }
  }

  void run(const Task& t, sum<T>* scratch) const {
    if (t.m1 <= t.m0) return;
    if constexpr (quantized) {
      using S = typename Parts<U>::Scale;
      const Parts<U> w{(const int32_t*)call.b, (const S*)call.scales, (const uint8_t*)call.zeros, d.K, d.scale_group};
      run_quantized<T>(*this, w, t, scratch);
    } else {
      run_unpacked(t, scratch);
    }
  }

  void run_unpacked(const Task& t, sum<T>* scratch) const {
    const int64_t many = t.m1 - t.m0;
    if (many <= THIN && t.k1 - t.k0 <= THIN_BLOCKS * KS<T>) {
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
        const double repack = in_place ? 0.0 : 0.4 * c * double(ceildiv(int64_t(r), MC));
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
    Cut c = cut(count, by_m ? ceildiv(d.M, count) : d.M, nt);
    // groups may differ much in size: smaller tasks, taken as threads become free
    if (nt > 1 && (by_m || by_k)) c.n = most(c.n, least(ceildiv(d.N, NR), ceildiv(4 * nt, count * c.m)));
    const int64_t tasks = count * c.m * c.n, step = slot_elements<T>(d, in_place, quantized);
    sum<T>* const scratch = (sum<T>*)call.workspace;
    if (nt <= 1) {
      for (int64_t i = 0; i < tasks; i++) run(task(i, c), scratch);
      return;
    }
#pragma omp parallel num_threads(nt)
    {
      const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
      if (by_m || by_k) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) run(task(i, c), scratch + id * step);
      } else {
        for (int64_t i = tasks * id / team; i < tasks * (id + 1) / team; i++) run(task(i, c), scratch + id * step);
      }
    }
  }
};

// Sums in T. A prologue makes numbers of T.
template <class T, class UA, class U, A a, B b, Kind kind> static void run(const Call& call, int nthreads) {
  if constexpr (kind == Kind::prologue) Driver<T, UA, U, a, b, kind>{call}(nthreads);
  else Driver<typename element_of<T, UA, U>::type, UA, U, a, b, kind>{call}(nthreads);
}

}  // namespace plait::matmul
