// argmax
#include "vmath.h"
using namespace plait;

extern "C" void argmax(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  int64_t* const top = static_cast<int64_t*>(bufs[1]);
  int64_t* const bottom = static_cast<int64_t*>(bufs[2]);
  int64_t* const column = static_cast<int64_t*>(bufs[3]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  parallel(M, (N * 4 + 4) * M, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t i = begin; i < end; i++) {
      Arg<float> best(lowest<float>());
      Arg<float> worst(highest<float>());
      Arg<vec<float>> best_lanes(lowest<float>());
      Arg<vec<float>> worst_lanes(highest<float>());
      tiles<1>(0, N, [&](int64_t r, auto lanes, auto) PLAIT_BODY {
        const vec<float> a = load(x + N * i + r, lanes);
        const vec<int64_t> at_ = r + iota<int64_t>();
        accumulate_arg<true>(best_lanes, a, at_, lanes);
        accumulate_arg<false>(worst_lanes, a, at_, lanes);
      });
      accumulate_lanes<true>(best, best_lanes);
      accumulate_lanes<false>(worst, worst_lanes);
      top[i] = best.index;
      bottom[i] = worst.index;
    }
  });
  parallel(tile_count(N), (M * 3 + 2) * N, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    tiles<1, 4>(begin * W, min_of(end * W, N), [&](int64_t j, auto lanes, auto) PLAIT_BODY {
      constexpr int WIDE = lanes.width;
      Arg<vec<float, WIDE>> first(lowest<float>());
      for (int64_t k = 0; k < M; k++) {
        const vec<float, WIDE> b = load(x + N * k + j, lanes);
        const int64_t row = k;
        accumulate_arg<true>(first, b, vec<int64_t, WIDE>(row));
      }
      store(column + j, first.index, lanes);
    });
  });
}
