// segment_sum
#include "vmath.h"
using namespace plait;

extern "C" void segment_sum(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  const int64_t* const offsets = static_cast<const int64_t*>(bufs[1]);
  float* const out = static_cast<float*>(bufs[2]);
  float* const ones = static_cast<float*>(bufs[3]);
  const int64_t M = sizes[0];
  const int64_t D = sizes[1];
  const float unit = 1.0f;
  parallel(M, M * 69, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = offsets[i];
      const int64_t last = offsets[i + 1];
      const int64_t count = -first + last;
      float n = 0.0f;
      vec<float> n_lanes[4];
      fill(n_lanes, 0.0f);
      tiles<4>(0, count, [&](int64_t r, auto lanes, auto part) PLAIT_BODY {
        accumulate<Sum>(n_lanes[part], vec<float>(unit), lanes);
      });
      accumulate<Sum>(n, reduce<Sum>(n_lanes));
      ones[i] = n;
    }
  });
  const int64_t j_count = tile_count(D);
  parallel(M * j_count, D * M * 4, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t at = begin; at < end;) {
      const int64_t j_first = at % j_count;
      const int64_t j_end = min_of(j_first + (end - at), j_count);
      const int64_t k = at / j_count;
      at += j_end - j_first;
      tiles<1, 4>(j_first * W, min_of(j_end * W, D), [&](int64_t j, auto lanes, auto) PLAIT_BODY {
        constexpr int WIDE = lanes.width;
        const int64_t from = offsets[k];
        const int64_t to = offsets[k + 1];
        vec<float, WIDE> total = 0.0f;
        for (int64_t s = 0; s < -from + to; s++) {
          const vec<float, WIDE> a = load(x + (from + s) * D + j, lanes);
          accumulate<Sum>(total, a);
        }
        store(out + D * k + j, total, lanes);
      });
    }
  });
}
