// normalise_rows
#include "vmath.h"
using namespace plait;

extern "C" void normalise_rows(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const sums = static_cast<float*>(bufs[1]);
  float* const out = static_cast<float*>(bufs[2]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  parallel(M, (N * 2 + 2) * M, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t i = begin; i < end; i++) {
      float s = 0.0f;
      vec<float> s_lanes[4];
      fill(s_lanes, 0.0f);
      tiles<4>(0, N, [&](int64_t r, auto lanes, auto part) PLAIT_BODY {
        const vec<float> a = load(x + N * i + r, lanes);
        accumulate<Sum>(s_lanes[part], a, lanes);
      });
      accumulate<Sum>(s, reduce<Sum>(s_lanes));
      sums[i] = s;
    }
  });
  const int64_t j_count = tile_count(N);
  parallel(M * j_count, M * N * 4, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t at = begin; at < end;) {
      const int64_t j_first = at % j_count;
      const int64_t j_end = min_of(j_first + (end - at), j_count);
      const int64_t k = at / j_count;
      at += j_end - j_first;
      tiles<1>(j_first * W, min_of(j_end * W, N), [&](int64_t j, auto lanes, auto) PLAIT_BODY {
        const vec<float> b = load(x + N * k + j, lanes);
        const float t = sums[k];
        const vec<float> q = b / t;
        store(out + N * k + j, q, lanes);
      });
    }
  });
}
