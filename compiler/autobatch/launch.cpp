// Scheduling what was recorded, and running launches whose plans need no Python.
#include "state.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>

namespace plait {

PyTypeObject table_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

namespace {

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The numbers of a tuple; false with an error set.
template <class T> bool numbers(PyObject* tuple, std::vector<T>& into) {
  into.clear();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) into.push_back(static_cast<T>(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i))));
  return !PyErr_Occurred();
}

bool addresses(PyObject* tuple, std::vector<char*>& into) {
  into.clear();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++)
    into.push_back(static_cast<char*>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, i))));
  return !PyErr_Occurred();
}

PyObject* tuple_of(const std::vector<int64_t>& v) {
  PyObject* made = PyTuple_New(v.size());
  for (size_t i = 0; made != nullptr && i < v.size(); i++) PyTuple_SET_ITEM(made, i, PyLong_FromLongLong(v[i]));
  return made;
}

// -- the table ------------------------------------------------------------------------------------------------------------

PyObject* table_new(PyTypeObject* type, PyObject*, PyObject*) {
  auto* t = reinterpret_cast<Table*>(type->tp_alloc(type, 0));
  if (t == nullptr) return nullptr;
  t->row_bytes = new std::vector<int64_t>;
  t->blocks = new std::vector<Block>;
  t->schedules = new std::vector<Schedule>;
  return reinterpret_cast<PyObject*>(t);
}

void table_dealloc(PyObject* self) {
  auto* t = reinterpret_cast<Table*>(self);
  delete t->row_bytes;
  delete t->blocks;
  delete t->schedules;
  Py_TYPE(self)->tp_free(self);
}

// type(bytes of a row) -> its number
PyObject* table_add_type(PyObject* self, PyObject* bytes) {
  auto* t = reinterpret_cast<Table*>(self);
  const long long n = PyLong_AsLongLong(bytes);
  if (n == -1 && PyErr_Occurred()) return nullptr;
  t->row_bytes->push_back(n);
  return PyLong_FromSize_t(t->row_bytes->size() - 1);
}

// block(types of arguments, types of results) -> its number
PyObject* table_add_block(PyObject* self, PyObject* args) {
  auto* t = reinterpret_cast<Table*>(self);
  PyObject *inputs, *outputs;
  if (!PyArg_ParseTuple(args, "O!O!", &PyTuple_Type, &inputs, &PyTuple_Type, &outputs)) return nullptr;
  Block b;
  if (!numbers(inputs, b.inputs) || !numbers(outputs, b.outputs)) return nullptr;
  b.recursive.resize(b.inputs.size());
  b.gathered.resize(b.inputs.size());
  b.plan = std::make_shared<Plan>();
  t->blocks->push_back(std::move(b));
  return PyLong_FromSize_t(t->blocks->size() - 1);
}

bool is_block(const Table* t, Py_ssize_t block) {
  if (block >= 0 && block < static_cast<Py_ssize_t>(t->blocks->size())) return true;
  PyErr_SetString(PyExc_IndexError, "there is no such block");
  return false;
}

// A Direct from (run, sizes, program, slots, counts, arena, bases, inputs, outputs, checks, panels, keep).
bool direct_of(PyObject* given, Direct& into) {
  unsigned long long run, sizes, program;
  long long arena;
  PyObject *slots, *counts, *bases, *inputs, *outputs, *checks, *panels, *keep;
  if (!PyArg_ParseTuple(given, "KKKO!O!LO!O!O!O!O!O", &run, &sizes, &program, &PyTuple_Type, &slots, &PyTuple_Type, &counts, &arena,
                        &PyTuple_Type, &bases, &PyTuple_Type, &inputs, &PyTuple_Type, &outputs, &PyTuple_Type, &checks, &PyTuple_Type,
                        &panels, &keep))
    return false;
  Direct d;
  std::vector<int64_t> flat;
  if (!numbers(slots, d.slots) || !numbers(counts, d.counts) || !addresses(bases, d.bases) || !numbers(inputs, d.inputs) ||
      !numbers(outputs, d.outputs) || !numbers(checks, d.checks) || !numbers(panels, flat))
    return false;
  for (size_t i = 0; i + 6 <= flat.size(); i += 6)
    d.panels.push_back({flat[i], flat[i + 1], flat[i + 2], flat[i + 3], flat[i + 4], flat[i + 5]});
  d.run = reinterpret_cast<Direct::Run>(run);
  d.sizes = reinterpret_cast<const int64_t*>(sizes);
  d.program = reinterpret_cast<const int64_t*>(program);
  d.arena = arena;
  d.keep = Py_NewRef(keep);
  into = std::move(d);
  return true;
}

// direct(block, forward): how a block runs without Python.
PyObject* table_direct(PyObject* self, PyObject* args) {
  auto* t = reinterpret_cast<Table*>(self);
  Py_ssize_t block;
  PyObject* given;
  if (!PyArg_ParseTuple(args, "nO!", &block, &PyTuple_Type, &given) || !is_block(t, block)) return nullptr;
  auto plan = std::make_shared<Plan>();
  if (!direct_of(given, plan->direct)) return nullptr;
  (*t->blocks)[block].plan = plan;
  Py_RETURN_NONE;
}

