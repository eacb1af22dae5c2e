// transposed
#include "vmath.h"
using namespace plait;

extern "C" void transposed(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  const int64_t j_count = tile_count(N);
  parallel(M * j_count, M * N * 3, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t at = begin; at < end;) {
      const int64_t j_first = at % j_count;
      const int64_t j_end = min_of(j_first + (end - at), j_count);
      const int64_t i = at / j_count;
      at += j_end - j_first;
      tiles<1>(j_first * W, min_of(j_end * W, N), [&](int64_t j, auto lanes, auto) PLAIT_BODY {
        const vec<float> a = load_strided(x + M * j + i, M, lanes);
        const vec<float> b = a + a;
        store(out + N * i + j, b, lanes);
      });
    }
  });
}
