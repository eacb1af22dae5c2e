// unfold
#include "vmath.h"
using namespace plait;

extern "C" void unfold(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  const int64_t N = sizes[0];
  parallel(tile_count(N * 6), N * 12, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    tiles<1>(begin * W, min_of(end * W, N * 6), [&](int64_t i, auto lanes, auto) PLAIT_BODY {
      const vec<int64_t> a_at = per_lane([&](int64_t l) { return ((i + l) % 2) * N * 2 + ((i + l) / 2 % 3) * N + (i + l) / 6; });
      const vec<float> a = gather(x, a_at, lanes);
      store(out + i, a, lanes);
    });
  });
}
