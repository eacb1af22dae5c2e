// select
#include "vmath.h"
using namespace plait;

extern "C" void select(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  const float* const y = static_cast<const float*>(bufs[1]);
  const bool* const flag = static_cast<const bool*>(bufs[2]);
  float* const out = static_cast<float*>(bufs[3]);
  bool* const above = static_cast<bool*>(bufs[4]);
  const int64_t N = sizes[0];
  const float nothing = -0.0f;
  parallel(tile_count(N), N * 13, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    tiles<1>(begin * W, min_of(end * W, N), [&](int64_t i, auto lanes, auto) PLAIT_BODY {
      const vec<float> a = load(x + i, lanes);
      const vec<float> b = load(y + i, lanes);
      const vec<bool> f = load(flag + i, lanes);
      const vec<bool> gt_ = a > b;
      const vec<bool> nf = !f;
      const vec<bool> take = gt_ | nf;
      const vec<float> top = maximum(a, b);
      const vec<float> neg_ = -top;
      const vec<float> v = where(take, neg_, vec<float>(nothing));
      store(out + i, v, lanes);
      const vec<bool> nan = isnan(v);
      const vec<bool> both = take ^ nan;
      store_if(f, above + i, both, lanes);
    });
  });
}
