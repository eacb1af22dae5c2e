// static_gelu
#include "vmath.h"
using namespace plait;

extern "C" void static_gelu(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  const float half = 0.5f;
  const float one = 1.0f;
  const float root = 0.70710677f;
  const int64_t j_count = 3;
  const int64_t k_count = tile_count(17);
  parallel(4 * j_count * k_count, 4488, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t at = begin; at < end;) {
      const int64_t k_first = at % k_count;
      const int64_t k_end = min_of(k_first + (end - at), k_count);
      const int64_t j = at / k_count % j_count;
      const int64_t i = at / (j_count * k_count);
      at += k_end - k_first;
      tiles<1>(k_first * W, min_of(k_end * W, 17), [&](int64_t k, auto lanes, auto) PLAIT_BODY {
        const vec<float> a = load(x + i * 51 + j * 17 + k, lanes);
        const vec<float> u = a * root;
        const vec<float> e = erf(u);
        const vec<float> w = e + one;
        const vec<float> h = a * half;
        const vec<float> g = h * w;
        store(out + i * 51 + j * 17 + k, g, lanes);
      });
    }
  });
}
