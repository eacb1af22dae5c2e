// The hot part of recording: pending tensors, the lines of a call, and what cut code calls to run a block.
//
// `record_python.py` is the same without a compiler.
#include "state.h"

#include <algorithm>
#include <cstdlib>

namespace plait {
namespace {

// -- handles --------------------------------------------------------------------------------------------------------------

// Lets go of the recorder once the call has ended and nobody holds a pending tensor of it.
void settle(State* s) {
  if (s->closed && s->live == 0) Py_CLEAR(s->recorder);
}

PyObject* handle_made(PyTypeObject* type, State* s, PyObject* kind, long long id, long long depth, uint64_t ancestors) {
  auto* h = reinterpret_cast<Handle*>(type->tp_alloc(type, 0));
  if (h == nullptr) return nullptr;
  h->state = reinterpret_cast<State*>(Py_NewRef(reinterpret_cast<PyObject*>(s)));
  h->type = Py_NewRef(kind);
  h->view_of = Py_NewRef(Py_None);
  h->id = id;
  h->depth = depth;
  h->ancestors = ancestors;
  s->live++;
  return reinterpret_cast<PyObject*>(h);
}

void handle_dealloc(PyObject* self) {
  auto* h = reinterpret_cast<Handle*>(self);
  Py_CLEAR(h->type);
  Py_CLEAR(h->view_of);
  if (h->state != nullptr) {
    h->state->live--;
    settle(h->state);
    Py_CLEAR(h->state);
  }
  Py_TYPE(self)->tp_free(self);
}

PyObject* handle_recorder(PyObject* self, void*) {
  PyObject* recorder = reinterpret_cast<Handle*>(self)->state->recorder;
  return Py_NewRef(recorder == nullptr ? Py_None : recorder);
}

PyMemberDef handle_members[] = {
    {"type", T_OBJECT, offsetof(Handle, type), READONLY, nullptr},
    {"view_of", T_OBJECT, offsetof(Handle, view_of), 0, nullptr},
    {"id", T_LONGLONG, offsetof(Handle, id), 0, nullptr},
    {"depth", T_LONGLONG, offsetof(Handle, depth), 0, nullptr},
    {"viewed", T_BOOL, offsetof(Handle, viewed), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyGetSetDef handle_properties[] = {{"recorder", handle_recorder, nullptr, nullptr, nullptr}, {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyTypeObject handle_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

// -- lines ----------------------------------------------------------------------------------------------------------------

thread_local State* current = nullptr;

PyObject* state_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *recorder, *table;
  if (!PyArg_ParseTuple(args, "OO!", &recorder, &table_type, &table)) return nullptr;
  auto* s = reinterpret_cast<State*>(type->tp_alloc(type, 0));
  if (s == nullptr) return nullptr;
  s->recorder = Py_NewRef(recorder);
  s->table = reinterpret_cast<Table*>(Py_NewRef(table));
  s->buckets = new std::vector<std::vector<std::vector<Bucket>>>;
  for (auto** v : {&s->integer_ids, &s->integers, &s->real_ids, &s->row_of, &s->used, &s->given, &s->rows}) *v = new std::vector<int64_t>;
  s->reals = new std::vector<double>;
  s->launches = new std::vector<Launch>;
  s->same = new std::vector<Same>;
  s->kept = new std::vector<Kept>;
  s->memory = new std::vector<char*>;
  s->lifted = new std::unordered_map<PyObject*, Lifted>;
  s->waiting = PyDict_New();
  s->wanting = PyList_New(0);
  s->shared = Py_NewRef(Py_None);
  s->keeps = 1;
  return reinterpret_cast<PyObject*>(s);
}

void forget_lifted(State* s) {
  std::unordered_map<PyObject*, Lifted> gone;
  gone.swap(*s->lifted);
  for (auto& [tensor, found] : gone) {
    Py_DECREF(tensor);
    Py_DECREF(found.value);
  }
}

void state_dealloc(PyObject* self) {
  auto* s = reinterpret_cast<State*>(self);
  if (current == s) current = nullptr;
  forget_lifted(s);
  delete s->lifted;
  for (PyObject** held : {&s->recorder, &s->waiting, &s->wanting, &s->shared}) Py_CLEAR(*held);
  Py_CLEAR(s->table);
  delete s->buckets;
  for (auto* v : {s->integer_ids, s->integers, s->real_ids, s->row_of, s->used, s->given, s->rows}) delete v;
  delete s->reals;
  delete s->launches;
  for (char* m : *s->memory) std::free(m);
  delete s->kept;
  delete s->memory;
  delete s->same;
  Py_TYPE(self)->tp_free(self);
}

// The id of a plain number as a value; -1 with an error set for one that does not fit.
long long number(State* s, PyObject* n) {
  if (PyFloat_CheckExact(n)) {
    s->real_ids->push_back(s->next_id);
    s->reals->push_back(PyFloat_AS_DOUBLE(n));
  } else {
    const long long value = PyLong_AsLongLong(n);
    if (value == -1 && PyErr_Occurred()) return -1;
    s->integer_ids->push_back(s->next_id);
    s->integers->push_back(value);
  }
  return s->next_id++;
}

PyObject* state_number(PyObject* self, PyObject* n) {
  const long long id = number(reinterpret_cast<State*>(self), n);
  return id < 0 ? nullptr : PyLong_FromLongLong(id);
}

// A line of a block with arguments of these ids, depths and ancestors; the first id of its results.
struct Line {
  long long depth, first;
  uint64_t ancestors;
};

Line add_line(State* s, size_t block, const long long* ids, const uint64_t* ancestors, size_t count, long long depth, size_t results) {
  Bucket& b = bucket_of(s, block, ++depth);
  b.arguments.insert(b.arguments.end(), ids, ids + count);
  b.firsts.push_back(s->next_id);
  uint64_t all = bit_of(block);
  auto& recursive = (*s->table->blocks)[block].recursive;
  for (size_t k = 0; k < count; k++) {
    all |= ancestors[k];
    if (ancestors[k] & bit_of(block)) recursive[k] = 1;
  }
  const Line made{depth, s->next_id, all};
  s->next_id += static_cast<long long>(results);
  return made;
}

constexpr size_t MOST = 32;  // arguments of a quick call

// line(block, arguments, results) -> (depth, id of the first result, ancestors of all)
PyObject* state_line(PyObject* self, PyObject* args) {
  auto* s = reinterpret_cast<State*>(self);
  Py_ssize_t block, results;
  PyObject* given;
  if (!PyArg_ParseTuple(args, "nO!n", &block, &PyList_Type, &given, &results)) return nullptr;
  std::vector<long long> ids;
  std::vector<uint64_t> ancestors;
  long long depth = s->floor;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given); i++) {
    auto* h = reinterpret_cast<Handle*>(PyList_GET_ITEM(given, i));
    ids.push_back(h->id);
    ancestors.push_back(h->ancestors);
    depth = std::max(depth, depth_of(s, h));
  }
  const Line l = add_line(s, block, ids.data(), ancestors.data(), ids.size(), depth, results);
  return Py_BuildValue("LLK", l.depth, l.first, static_cast<unsigned long long>(l.ancestors));
}

// pending(class, type, id, depth, ancestors) -> a pending tensor of this call
PyObject* state_pending(PyObject* self, PyObject* args) {
  PyObject *type, *kind;
  long long id, depth;
  unsigned long long ancestors;
  if (!PyArg_ParseTuple(args, "O!OLLK", &PyType_Type, &type, &kind, &id, &depth, &ancestors)) return nullptr;
  return handle_made(reinterpret_cast<PyTypeObject*>(type), reinterpret_cast<State*>(self), kind, id, depth, ancestors);
}

// -- real tensors -----------------------------------------------------------------------------------------------------------

bool (*grad_enabled)() = nullptr;  // torch's own: whether gradients are recorded in this thread
int (*get_disabled)() = nullptr;  // torch's own: whether overrides of its API are off in this thread
void (*set_disabled)(int) = nullptr;
bool (*autocasts)(int8_t) = nullptr;  // torch's own: whether autocast is on for a type of devices
constexpr int8_t CPU = 0, CUDA = 1;   // as c10::DeviceType
constexpr int ALL_DISABLED = 2;

PyObject* names[4];  // of attributes: shape, dtype, device, requires_grad
enum Name { SHAPE, DTYPE, DEVICE, REQUIRES_GRAD };

// What overrides of torch's API must not see.
struct Plainly {
  int before = get_disabled();
  Plainly() { set_disabled(ALL_DISABLED); }
  ~Plainly() { set_disabled(before); }
};

// Whether attributes of a tensor and of a type are the same; -1 with an error set.
int same_attribute(PyObject* tensor, PyObject* type, Name name) {
  PyObject *a = PyObject_GetAttr(tensor, names[name]), *b = PyObject_GetAttr(type, names[name]);
  const int same = a == nullptr || b == nullptr ? -1 : PyObject_RichCompareBool(a, b, Py_EQ);
  Py_XDECREF(a);
  Py_XDECREF(b);
  return same;
}

// Notes a tensor that wants a gradient, the first time that gradients are recorded; false with an error set.
bool ask(State* s, PyObject* tensor, Lifted& found) {
  if (found.asked || !grad_enabled()) return true;
  found.asked = true;
  auto* h = reinterpret_cast<Handle*>(found.value);
  PyObject* wants = PyObject_GetAttr(tensor, names[REQUIRES_GRAD]);
  PyObject* entry = wants == Py_True ? Py_BuildValue("OOL", tensor, h->type, h->id) : nullptr;
  const bool noted = entry != nullptr ? PyList_Append(s->wanting, entry) == 0 : wants != nullptr && wants != Py_True;
  Py_XDECREF(entry);
  Py_XDECREF(wants);
  return noted;
}

// The value of a real tensor, made where it is the first time: a new reference.
PyObject* lift(State* s, PyObject* cls, PyObject* tensor, PyObject* type) {
  if (const auto found = s->lifted->find(tensor); found != s->lifted->end())
    return ask(s, tensor, found->second) ? Py_NewRef(found->second.value) : nullptr;
  PyObject* id = PyLong_FromLongLong(s->next_id);
  PyObject* same = PyDict_GetItemWithError(s->waiting, type);
  if (same == nullptr && !PyErr_Occurred() && (same = PyDict_New()) != nullptr) {
    PyDict_SetItem(s->waiting, type, same);
    Py_DECREF(same);
  }
  const bool waits = id != nullptr && same != nullptr && !PyErr_Occurred() && PyDict_SetItem(same, id, tensor) == 0;
  Py_XDECREF(id);
  PyObject* value = waits ? handle_made(reinterpret_cast<PyTypeObject*>(cls), s, type, s->next_id, 0, 0) : nullptr;
  if (value == nullptr) return nullptr;
  s->next_id++;
  Lifted& made = s->lifted->emplace(Py_NewRef(tensor), Lifted{value, false}).first->second;
  return ask(s, tensor, made) ? Py_NewRef(value) : nullptr;
}

// lift(class, tensor, type) -> its value; in the absence of overrides of torch's API.
PyObject* state_lift(PyObject* self, PyObject* args) {
  PyObject *cls, *tensor, *type;
  if (!PyArg_ParseTuple(args, "O!OO", &PyType_Type, &cls, &tensor, &type)) return nullptr;
  return lift(reinterpret_cast<State*>(self), cls, tensor, type);
}

// The value of a real tensor where it is of this type and not shared; null, with or without an error set, where it is not.
PyObject* lift_as(State* s, PyObject* cls, PyObject* tensor, PyObject* type) {
  if (const auto found = s->lifted->find(tensor); found != s->lifted->end() && (found->second.asked || !grad_enabled()))
    return reinterpret_cast<Handle*>(found->second.value)->type == type ? Py_NewRef(found->second.value) : nullptr;
  const Plainly plainly;
  if (s->shared != Py_None) {
    PyObject* address = PyLong_FromVoidPtr(tensor);
    const int shared = address == nullptr ? -1 : PyDict_Contains(s->shared, address);
    Py_XDECREF(address);
    if (shared != 0) return nullptr;
  }
  for (const Name name : {SHAPE, DTYPE, DEVICE})
    if (same_attribute(tensor, type, name) != 1) return nullptr;
  return lift(s, cls, tensor, type);
}

// end() -> whether no pending tensor is left; the recorder is let go of once that is so.
PyObject* state_end(PyObject* self, PyObject*) {
  auto* s = reinterpret_cast<State*>(self);
  forget_lifted(s);
  const bool alone = s->live == 0;
  s->closed = 1;
  settle(s);
  return PyBool_FromLong(alone);
}

PyMemberDef state_members[] = {
    {"next_id", T_LONGLONG, offsetof(State, next_id), 0, nullptr},
    {"floor", T_LONGLONG, offsetof(State, floor), 0, nullptr},
    {"keeps", T_BOOL, offsetof(State, keeps), 0, nullptr},
    {"scheduler", T_INT, offsetof(State, scheduler), 0, nullptr},
    {"reused", T_BOOL, offsetof(State, reused), READONLY, nullptr},
    {"waiting", T_OBJECT, offsetof(State, waiting), 0, nullptr},
    {"wanting", T_OBJECT, offsetof(State, wanting), READONLY, nullptr},
    {"shared", T_OBJECT, offsetof(State, shared), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyTypeObject state_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

// -- quick calls ----------------------------------------------------------------------------------------------------------

enum How { PENDING, SAME, EQUAL, NUMBER, REAL };

struct Kind {
  How how;
  PyObject* what;  // the type of a pending or real tensor, the very object, an equal one, the class of a number
};

// A hoisted block that runs before: it takes the arguments at `places`, and the block takes those at `kept`, then its results.
struct Before {
  size_t block = 0, results = 0;
  std::vector<size_t> places, kept;
};

struct Version {
  bool grad;
  size_t block;
  std::vector<Kind> kinds;
  std::vector<PyObject*> types;  // of the block's results
  std::vector<std::pair<size_t, size_t>> views;  // (result of the block, argument) that share memory in eager
  std::vector<size_t> order;     // results of the call among those of the block
  bool single;                   // one result, not a tuple
  bool hoisted = false;
  Before before;
};

struct Quick {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject *slow, *pending, *tensor;
  std::vector<Version>* versions;
};

bool fits(const Quick* q, const Version& v, PyObject* const* args) {
  for (size_t i = 0; i < v.kinds.size(); i++) {
    const Kind& k = v.kinds[i];
    PyObject* a = args[i];
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(a));
    switch (k.how) {
      case PENDING:
        if (type != q->pending || reinterpret_cast<Handle*>(a)->type != k.what) return false;
        break;
      case SAME:
        if (a != k.what) return false;
        break;
      case EQUAL: {
        if (Py_TYPE(a) != Py_TYPE(k.what)) return false;
        const int equal = PyObject_RichCompareBool(a, k.what, Py_EQ);
        if (equal < 0) PyErr_Clear();
        if (equal != 1) return false;
        break;
      }
      case NUMBER:
        if (type != k.what) return false;
        break;
      case REAL:
        if (type != q->tensor) return false;
        break;
    }
  }
  return true;
}

// Records the line of a hoisted block, or finds the last one to be the same; the arguments of the block that follows take the
// place of its own. Returns their number.
size_t hoist(State* s, const Before& b, long long* ids, long long* depths, uint64_t* ancestors) {
  long long own[MOST], kept_ids[MOST], kept_depths[MOST], depth = s->floor;
  uint64_t own_ancestors[MOST], kept_ancestors[MOST];
  for (size_t i = 0; i < b.places.size(); i++) {
    own[i] = ids[b.places[i]];
    own_ancestors[i] = ancestors[b.places[i]];
    depth = std::max(depth, depths[b.places[i]]);
  }
  if (b.block >= s->same->size()) s->same->resize(b.block + 1);
  Same& last = (*s->same)[b.block];
  uint64_t all = bit_of(b.block);
  if (last.depth != depth || !std::equal(last.arguments.begin(), last.arguments.end(), own, own + b.places.size())) {
    const Line l = add_line(s, b.block, own, own_ancestors, b.places.size(), depth, b.results);
    last.arguments.assign(own, own + b.places.size());
    last.depth = depth;
    last.first = l.first;
    all = l.ancestors;
  }
  size_t count = 0;
  for (size_t k : b.kept) {
    kept_ids[count] = ids[k];
    kept_depths[count] = depths[k];
    kept_ancestors[count++] = ancestors[k];
  }
  for (size_t r = 0; r < b.results; r++) {
    kept_ids[count] = last.first + static_cast<long long>(r);
    kept_depths[count] = depth + 1;
    kept_ancestors[count++] = all;
  }
  std::copy(kept_ids, kept_ids + count, ids);
  std::copy(kept_depths, kept_depths + count, depths);
  std::copy(kept_ancestors, kept_ancestors + count, ancestors);
  return count;
}

// Records one line. `lifted` are the handles of real tensors. Null with an error set, or without one for a number that is too
// large.
PyObject* record(Quick* q, State* s, const Version& v, PyObject* const* args, PyObject* const* lifted) {
  long long ids[MOST], depths[MOST];
  uint64_t ancestors[MOST];
  size_t count = 0;
  for (size_t i = 0; i < v.kinds.size(); i++) {
    const How how = v.kinds[i].how;
    if (how == NUMBER) {
      if ((ids[count] = number(s, args[i])) < 0) {
        PyErr_Clear();
        return nullptr;
      }
      depths[count] = 0;
      ancestors[count++] = 0;
    } else if (how == PENDING || how == REAL) {
      auto* h = reinterpret_cast<Handle*>(how == REAL ? lifted[i] : args[i]);
      ids[count] = h->id;
      depths[count] = depth_of(s, h);
      ancestors[count++] = h->ancestors;
    }
  }
  if (v.hoisted) count = hoist(s, v.before, ids, depths, ancestors);
  long long depth = s->floor;
  for (size_t k = 0; k < count; k++) depth = std::max(depth, depths[k]);
  Line l = add_line(s, v.block, ids, ancestors, count, depth, v.types.size());
  PyObject* made[MOST];
  for (size_t k = 0; k < v.types.size(); k++)
    if ((made[k] = handle_made(reinterpret_cast<PyTypeObject*>(q->pending), s, v.types[k], l.first++, l.depth, l.ancestors)) == nullptr)
      return nullptr;
  for (auto [result, argument] : v.views) {
    PyObject* base = v.kinds[argument].how == REAL ? lifted[argument] : args[argument];
    if (v.kinds[argument].how == NUMBER) continue;
    auto* h = reinterpret_cast<Handle*>(made[result]);
    Py_SETREF(h->view_of, Py_NewRef(base));
    reinterpret_cast<Handle*>(base)->viewed = 1;
  }
  PyObject* found;
  if (v.single) {
    found = Py_NewRef(made[v.order[0]]);
  } else {
    found = PyTuple_New(v.order.size());
    for (size_t k = 0; found != nullptr && k < v.order.size(); k++) PyTuple_SET_ITEM(found, k, Py_NewRef(made[v.order[k]]));
  }
  for (size_t k = 0; k < v.types.size(); k++) Py_DECREF(made[k]);
  return found;
}

PyObject* quick_call(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* kwnames) {
  auto* q = reinterpret_cast<Quick*>(self);
  State* s = current;
  const size_t count = PyVectorcall_NARGS(nargsf);
  if (s != nullptr && kwnames == nullptr && count <= MOST && !autocasts(CPU) && !autocasts(CUDA)) {
    int grad = -1;
    for (const Version& v : *q->versions) {
      if (v.kinds.size() != count || !fits(q, v, args)) continue;
      if (grad < 0) grad = grad_enabled();
      if (grad != v.grad) continue;
      PyObject* lifted[MOST] = {};
      bool all = true;
      for (size_t i = 0; all && i < count; i++) {
        if (v.kinds[i].how != REAL) continue;
        lifted[i] = lift_as(s, q->pending, args[i], v.kinds[i].what);
        all = lifted[i] != nullptr;
      }
      PyObject* made = all ? record(q, s, v, args, lifted) : nullptr;
      for (PyObject* h : lifted) Py_XDECREF(h);
      if (made != nullptr || PyErr_Occurred()) return made;
    }
  }
  return PyObject_Vectorcall(q->slow, args, nargsf, kwnames);
}

PyObject* quick_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *slow, *pending, *tensor;
  if (!PyArg_ParseTuple(args, "OOO", &slow, &pending, &tensor)) return nullptr;
  auto* q = reinterpret_cast<Quick*>(type->tp_alloc(type, 0));
  if (q == nullptr) return nullptr;
  q->call = quick_call;
  q->slow = Py_NewRef(slow);
  q->pending = Py_NewRef(pending);
  q->tensor = Py_NewRef(tensor);
  q->versions = new std::vector<Version>;
  return reinterpret_cast<PyObject*>(q);
}

int quick_traverse(PyObject* self, visitproc visit, void* arg) {
  auto* q = reinterpret_cast<Quick*>(self);
  Py_VISIT(q->slow);
  Py_VISIT(q->pending);
  Py_VISIT(q->tensor);
  for (const Version& v : *q->versions) {
    for (const Kind& k : v.kinds) Py_VISIT(k.what);
    for (PyObject* t : v.types) Py_VISIT(t);
  }
  return 0;
}

int quick_clear(PyObject* self) {
  auto* q = reinterpret_cast<Quick*>(self);
  std::vector<Version> gone;
  gone.swap(*q->versions);
  for (Version& v : gone) {
    for (Kind& k : v.kinds) Py_CLEAR(k.what);
    for (PyObject*& t : v.types) Py_CLEAR(t);
  }
  Py_CLEAR(q->slow);
  Py_CLEAR(q->pending);
  Py_CLEAR(q->tensor);
  return 0;
}

void quick_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  quick_clear(self);
  delete reinterpret_cast<Quick*>(self)->versions;
  Py_TYPE(self)->tp_free(self);
}

bool positions(PyObject* tuple, std::vector<size_t>& into) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) into.push_back(PyLong_AsSize_t(PyTuple_GET_ITEM(tuple, i)));
  return !PyErr_Occurred();
}

