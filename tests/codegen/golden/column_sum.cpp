// column_sum
#include "vmath.h"
using namespace plait;

extern "C" void column_sum(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  parallel(tile_count(N), (M * 2 + 2) * N, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    tiles<1, 4>(begin * W, min_of(end * W, N), [&](int64_t j, auto lanes, auto) PLAIT_BODY {
      constexpr int WIDE = lanes.width;
      vec<float, WIDE> total = 0.0f;
      for (int64_t i = 0; i < M; i++) {
        const vec<float, WIDE> a = load(x + N * i + j, lanes);
        accumulate<Sum>(total, a);
      }
      store(out + j, total, lanes);
    });
  });
}
