// scan
#include "vmath.h"
using namespace plait;

extern "C" void scan(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  const int64_t zero = 0;
  parallel(tile_count(N), M * N * 6, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    tiles<1, 4>(begin * W, min_of(end * W, N), [&](int64_t j, auto lanes, auto) PLAIT_BODY {
      constexpr int WIDE = lanes.width;
      for (int64_t i = 0; i < M; i++) {
        const int64_t row = i;
        const bool later = row > zero;
        const vec<float, WIDE> before = load_if(vec<bool, WIDE>(later), out + (i - 1) * N + j, lanes, 0.0f);
        const vec<float, WIDE> a = load(x + N * i + j, lanes);
        const vec<float, WIDE> b = a + before;
        store(out + N * i + j, b, lanes);
      }
    });
  });
}