// indexed(block, forward, (base of row ids, …), (slots of heights, …)): a second way, of which launches find the faster one.
PyObject* table_indexed(PyObject* self, PyObject* args) {
  auto* t = reinterpret_cast<Table*>(self);
  Py_ssize_t block;
  PyObject *given, *rows, *heights;
  if (!PyArg_ParseTuple(args, "nO!O!O!", &block, &PyTuple_Type, &given, &PyTuple_Type, &rows, &PyTuple_Type, &heights) || !is_block(t, block))
    return nullptr;
  Indexed& made = (*t->blocks)[block].plan->indexed;
  if (!numbers(rows, made.rows) || !numbers(heights, made.heights) || !direct_of(given, made.direct)) return nullptr;
  Py_RETURN_NONE;
}

constexpr size_t TRIED = 12;  // launches of each way, before one is chosen

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

enum Way { ONE, TRYING, GATHERS, ROWS };

// Which way the launches of a plan go.
Way way_of(const Plan& p) {
  if (p.indexed.direct.run == nullptr) return ONE;
  if (p.took[0].size() < TRIED || p.took[1].size() < TRIED) return TRYING;
  return median(p.took[1]) < median(p.took[0]) ? ROWS : GATHERS;
}

// gathering(block) -> (nanoseconds of gathers, of kernels, the arguments that were gathered, its way)
PyObject* table_gathering(PyObject* self, PyObject* block) {
  auto* t = reinterpret_cast<Table*>(self);
  const Py_ssize_t n = PyLong_AsSsize_t(block);
  if (PyErr_Occurred() || !is_block(t, n)) return nullptr;
  const Block& b = (*t->blocks)[n];
  std::vector<int64_t> found;
  for (size_t k = 0; k < b.gathered.size(); k++)
    if (b.gathered[k]) found.push_back(static_cast<int64_t>(k));
  return Py_BuildValue("LLNi", b.gathers, b.kernels, tuple_of(found), way_of(*b.plan));
}

// trained(block, forward, backward, saved, tangents, gradients): how it does where gradients are wanted; the last three are
// flat, as the members of `Trained`.
PyObject* table_trained(PyObject* self, PyObject* args) {
  auto* t = reinterpret_cast<Table*>(self);
  Py_ssize_t block;
  PyObject *forward, *backward, *saved, *tangents, *gradients;
  if (!PyArg_ParseTuple(args, "nO!O!O!O!O!", &block, &PyTuple_Type, &forward, &PyTuple_Type, &backward, &PyTuple_Type, &saved,
                        &PyTuple_Type, &tangents, &PyTuple_Type, &gradients) ||
      !is_block(t, block))
    return nullptr;
  auto plan = std::make_shared<Plan>();
  Trained& made = plan->trained;
  std::vector<int64_t> s, g, d;
  if (!direct_of(forward, plan->direct) || !direct_of(backward, made.backward) || !numbers(saved, s) || !numbers(tangents, g) ||
      !numbers(gradients, d))
    return nullptr;
  for (size_t i = 0; i + 4 <= s.size(); i += 4)
    made.saved.push_back({static_cast<Trained::Kind>(s[i]), s[i + 1], s[i + 2], s[i + 3]});
  for (size_t i = 0; i + 2 <= g.size(); i += 2) made.tangents.emplace_back(g[i], g[i + 1]);
  for (size_t i = 0; i + 4 <= d.size(); i += 4) made.gradients.push_back({d[i], d[i + 1], d[i + 2], d[i + 3]});
  (*t->blocks)[block].plan = plan;
  Py_RETURN_NONE;
}

// Panels of 32 columns; as many rows of a column side by side as make four bytes.
template <class T> void lay_out(const Panels& p, const T* from, T* into) {
  const int64_t word = std::max<int64_t>(1, 4 / static_cast<int64_t>(sizeof(T))), down = p.by_column ? 1 : p.n, across = p.by_column ? p.k : 1;
  for (int64_t first = 0; first < p.n; first += 32)
    for (int64_t row = 0; row < p.k; row += word)
      for (int64_t j = 0; j < 32; j++)
        for (int64_t w = 0; w < word; w++) {
          const bool inside = first + j < p.n && row + w < p.k;
          *into++ = inside ? from[(first + j) * across + (row + w) * down] : T{};
        }
}

void lay_out(const Panels& p, const char* from, char* into) {
  switch (p.item) {
    case 1: return lay_out(p, reinterpret_cast<const uint8_t*>(from), reinterpret_cast<uint8_t*>(into));
    case 2: return lay_out(p, reinterpret_cast<const uint16_t*>(from), reinterpret_cast<uint16_t*>(into));
    case 4: return lay_out(p, reinterpret_cast<const uint32_t*>(from), reinterpret_cast<uint32_t*>(into));
    default: return lay_out(p, reinterpret_cast<const uint64_t*>(from), reinterpret_cast<uint64_t*>(into));
  }
}

// shared(block, addresses): where the tensors are that all instances share.
PyObject* table_shared(PyObject* self, PyObject* args) {
  auto* t = reinterpret_cast<Table*>(self);
  Py_ssize_t block;
  PyObject* given;
  if (!PyArg_ParseTuple(args, "nO!", &block, &PyTuple_Type, &given)) return nullptr;
  std::vector<char*> found;
  if (!addresses(given, found)) return nullptr;
  if (!is_block(t, block)) return nullptr;
  Block& b = (*t->blocks)[block];
  if (b.plan->direct.inputs.size() != b.inputs.size() + found.size()) {
    PyErr_SetString(PyExc_IndexError, "the block has another number of shared tensors");
    return nullptr;
  }
  const Way way = way_of(*b.plan);
  for (Direct* d : {&b.plan->direct, way == ONE || way == GATHERS ? nullptr : &b.plan->indexed.direct}) {
    if (d == nullptr) continue;
    for (size_t k = 0; k < found.size(); k++)
      if (const int64_t base = d->inputs[b.inputs.size() + k]; base >= 0) d->bases[base] = found[k];
    for (const Panels& p : d->panels) lay_out(p, found[p.shared], d->bases[p.base]);
  }
  Py_RETURN_NONE;
}

