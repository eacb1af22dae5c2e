// Minimax coefficients of vmath.h, lowest power first. Written by codegen/cpp/fits.py; do not edit.
#pragma once

namespace plait {

// exp(r) = 1 + r + r^2 q(r) on [-0.34664, 0.34664], weighted error at most 3.29e-09
constexpr float EXP[] = {0.49999994f, 0.16666521f, 0.04166839f, 0.008368723f, 0.0013808353f};

// exp(r) - 1 = r + r^2 q(r) on [-0.34664, 0.34664], weighted error at most 4.34e-10
constexpr float EXPM1[] = {0.5f, 0.16666667f, 0.04166648f, 0.008333176f, 0.001393327f, 0.00019970642f};

// 2^r = 1 + r q(r) on [-0.5, 0.5], weighted error at most 1.38e-08
constexpr float EXP2[] = {0.6931472f, 0.2402265f, 0.05550328f, 0.009618004f, 0.001340027f, 0.0001548635f};

// log(1 + f) = f - f^2 / 2 + f^3 q(f) on [-0.2929, 0.41422], weighted error at most 7.89e-10
constexpr float LOG[] = {0.3333331f, -0.24999987f, 0.20002227f, -0.16669253f, 0.14218658f, -0.12384316f, 0.11872953f,
    -0.11789995f, 0.06915634f};

// sin(r) = r + r^3 q(r^2) on [0, 0.616853], weighted error at most 1.59e-10
constexpr float SIN[] = {-0.16666667f, 0.00833338f, -0.00019853513f, 2.8375428e-06f};

// cos(r) = 1 - r^2 / 2 + r^4 q(r^2) on [0, 0.616853], weighted error at most 1.07e-10
constexpr float COS[] = {0.041666646f, -0.0013887301f, 2.4430661e-05f};

// tanh(x) = x + x^3 q(x^2) on [0, 0.36], weighted error at most 2.75e-09
constexpr float TANH[] = {-0.333333f, 0.13331936f, -0.053784523f, 0.020797115f, -0.0058951387f};

// erf(x) = x + x q(x^2) on [0, 0.860627], weighted error at most 1.69e-08
constexpr float ERF[] = {0.12837915f, -0.376125f, 0.11281863f, -0.026767595f, 0.0049938164f, -0.0005990856f};

// 1 - erf(t) = exp(-t - t q(t)) on [0.9277, 4], weighted error at most 2.49e-09
constexpr float ERFC[] = {0.12865289f, 0.6351335f, 0.10626631f, -0.023787383f, 0.0036544148f, -0.00032574058f,
    1.1521166e-05f};

// log2((1 + z) / (1 - z)) = z q(z^2) on [0, 0.0294397], weighted error at most 7.79e-14
constexpr double POW_LOG2[] = {2.8853900817778495, 0.9617966941140343, 0.5770779421751324, 0.4122092708677455,
    0.31990496028724325, 0.28291042540260003};

// 2^r = q(r) on [-0.5, 0.5], weighted error at most 4.06e-11
constexpr double POW_EXP2[] = {0.999999999961685, 0.6931471807284608, 0.24022651198134726, 0.05550410353379857,
    0.009618027255381863, 0.0013333922579565583, 0.00015469291566022343, 1.520193029257813e-05};

}  // namespace plait
