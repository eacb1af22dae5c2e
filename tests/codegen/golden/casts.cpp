// casts
#include "vmath.h"
using namespace plait;

extern "C" void casts(void* const* bufs, const int64_t* sizes, int nthreads) {
  const bf16* const x = static_cast<const bf16*>(bufs[0]);
  const int64_t* const y = static_cast<const int64_t*>(bufs[1]);
  f16* const half = static_cast<f16*>(bufs[2]);
  bf16* const back = static_cast<bf16*>(bufs[3]);
  int8_t* const small = static_cast<int8_t*>(bufs[4]);
  bool* const truth = static_cast<bool*>(bufs[5]);
  double* const double_ = static_cast<double*>(bufs[6]);
  int64_t* const count = static_cast<int64_t*>(bufs[7]);
  const int64_t N = sizes[0];
  parallel(tile_count(N), N * 19, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    tiles<1>(begin * W, min_of(end * W, N), [&](int64_t i, auto lanes, auto) PLAIT_BODY {
      const vec<bf16> a = load(x + i, lanes);
      const vec<float> f = cast<float>(a);
      const vec<float> g = f * f;
      const vec<f16> h = cast<f16>(g);
      stream(half + i, h, lanes);
      const vec<int64_t> c = load(y + i, lanes);
      const vec<float> cf = cast<float>(c);
      const vec<float> s = g + cf;
      const vec<bf16> b = cast<bf16>(s);
      stream(back + i, b, lanes);
      const vec<int8_t> n = cast<int8_t>(f);
      stream(small + i, n, lanes);
      const vec<bool> t = cast<bool>(c);
      stream(truth + i, t, lanes);
      const vec<double> d = cast<double>(a);
      stream(double_ + i, d, lanes);
      const vec<int64_t> tn = cast<int64_t>(t);
      const vec<int64_t> sum = tn + c;
      stream(count + i, sum, lanes);
    });
    streams_done();
  });
}
