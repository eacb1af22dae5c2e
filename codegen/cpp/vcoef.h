// Minimax coefficients of vmath.h, lowest power first. Written by codegen/cpp/fits.py; do not edit.
#pragma once

namespace plait {

// exp(r) = 1 + r + r^2 q(r) on [-0.34664, 0.34664], weighted error at most 3.29e-09
constexpr float EXP[] = {
    0x1.fffffc0000000p-2f,
    0x1.5554920000000p-3f,
    0x1.5558f20000000p-5f,
    0x1.1239f00000000p-7f,
    0x1.69fa4a0000000p-10f,
};

// exp(r) - 1 = r + r^2 q(r) on [-0.34664, 0.34664], weighted error at most 4.34e-10
constexpr float EXPM1[] = {
    0x1.0000000000000p-1f,
    0x1.5555560000000p-3f,
    0x1.5554f20000000p-5f,
    0x1.110fc00000000p-7f,
    0x1.6d40980000000p-10f,
    0x1.a2d0920000000p-13f,
};

// 2^r = 1 + r q(r) on [-0.5, 0.5], weighted error at most 1.38e-08
constexpr float EXP2[] = {
    0x1.62e4300000000p-1f,
    0x1.ebfbe00000000p-3f,
    0x1.c6aed00000000p-5f,
    0x1.3b29aa0000000p-7f,
    0x1.5f47b00000000p-10f,
    0x1.44c5b60000000p-13f,
};

// log(1 + f) = f - f^2 / 2 + f^3 q(f) on [-0.2929, 0.41422], weighted error at most 7.89e-10
constexpr float LOG[] = {
    0x1.5555460000000p-2f,
    -0x1.ffffee0000000p-3f,
    0x1.99a5460000000p-3f,
    -0x1.5562e40000000p-3f,
    0x1.2332b80000000p-3f,
    -0x1.fb42f80000000p-4f,
    0x1.e650f00000000p-4f,
    -0x1.e2eb0e0000000p-4f,
    0x1.1b43ae0000000p-4f,
};

// sin(r) = r + r^3 q(r^2) on [0, 0.616853], weighted error at most 1.59e-10
constexpr float SIN[] = {
    -0x1.5555560000000p-3f,
    0x1.1111760000000p-7f,
    -0x1.a05bbc0000000p-13f,
    0x1.7cd93a0000000p-19f,
};

// cos(r) = 1 - r^2 / 2 + r^4 q(r^2) on [0, 0.616853], weighted error at most 1.07e-10
constexpr float COS[] = {
    0x1.55554a0000000p-5f,
    -0x1.6c0c1a0000000p-10f,
    0x1.99e0e40000000p-16f,
};

// erf(x) = x + x q(x^2) on [0, 0.860627], weighted error at most 1.69e-08
constexpr float ERF[] = {
    0x1.06eba60000000p-3f,
    -0x1.8126ea0000000p-2f,
    0x1.ce1ae80000000p-4f,
    -0x1.b68f6e0000000p-6f,
    0x1.4746560000000p-8f,
    -0x1.3a17e80000000p-11f,
};

// 1 - erf(t) = exp(-t - t q(t)) on [0.9277, 4], weighted error at most 2.49e-09
constexpr float ERFC[] = {
    0x1.077b2a0000000p-3f,
    0x1.4530380000000p-1f,
    0x1.b3444e0000000p-4f,
    -0x1.85bb840000000p-6f,
    0x1.defdd00000000p-9f,
    -0x1.5590520000000p-12f,
    0x1.8296100000000p-17f,
};

}  // namespace plait
