// block_sum
#include "vmath.h"
using namespace plait;

extern "C" void block_sum(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  float* const out = static_cast<float*>(bufs[1]);
  int64_t* const largest = static_cast<int64_t*>(bufs[2]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  parallel(N, (M * 84 + 4) * N, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t j = begin; j < end; j++) {
      float total = 0.0f;
      int64_t most = lowest<int64_t>();
      for (int64_t i = 0; i < M; i++) {
        vec<float> total_lanes[4];
        fill(total_lanes, 0.0f);
        vec<int64_t> most_lanes[4];
        fill(most_lanes, lowest<int64_t>());
        tiles<4>(0, 21, [&](int64_t k, auto lanes, auto part) PLAIT_BODY {
          const vec<float> a = load(x + j * 21 + N * i * 21 + k, lanes);
          accumulate<Sum>(total_lanes[part], a, lanes);
          const vec<int64_t> weight = k + iota<int64_t>() + int64_t(i * 100);
          accumulate<Max>(most_lanes[part], weight, lanes);
        });
        accumulate<Sum>(total, reduce<Sum>(total_lanes));
        accumulate<Max>(most, reduce<Max>(most_lanes));
      }
      out[j] = total;
      largest[j] = most;
    }
  });
}