// recursive(block) -> which of its arguments have come from itself so far
PyObject* table_recursive(PyObject* self, PyObject* block) {
  auto* t = reinterpret_cast<Table*>(self);
  const Py_ssize_t n = PyLong_AsSsize_t(block);
  if (PyErr_Occurred() || !is_block(t, n)) return nullptr;
  const auto& found = (*t->blocks)[n].recursive;
  PyObject* made = PyTuple_New(found.size());
  for (size_t k = 0; made != nullptr && k < found.size(); k++) PyTuple_SET_ITEM(made, k, PyBool_FromLong(found[k]));
  return made;
}

PyMethodDef table_methods[] = {
    {"type", table_add_type, METH_O, nullptr},
    {"block", table_add_block, METH_VARARGS, nullptr},
    {"direct", table_direct, METH_VARARGS, nullptr},
    {"indexed", table_indexed, METH_VARARGS, nullptr},
    {"gathering", table_gathering, METH_O, nullptr},
    {"trained", table_trained, METH_VARARGS, nullptr},
    {"shared", table_shared, METH_VARARGS, nullptr},
    {"recursive", table_recursive, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// -- scheduling -----------------------------------------------------------------------------------------------------------

int64_t reserve(State* s, size_t type, size_t more) {
  if (type >= s->used->size()) s->used->resize(s->table->row_bytes->size());
  const int64_t start = (*s->used)[type];
  (*s->used)[type] += static_cast<int64_t>(more);
  return start;
}

void place(State* s, const int64_t* ids, size_t count, int64_t start) {
  for (size_t i = 0; i < count; i++) (*s->row_of)[ids[i]] = start + static_cast<int64_t>(i);
}

void fit(State* s) {
  if (static_cast<long long>(s->row_of->size()) < s->next_id) s->row_of->resize(s->next_id, -1);
}

// put(type, ids) -> the row from which on these values lie
PyObject* state_put(PyObject* self, PyObject* args) {
  auto* s = reinterpret_cast<State*>(self);
  Py_ssize_t type;
  PyObject* ids;
  if (!PyArg_ParseTuple(args, "nO!", &type, &PyTuple_Type, &ids)) return nullptr;
  std::vector<int64_t> found;
  if (!numbers(ids, found)) return nullptr;
  fit(s);
  const int64_t start = reserve(s, type, found.size());
  place(s, found.data(), found.size(), start);
  s->given->push_back(type);
  s->given->push_back(static_cast<int64_t>(found.size()));
  s->given->insert(s->given->end(), found.begin(), found.end());
  return PyLong_FromLongLong(start);
}

// row(id) -> where a value lies in the pool of its type; -1 where it is not computed
PyObject* state_row(PyObject* self, PyObject* id) {
  auto* s = reinterpret_cast<State*>(self);
  const long long n = PyLong_AsLongLong(id);
  if (n == -1 && PyErr_Occurred()) return nullptr;
  return PyLong_FromLongLong(n < s->computed && n < static_cast<long long>(s->row_of->size()) ? (*s->row_of)[n] : -1);
}

// rows(values) -> where they lie, as int64
PyObject* state_rows(PyObject* self, PyObject* values) {
  auto* s = reinterpret_cast<State*>(self);
  if (!PyList_Check(values)) {
    PyErr_SetString(PyExc_TypeError, "a list of pending tensors is wanted");
    return nullptr;
  }
  const Py_ssize_t count = PyList_GET_SIZE(values);
  PyObject* made = PyByteArray_FromStringAndSize(nullptr, count * sizeof(int64_t));
  if (made == nullptr) return nullptr;
  auto* rows = reinterpret_cast<int64_t*>(PyByteArray_AS_STRING(made));
  for (Py_ssize_t i = 0; i < count; i++) rows[i] = (*s->row_of)[reinterpret_cast<Handle*>(PyList_GET_ITEM(values, i))->id];
  return made;
}

// The number at an address; `code` as in READ of execute.py. None for other kinds.
PyObject* number_at(const char* p, int code) {
  switch (code) {
    case 1: return PyFloat_FromDouble(*reinterpret_cast<const float*>(p));
    case 2: return PyFloat_FromDouble(*reinterpret_cast<const double*>(p));
    case 3: return PyLong_FromLongLong(*reinterpret_cast<const int64_t*>(p));
    case 4: return PyLong_FromLong(*reinterpret_cast<const int32_t*>(p));
    case 5: return PyBool_FromLong(*reinterpret_cast<const uint8_t*>(p));
    case 6: return PyLong_FromLong(*reinterpret_cast<const uint8_t*>(p));
    case 7: return PyLong_FromLong(*reinterpret_cast<const int16_t*>(p));
    case 8: return PyLong_FromLong(*reinterpret_cast<const int8_t*>(p));
    default: Py_RETURN_NONE;
  }
}

// read(computed values, {type: (address of its pool, code)}) -> their numbers, None for those that are no single number here
PyObject* state_read(PyObject* self, PyObject* args) {
  auto* s = reinterpret_cast<State*>(self);
  PyObject *values, *kinds;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &values, &PyDict_Type, &kinds)) return nullptr;
  const Py_ssize_t count = PyList_GET_SIZE(values);
  PyObject* made = PyList_New(count);
  PyObject* type = nullptr;  // of the last one
  const char* pool = nullptr;
  int code = 0;
  for (Py_ssize_t i = 0; made != nullptr && i < count; i++) {
    auto* h = reinterpret_cast<Handle*>(PyList_GET_ITEM(values, i));
    if (h->type != type) {
      PyObject* kind = PyDict_GetItemWithError(kinds, h->type);
      if (kind == nullptr && PyErr_Occurred()) {
        Py_DECREF(made);
        return nullptr;
      }
      type = h->type;
      pool = kind == nullptr ? nullptr : static_cast<const char*>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(kind, 0)));
      code = kind == nullptr ? 0 : static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(kind, 1)));
    }
    static const int64_t bytes[] = {0, 4, 8, 8, 4, 1, 1, 2, 1};
    const bool known = h->id < s->computed && (*s->row_of)[h->id] >= 0;
    PyObject* number = number_at(known && code ? pool + (*s->row_of)[h->id] * bytes[code] : nullptr, known ? code : 0);
    if (number == nullptr) Py_CLEAR(made);
    else PyList_SET_ITEM(made, i, number);
  }
  return made;
}