bool hoisted_before(PyObject* given, Before& into) {
  Py_ssize_t block, results;
  PyObject *places, *kept;
  if (!PyArg_ParseTuple(given, "nnO!O!", &block, &results, &PyTuple_Type, &places, &PyTuple_Type, &kept)) return false;
  into.block = block;
  into.results = results;
  return positions(places, into.places) && positions(kept, into.kept);
}

// add(grad, block, ((how, what), …), types, ((result, argument), …), order, single, (block, results, places, kept) or None)
PyObject* quick_add(PyObject* self, PyObject* args) {
  auto* q = reinterpret_cast<Quick*>(self);
  int grad, single;
  Py_ssize_t block;
  PyObject *kinds, *types, *views, *order, *before;
  if (!PyArg_ParseTuple(args, "pnO!O!O!O!pO", &grad, &block, &PyTuple_Type, &kinds, &PyTuple_Type, &types, &PyTuple_Type, &views,
                        &PyTuple_Type, &order, &single, &before))
    return nullptr;
  Version v{grad != 0, static_cast<size_t>(block), {}, {}, {}, {}, single != 0, before != Py_None, {}};
  if (before != Py_None && !hoisted_before(before, v.before)) return nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kinds); i++) {
    int how;
    PyObject* what;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(kinds, i), "iO", &how, &what)) return nullptr;
    v.kinds.push_back({static_cast<How>(how), what});
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(views); i++) {
    Py_ssize_t result, argument;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(views, i), "nn", &result, &argument)) return nullptr;
    v.views.emplace_back(result, argument);
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(order); i++) v.order.push_back(PyLong_AsSize_t(PyTuple_GET_ITEM(order, i)));
  if (PyErr_Occurred()) return nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); i++) v.types.push_back(PyTuple_GET_ITEM(types, i));
  for (Kind& k : v.kinds) Py_INCREF(k.what);
  for (PyObject* t : v.types) Py_INCREF(t);
  q->versions->push_back(std::move(v));
  Py_RETURN_NONE;
}

