// tiled
#include "vmath.h"
using namespace plait;

extern "C" void tiled(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  const int64_t l_count = ((N + 31) / 32);
  parallel(((M + 15) / 16) * l_count, ((min_of(max_of(-((N + 31) / 32) * 32 + N, N), 32) * 3) * min_of(max_of(-((M + 15) / 16) * 16 + M, M), 16) + 1) * ((M + 15) / 16) * ((N + 31) / 32), nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t at = begin; at < end;) {
      const int64_t l_first = at % l_count;
      const int64_t l_end = min_of(l_first + (end - at), l_count);
      const int64_t k = at / l_count;
      at += l_end - l_first;
      for (int64_t l_ = l_first; l_ < l_end; l_++) {
        alignas(64) float t[16 * 32];
        transpose<32>(t, x + k * 16 + M * l_ * 32, M, min_of(-k * 16 + M, 16), min_of(-l_ * 32 + N, 32));
        for (int64_t i = 0; i < min_of(-k * 16 + M, 16); i++) {
          tiles<1>(0, min_of(-l_ * 32 + N, 32), [&](int64_t j, auto lanes, auto) PLAIT_BODY {
            const vec<float> a = load(t + i * 32 + j, lanes);
            const vec<float> b = a + a;
            store(out + l_ * 32 + (k * 16 + i) * N + j, b, lanes);
          });
        }
      }
    }
  });
}
