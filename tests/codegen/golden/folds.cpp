// folds
#include "vmath.h"
using namespace plait;

extern "C" void folds(void* const* bufs, const int64_t* sizes, int nthreads) {
  const float* const x = static_cast<const float*>(bufs[0]);
  const bool* const flag = static_cast<const bool*>(bufs[1]);
  const int32_t* const y = static_cast<const int32_t*>(bufs[2]);
  float* const product = static_cast<float*>(bufs[3]);
  float* const least = static_cast<float*>(bufs[4]);
  bool* const some = static_cast<bool*>(bufs[5]);
  bool* const every = static_cast<bool*>(bufs[6]);
  int32_t* const high = static_cast<int32_t*>(bufs[7]);
  const int64_t M = sizes[0];
  const int64_t N = sizes[1];
  parallel(M, (N * 8 + 10) * M, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {
    for (int64_t i = begin; i < end; i++) {
      float p = 1.0f;
      float m = highest<float>();
      bool o = false;
      bool e = true;
      int32_t h = lowest<int32_t>();
      vec<float> p_lanes[4];
      fill(p_lanes, 1.0f);
      vec<float> m_lanes[4];
      fill(m_lanes, highest<float>());
      vec<bool> o_lanes[4];
      fill(o_lanes, false);
      vec<bool> e_lanes[4];
      fill(e_lanes, true);
      vec<int32_t> h_lanes[4];
      fill(h_lanes, lowest<int32_t>());
      tiles<4>(0, N, [&](int64_t r, auto lanes, auto part) PLAIT_BODY {
        const vec<float> a = load(x + N * i + r, lanes);
        accumulate<Prod>(p_lanes[part], a, lanes);
        accumulate<Min>(m_lanes[part], a, lanes);
        const vec<bool> f = load(flag + N * i + r, lanes);
        accumulate<Any>(o_lanes[part], f, lanes);
        accumulate<All>(e_lanes[part], f, lanes);
        const vec<int32_t> b = load(y + N * i + r, lanes);
        accumulate<Max>(h_lanes[part], b, lanes);
      });
      accumulate<Prod>(p, reduce<Prod>(p_lanes));
      accumulate<Min>(m, reduce<Min>(m_lanes));
      accumulate<Any>(o, reduce<Any>(o_lanes));
      accumulate<All>(e, reduce<All>(e_lanes));
      accumulate<Max>(h, reduce<Max>(h_lanes));
      product[i] = p;
      least[i] = m;
      some[i] = o;
      every[i] = e;
      high[i] = h;
    }
  });
}