PyMethodDef quick_methods[] = {{"add", quick_add, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyTypeObject quick_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

// -- the module -----------------------------------------------------------------------------------------------------------

// enter(state) makes it the one that quick calls of this thread record into; None ends that. Returns nothing.
PyObject* enter(PyObject*, PyObject* state) {
  if (state != Py_None && Py_TYPE(state) != &state_type) {
    PyErr_SetString(PyExc_TypeError, "a State is wanted");
    return nullptr;
  }
  current = state == Py_None ? nullptr : reinterpret_cast<State*>(state);
  Py_RETURN_NONE;
}

// -- results ----------------------------------------------------------------------------------------------------------------

bool is_plain(PyObject* x) {
  return x == Py_None || PyBool_Check(x) || PyLong_CheckExact(x) || PyFloat_CheckExact(x) || PyUnicode_CheckExact(x);
}

int pending_in(PyObject* x, PyObject* type, PyObject* into);

int pending_below(PyObject* x, PyObject* type, PyObject* into) {
  if (Py_EnterRecursiveCall(" while results are handed over") != 0) return -1;
  const int found = pending_in(x, type, into);
  Py_LeaveRecursiveCall();
  return found;
}

// Appends the pending tensors in lists, tuples and dicts; 0 where there is something else than these and plain data.
int pending_in(PyObject* x, PyObject* type, PyObject* into) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(x)) == type) return PyList_Append(into, x) == 0 ? 1 : -1;
  if (is_plain(x)) return 1;
  if (PyList_CheckExact(x) || PyTuple_CheckExact(x)) {
    PyObject** items = PySequence_Fast_ITEMS(x);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(x); i++)
      if (const int found = pending_below(items[i], type, into); found != 1) return found;
    return 1;
  }
  if (!PyDict_CheckExact(x)) return 0;
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(x, &at, &key, &value);)
    if (const int found = pending_below(value, type, into); found != 1) return found;
  return 1;
}

