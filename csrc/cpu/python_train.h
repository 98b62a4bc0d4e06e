// A training step's ops and draws as Python functions; see python_train.cpp.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace fastdiff::cpu {

PyObject* train(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* train_rows(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace fastdiff::cpu