// used() -> rows of each type
PyObject* state_used(PyObject* self, PyObject*) {
  auto* s = reinterpret_cast<State*>(self);
  s->used->resize(s->table->row_bytes->size());
  return tuple_of(*s->used);
}

constexpr size_t SCHEDULES = 8;  // kept by a table

// All of what was recorded, one part after the other.
std::vector<int64_t> key_of(const State* s) {
  std::vector<int64_t> key{s->next_id};
  auto append = [&](const std::vector<int64_t>& part) {
    key.push_back(static_cast<int64_t>(part.size()));
    key.insert(key.end(), part.begin(), part.end());
  };
  for (const auto* part : {s->given, s->integer_ids, s->real_ids}) append(*part);
  for (const Launch& l : *s->launches) {
    key.push_back(static_cast<int64_t>(l.block));
    append(l.bucket->arguments);
    append(l.bucket->firsts);
  }
  return key;
}

// Takes up the schedule that is kept for the same key; false where there is none.
bool recalled(State* s, const std::vector<int64_t>& key) {
  auto& kept = *s->table->schedules;
  for (auto found = kept.begin(); found != kept.end(); ++found) {
    if (found->key != key) continue;
    *s->launches = found->launches;
    *s->rows = found->rows;
    *s->row_of = found->row_of;
    *s->used = found->used;
    std::rotate(kept.begin(), found, found + 1);
    return true;
  }
  return false;
}

// Finds the rows of all arguments and results, launch after launch.
void place_all(State* s) {
  for (auto [ids, type] : {std::pair{s->integer_ids, 0}, {s->real_ids, 1}})
    if (!ids->empty()) place(s, ids->data(), ids->size(), reserve(s, type, ids->size()));
  for (Launch& l : *s->launches) {
    const Block& b = (*s->table->blocks)[l.block];
    const size_t arity = b.inputs.size();
    l.rows = s->rows->size();
    s->rows->resize(l.rows + arity * l.count);
    for (size_t k = 0; k < arity; k++) {
      int64_t* rows = s->rows->data() + l.rows + k * l.count;
      bool side = true;
      for (size_t i = 0; i < l.count; i++) {
        rows[i] = (*s->row_of)[l.bucket->arguments[i * arity + k]];
        side = side && rows[i] == rows[0] + static_cast<int64_t>(i);
      }
      l.side.push_back(side ? rows[0] : -1);
    }
    for (size_t k = 0; k < b.outputs.size(); k++) {
      l.starts.push_back(reserve(s, b.outputs[k], l.count));
      for (size_t i = 0; i < l.count; i++) (*s->row_of)[l.bucket->firsts[i] + k] = l.starts[k] + static_cast<int64_t>(i);
    }
  }
}

// Launches by depth, then by block.
void by_depth(State* s) {
  for (auto& depths : *s->buckets)
    for (auto& found : depths) {
      std::sort(found.begin(), found.end(), [](const Bucket& a, const Bucket& b) { return a.block < b.block; });
      for (Bucket& b : found) s->launches->push_back({b.block, b.firsts.size(), 0, {}, {}, &b});
    }
}

