// The hot part of recording: pending tensors, the lines of a call, and what cut code calls to run a block.
//
// `record_python.py` is the same without a compiler.
#include "state.h"

#include <algorithm>

namespace plait {
namespace {

// -- handles --------------------------------------------------------------------------------------------------------------

// Lets go of the recorder once the call has ended and nobody holds a pending tensor of it.
void settle(State* s) {
  if (s->closed && s->live == 0) Py_CLEAR(s->recorder);
}

PyObject* handle_made(PyTypeObject* type, State* s, PyObject* kind, long long id, long long depth) {
  auto* h = reinterpret_cast<Handle*>(type->tp_alloc(type, 0));
  if (h == nullptr) return nullptr;
  h->state = reinterpret_cast<State*>(Py_NewRef(reinterpret_cast<PyObject*>(s)));
  h->type = Py_NewRef(kind);
  h->view_of = Py_NewRef(Py_None);
  h->id = id;
  h->depth = depth;
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
  for (auto** v : {&s->integer_ids, &s->integers, &s->real_ids, &s->row_of, &s->used, &s->rows}) *v = new std::vector<int64_t>;
  s->reals = new std::vector<double>;
  s->launches = new std::vector<Launch>;
  s->scratch = new std::vector<char>;
  return reinterpret_cast<PyObject*>(s);
}

void state_dealloc(PyObject* self) {
  auto* s = reinterpret_cast<State*>(self);
  if (current == s) current = nullptr;
  Py_CLEAR(s->recorder);
  Py_CLEAR(s->table);
  delete s->buckets;
  for (auto* v : {s->integer_ids, s->integers, s->real_ids, s->row_of, s->used, s->rows}) delete v;
  delete s->reals;
  delete s->launches;
  delete s->scratch;
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

// line(block, arguments, results) -> (depth, id of the first result)
PyObject* state_line(PyObject* self, PyObject* args) {
  auto* s = reinterpret_cast<State*>(self);
  Py_ssize_t block, results;
  PyObject* given;
  if (!PyArg_ParseTuple(args, "nO!n", &block, &PyList_Type, &given, &results)) return nullptr;
  long long depth = s->floor;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given); i++)
    depth = std::max(depth, depth_of(s, reinterpret_cast<Handle*>(PyList_GET_ITEM(given, i))));
  Bucket& b = bucket_of(s, block, ++depth);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given); i++)
    b.arguments.push_back(reinterpret_cast<Handle*>(PyList_GET_ITEM(given, i))->id);
  b.firsts.push_back(s->next_id);
  PyObject* made = Py_BuildValue("LL", depth, s->next_id);
  s->next_id += results;
  return made;
}

// pending(class, type, id, depth) -> a pending tensor of this call
PyObject* state_pending(PyObject* self, PyObject* args) {
  PyObject *type, *kind;
  long long id, depth;
  if (!PyArg_ParseTuple(args, "O!OLL", &PyType_Type, &type, &kind, &id, &depth)) return nullptr;
  return handle_made(reinterpret_cast<PyTypeObject*>(type), reinterpret_cast<State*>(self), kind, id, depth);
}

// end() -> whether no pending tensor is left; the recorder is let go of once that is so.
PyObject* state_end(PyObject* self, PyObject*) {
  auto* s = reinterpret_cast<State*>(self);
  const bool alone = s->live == 0;
  s->closed = 1;
  settle(s);
  return PyBool_FromLong(alone);
}

