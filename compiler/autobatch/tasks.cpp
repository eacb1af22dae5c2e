// Instances that wait for values: generators which are resumed until all of them wait.
//
// `record_python.py` has the same without a compiler.
#include "state.h"

#include <utility>

namespace plait {

PyTypeObject tasks_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

namespace {

bool (*grad_enabled)() = nullptr;
void (*set_grad_enabled)(bool) = nullptr;

// A generator, and who waits for it: another task, or the call, in its `slot`.
struct Task {
  PyObject* generator;
  Task* parent;
  Py_ssize_t slot;
  long long floor;  // what it left when it waited
  bool grad;
  Py_ssize_t left = 0;          // calls that it forked and that have not ended
  PyObject* results = nullptr;  // of those, a tuple
  PyObject* error = nullptr;    // of the first of those that failed
  Py_ssize_t failed = 0;        // its slot
};

struct Tasks {
  PyObject_HEAD
  State* state;
  PyObject* results;  // of the instances, a list
  long long forks;
  char grad;  // whether gradients are recorded where the call is
  std::vector<std::pair<Task*, PyObject*>>* ready;  // the last one goes on first, with this value
  std::vector<Task*>* waiting;
  PyObject* asked;  // what for, a list
};

void end_task(Task* t) {
  Py_XDECREF(t->generator);
  Py_XDECREF(t->results);
  Py_XDECREF(t->error);
  delete t;
}

// Ends tasks that are left after an error, and those that wait for them.
void clear(Tasks* t) {
  std::vector<Task*> gone;
  for (auto [task, value] : *t->ready) {
    Py_XDECREF(value);
    gone.push_back(task);
  }
  gone.insert(gone.end(), t->waiting->begin(), t->waiting->end());
  t->ready->clear();
  t->waiting->clear();
  Py_CLEAR(t->asked);
  PyObject *type, *error, *trace;
  PyErr_Fetch(&type, &error, &trace);
  for (Task* task : gone)
    while (task != nullptr) {
      PyObject* closed = PyObject_CallMethod(task->generator, "close", nullptr);
      if (closed == nullptr) PyErr_Clear();
      Py_XDECREF(closed);
      Task* parent = task->parent;
      end_task(task);
      task = parent != nullptr && --parent->left == 0 ? parent : nullptr;
    }
  PyErr_Restore(type, error, trace);
  set_grad_enabled(t->grad != 0);  // what was closed may have set it
}

PyObject* tasks_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject* state;
  if (!PyArg_ParseTuple(args, "O", &state)) return nullptr;
  auto* t = reinterpret_cast<Tasks*>(type->tp_alloc(type, 0));
  if (t == nullptr) return nullptr;
  t->state = reinterpret_cast<State*>(Py_NewRef(state));
  t->ready = new std::vector<std::pair<Task*, PyObject*>>;
  t->waiting = new std::vector<Task*>;
  t->results = PyList_New(0);
  t->grad = grad_enabled();
  return reinterpret_cast<PyObject*>(t);
}

void tasks_dealloc(PyObject* self) {
  auto* t = reinterpret_cast<Tasks*>(self);
  clear(t);
  delete t->ready;
  delete t->waiting;
  Py_CLEAR(t->results);
  Py_CLEAR(t->state);
  Py_TYPE(self)->tp_free(self);
}

// Makes a task of a call, ready to begin; false with an error set.
bool begin_task(Tasks* t, PyObject* fn, PyObject* args, Task* parent, Py_ssize_t slot) {
  PyObject* generator = PyObject_Call(fn, args, nullptr);
  if (generator == nullptr) return false;
  const bool has = parent != nullptr;
  t->ready->emplace_back(new Task{generator, parent, slot, has ? parent->floor : 0, has ? parent->grad : t->grad != 0}, nullptr);
  return true;
}

// The error that is set, as an object that has its traceback.
PyObject* error_set() {
  PyObject *type, *error, *trace;
  PyErr_Fetch(&type, &error, &trace);
  PyErr_NormalizeException(&type, &error, &trace);
  if (trace != nullptr) PyException_SetTraceback(error, trace);
  Py_XDECREF(type);
  Py_XDECREF(trace);
  return error;
}

// The call in a slot of a task has failed: of several errors the task gets that of the first slot.
void failed(Task* task, Py_ssize_t slot) {
  PyObject* error = error_set();
  if (task->error == nullptr || slot < task->failed) {
    Py_XSETREF(task->error, error);
    task->failed = slot;
  } else {
    Py_DECREF(error);
  }
}

// Notes at the error that is set which instance it is of.
void note(Py_ssize_t instance) {
  PyObject *type, *error, *trace;
  PyErr_Fetch(&type, &error, &trace);
  PyErr_NormalizeException(&type, &error, &trace);
  PyObject* noted = PyObject_CallMethod(error, "add_note", "N",
                                        PyUnicode_FromFormat("plait.autobatch: this was raised in instance %zd", instance));
  if (noted == nullptr) PyErr_Clear();
  Py_XDECREF(noted);
  PyErr_Restore(type, error, trace);
}

// ((function, arguments), …): what a task wants to run side by side.
bool fork(Tasks* t, Task* task, PyObject* calls) {
  t->forks++;
  const Py_ssize_t count = PyTuple_GET_SIZE(calls);
  if (count == 0) {
    t->ready->emplace_back(task, Py_NewRef(calls));
    return true;
  }
  task->left = count;
  task->results = PyTuple_New(count);
  if (task->results == nullptr) return false;
  for (Py_ssize_t i = count - 1; i >= 0; i--) {
    PyObject* call = PyTuple_GET_ITEM(calls, i);
    if (begin_task(t, PyTuple_GET_ITEM(call, 0), PyTuple_GET_ITEM(call, 1), task, i)) continue;
    failed(task, i);
    task->left--;
  }
  if (task->left == 0) {
    Py_CLEAR(task->results);
    t->ready->emplace_back(task, nullptr);
  }
  return true;
}

// A task has ended with a value, or with null and an error set. Null is for an error that ends the call.
bool ended(Tasks* t, Task* task, PyObject* value) {
  Task* parent = task->parent;
  const Py_ssize_t slot = task->slot;
  end_task(task);
  if (parent == nullptr) {
    if (value != nullptr) return PyList_SetItem(t->results, slot, value) == 0;
    note(slot);
    return false;
  }
  if (value != nullptr) PyTuple_SET_ITEM(parent->results, slot, value);
  else failed(parent, slot);
  if (--parent->left == 0) {
    PyObject* found = std::exchange(parent->results, nullptr);
    if (parent->error != nullptr) Py_CLEAR(found);
    t->ready->emplace_back(parent, found);
  }
  return true;
}

// Resumes a task once. 1: it goes on later, 0: it has ended, -1: it has ended the call.
int resume(Tasks* t, Task* task, PyObject* value) {
  State* s = t->state;
  s->floor = task->floor;
  if (task->grad != (t->grad != 0)) set_grad_enabled(task->grad);
  PyObject* found = nullptr;
  PySendResult how;
  if (task->error != nullptr) {
    PyObject* error = std::exchange(task->error, nullptr);
    found = PyObject_CallMethod(task->generator, "throw", "N", error);
    how = found != nullptr ? PYGEN_NEXT : PYGEN_ERROR;
    if (found == nullptr && PyErr_ExceptionMatches(PyExc_StopIteration)) {
      PyObject *type, *stop, *trace;
      PyErr_Fetch(&type, &stop, &trace);
      PyErr_NormalizeException(&type, &stop, &trace);
      found = PyObject_GetAttrString(stop, "value");
      Py_XDECREF(type);
      Py_XDECREF(stop);
      Py_XDECREF(trace);
      if (found != nullptr) how = PYGEN_RETURN;
    }
  } else {
    how = PyIter_Send(task->generator, value == nullptr ? Py_None : value, &found);
  }
  Py_XDECREF(value);
  task->floor = s->floor;
  task->grad = grad_enabled();
  if (task->grad != (t->grad != 0)) set_grad_enabled(t->grad != 0);
  if (how == PYGEN_NEXT) {
    if (PyTuple_CheckExact(found)) {
      const bool forked = fork(t, task, found);
      Py_DECREF(found);
      return forked ? 1 : -1;
    }
    t->waiting->push_back(task);
    const int appended = PyList_Append(t->asked, found);
    Py_DECREF(found);
    return appended == 0 ? 1 : -1;
  }
  if (how == PYGEN_ERROR && !PyErr_ExceptionMatches(PyExc_Exception)) {
    t->waiting->push_back(task);  // so that it is ended, with those that wait for it
    return -1;
  }
  return ended(t, task, found) ? 0 : -1;
}

// Resumes all that are ready, and gives what they ask for then.
PyObject* all_ready(Tasks* t) {
  t->asked = PyList_New(0);
  if (t->asked == nullptr) return nullptr;
  while (!t->ready->empty()) {
    auto [task, value] = t->ready->back();
    t->ready->pop_back();
    if (resume(t, task, value) < 0) {
      clear(t);
      return nullptr;
    }
  }
  return std::exchange(t->asked, nullptr);
}

// start(program, instances) -> what they ask for
PyObject* tasks_start(PyObject* self, PyObject* args) {
  auto* t = reinterpret_cast<Tasks*>(self);
  PyObject *program, *instances;
  if (!PyArg_ParseTuple(args, "OO!", &program, &PyList_Type, &instances)) return nullptr;
  const Py_ssize_t count = PyList_GET_SIZE(instances);
  Py_SETREF(t->results, PyList_New(count));
  if (t->results == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < count; i++) PyList_SET_ITEM(t->results, i, Py_NewRef(Py_None));
  for (Py_ssize_t i = count - 1; i >= 0; i--)
    if (!begin_task(t, program, PyList_GET_ITEM(instances, i), nullptr, i)) {
      note(i);
      clear(t);
      return nullptr;
    }
  return all_ready(t);
}

// resume(values) -> what they ask for next; the values are of what was asked for, in that order.
PyObject* tasks_resume(PyObject* self, PyObject* values) {
  auto* t = reinterpret_cast<Tasks*>(self);
  if (!PyList_Check(values) || PyList_GET_SIZE(values) != static_cast<Py_ssize_t>(t->waiting->size())) {
    PyErr_SetString(PyExc_ValueError, "as many values are wanted as were asked for");
    return nullptr;
  }
  for (size_t i = t->waiting->size(); i-- > 0;) t->ready->emplace_back((*t->waiting)[i], Py_NewRef(PyList_GET_ITEM(values, i)));
  t->waiting->clear();
  return all_ready(t);
}

// close(): ends all that have not.
PyObject* tasks_close(PyObject* self, PyObject*) {
  clear(reinterpret_cast<Tasks*>(self));
  Py_RETURN_NONE;
}

PyMemberDef tasks_members[] = {
    {"results", T_OBJECT, offsetof(Tasks, results), READONLY, nullptr},
    {"forks", T_LONGLONG, offsetof(Tasks, forks), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyMethodDef tasks_methods[] = {
    {"start", tasks_start, METH_VARARGS, nullptr},
    {"resume", tasks_resume, METH_O, nullptr},
    {"close", tasks_close, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void begin_tasks(bool (*is)(), void (*set)(bool)) {
  grad_enabled = is;
  set_grad_enabled = set;
}

bool ready_tasks() {
  tasks_type.tp_name = "plait_record.Tasks";
  tasks_type.tp_basicsize = sizeof(Tasks);
  tasks_type.tp_flags = Py_TPFLAGS_DEFAULT;
  tasks_type.tp_new = tasks_new;
  tasks_type.tp_dealloc = tasks_dealloc;
  tasks_type.tp_members = tasks_members;
  tasks_type.tp_methods = tasks_methods;
  return PyType_Ready(&tasks_type) == 0;
}

}  // namespace plait
