// pad
#include "vmath.h"
using namespace plait;

extern "C" void pad(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  const int64_t zero = 0;
  const int64_t j_count = tile_count(N + 3);
  parallel(M * j_count, (N + 3) * M * 7, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t at = begin; at < end;) {
      const int64_t j_first = at % j_count;
      const int64_t j_end = min_of(j_first + (end - at), j_count);
      const int64_t i = at / j_count;
      at += j_end - j_first;
      tiles<1>(j_first * W, min_of(j_end * W, N + 3), [&](int64_t j, auto lanes, auto) PLAIT_BODY {
        const vec<int64_t> at_ = j + iota<int64_t>() + int64_t(-2);
        const int64_t end_ = N;
        const vec<bool> low = at_ >= zero;
        const vec<bool> high = at_ < end_;
        const vec<bool> inside = low & high;
        const vec<float> a = load_if(inside, x + N * i + j - 2, lanes, -7.5f);
        store(out + (N + 3) * i + j, a, lanes);
      });
    }
  });
}
