// Transcendental functions of kernel IR on float, double and vec of either.
#pragma once
#include "vops.h"

namespace plait {

#define PLAIT_LIBM1(name, fn)                                                                    \
  template <class V> PLAIT_FN V name(V x) {                                                      \
    using T = lane_t<V>;                                                                         \
    const auto one = [](T s) -> T {                                                              \
      if constexpr (same<T, float>) return __builtin_##fn##f(s);                                 \
      else return __builtin_##fn(s);                                                             \
    };                                                                                           \
    if constexpr (is_vec<V>) return calls(one, x);                                               \
    else return one(x);                                                                          \
  }
#define PLAIT_LIBM2(name, fn)                                                                    \
  template <class V> PLAIT_FN V name(V x, V y) {                                                 \
    using T = lane_t<V>;                                                                         \
    const auto one = [](T s, T t) -> T {                                                         \
      if constexpr (same<T, float>) return __builtin_##fn##f(s, t);                              \
      else return __builtin_##fn(s, t);                                                          \
    };                                                                                           \
    if constexpr (is_vec<V>) return calls(one, x, y);                                            \
    else return one(x, y);                                                                       \
  }
PLAIT_LIBM1(exp, exp)
PLAIT_LIBM1(exp2, exp2)
PLAIT_LIBM1(expm1, expm1)
PLAIT_LIBM1(log, log)
PLAIT_LIBM1(log1p, log1p)
PLAIT_LIBM1(log2, log2)
PLAIT_LIBM1(log10, log10)
PLAIT_LIBM1(sin, sin)
PLAIT_LIBM1(cos, cos)
PLAIT_LIBM1(tan, tan)
PLAIT_LIBM1(asin, asin)
PLAIT_LIBM1(acos, acos)
PLAIT_LIBM1(atan, atan)
PLAIT_LIBM1(sinh, sinh)
PLAIT_LIBM1(cosh, cosh)
PLAIT_LIBM1(tanh, tanh)
PLAIT_LIBM1(asinh, asinh)
PLAIT_LIBM1(acosh, acosh)
PLAIT_LIBM1(atanh, atanh)
PLAIT_LIBM1(erf, erf)
PLAIT_LIBM1(erfc, erfc)
PLAIT_LIBM2(atan2, atan2)

template <class V> PLAIT_FN V sigmoid(V x) { return lane_t<V>(1) / (lane_t<V>(1) + exp(V(-x))); }

template <class T> PLAIT_FN T int_pow(T base, T exponent) {  // as torch: a negative exponent gives 0, but for base 1 and -1
  if (exponent < 0) return base == 1 ? T(1) : base == T(-1) ? (exponent & 1 ? T(-1) : T(1)) : T(0);
  T r = 1;
  for (; exponent > 0; exponent = T(exponent >> 1)) {
    if (exponent & 1) r = T(r * base);
    base = T(base * base);
  }
  return r;
}
template <class V> PLAIT_FN V pow(V x, V y) {
  using T = lane_t<V>;
  const auto one = [](T s, T t) -> T {
    if constexpr (same<T, float>) return __builtin_powf(s, t);
    else if constexpr (same<T, double>) return __builtin_pow(s, t);
    else return int_pow(s, t);
  };
  if constexpr (is_vec<V>) return calls(one, x, y);
  else return one(x, y);
}

}  // namespace plait
