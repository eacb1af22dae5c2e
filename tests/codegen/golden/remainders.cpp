// remainders
#include "vmath.h"
using namespace plait;

extern "C" void remainders(void* const* bufs, const int64_t* sizes, int nthreads) {
  const int32_t* const x = static_cast<const int32_t*>(bufs[0]);
  const int32_t* const y = static_cast<const int32_t*>(bufs[1]);
  int32_t* const quotient = static_cast<int32_t*>(bufs[2]);
  int32_t* const rest = static_cast<int32_t*>(bufs[3]);
  int32_t* const cut = static_cast<int32_t*>(bufs[4]);
  int32_t* const left = static_cast<int32_t*>(bufs[5]);
  const int64_t N = sizes[0];
  parallel(tile_count(N), N * 55, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    tiles<1>(begin * W, min_of(end * W, N), [&](int64_t i, auto lanes, auto) PLAIT_BODY {
      const vec<int32_t> a = load(x + i, lanes);
      const vec<int32_t> b = load(y + i, lanes);
      const vec<int32_t> q = floordiv(a, b);
      store(quotient + i, q, lanes);
      const vec<int32_t> m = mod(a, b);
      store(rest + i, m, lanes);
      const vec<int32_t> t = trunc_div(a, b);
      store(cut + i, t, lanes);
      const vec<int32_t> f = fmod(a, b);
      store(left + i, f, lanes);
    });
  });
}
