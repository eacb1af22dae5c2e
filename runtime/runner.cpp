// The native half of a plan: evaluates size programs and calls kernels in order. Generic: it is compiled once per
// machine, and a plan is data for it. Nothing here allocates, locks, throws or keeps state.
//
// A program is a sequence of int64 records, all positions in words:
//   0                                    end
//   1 code dst a b                       slots[dst] = code(slots[a], slots[b])
//   2 slot index                         stop with result index + 1 unless slots[slot] is non-zero
//   3 function nb ns (base offset)*nb slot*ns
//                                        function(bufs, sizes, nthreads) with bufs[i] = bases[base] + slots[offset] bytes
//                                        and sizes[i] = slots[slot]
// The result is 0, a positive guard index + 1, or a negative error below. Codes are those of sizes.py (OPS), in its order.
#include <cstdint>
#include <time.h>

namespace {

using Kernel = void (*)(void* const* bufs, const int64_t* sizes, int nthreads);

enum Record : int64_t { END, EVAL, GUARD, LAUNCH };
enum Code : int64_t { ADD, MUL, FLOORDIV, MOD, MAX, MIN, POW, NEG, CEILDIV, EQ, NE, LT, LE, GT, GE, AND, OR, NOT };
constexpr int64_t OK = 0, BAD_DIVISION = -1, OVERFLOWED = -2, BAD_PROGRAM = -3;

int64_t floordiv(int64_t a, int64_t b) {
  int64_t q = a / b;
  return q - ((a % b != 0) && ((a < 0) != (b < 0)));
}

// a raised to b >= 0 by squaring; false on overflow.
bool power(int64_t a, int64_t b, int64_t* out) {
  int64_t result = 1;
  for (;;) {
    if ((b & 1) && __builtin_mul_overflow(result, a, &result)) return false;
    b >>= 1;
    if (b == 0) break;
    if (__builtin_mul_overflow(a, a, &a)) return false;
  }
  *out = result;
  return true;
}

int64_t evaluate(int64_t code, int64_t a, int64_t b, int64_t* out) {
  switch (code) {
    case ADD: return __builtin_add_overflow(a, b, out) ? OVERFLOWED : OK;
    case MUL: return __builtin_mul_overflow(a, b, out) ? OVERFLOWED : OK;
    case FLOORDIV:
    case MOD:
    case CEILDIV:
      if (b == 0) return BAD_DIVISION;
      if (b == -1) {  // INT64_MIN / -1 traps on some machines
        if (code == MOD) return *out = 0;
        return __builtin_sub_overflow(int64_t{0}, a, out) ? OVERFLOWED : OK;
      }
      if (code == FLOORDIV) *out = floordiv(a, b);
      if (code == CEILDIV) *out = floordiv(a, b) + (a % b != 0);
      if (code == MOD) *out = a % b + ((a % b != 0 && (a < 0) != (b < 0)) ? b : 0);
      return 0;
    case MAX: *out = a > b ? a : b; return 0;
    case MIN: *out = a < b ? a : b; return 0;
    case POW:
      if (b < 0) return BAD_DIVISION;
      return power(a, b, out) ? OK : OVERFLOWED;
    case NEG: return __builtin_sub_overflow(int64_t{0}, a, out) ? OVERFLOWED : OK;
    case EQ: *out = a == b; return 0;
    case NE: *out = a != b; return 0;
    case LT: *out = a < b; return 0;
    case LE: *out = a <= b; return 0;
    case GT: *out = a > b; return 0;
    case GE: *out = a >= b; return 0;
    case AND: *out = a && b; return 0;
    case OR: *out = a || b; return 0;
    case NOT: *out = !a; return 0;
  }
  return BAD_PROGRAM;
}

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1000000000 + t.tv_nsec;
}

const int64_t* launch(const int64_t* p, char* const* bases, const int64_t* slots, int nthreads) {
  const int64_t nb = p[2], ns = p[3];
  auto** bufs = static_cast<void**>(__builtin_alloca((nb + 1) * sizeof(void*)));
  auto* sizes = static_cast<int64_t*>(__builtin_alloca((ns + 1) * sizeof(int64_t)));
  const int64_t* arg = p + 4;
  for (int64_t i = 0; i < nb; ++i, arg += 2) bufs[i] = bases[arg[0]] + slots[arg[1]];
  for (int64_t i = 0; i < ns; ++i) sizes[i] = slots[*arg++];
  reinterpret_cast<Kernel>(p[1])(bufs, sizes, nthreads);
  return arg;
}

}  // namespace

// Runs a program. `times`, when not null, receives the nanoseconds of each launch in order.
extern "C" int64_t plait_run(const int64_t* p, char* const* bases, int64_t* slots, int nthreads, int64_t* times) {
  for (;;) {
    switch (p[0]) {
      case END: return 0;
      case EVAL:
        if (int64_t error = evaluate(p[1], slots[p[3]], slots[p[4]], &slots[p[2]])) return error;
        p += 5;
        break;
      case GUARD:
        if (slots[p[1]] == 0) return p[2] + 1;
        p += 3;
        break;
      case LAUNCH: {
        const int64_t start = times ? now() : 0;
        p = launch(p, bases, slots, nthreads);
        if (times) *times++ = now() - start;
        break;
      }
      default: return BAD_PROGRAM;
    }
  }
}
