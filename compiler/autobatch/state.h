// What recording (record.cpp) and launching (launch.cpp) share: pending tensors, tables of blocks, and what a call recorded.
//
// Python objects only; no torch headers.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace plait {

constexpr int PHASE_BITS = 24;  // of a depth, below the number of the phase

struct State;

// What a pending tensor consists of; Python's class `Pending` adds the methods of a tensor. It takes no part in garbage
// collection: what it refers to is older than itself, or lets go of it when the call ends.
struct Handle {
  PyObject_HEAD
  State* state;
  PyObject* type;
  PyObject* view_of;  // in eager it shares memory with this one
  long long id;
  long long depth;
  uint64_t ancestors;  // blocks that it comes from, by number modulo 64
  char viewed;  // in eager another one shares memory with it
};

// A matrix of `runtime/panels.py` that is laid out anew for each call, from a shared tensor.
struct Panels {
  int64_t shared, base, by_column, n, k, item;  // by_column: [N, K] in memory; item: bytes of an element
};

// A plan of `runtime/direct.py`: what a launch needs to run without Python.
struct Direct {
  using Run = int64_t (*)(const int64_t*, char* const*, int64_t*, int, int64_t*);
  Run run = nullptr;  // null: there is none
  const int64_t *sizes = nullptr, *program = nullptr;
  std::vector<int64_t> slots;           // before the sizes are known
  std::vector<int64_t> counts;          // slots that hold the number of instances
  int64_t arena = 0;                    // slot of the bytes that the arena needs
  std::vector<char*> bases;             // with the addresses of constants
  std::vector<int64_t> inputs, outputs;  // bases of a block's stacked arguments, then of its shared ones; of its results
  std::vector<int64_t> checks;          // bases and slots of offsets of words that stay 0 unless a row id is out of range
  std::vector<Panels> panels;
  PyObject* keep = nullptr;             // owns what the addresses point to
};

// How a block runs where gradients are wanted: the forward keeps what the backward reads.
struct Trained {
  enum Kind { MEMORY, ARGUMENT, SHARED, RESULT };
  struct Saved {
    Kind kind;
    int64_t at, bytes;  // MEMORY: base and slot of its bytes in the forward; else the number of the argument or result
    int64_t base;       // in the backward, -1 where it is not read
  };
  struct Gradient {
    int64_t argument, base, bytes;  // stacked arguments first, then shared ones; the slot of its bytes
    int64_t item;                   // bytes of an element: float32 or float64
  };
  Direct backward;
  std::vector<Saved> saved;
  std::vector<std::pair<int64_t, int64_t>> tangents;  // (result of the block, base in the backward)
  std::vector<Gradient> gradients;
};

// The same as a Direct that reads some arguments from their pools, through the ids of their rows.
struct Indexed {
  Direct direct;                 // of such arguments `inputs` are the bases of the pools
  std::vector<int64_t> rows;     // of each argument the base of its row ids, -1 where it is gathered
  std::vector<int64_t> heights;  // slots that hold numbers of rows of pools
};

// How a block was compiled. Launches hold on to it until their backward, even where the block is compiled anew.
struct Plan {
  Direct direct;
  Trained trained;
  Indexed indexed;
  std::vector<double> took[2];  // nanoseconds a line of launches that gathered, and that read through ids, for a choice
  Plan() = default;
  Plan(const Plan&) = delete;
  ~Plan() {
    Py_XDECREF(direct.keep);
    Py_XDECREF(indexed.direct.keep);
    Py_XDECREF(trained.backward.keep);
  }
};

struct Block {
  std::vector<int> inputs, outputs;  // types
  std::vector<char> recursive;       // which arguments have come from this very block
  std::shared_ptr<Plan> plan;
  std::vector<char> gathered;        // which arguments have been gathered
  int64_t gathers = 0, kernels = 0;  // nanoseconds of all its launches
};

// The lines of one block at one depth.
struct Bucket {
  size_t block;
  std::vector<int64_t> arguments, firsts;
};

// The last line of a hoisted block: another one with the same arguments is not needed.
struct Same {
  std::vector<int64_t> arguments;
  long long depth = -1, first = 0;
};

