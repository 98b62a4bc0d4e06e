// The row and the norm op as Python functions, for which ctypes would take longer than they do where they are short: on
// tensors like those that were bound, or on ones that are not looked at. Python's stable interface and torch's stable C
// functions alone, so that one binary still serves every version of both.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <new>
#include <vector>

#include "../export.h"
#include "guard.h"
#include "python_train.h"
#include "tensor_view.h"

using namespace fastdiff;
using namespace fastdiff::cpu;

namespace {

constexpr int kBranchCount = 3;  // model_out, unguided, perturbed

// A step that was bound. like: of the branches that are given; stacked: in bytes from Fc on, where a branch follows it
// in its stack, 0: it does not. unlike: what runs or refuses all else; failed: what raises an error code.
// gathered: where Fc, which does not lie as a row reads it, is copied to; empty: it is read where it is.
struct Bound {
  AffineArgs* block;
  PyObject *type, *unlike, *failed;
  bool given[kBranchCount];
  int64_t stacked[kBranchCount];
  Form like[kBranchCount];
  std::vector<char> gathered;
};

constexpr const char* kCapsule = "fastdiff.step";

void release(PyObject* capsule) {
  auto* bound = static_cast<Bound*>(PyCapsule_GetPointer(capsule, kCapsule));
  for (PyObject* kept : {bound->type, bound->unlike, bound->failed}) Py_DECREF(kept);
  delete bound;
}

PyObject* otherwise(const Bound& bound, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  const Py_ssize_t named = names ? PyTuple_Size(names) : 0;
  PyObject* given = PyTuple_New(count);
  PyObject* by_name = given ? PyDict_New() : nullptr;
  for (Py_ssize_t i = 0; by_name && i < count; ++i) {
    Py_INCREF(args[i]);
    PyTuple_SetItem(given, i, args[i]);
  }
  bool whole = by_name != nullptr;
  for (Py_ssize_t i = 0; whole && i < named; ++i)
    whole = PyDict_SetItem(by_name, PyTuple_GetItem(names, i), args[count + i]) == 0;
  PyObject* result = whole ? PyObject_Call(bound.unlike, given, by_name) : nullptr;
  Py_XDECREF(given);
  Py_XDECREF(by_name);
  return result;
}

// True where all that the networks returned so far was finite, else None.
PyObject* step(PyObject* capsule, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  auto* bound = static_cast<Bound*>(PyCapsule_GetPointer(capsule, kCapsule));
  if (!bound) return nullptr;
  if (names || count < 1 || count > kBranchCount) return otherwise(*bound, args, count, names);
  void* at[kBranchCount] = {};
  for (int i = 0; i < kBranchCount; ++i) {
    PyObject* tensor = i < count ? args[i] : Py_None;
    if (!bound->given[i] && tensor == Py_None) {
      if (bound->stacked[i]) at[i] = static_cast<char*>(at[0]) + bound->stacked[i];
      continue;
    }
    View view;
    if (!bound->given[i] || reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != bound->type || !view.of(tensor) ||
        !view.locate(bound->like[i], at[i]) || negated(tensor))
      return otherwise(*bound, args, count, names);
    if (i == 0 && !bound->gathered.empty()) {
      char* to = bound->gathered.data();
      if (bound->block->model_out_dtype == kFloat32)
        gather(bound->like[0], static_cast<const float*>(at[0]), reinterpret_cast<float*>(to));
      else
        gather(bound->like[0], static_cast<const uint16_t*>(at[0]), reinterpret_cast<uint16_t*>(to));
      at[0] = to;
    }
  }
  AffineArgs& block = *bound->block;
  block.model_out = at[0];
  block.unguided = at[1];
  block.perturbed = at[2];
  int code;
  Py_BEGIN_ALLOW_THREADS
  code = fastdiff_affine_step_cpu(&block);
  Py_END_ALLOW_THREADS
  if (code) return PyObject_CallFunction(bound->failed, "i", code);
  for (int64_t b = 0; b < block.B; ++b)
    if (block.status[b] >= 0) Py_RETURN_NONE;
  Py_RETURN_TRUE;
}

PyMethodDef step_method = {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)),
                           METH_FASTCALL | METH_KEYWORDS, nullptr};