// Launches as DyNet's agenda picks them from a graph: of the blocks with lines that are ready, the one whose lines are least
// deep in the mean, with all of those. `made` owns their lines.
void by_agenda(State* s, std::deque<Bucket>& made) {
  struct Node {
    size_t block;
    const int64_t* arguments;
    int64_t first, depth, waits, users;  // the last of its users among `uses`
  };
  struct Use {
    size_t user;
    int64_t before;
  };
  std::vector<Node> nodes;
  for (auto& depths : *s->buckets)
    for (auto& found : depths)
      for (Bucket& b : found)
        for (size_t i = 0; i < b.firsts.size(); i++)
          nodes.push_back({b.block, b.arguments.data() + i * (*s->table->blocks)[b.block].inputs.size(), b.firsts[i], 0, 0, -1});
  std::sort(nodes.begin(), nodes.end(), [](const Node& a, const Node& b) { return a.first < b.first; });
  const size_t blocks = s->table->blocks->size();
  const int64_t known = s->computed;  // ids below it have been computed
  std::vector<Use> uses;
  std::vector<int64_t> maker(s->next_id - known, -1);
  std::vector<double> depths(blocks, 0), counts(blocks, 0);
  std::vector<std::vector<size_t>> ready(blocks);
  for (size_t n = 0; n < nodes.size(); n++) {
    Node& node = nodes[n];
    const Block& b = (*s->table->blocks)[node.block];
    for (size_t k = 0; k < b.inputs.size(); k++)
      if (const int64_t id = node.arguments[k] - known, from = id < 0 ? -1 : maker[id]; from >= 0) {
        uses.push_back({n, nodes[from].users});
        nodes[from].users = static_cast<int64_t>(uses.size()) - 1;
        node.waits++;
        node.depth = std::max(node.depth, nodes[from].depth + 1);
      }
    for (size_t k = 0; k < b.outputs.size(); k++) maker[node.first - known + static_cast<int64_t>(k)] = static_cast<int64_t>(n);
    depths[node.block] += static_cast<double>(node.depth);
    counts[node.block] += 1;
    if (node.waits == 0) ready[node.block].push_back(n);
  }
  for (size_t left = nodes.size(); left > 0;) {
    size_t best = blocks;
    for (size_t b = 0; b < blocks; b++)
      if (!ready[b].empty() && (best == blocks || depths[b] / counts[b] < depths[best] / counts[best])) best = b;
    std::vector<size_t> run;
    run.swap(ready[best]);
    left -= run.size();
    Bucket& bucket = made.emplace_back(Bucket{best, {}, {}});
    const size_t arity = (*s->table->blocks)[best].inputs.size();
    for (size_t n : run) {
      bucket.arguments.insert(bucket.arguments.end(), nodes[n].arguments, nodes[n].arguments + arity);
      bucket.firsts.push_back(nodes[n].first);
      for (int64_t u = nodes[n].users; u >= 0; u = uses[u].before)
        if (Node& user = nodes[uses[u].user]; --user.waits == 0) ready[user.block].push_back(uses[u].user);
    }
    s->launches->push_back({best, run.size(), 0, {}, {}, &bucket});
  }
}

constexpr long long TRIALS = 8, AGAIN = 256;  // schedules that are made both ways, so often

// Replaces launches by depth with those of an agenda where `scheduler` says so.
void reschedule(State* s, std::deque<Bucket>& made) {
  Table* t = s->table;
  const bool tried = s->scheduler == FEWER && t->trials++ % AGAIN < TRIALS;
  if (t->trials % AGAIN == 1) t->by_depth = t->by_agenda = 0;
  // a graph takes time, which launches have to be worth
  if (!tried && s->scheduler != AGENDA && (s->scheduler == DEPTHS || 20 * t->by_agenda >= 19 * t->by_depth)) return;
  std::vector<Launch> other;
  other.swap(*s->launches);
  by_agenda(s, made);
  if (!tried) return;
  t->by_agenda += static_cast<long long>(s->launches->size());
  t->by_depth += static_cast<long long>(other.size());
  if (other.size() <= s->launches->size()) other.swap(*s->launches);
}

// schedule() -> [(block, count)]: launches of what was recorded.
PyObject* state_schedule(PyObject* self, PyObject*) {
  auto* s = reinterpret_cast<State*>(self);
  fit(s);
  s->launches->clear();
  s->rows->clear();
  std::deque<Bucket> own;
  by_depth(s);
  const bool first = s->keeps && s->computed == 0;
  std::vector<int64_t> key;
  if (first) key = key_of(s);
  s->reused = first && recalled(s, key);
  if (!s->reused) {
    reschedule(s, own);
    place_all(s);
  }
  if (first && !s->reused) {
    auto& kept = *s->table->schedules;
    kept.insert(kept.begin(), Schedule{std::move(key), *s->launches, *s->rows, *s->row_of, *s->used});
    if (kept.size() > SCHEDULES) kept.pop_back();
  }
  s->buckets->clear();
  s->same->clear();
  s->computed = s->next_id;
  PyObject* found = PyList_New(s->launches->size());
  for (size_t i = 0; found != nullptr && i < s->launches->size(); i++) {
    PyObject* entry = Py_BuildValue("nn", (*s->launches)[i].block, (*s->launches)[i].count);
    if (entry == nullptr) Py_CLEAR(found);
    else PyList_SET_ITEM(found, i, entry);
  }
  return found;
}

// scheduled(launch) -> (rows of its arguments as int64, first rows of its results, first rows of arguments that lie side by side,
// else -1)
PyObject* state_scheduled(PyObject* self, PyObject* launch) {
  auto* s = reinterpret_cast<State*>(self);
  const Py_ssize_t n = PyLong_AsSsize_t(launch);
  if (PyErr_Occurred()) return nullptr;
  if (n < 0 || n >= static_cast<Py_ssize_t>(s->launches->size())) {
    PyErr_SetString(PyExc_IndexError, "there is no such launch");
    return nullptr;
  }
  const Launch& l = (*s->launches)[n];
  const size_t bytes = l.side.size() * l.count * sizeof(int64_t);
  PyObject* rows = PyByteArray_FromStringAndSize(reinterpret_cast<const char*>(s->rows->data() + l.rows), bytes);
  return rows == nullptr ? nullptr : Py_BuildValue("NNN", rows, tuple_of(l.starts), tuple_of(l.side));
}

// numbers(address of the integers' pool, of the reals'): write the plain numbers that are values into their rows.
PyObject* state_numbers(PyObject* self, PyObject* args) {
  auto* s = reinterpret_cast<State*>(self);
  unsigned long long integers, reals;
  if (!PyArg_ParseTuple(args, "KK", &integers, &reals)) return nullptr;
  for (size_t i = 0; i < s->integer_ids->size(); i++)
    reinterpret_cast<int64_t*>(integers)[(*s->row_of)[(*s->integer_ids)[i]]] = (*s->integers)[i];
  for (size_t i = 0; i < s->real_ids->size(); i++)
    reinterpret_cast<float*>(reals)[(*s->row_of)[(*s->real_ids)[i]]] = static_cast<float>((*s->reals)[i]);
  for (auto* v : {s->integer_ids, s->integers, s->real_ids}) v->clear();
  s->reals->clear();
  Py_RETURN_NONE;
}

