// total
#include "vmath.h"
using namespace plait;

extern "C" void total(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  float* const scaled = static_cast<float*>(bufs[2]);
  const int64_t N = sizes[0];
  float s = 0.0f;
  vec<float> s_lanes[4];
  fill(s_lanes, 0.0f);
  tiles<4>(0, N, [&](int64_t r, auto lanes, auto part) PLAIT_BODY {
    const vec<float> a = load(x + r, lanes);
    accumulate<Sum>(s_lanes[part], a, lanes);
  });
  accumulate<Sum>(s, reduce<Sum>(s_lanes));
  out[0] = s;
  const float two = 2.0f;
  parallel(tile_count(N), N * 3, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    tiles<1>(begin * W, min_of(end * W, N), [&](int64_t i, auto lanes, auto) PLAIT_BODY {
      const vec<float> b = load(x + i, lanes);
      const vec<float> c = b * two;
      store(scaled + i, c, lanes);
    });
  });
}
