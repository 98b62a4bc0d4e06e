// The row on tensors that are other ones each time, as a Python function: of such a step ctypes would take a tenth, to
// convert seven arguments. Python's stable interface alone, so that one binary still serves every version.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../export.h"

using namespace fastdiff;

namespace {

PyObject* data_ptr;  // the method's name

// Where a tensor's elements lie, null for None; false with an exception.
bool locate(PyObject* tensor, void*& at) {
  at = nullptr;
  if (tensor == Py_None) return true;
  PyObject* address = PyObject_CallMethodObjArgs(tensor, data_ptr, nullptr);
  if (!address) return false;
  at = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  return !PyErr_Occurred();
}

// bound: what `bind_apart` was given.
PyObject* step(PyObject* bound, PyObject* const* args, Py_ssize_t count) {
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

PyMethodDef step_method = {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL,
                           nullptr};

// bind_apart(address of the block, whether the first output is fp32, what raises an error code) -> step
PyObject* bind_apart(PyObject*, PyObject* bound) {
  if (PyTuple_Size(bound) != 3) return PyErr_Format(PyExc_TypeError, "expected address, single, failed");
  return PyCFunction_NewEx(&step_method, bound, nullptr);
}

PyMethodDef methods[] = {{"bind_apart", bind_apart, METH_VARARGS, nullptr}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  if (!data_ptr) data_ptr = PyUnicode_InternFromString("data_ptr");
  return data_ptr ? PyModule_Create(&module) : nullptr;
}