// bind_step(address of the block, torch.Tensor, (model_out, unguided, perturbed), (0, bytes to Fu, bytes to Fp), bytes of
// model_out where they are gathered, else 0, unlike, failed) -> step, or None where torch keeps its tensors in another way
// than `View` knows.
PyObject* bind_step(PyObject*, PyObject* args) {
  PyObject *address, *type, *tensors, *stacked, *unlike, *failed;
  Py_ssize_t gathered;
  if (!PyArg_ParseTuple(args, "OOOOnOO", &address, &type, &tensors, &stacked, &gathered, &unlike, &failed))
    return nullptr;
  for (PyObject* kept : {type, unlike, failed}) Py_INCREF(kept);
  auto* bound = new (std::nothrow) Bound{nullptr, type, unlike, failed, {}, {}, {}, {}};
  if (!bound) return PyErr_NoMemory();
  PyObject* capsule = PyCapsule_New(bound, kCapsule, release);
  if (!capsule) return nullptr;
  bound->block = static_cast<AffineArgs*>(PyLong_AsVoidPtr(address));
  bool known = true;
  for (int i = 0; i < kBranchCount && !PyErr_Occurred(); ++i) {
    PyObject* tensor = PyTuple_GetItem(tensors, i);
    bound->stacked[i] = PyLong_AsLongLong(PyTuple_GetItem(stacked, i));
    bound->given[i] = tensor != Py_None;
    if (!bound->given[i]) continue;
    View view;
    void *at, *shown;
    if (!locate(tensor, at)) break;
    known = known && view.of(tensor) && view.form(bound->like[i]) && view.locate(bound->like[i], shown) && at == shown;
  }
  const auto take = [&] { return bound->gathered.resize(static_cast<size_t>(gathered)), kOk; };
  if (!PyErr_Occurred() && cpu::guarded(take) != kOk) PyErr_NoMemory();
  PyObject* result = nullptr;
  if (!PyErr_Occurred()) result = known ? PyCFunction_NewEx(&step_method, capsule, nullptr) : Py_NewRef(Py_None);
  Py_DECREF(capsule);
  return result;
}

// bound: what `bind_apart` was given.
PyObject* step_apart(PyObject* bound, PyObject* const* args, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "expected i, model_out, x, first, denoised");
  const auto* block = static_cast<const AffineArgs*>(PyLong_AsVoidPtr(PyTuple_GetItem(bound, 0)));
  const bool single = PyTuple_GetItem(bound, 1) == Py_True;
  const long i = PyLong_AsLong(args[0]);
  if (PyErr_Occurred()) return nullptr;
  void *model_out, *x, *first, *denoised;
  if (!locate(args[1], model_out) || !locate(args[2], x) || !locate(args[3], first) || !locate(args[4], denoised))
    return nullptr;
  int code;
  Py_BEGIN_ALLOW_THREADS
  code = fastdiff_affine_step_apart_cpu(block, static_cast<int32_t>(i), model_out, static_cast<const float*>(x),
                                        single ? static_cast<float*>(first) : nullptr, single ? nullptr : first,
                                        static_cast<float*>(denoised));
  Py_END_ALLOW_THREADS
  if (code) return PyObject_CallFunction(PyTuple_GetItem(bound, 2), "i", code);
  Py_RETURN_NONE;
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef fast(const char* name, FastCall function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef step_apart_method = fast("step", step_apart);

// bind_apart(address of the block, whether the first output is fp32, what raises an error code) -> step
PyObject* bind_apart(PyObject*, PyObject* bound) {
  if (PyTuple_Size(bound) != 3) return PyErr_Format(PyExc_TypeError, "expected address, single, failed");
  return PyCFunction_NewEx(&step_apart_method, bound, nullptr);
}

// norm(address of a block, x, weight, bias, before, scale, shift, residual, skip, y, total) -> error code; without
// statistics, on tensors of which nothing is looked at but where they lie. The block stays as it is.
PyObject* norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kTensors = 10;
  if (count != 1 + kTensors) return PyErr_Format(PyExc_TypeError, "expected an address and 10 tensors, got %zd", count);
  const auto* given = static_cast<const NormArgs*>(PyLong_AsVoidPtr(args[0]));
  if (PyErr_Occurred()) return nullptr;
  void* at[kTensors];
  for (int i = 0; i < kTensors; ++i)
    if (!locate(args[1 + i], at[i])) return nullptr;
  NormArgs block = *given;
  const auto vector = [&](int i) { return static_cast<const float*>(at[i]); };
  block.x = at[0], block.weight = vector(1), block.bias = vector(2), block.before = vector(3);
  block.scale = vector(4), block.shift = vector(5), block.residual = at[6], block.skip = at[7];
  block.y = at[8], block.total = at[9];
  int code;
  Py_BEGIN_ALLOW_THREADS
  code = fastdiff_norm_cpu(&block);
  Py_END_ALLOW_THREADS
  return PyLong_FromLong(code);
}

PyMethodDef methods[] = {{"bind_apart", bind_apart, METH_VARARGS, nullptr},
                         {"bind_step", bind_step, METH_VARARGS, nullptr},
                         fast("norm", norm),
                         fast("train", train),
                         fast("train_rows", train_rows),
                         {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  if (!data_ptr) data_ptr = PyUnicode_InternFromString("data_ptr");
  if (!is_neg) is_neg = PyUnicode_InternFromString("is_neg");
  if (!cdata) cdata = PyUnicode_InternFromString("_cdata");
  return data_ptr && is_neg && cdata ? PyModule_Create(&module) : nullptr;
}
