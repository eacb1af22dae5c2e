// scatter
#include "vmath.h"
using namespace plait;

extern "C" void scatter(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  const int64_t* const ids = static_cast<const int64_t*>(bufs[1]);
  float* const out = static_cast<float*>(bufs[2]);
  int32_t* const hits = static_cast<int32_t*>(bufs[3]);
  const int64_t M = sizes[0];
  const int64_t D = sizes[1];
  const int32_t one = 1;
  const int64_t none = -1;
  parallel(M, (D * 3 + 2) * M, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t i = begin; i < end; i++) {
      const int64_t id = ids[i];
      const bool valid = id > none;
      tiles<1>(0, D, [&](int64_t j, auto lanes, auto) PLAIT_BODY {
        const vec<float> a = load(x + D * i + j, lanes);
        const vec<int64_t> a_at = j + iota<int64_t>() + int64_t(D * id);
        atomic_scatter_if(vec<bool>(valid), out, a_at, a, lanes);
        const vec<int64_t> one_at = vec<int64_t>(0);
        atomic_scatter_if(vec<bool>(valid), hits, one_at, vec<int32_t>(one), lanes);
      });
    }
  });
}