// -- running --------------------------------------------------------------------------------------------------------------

constexpr int64_t BAD_ROW = -100, NO_MEMORY = -101;

struct Spent {
  int64_t gathered = 0, gathers = 0, kernels = 0;  // bytes, nanoseconds
};

void gather(char* into, const char* pool, int64_t row_bytes, const int64_t* rows, size_t count) {
  switch (row_bytes) {  // a known size is copied without a call
    case 4:
      for (size_t i = 0; i < count; i++) std::memcpy(into + i * 4, pool + rows[i] * 4, 4);
      return;
    case 8:
      for (size_t i = 0; i < count; i++) std::memcpy(into + i * 8, pool + rows[i] * 8, 8);
      return;
    default:
      for (size_t i = 0; i < count; i++) std::memcpy(into + i * row_bytes, pool + rows[i] * row_bytes, row_bytes);
  }
}

char* keep(State* s, size_t bytes) {
  auto* made = static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64));
  if (made == nullptr) throw std::bad_alloc();
  s->memory->push_back(made);
  return made;
}

// Sizes of a launch; 0, or the status of what failed.
int64_t size_up(const Direct& d, size_t count, std::vector<char*>& bases, std::vector<int64_t>& slots) {
  if (bases.empty()) bases = d.bases;
  if (slots.empty()) slots = d.slots;
  for (int64_t slot : d.counts) slots[slot] = static_cast<int64_t>(count);
  return d.sizes == nullptr ? 0 : d.run(d.sizes, bases.data(), slots.data(), 1, nullptr);
}

thread_local std::vector<char> scratch;

char* room(size_t bytes) {
  if (scratch.size() < bytes + 64) scratch = std::vector<char>(bytes + 64);
  return padded(scratch.data());
}

// Plans hold for two instances and more: a single one runs twice, and its results are copied from scratch memory.
int64_t run(State* s, const Launch& l, const std::vector<char*>& pools, int threads, Spent& spent) {
  Block& b = (*s->table->blocks)[l.block];
  Plan& plan = *b.plan;
  const Way way = way_of(plan);
  bool by_rows = way == ROWS || (way == TRYING && plan.took[1].size() < plan.took[0].size()), scattered = false;
  for (size_t k = 0; by_rows && k < plan.indexed.rows.size(); k++) scattered |= plan.indexed.rows[k] >= 0 && (l.side[k] < 0 || l.count == 1);
  by_rows = by_rows && scattered;  // rows that lie side by side are read where they are
  const Direct& d = by_rows ? plan.indexed.direct : plan.direct;
  const Trained& trained = plan.trained;
  const int64_t started = now();
  const size_t count = l.count == 1 ? 2 : l.count, arity = b.inputs.size();
  std::vector<char*> bases;
  std::vector<int64_t> slots;
  if (by_rows) {
    bases = d.bases;
    slots = d.slots;
    for (int64_t slot : plan.indexed.heights) slots[slot] = INT64_MAX / 2;  // its row ids are in range
  }
  if (const int64_t status = size_up(d, count, bases, slots)) return status;
  const bool trains = trained.backward.run != nullptr;
  std::vector<char> kept(arity, 0);  // arguments that the backward reads
  for (const auto& saved : trained.saved)
    if (saved.kind == Trained::ARGUMENT) kept[saved.at] = 1;
  size_t bytes = static_cast<size_t>(slots[d.arena]) + 64;
  for (size_t k = 0; k < arity; k++) bytes += count * (*s->table->row_bytes)[b.inputs[k]] + 64;
  for (size_t k = 0; k < b.outputs.size(); k++) bytes += 2 * (*s->table->row_bytes)[b.outputs[k]] + 64;
  char* at = room(bytes);
  std::vector<char*> found(arity, nullptr);
  std::vector<std::array<int64_t, 2>> twice(by_rows ? arity : 0);
  bases[0] = at;
  at += slots[d.arena];
  for (size_t k = 0; k < arity; k++) {
    if (d.inputs[k] < 0 && !kept[k]) continue;
    const int64_t row_bytes = (*s->table->row_bytes)[b.inputs[k]];
    char* pool = pools[b.inputs[k]];
    const int64_t* rows = s->rows->data() + l.rows + k * l.count;
    if (by_rows && plan.indexed.rows[k] >= 0) {
      bases[d.inputs[k]] = pool;
      twice[k] = {rows[0], rows[0]};
      bases[plan.indexed.rows[k]] = reinterpret_cast<char*>(l.count == 1 ? twice[k].data() : const_cast<int64_t*>(rows));
      continue;
    }
    if (l.side[k] >= 0 && l.count > 1) {  // rows of a pool are written once: the backward may read them where they are
      found[k] = pool + l.side[k] * row_bytes;
      if (d.inputs[k] >= 0) bases[d.inputs[k]] = found[k];
      continue;
    }
    at = padded(at);
    char* into = found[k] = kept[k] ? keep(s, count * row_bytes) : at;
    if (d.inputs[k] >= 0) bases[d.inputs[k]] = into;
    gather(into, pool, row_bytes, rows, l.count);
    if (l.count == 1) std::memcpy(into + row_bytes, into, row_bytes);
    if (!kept[k]) at += count * row_bytes;
    spent.gathered += l.count * row_bytes;
    b.gathered[k] = 1;
  }
  for (size_t k = 0; k < b.outputs.size(); k++) {
    const int64_t row_bytes = (*s->table->row_bytes)[b.outputs[k]];
    if (l.count > 1) {
      bases[d.outputs[k]] = pools[b.outputs[k]] + l.starts[k] * row_bytes;
      continue;
    }
    bases[d.outputs[k]] = at = padded(at);
    at += 2 * row_bytes;
  }
  if (trains) {
    Kept k{l.block, l.count, b.plan, {}, l.starts, {}};
    k.rows.assign(s->rows->begin() + static_cast<int64_t>(l.rows), s->rows->begin() + static_cast<int64_t>(l.rows + arity * l.count));
    for (const auto& saved : trained.saved) {
      char* where = nullptr;
      if (saved.kind == Trained::MEMORY) {
        if (bases[saved.at] == nullptr) bases[saved.at] = keep(s, static_cast<size_t>(slots[saved.bytes]));
        where = bases[saved.at];
      } else if (saved.kind == Trained::ARGUMENT) {
        where = found[saved.at];
      } else if (saved.kind == Trained::RESULT) {
        where = bases[d.outputs[saved.at]];
      }
      k.saved.push_back(where);
    }
    s->kept->push_back(std::move(k));
  }
  for (size_t i = 0; i < d.checks.size(); i += 2) *reinterpret_cast<int64_t*>(bases[d.checks[i]] + slots[d.checks[i + 1]]) = 0;
  const int64_t ready = now();
  int64_t status = d.run(d.program, bases.data(), slots.data(), threads, nullptr);
  const int64_t ended = now();
  spent.gathers += ready - started;
  spent.kernels += ended - ready;
  b.gathers += ready - started;
  b.kernels += ended - ready;
  if (way == TRYING && (by_rows || plan.took[0].size() <= plan.took[1].size())) plan.took[by_rows].push_back(static_cast<double>(ended - started) / static_cast<double>(l.count));
  if (l.count == 1)
    for (size_t k = 0; k < b.outputs.size(); k++) {
      const int64_t row_bytes = (*s->table->row_bytes)[b.outputs[k]];
      std::memcpy(pools[b.outputs[k]] + l.starts[k] * row_bytes, bases[d.outputs[k]], row_bytes);
    }
  if (trains && l.count == 1)
    for (size_t i = 0; i < trained.saved.size(); i++)
      if (const auto& saved = trained.saved[i]; saved.kind == Trained::RESULT) {
        const size_t size = 2 * (*s->table->row_bytes)[b.outputs[saved.at]];
        char* own = keep(s, size);
        std::memcpy(own, s->kept->back().saved[i], size);
        s->kept->back().saved[i] = own;
      }
  for (size_t i = 0; i < d.checks.size() && status == 0; i += 2)
    if (*reinterpret_cast<int64_t*>(bases[d.checks[i]] + slots[d.checks[i + 1]]) != 0) status = BAD_ROW;
  return status;
}

