// triangle
#include "vmath.h"
using namespace plait;

extern "C" void triangle(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  const int64_t N = sizes[0];
  parallel(N, ((N + 1) * 2 + 2) * N, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t i = begin; i < end; i++) {
      float top = lowest<float>();
      vec<float> top_lanes[4];
      fill(top_lanes, lowest<float>());
      tiles<4>(0, i + 1, [&](int64_t r, auto lanes, auto part) PLAIT_BODY {
        const vec<float> a = load(x + N * i + r, lanes);
        accumulate<Max>(top_lanes[part], a, lanes);
      });
      accumulate<Max>(top, reduce<Max>(top_lanes));
      out[i] = top;
    }
  });
}
