// layer_norm
#include "vmath.h"
using namespace plait;

extern "C" void layer_norm(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  const float* const weight = static_cast<const float*>(bufs[1]);
  const float* const bias = static_cast<const float*>(bufs[2]);
  float* const out = static_cast<float*>(bufs[3]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  const float epsilon = 1e-05f;
  const int64_t count = N;
  const float n = cast<float>(count);
  parallel(M, (N * 13 + 6) * M, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t i = begin; i < end; i++) {
      float total = 0.0f;
      vec<float> total_lanes[4];
      fill(total_lanes, 0.0f);
      tiles<4>(0, N, [&](int64_t r, auto lanes, auto part) PLAIT_BODY {
        const vec<float> a = load(x + N * i + r, lanes);
        accumulate<Sum>(total_lanes[part], a, lanes);
      });
      accumulate<Sum>(total, reduce<Sum>(total_lanes));
      const float mean = total / n;
      float squares = 0.0f;
      vec<float> squares_lanes[4];
      fill(squares_lanes, 0.0f);
      tiles<4>(0, N, [&](int64_t s, auto lanes, auto part) PLAIT_BODY {
        const vec<float> b = load(x + N * i + s, lanes);
        const vec<float> d = b - mean;
        const vec<float> d2 = d * d;
        accumulate<Sum>(squares_lanes[part], d2, lanes);
      });
      accumulate<Sum>(squares, reduce<Sum>(squares_lanes));
      const float variance = squares / n;
      const float safe = variance + epsilon;
      const float inv = rsqrt<float>(safe);
      tiles<1>(0, N, [&](int64_t t, auto lanes, auto) PLAIT_BODY {
        const vec<float> c = load(x + N * i + t, lanes);
        const vec<float> e = c - mean;
        const vec<float> f = e * inv;
        const vec<float> w = load(weight + t, lanes);
        const vec<float> o = load(bias + t, lanes);
        const vec<float> g = fma(f, w, o);
        store(out + N * i + t, g, lanes);
      });
    }
  });
}