// pending_in(results, class) -> their pending tensors; None where there is something else than these and plain data.
PyObject* find_pending(PyObject*, PyObject* args) {
  PyObject *x, *type;
  if (!PyArg_ParseTuple(args, "OO!", &x, &PyType_Type, &type)) return nullptr;
  PyObject* found = PyList_New(0);
  if (found == nullptr) return nullptr;
  const int whole = pending_in(x, type, found);
  if (whole == 1) return found;
  Py_DECREF(found);
  if (whole < 0) return nullptr;
  Py_RETURN_NONE;
}

// The same structure with the next of `values` in place of each pending tensor, in the order of `pending_in`, which has been
// as deep before.
PyObject* rebuilt(PyObject* x, PyObject* type, PyObject* values, Py_ssize_t& next) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(x)) == type) return Py_NewRef(PyList_GET_ITEM(values, next++));
  if (PyList_CheckExact(x) || PyTuple_CheckExact(x)) {
    const bool list = PyList_CheckExact(x);
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(x);
    PyObject* made = list ? PyList_New(count) : PyTuple_New(count);
    for (Py_ssize_t i = 0; made != nullptr && i < count; i++) {
      PyObject* item = rebuilt(PySequence_Fast_ITEMS(x)[i], type, values, next);
      if (item == nullptr) Py_CLEAR(made);
      else if (list) PyList_SET_ITEM(made, i, item);
      else PyTuple_SET_ITEM(made, i, item);
    }
    return made;
  }
  if (!PyDict_CheckExact(x)) return Py_NewRef(x);
  PyObject* made = PyDict_New();
  PyObject *key, *value;
  for (Py_ssize_t at = 0; made != nullptr && PyDict_Next(x, &at, &key, &value);) {
    PyObject* item = rebuilt(value, type, values, next);
    if (item == nullptr || PyDict_SetItem(made, key, item) != 0) Py_CLEAR(made);
    Py_XDECREF(item);
  }
  return made;
}

