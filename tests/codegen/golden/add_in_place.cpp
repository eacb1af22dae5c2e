// add_in_place
#include "vmath.h"
using namespace plait;

extern "C" void add_in_place(void* const* bufs, const int64_t* sizes, int nthreads) {
  float* const x = static_cast<float*>(bufs[0]);
  const float* const y = static_cast<const float*>(bufs[1]);
  const int64_t N = sizes[0];
  parallel(tile_count(N), N * 4, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    tiles<1>(begin * W, min_of(end * W, N), [&](int64_t i, auto lanes, auto) PLAIT_BODY {
      const vec<float> a = load(x + i, lanes);
      const vec<float> b = load(y + i, lanes);
      const vec<float> c = a + b;
      store(x + i, c, lanes);
    });
  });
}
