// Minimax coefficients of vmath.h, lowest power first. Written by codegen/cpp/fits.py; do not edit.
#pragma once

namespace plait {

// exp(r) = 1 + r + r^2 q(r) on [-0.34664, 0.34664], weighted error at most 3.78e-09
constexpr float EXP[] = {0.49999994f, 0.16666521f, 0.04166839f, 0.008368723f, 0.0013814585f};

// exp(r) - 1 = r + r^2 q(r) on [-0.34664, 0.34664], weighted error at most 2.27e-09
constexpr float EXPM1[] = {0.5f, 0.16666667f, 0.041666355f, 0.008333273f, 0.0013941018f, 0.00019914184f};

// 2^r = 1 + r q(r) on [-0.5, 0.5], weighted error at most 1.54e-08
constexpr float EXP2[] = {0.6931472f, 0.2402265f, 0.05550328f, 0.009618004f, 0.001340027f, 0.00015476301f};

// log(1 + f) = f - f^2 / 2 + f^3 q(f) on [-0.2929, 0.41422], weighted error at most 7.89e-10
constexpr float LOG[] = {0.3333331f, -0.24999987f, 0.20002227f, -0.16669253f, 0.14218658f, -0.12384316f, 0.11872953f,
    -0.11789995f, 0.06915634f};

// sin(r) = r + r^3 q(r^2) on [0, 0.616853], weighted error at most 3.35e-09
constexpr float SIN[] = {-0.16666667f, 0.008333329f, -0.00019839335f, 2.7183114e-06f};

// cos(r) = 1 - r^2 / 2 + r^4 q(r^2) on [0, 0.616853], weighted error at most 5.14e-10
constexpr float COS[] = {0.041666646f, -0.0013887368f, 2.443845e-05f};

// tanh(x) = x + x^3 q(x^2) on [0, 0.3025], weighted error at most 3.89e-08
constexpr float TANH[] = {-0.3333296f, 0.13320942f, -0.052684147f, 0.016458763f};

// 2^r = q(r) on [-0.5, 0.5], weighted error at most 1.56e-08
constexpr float TANH_EXP2[] = {1.0f, 0.6931472f, 0.24022646f, 0.055503286f, 0.009618489f, 0.0013399931f,
    0.0001534581f};

// erf(x) = x + x q(x^2) on [0, 0.860627], weighted error at most 1.79e-08
constexpr float ERF[] = {0.12837915f, -0.37612498f, 0.11281839f, -0.026766906f, 0.004992982f, -0.00059872353f};

// 1 - erf(t) = exp(-t - t q(t)) on [0.9277, 4], weighted error at most 6.99e-10
constexpr float ERFC[] = {0.1286529f, 0.63513345f, 0.106266364f, -0.023787398f, 0.0036544057f, -0.00032573377f,
    1.1523168e-05f};

// log2((1 + z) / (1 - z)) = z q(z^2) on [0, 0.0294397], weighted error at most 7.79e-14
constexpr double POW_LOG2[] = {2.8853900817778495, 0.9617966941140343, 0.5770779421751324, 0.41220927059733076,
    0.31990498252850674, 0.28290996511089067};

// 2^r = q(r) on [-0.5, 0.5], weighted error at most 4.06e-11
constexpr double POW_EXP2[] = {0.999999999961685, 0.6931471807284608, 0.2402265119814805, 0.055504103534193425,
    0.009618027254005743, 0.0013333922578014005, 0.0001546929116102634, 1.5201919645656402e-05};

}  // namespace plait
