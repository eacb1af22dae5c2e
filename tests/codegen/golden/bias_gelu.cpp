// bias_gelu
//   %y = gelu(%x + %bias, approximate='tanh')
#include "vmath.h"
using namespace plait;

extern "C" void bias_gelu(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  const float* const bias = static_cast<const float*>(bufs[1]);
  float* const out = static_cast<float*>(bufs[2]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  const float half = 0.5f;
  const float one = 1.0f;
  const float cubic = 0.044715f;
  const float scale = 0.7978846f;
  const int64_t j_count = tile_count(N);
  parallel(M * j_count, M * N * 27, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t at = begin; at < end;) {
      const int64_t j_first = at % j_count;
      const int64_t j_end = min_of(j_first + (end - at), j_count);
      const int64_t i = at / j_count;
      at += j_end - j_first;
      tiles<1>(j_first * W, min_of(j_end * W, N), [&](int64_t j, auto lanes, auto) PLAIT_BODY {
        const vec<float> a = load(x + N * i + j, lanes);
        const vec<float> b = load(bias + j, lanes);
        const vec<float> v = a + b;
        const vec<float> v2 = v * v;
        const vec<float> p = fma(v2, vec<float>(cubic), vec<float>(one));
        const vec<float> q = v * p;
        const vec<float> u = q * scale;
        const vec<float> th = tanh(u);
        const vec<float> w = th + one;
        const vec<float> h = v * half;
        const vec<float> g = h * w;
        store(out + N * i + j, g, lanes);
      });
    }
  });
}