struct Launch {
  size_t block, count;
  size_t rows;                   // where the rows of its arguments begin, one argument after the other
  std::vector<int64_t> side;     // of each argument the first row where they lie side by side, else -1
  std::vector<int64_t> starts;   // first rows of its results
  Bucket* bucket;
};

// A launch that the backward goes through: what it kept, and where its values are.
struct Kept {
  size_t block, count;
  std::shared_ptr<Plan> plan;
  std::vector<int64_t> rows, starts;
  std::vector<char*> saved;
};

// How something was scheduled, for when the same is recorded again: `key` is all of what was recorded.
struct Schedule {
  std::vector<int64_t> key;
  std::vector<Launch> launches;
  std::vector<int64_t> rows, row_of, used;
};

enum Scheduler { DEPTHS, AGENDA, FEWER };

// What a batched function has learnt, as far as launching needs it; lives as long as it does.
struct Table {
  PyObject_HEAD
  std::vector<int64_t>* row_bytes;  // of each type
  std::vector<Block>* blocks;
  std::vector<Schedule>* schedules;  // the latest first
  long long trials, by_depth, by_agenda;  // of schedulers, and the launches that they gave
};

// The value of a real tensor. `asked`: whether it wants a gradient, while gradients were recorded.
struct Lifted {
  PyObject* value;
  bool asked;
};

// What a call has recorded since it was last scheduled, and where its values are.
struct State {
  PyObject_HEAD
  PyObject* recorder;  // owned until the call has ended and nobody holds a pending tensor of it
  Table* table;
  long long next_id;
  long long computed;  // values below this one are computed: nothing has to wait for them
  long long floor;     // the depth below which nothing is recorded: the program phase
  long long live;      // pending tensors of this call that exist
  char closed;
  char keeps;   // schedules are kept
  int scheduler;  // DEPTHS, AGENDA, or FEWER: that of the two that has given fewer launches
  char reused;  // the first schedule of this call was one of those
  std::vector<std::vector<std::vector<Bucket>>>* buckets;  // by phase and depth, in each one for a block
  std::vector<int64_t>*integer_ids, *integers, *real_ids;
  std::vector<double>* reals;
  std::vector<Same>* same;       // by block
  std::unordered_map<PyObject*, Lifted>* lifted;  // by real tensor
  PyObject* waiting;  // {type: {id: real tensor}} of those that are not in their pool yet
  PyObject* wanting;  // [(real tensor, type, id)] of those that want a gradient
  PyObject* shared;   // {address of a tensor that all instances share: that tensor}, or None
  std::vector<int64_t>* row_of;  // of each value, -1 where it is not computed yet
  std::vector<int64_t>* used;    // rows of each type
  std::vector<int64_t>* given;   // number of a type and ids of what was put into its pool, one after the other
  std::vector<int64_t>* rows;    // of the arguments of the launches
  std::vector<Launch>* launches;
  std::vector<Kept>* kept;
  std::vector<char*>* memory;  // of what launches keep
};

inline Bucket& bucket_of(State* s, size_t block, int64_t depth) {
  const auto phase = static_cast<size_t>(depth >> PHASE_BITS), deep = static_cast<size_t>(depth & ((1LL << PHASE_BITS) - 1));
  auto& phases = *s->buckets;
  if (phase >= phases.size()) phases.resize(phase + 1);
  auto& depths = phases[phase];
  if (deep >= depths.size()) depths.resize(deep + 1);
  for (Bucket& b : depths[deep])
    if (b.block == block) return b;
  depths[deep].push_back({block, {}, {}});
  return depths[deep].back();
}

inline long long depth_of(const State* s, const Handle* h) { return h->id < s->computed ? 0 : h->depth; }

inline char* padded(char* p) { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63}); }

inline uint64_t bit_of(size_t block) { return uint64_t{1} << (block % 64); }

// launch.cpp
extern PyTypeObject table_type;
extern PyMethodDef launch_methods[];  // of State
bool ready_table();

// tasks.cpp
extern PyTypeObject tasks_type;
bool ready_tasks();
void begin_tasks(bool (*is)(), void (*set)(bool));  // torch's functions for whether gradients are recorded

}  // namespace plait