// rebuilt(results, class, values)
PyObject* rebuild(PyObject*, PyObject* args) {
  PyObject *x, *type, *values;
  if (!PyArg_ParseTuple(args, "OO!O!", &x, &PyType_Type, &type, &PyList_Type, &values)) return nullptr;
  Py_ssize_t next = 0;
  return rebuilt(x, type, values, next);
}

// begin(addresses of torch's functions that tell, and set, whether gradients are recorded, and whether overrides of its API
// are off, and of the one that tells whether autocast is on), before anything else.
PyObject* begin(PyObject*, PyObject* args) {
  unsigned long long grad, set_grad, disabled, set, casts;
  if (!PyArg_ParseTuple(args, "KKKKK", &grad, &set_grad, &disabled, &set, &casts)) return nullptr;
  grad_enabled = reinterpret_cast<bool (*)()>(grad);
  begin_tasks(grad_enabled, reinterpret_cast<void (*)(bool)>(set_grad));
  get_disabled = reinterpret_cast<int (*)()>(disabled);
  set_disabled = reinterpret_cast<void (*)(int)>(set);
  autocasts = reinterpret_cast<bool (*)(int8_t)>(casts);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"enter", enter, METH_O, nullptr},
    {"begin", begin, METH_VARARGS, nullptr},
    {"pending_in", find_pending, METH_VARARGS, nullptr},
    {"rebuilt", rebuild, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "plait_record", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace plait

PyMODINIT_FUNC PyInit_plait_record() {
  using namespace plait;
  handle_type.tp_name = "plait_record.Handle";
  handle_type.tp_basicsize = sizeof(Handle);
  handle_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  handle_type.tp_dealloc = handle_dealloc;
  handle_type.tp_members = handle_members;
  handle_type.tp_getset = handle_properties;

  static std::vector<PyMethodDef> methods{
      {"line", state_line, METH_VARARGS, nullptr},
      {"number", state_number, METH_O, nullptr},
      {"pending", state_pending, METH_VARARGS, nullptr},
      {"lift", state_lift, METH_VARARGS, nullptr},
      {"end", state_end, METH_NOARGS, nullptr},
  };
  for (PyMethodDef* m = launch_methods; m->ml_name != nullptr; m++) methods.push_back(*m);
  methods.push_back({nullptr, nullptr, 0, nullptr});
  state_type.tp_name = "plait_record.State";
  state_type.tp_basicsize = sizeof(State);
  state_type.tp_flags = Py_TPFLAGS_DEFAULT;
  state_type.tp_new = state_new;
  state_type.tp_dealloc = state_dealloc;
  state_type.tp_members = state_members;
  state_type.tp_methods = methods.data();

  quick_type.tp_name = "plait_record.Quick";
  quick_type.tp_basicsize = sizeof(Quick);
  quick_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL;
  quick_type.tp_new = quick_new;
  quick_type.tp_dealloc = quick_dealloc;
  quick_type.tp_traverse = quick_traverse;
  quick_type.tp_clear = quick_clear;
  quick_type.tp_methods = quick_methods;
  quick_type.tp_call = PyVectorcall_Call;
  quick_type.tp_vectorcall_offset = offsetof(Quick, call);

  const char* attributes[] = {"shape", "dtype", "device", "requires_grad"};
  for (size_t i = 0; i < 4; i++)
    if ((names[i] = PyUnicode_InternFromString(attributes[i])) == nullptr) return nullptr;
  PyObject* m = PyModule_Create(&module);
  if (m == nullptr || !ready_table() || !ready_tasks()) return nullptr;
  for (PyTypeObject* type : {&handle_type, &table_type, &tasks_type, &state_type, &quick_type}) {
    if (PyType_Ready(type) < 0) return nullptr;
    const std::string name = std::string(type->tp_name).substr(sizeof("plait_record"));
    if (PyModule_AddObjectRef(m, name.c_str(), reinterpret_cast<PyObject*>(type)) < 0) return nullptr;
  }
  return m;
}
