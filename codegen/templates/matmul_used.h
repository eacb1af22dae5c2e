// Buffers of which some rows are used, as a mixture of experts has them: the rows that the groups of a product meet.
#pragma once
#include <cstdint>
#include <cstring>

namespace plait::matmul {

// Buffer i of `count` has `capacity` rows, of which rows[2 * i] up to rows[2 * i + 1] are used, for group i % groups.
struct Used {
  const int64_t* rows;
  int64_t count, capacity, groups;

  static int64_t within(int64_t row, int64_t low, int64_t high) { return row < low ? low : row > high ? high : row; }
  int64_t first(int64_t i) const { return within(rows[2 * i], 0, capacity); }
  int64_t end(int64_t i) const { return within(rows[2 * i + 1], first(i), capacity); }

  // Where the used rows of each group lie in memory, buffer after buffer, -> ids; where each group begins among them ->
  // offsets [groups + 1]. How many there are.
  int64_t list(int64_t* ids, int64_t* offsets) const {
    int64_t n = 0;
    for (int64_t g = 0; g < groups; g++) {
      offsets[g] = n;
      for (int64_t i = g; i < count; i += groups)
        for (int64_t row = i * capacity + first(i), stop = i * capacity + end(i); row < stop; row++) ids[n++] = row;
    }
    return offsets[groups] = n;
  }

  // Zeros in the rows of `out` that are not used; a row has so many bytes.
  void clear_others(void* out, int64_t bytes, int nthreads) const {
    char* const all = static_cast<char*>(out);
    const auto clear = [=, *this](int64_t i) {
      char* const own = all + i * capacity * bytes;
      std::memset(own, 0, first(i) * bytes);
      std::memset(own + end(i) * bytes, 0, (capacity - end(i)) * bytes);
    };
    if (nthreads <= 1 || count * capacity * bytes < 1 << 20) {
      for (int64_t i = 0; i < count; i++) clear(i);
    } else {
#pragma omp parallel for num_threads(nthreads)
      for (int64_t i = 0; i < count; i++) clear(i);
    }
  }
};

}  // namespace plait::matmul
