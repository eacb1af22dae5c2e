// kept_row
#include "vmath.h"
using namespace plait;

extern "C" void kept_row(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  const int64_t M = sizes[0];
  parallel(M, M * 492, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t i = begin; i < end; i++) {
      alignas(64) float row[70];
      float s = 0.0f;
      vec<float> s_lanes[4];
      fill(s_lanes, 0.0f);
      tiles<4>(0, 70, [&](int64_t r, auto lanes, auto part) PLAIT_BODY {
        const vec<float> a = load(x + i * 70 + r, lanes);
        const vec<float> b = a * a;
        store(row + r, b, lanes);
        accumulate<Sum>(s_lanes[part], b, lanes);
      });
      accumulate<Sum>(s, reduce<Sum>(s_lanes));
      tiles<1>(0, 70, [&](int64_t j, auto lanes, auto) PLAIT_BODY {
        const vec<float> c = load(row + j, lanes);
        const vec<float> q = c / s;
        stream(out + i * 70 + j, q, lanes);
      });
    }
    streams_done();
  });
}