PyMemberDef state_members[] = {
    {"next_id", T_LONGLONG, offsetof(State, next_id), 0, nullptr},
    {"floor", T_LONGLONG, offsetof(State, floor), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyTypeObject state_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

// -- quick calls ----------------------------------------------------------------------------------------------------------

enum How { PENDING, SAME, EQUAL, NUMBER, REAL };

struct Kind {
  How how;
  PyObject* what;  // the type of a pending or real tensor, the very object, an equal one, the class of a number
};

struct Version {
  bool grad;
  size_t block;
  std::vector<Kind> kinds;
  std::vector<PyObject*> types;  // of the block's results
  std::vector<std::pair<size_t, size_t>> views;  // (result of the block, argument) that share memory in eager
  std::vector<size_t> order;     // results of the call among those of the block
  bool single;                   // one result, not a tuple
};

struct Quick {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject *slow, *pending, *tensor;
  std::vector<Version>* versions;
};

PyObject* lift_as = nullptr;            // the name of the recorder's method
bool (*grad_enabled)() = nullptr;  // torch's own: whether gradients are recorded in this thread

constexpr size_t MOST = 32;  // arguments

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

// Records one line. `lifted` are the handles of real tensors. Null with an error set, or without one for a number that is too
// large.
PyObject* record(Quick* q, State* s, const Version& v, PyObject* const* args, PyObject* const* lifted) {
  long long ids[MOST], depth = s->floor;
  size_t count = 0;
  for (size_t i = 0; i < v.kinds.size(); i++) {
    const How how = v.kinds[i].how;
    if (how == NUMBER) {
      if ((ids[count++] = number(s, args[i])) < 0) {
        PyErr_Clear();
        return nullptr;
      }
    } else if (how == PENDING || how == REAL) {
      auto* h = reinterpret_cast<Handle*>(how == REAL ? lifted[i] : args[i]);
      ids[count++] = h->id;
      depth = std::max(depth, depth_of(s, h));
    }
  }
  Bucket& b = bucket_of(s, v.block, ++depth);
  b.arguments.insert(b.arguments.end(), ids, ids + count);
  b.firsts.push_back(s->next_id);
  PyObject* made[MOST];
  for (size_t k = 0; k < v.types.size(); k++)
    if ((made[k] = handle_made(reinterpret_cast<PyTypeObject*>(q->pending), s, v.types[k], s->next_id++, depth)) == nullptr)
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
  if (s != nullptr && kwnames == nullptr && count <= MOST) {
    int grad = -1;
    for (const Version& v : *q->versions) {
      if (v.kinds.size() != count || !fits(q, v, args)) continue;
      if (grad < 0) grad = grad_enabled();
      if (grad != v.grad) continue;
      PyObject* lifted[MOST] = {};
      bool all = true;
      for (size_t i = 0; all && i < count; i++) {
        if (v.kinds[i].how != REAL) continue;
        lifted[i] = PyObject_CallMethodObjArgs(s->recorder, lift_as, args[i], v.kinds[i].what, nullptr);
        all = lifted[i] != nullptr && lifted[i] != Py_None;
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

// add(grad, block, ((how, what), …), types, ((result, argument), …), order, single)
PyObject* quick_add(PyObject* self, PyObject* args) {
  auto* q = reinterpret_cast<Quick*>(self);
  int grad, single;
  Py_ssize_t block;
  PyObject *kinds, *types, *views, *order;
  if (!PyArg_ParseTuple(args, "pnO!O!O!O!p", &grad, &block, &PyTuple_Type, &kinds, &PyTuple_Type, &types, &PyTuple_Type, &views,
                        &PyTuple_Type, &order, &single))
    return nullptr;
  Version v{grad != 0, static_cast<size_t>(block), {}, {}, {}, {}, single != 0};
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

// begin(address of torch's function that tells whether gradients are recorded), before anything else.
PyObject* begin(PyObject*, PyObject* address) {
  grad_enabled = reinterpret_cast<bool (*)()>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"enter", enter, METH_O, nullptr}, {"begin", begin, METH_O, nullptr}, {nullptr, nullptr, 0, nullptr}};

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

  lift_as = PyUnicode_InternFromString("lift_as");
  PyObject* m = PyModule_Create(&module);
  if (m == nullptr || lift_as == nullptr || !ready_table()) return nullptr;
  for (PyTypeObject* type : {&handle_type, &table_type, &state_type, &quick_type}) {
    if (type != &table_type && PyType_Ready(type) < 0) return nullptr;
    const std::string name = std::string(type->tp_name).substr(sizeof("plait_record"));
    if (PyModule_AddObjectRef(m, name.c_str(), reinterpret_cast<PyObject*>(type)) < 0) return nullptr;
  }
  return m;
}
