// embedding
#include "vmath.h"
using namespace plait;

extern "C" void embedding(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const table = static_cast<const float*>(bufs[0]);
  const int32_t* const ids = static_cast<const int32_t*>(bufs[1]);
  float* const out = static_cast<float*>(bufs[2]);
  const int64_t M = sizes[0];
  const int64_t D = sizes[1];
  parallel(M, (D * 2 + 1) * M, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t i = begin; i < end; i++) {
      const int32_t id = ids[i];
      tiles<1>(0, D, [&](int64_t j, auto lanes, auto) PLAIT_BODY {
        const vec<float> a = load(table + D * int64_t(id) + j, lanes);
        store(out + D * i + j, a, lanes);
      });
    }
  });
}