// run(first, end, addresses of the pools, threads) -> (status, launches that ran, bytes gathered, nanoseconds of gathers, of
// kernels)
PyObject* state_run(PyObject* self, PyObject* args) {
  auto* s = reinterpret_cast<State*>(self);
  Py_ssize_t first, end;
  PyObject* given;
  int threads;
  if (!PyArg_ParseTuple(args, "nnO!i", &first, &end, &PyTuple_Type, &given, &threads)) return nullptr;
  std::vector<char*> pools;
  if (!addresses(given, pools)) return nullptr;
  Spent spent;
  int64_t status = 0;
  Py_ssize_t ran = 0;
  Py_BEGIN_ALLOW_THREADS;
  Py_ssize_t i = first;
  for (; i < end && status == 0; i++) try {
      status = run(s, (*s->launches)[i], pools, threads, spent);
    } catch (const std::bad_alloc&) {
      status = NO_MEMORY;
    }
  ran = i - first;
  Py_END_ALLOW_THREADS;
  return Py_BuildValue("LnLLL", status, ran, spent.gathered, spent.gathers, spent.kernels);
}

// -- the backward -----------------------------------------------------------------------------------------------------------

template <class T> void add(char* into, const char* from, size_t count) {
  for (size_t i = 0; i < count; i++) reinterpret_cast<T*>(into)[i] += reinterpret_cast<const T*>(from)[i];
}

void add_bytes(char* into, const char* from, size_t bytes, int64_t item) {
  if (item == 4) add<float>(into, from, bytes / 4);
  else add<double>(into, from, bytes / 8);
}

