// softmax
//   %y = softmax(%x, dim=-1)
#include "vmath.h"
using namespace plait;

extern "C" void softmax(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  parallel(M, (N * 41 + 2) * M, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t i = begin; i < end; i++) {
      float top = lowest<float>();
      vec<float> top_lanes[4];
      fill(top_lanes, lowest<float>());
      tiles<4>(0, N, [&](int64_t r, auto lanes, auto part) PLAIT_BODY {
        const vec<float> a = load(x + N * i + r, lanes);
        accumulate<Max>(top_lanes[part], a, lanes);
      });
      accumulate<Max>(top, reduce<Max>(top_lanes));
      float total = 0.0f;
      vec<float> total_lanes[4];
      fill(total_lanes, 0.0f);
      tiles_in_turn(0, N, [&](int64_t s, auto lanes, auto part) PLAIT_BODY {
        const vec<float> b = load(x + N * i + s, lanes);
        const vec<float> d = b - top;
        const vec<float> e = exp(d);
        accumulate<Sum>(total_lanes[part], e, lanes);
      });
      accumulate<Sum>(total, reduce<Sum>(total_lanes));
      tiles<1>(0, N, [&](int64_t t, auto lanes, auto) PLAIT_BODY {
        const vec<float> c = load(x + N * i + t, lanes);
        const vec<float> g = c - top;
        const vec<float> h = exp(g);
        const vec<float> p = h / total;
        store(out + N * i + t, p, lanes);
      });
    }
  });
}
