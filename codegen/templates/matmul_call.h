// What a generated matmul kernel hands to the driver in matmul.h: sizes, operands, and the functions that it was generated
// for. Where PLAIT_CORE is defined, to a suffix that tells builds of the driver apart, the driver is a function of another
// shared object, built once for all kernels of the same operands; else it becomes part of the kernel's own.
#pragma once
#include "matmul_tile.h"

namespace plait::matmul {

enum class Group { none, m, k };  // what the offsets of groups cut

// Windows of the images that a convolution reads: C channels, KH x KW taps, images of H x W, results of OH x OW. x_*: elements
// from one image, channel, row, column to the next. taps_first: the order of k is tap, channel; else channel, tap.
struct Window {
  int64_t C, KH, KW, H, W, OH, OW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, x_n, x_c, x_h, x_w, taps_first;
};

// Runtime sizes; strides in elements. Batch axes beyond those of the call have extent 1 and stride 0.
struct Dims {
  int64_t M, N, K, lda, ldb, slots;
  int64_t batch[2] = {1, 1}, a_step[2] = {0, 0}, b_step[2] = {0, 0};
  int64_t groups = 1, group_step = 0;
  int64_t scale_group = 0;  // k that share a scale of a quantized B
  Window window{};
};

// A thread's rectangle of one matrix. b0, b1: its batch indices; group: its group.
struct Task {
  int64_t b0, b1, group, m0, m1, n0, n1, k0, k1;
};

// Finishes a tile of sums, `step` elements from row to row. Fills a packed block of A.
using Epilogue = void (*)(void* const* bufs, const int64_t* sizes, const Task& t, int64_t m0, int64_t rows, int64_t n0,
                          int64_t cols, const void* tile, int64_t step);
using Prologue = void (*)(void* const* bufs, const int64_t* sizes, const Task& t, int64_t m0, int64_t rows, int64_t k0,
                          int64_t depth, void* block);

// Tables (row ids of A and of B, offsets of groups, the matrix of each group) are null where there are none.
struct Call {
  void* const* bufs;
  const int64_t* sizes;
  Dims d;
  const void *a, *b, *scales, *zeros;  // the latter two of a quantized B: b are its codes
  const int64_t *a_ids, *b_ids, *offsets, *group_ids;
  void* workspace;
  int batch;
  Group group;
  Epilogue epilogue;
  Prologue prologue;
};

}  // namespace plait::matmul

// PLAIT_MATMUL(T, AT, BT, a, b, prologue) names the driver for sums in T, A and B in memory as AT and BT, the contiguous axes
// a and b, and with or without a prologue; PLAIT_USES_MATMUL declares it.
#ifdef PLAIT_CORE
#define PLAIT_MATMUL_NAME(T, AT, BT, a, b, p, core) plait_matmul_##T##_##AT##_##BT##_##a##_##b##_##p##_##core
#define PLAIT_MATMUL_OF(T, AT, BT, a, b, p, core) PLAIT_MATMUL_NAME(T, AT, BT, a, b, p, core)
#define PLAIT_MATMUL(T, AT, BT, a, b, p) PLAIT_MATMUL_OF(T, AT, BT, a, b, p, PLAIT_CORE)
#define PLAIT_USES_MATMUL(T, AT, BT, a, b, p) \
  extern "C" void PLAIT_MATMUL(T, AT, BT, a, b, p)(const plait::matmul::Call& call, int nthreads)
#else
#include "matmul.h"
#define PLAIT_MATMUL(T, AT, BT, a, b, p) \
  plait::matmul::run<T, AT, BT, plait::matmul::A::a, plait::matmul::B::b, plait::matmul::Kind::p>
#define PLAIT_USES_MATMUL(T, AT, BT, a, b, p) static_assert(true)
#endif