// Adds the gradients of one launch to those of its arguments. `shared` are where the tensors that all share, and their
// gradients, are: address after address.
int64_t run_backward(State* s, const Kept& k, const std::vector<char*>& pools, const std::vector<char*>& touched,
                     const std::vector<char*>& shared, int threads, bool& ran) {
  const Block& b = (*s->table->blocks)[k.block];
  const Trained& trained = k.plan->trained;
  const Direct& d = trained.backward;
  const auto& row_bytes = *s->table->row_bytes;
  bool any = false;
  for (size_t r = 0; r < b.outputs.size(); r++)
    if (const char* flags = touched[b.outputs[r]])
      for (size_t i = 0; i < k.count && !any; i++) any = flags[k.starts[r] + static_cast<int64_t>(i)];
  if (!any) return 0;
  ran = true;
  const size_t count = k.count == 1 ? 2 : k.count;
  std::vector<char*> bases;
  std::vector<int64_t> slots;
  if (const int64_t status = size_up(d, count, bases, slots)) return status;
  size_t bytes = static_cast<size_t>(slots[d.arena]) + 64;
  for (const auto& g : trained.gradients)
    if (g.base >= 0) bytes += static_cast<size_t>(slots[g.bytes]) + 64;
  for (auto [r, base] : trained.tangents) bytes += 2 * row_bytes[b.outputs[r]] + 64;
  char* at = room(bytes);
  bases[0] = at;
  at += slots[d.arena];
  for (size_t i = 0; i < k.saved.size(); i++) {
    const auto& saved = trained.saved[i];
    if (saved.base >= 0) bases[saved.base] = saved.kind == Trained::SHARED ? shared[2 * saved.at] : k.saved[i];
  }
  std::vector<char*> tangents;
  for (auto [r, base] : trained.tangents) {
    const int64_t size = row_bytes[b.outputs[r]];
    char* grad = pools[b.outputs[r]] + k.starts[r] * size;
    if (k.count == 1) {
      at = padded(at);
      std::memcpy(at, grad, size);
      std::memset(at + size, 0, size);
      grad = at;
      at += 2 * size;
    }
    tangents.push_back(grad);
    if (base >= 0) bases[base] = grad;
  }
  for (const auto& g : trained.gradients) {
    if (g.base < 0) continue;
    at = padded(at);
    bases[g.base] = at;
    at += slots[g.bytes];
  }
  if (const int64_t status = d.run(d.program, bases.data(), slots.data(), threads, nullptr)) return status;
  const int64_t arity = static_cast<int64_t>(b.inputs.size());
  for (const auto& g : trained.gradients) {
    const char* from = g.base >= 0 ? bases[g.base] : tangents[-1 - g.base];  // one that is only passed on
    if (g.argument >= arity) {
      if (char* into = shared[2 * (g.argument - arity) + 1]) add_bytes(into, from, static_cast<size_t>(slots[g.bytes]), g.item);
      continue;
    }
    const int type = b.inputs[g.argument];
    const int64_t size = row_bytes[type];
    const int64_t* rows = k.rows.data() + g.argument * static_cast<int64_t>(k.count);
    for (size_t i = 0; i < k.count; i++) {
      add_bytes(pools[type] + rows[i] * size, from + static_cast<int64_t>(i) * size, size, g.item);
      touched[type][rows[i]] = 1;
    }
  }
  return 0;
}

// backward(first, end, addresses of the gradients' pools, of what says which rows have any, {block: addresses of shared tensors
// and of their gradients}, threads) -> (status, the blocks of launches that had any). Goes through launches in reverse.
PyObject* state_backward(PyObject* self, PyObject* args) {
  auto* s = reinterpret_cast<State*>(self);
  Py_ssize_t first, end;
  PyObject *given, *flags, *by_block;
  int threads;
  if (!PyArg_ParseTuple(args, "nnO!O!O!i", &first, &end, &PyTuple_Type, &given, &PyTuple_Type, &flags, &PyDict_Type, &by_block, &threads))
    return nullptr;
  std::vector<char*> pools, touched;
  if (!addresses(given, pools) || !addresses(flags, touched)) return nullptr;
  std::vector<std::vector<char*>> shared(s->table->blocks->size());
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(by_block, &at, &key, &value);)
    if (!addresses(value, shared[PyLong_AsSize_t(key)])) return nullptr;
  int64_t status = 0;
  std::vector<char> ran(shared.size(), 0);
  // The interpreter lock is kept: a call in another thread may add blocks to the table.
  for (Py_ssize_t i = end - 1; i >= first && status == 0; i--) {
    const Kept& k = (*s->kept)[i];
    bool now = false;
    try {
      status = run_backward(s, k, pools, touched, shared[k.block], threads, now);
    } catch (const std::bad_alloc&) {
      status = NO_MEMORY;
    }
    ran[k.block] |= now;
  }
  std::vector<int64_t> found;
  for (size_t b = 0; b < ran.size(); b++)
    if (ran[b]) found.push_back(static_cast<int64_t>(b));
  return Py_BuildValue("LN", status, tuple_of(found));
}

// kept() -> how many launches the backward goes through so far
PyObject* state_kept(PyObject* self, PyObject*) { return PyLong_FromSize_t(reinterpret_cast<State*>(self)->kept->size()); }

}  // namespace

PyMethodDef launch_methods[] = {
    {"put", state_put, METH_VARARGS, nullptr},
    {"row", state_row, METH_O, nullptr},
    {"rows", state_rows, METH_O, nullptr},
    {"read", state_read, METH_VARARGS, nullptr},
    {"used", state_used, METH_NOARGS, nullptr},
    {"schedule", state_schedule, METH_NOARGS, nullptr},
    {"scheduled", state_scheduled, METH_O, nullptr},
    {"numbers", state_numbers, METH_VARARGS, nullptr},
    {"run", state_run, METH_VARARGS, nullptr},
    {"kept", state_kept, METH_NOARGS, nullptr},
    {"backward", state_backward, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

bool ready_table() {
  table_type.tp_name = "plait_record.Table";
  table_type.tp_basicsize = sizeof(Table);
  table_type.tp_flags = Py_TPFLAGS_DEFAULT;
  table_type.tp_new = table_new;
  table_type.tp_dealloc = table_dealloc;
  table_type.tp_methods = table_methods;
  return PyType_Ready(&table_type) == 0;
}

}  // namespace plait
