// What this machine can do at most: fused multiply-adds, reading, writing, and opening a parallel region. Each function has
// the interface of a kernel; a call of it does a known amount of work that the caller divides by its time.
#include <omp.h>

#include "matmul_tile.h"

namespace {

using plait::matmul::get, plait::matmul::muladd, plait::matmul::put;
using V = plait::matmul::reg<float>;
constexpr int64_t LANES = plait::matmul::lanes<float>;
constexpr int CHAINS = 10;  // independent ones: two units times a latency of four or five cycles

// This thread's part of `registers`, in whole rounds of CHAINS.
struct Part {
  int64_t begin, end;
  explicit Part(int64_t registers) {
    const int64_t rounds = registers / CHAINS, id = omp_get_thread_num(), team = omp_get_num_threads();
    begin = rounds * id / team * CHAINS;
    end = rounds * (id + 1) / team * CHAINS;
  }
};

}  // namespace

// 2 * CHAINS * sizes[0] operations on each thread; bufs[0] takes a register of each.
extern "C" void ceiling_fma(void* const* bufs, const int64_t* sizes, int nthreads) {
#pragma omp parallel num_threads(nthreads) if (nthreads > 1)
  {
    V a[CHAINS], scale = V{} + 0.5f, shift = V{} + 1.0f;
    for (int i = 0; i < CHAINS; i++) a[i] = V{} + float(i);
    for (int64_t r = 0; r < sizes[0]; r += LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < CHAINS; i++) a[i] = muladd(a[i], scale, shift);
    }
    V sum{};
    for (int i = 0; i < CHAINS; i++) sum += a[i];
    put(static_cast<float*>(bufs[0]) + omp_get_thread_num() * LANES, sum);
  }
}

// Reads sizes[1] floats sizes[2] times; bufs[0] takes a register of each thread.
extern "C" void ceiling_read(void* const* bufs, const int64_t* sizes, int nthreads) {
#pragma omp parallel num_threads(nthreads) if (nthreads > 1)
  {
    const auto* data = static_cast<const float*>(bufs[1]);
    const Part part(sizes[1] / LANES);
    V a[CHAINS]{};
    for (int64_t r = 0; r < sizes[2]; r++) {
      for (int64_t at = part.begin; at < part.end; at += CHAINS) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) a[i] += get(data + (at + i) * LANES);
      }
      asm volatile("" ::: "memory");  // the next pass reads again
    }
    V sum{};
    for (int i = 0; i < CHAINS; i++) sum += a[i];
    put(static_cast<float*>(bufs[0]) + omp_get_thread_num() * LANES, sum);
  }
}

// Writes sizes[1] floats sizes[2] times; where sizes[3] is set without fetching the lines first, as kernels do past the caches.
extern "C" void ceiling_write(void* const* bufs, const int64_t* sizes, int nthreads) {
#pragma omp parallel num_threads(nthreads) if (nthreads > 1)
  {
    auto* data = static_cast<float*>(bufs[1]);
    const Part part(sizes[1] / LANES);
    for (int64_t r = 0; r < sizes[2]; r++) {
      const V value = V{} + float(r);
      for (int64_t at = part.begin; at < part.end; at += CHAINS) {
        if (sizes[3]) {
#pragma GCC unroll 16
          for (int i = 0; i < CHAINS; i++) plait::stream_lanes(data + (at + i) * LANES, plait::vec<float, LANES>(value));
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < CHAINS; i++) put(data + (at + i) * LANES, value);
        }
      }
      asm volatile("" ::: "memory");  // every pass writes
    }
  }
}

// Opens and closes a parallel region.
extern "C" void ceiling_region(void* const* bufs, const int64_t*, int nthreads) {
#pragma omp parallel num_threads(nthreads) if (nthreads > 1)
  static_cast<float*>(bufs[0])[omp_get_thread_num() * LANES] = 1.0f;
}
