// A tensor as it comes from Python. A View tells, through torch's stable C functions, whether it has the sizes,
// strides, dtype and device of the one that was bound, and where its elements then lie; `locate` says where they lie
// and looks at nothing else; `gather` copies the elements of one that does not lie as a row reads it.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstring>

namespace fastdiff::cpu {

inline PyObject *data_ptr, *is_neg, *cdata;  // the methods' names and the attribute's, made with the module

namespace {

constexpr int64_t kMostDims = 8;

// What the row needs to know of a tensor.
struct Form {
  int64_t dims, sizes[kMostDims], strides[kMostDims];
  int32_t dtype, device;

  // Of a dimension of one element the stride says nothing.
  bool lies_as(const int64_t* given_sizes, const int64_t* given_strides) const {
    for (int64_t i = 0; i < dims; ++i)
      if (given_sizes[i] != sizes[i] || (sizes[i] != 1 && given_strides[i] != strides[i])) return false;
    return true;
  }
};

// A tensor through torch's stable functions, whose handle is a pointer to its one member, the implementation.
class View {
 public:
  // False, without an exception, where this is no tensor or there is no such attribute.
  bool of(PyObject* tensor) {
    PyObject* address = PyObject_GetAttr(tensor, cdata);
    if (address) {
      implementation_ = PyLong_AsVoidPtr(address);
      Py_DECREF(address);
    }
    if (!PyErr_Occurred()) return implementation_ != nullptr;
    PyErr_Clear();
    return false;
  }

  // False for a tensor that has no memory of its own.
  bool form(Form& form) {
    int64_t *sizes, *strides;
    int32_t layout;
    if (aoti_torch_get_layout(handle(), &layout) || layout != aoti_torch_layout_strided() ||
        aoti_torch_get_dim(handle(), &form.dims) || form.dims > kMostDims ||
        aoti_torch_get_dtype(handle(), &form.dtype) || aoti_torch_get_device_type(handle(), &form.device) ||
        aoti_torch_get_sizes(handle(), &sizes) || aoti_torch_get_strides(handle(), &strides))
      return false;
    std::memcpy(form.sizes, sizes, static_cast<size_t>(form.dims) * sizeof *sizes);
    std::memcpy(form.strides, strides, static_cast<size_t>(form.dims) * sizeof *strides);
    return true;
  }

  // Where its elements lie, if it is of this form.
  bool locate(const Form& form, void*& at) {
    int64_t dims, *sizes, *strides;
    int32_t dtype, device;
    return !aoti_torch_get_dim(handle(), &dims) && dims == form.dims && !aoti_torch_get_dtype(handle(), &dtype) &&
           dtype == form.dtype && !aoti_torch_get_device_type(handle(), &device) && device == form.device &&
           !aoti_torch_get_sizes(handle(), &sizes) && !aoti_torch_get_strides(handle(), &strides) &&
           form.lies_as(sizes, strides) && !aoti_torch_get_data_ptr(handle(), &at);
  }

 private:
  AtenTensorHandle handle() { return reinterpret_cast<AtenTensorHandle>(&implementation_); }

  void* implementation_ = nullptr;
};

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

// Whether torch has still to turn a tensor's sign, of which the elements where it lies say nothing; so too where it
// cannot be asked.
bool negated(PyObject* tensor) {
  PyObject* found = PyObject_CallMethodObjArgs(tensor, is_neg, nullptr);
  Py_XDECREF(found);
  if (!found) PyErr_Clear();
  return found != Py_False;
}

// The elements of a tensor of this form one after the other, the last dimension first.
template <class T>
void gather(const Form& form, const T* from, T* to) {
  int64_t at[kMostDims] = {}, count = 1, offset = 0;
  for (int64_t i = 0; i < form.dims; ++i) count *= form.sizes[i];
  while (count-- > 0) {
    *to++ = from[offset];
    for (int64_t i = form.dims - 1; i >= 0; --i) {
      offset += form.strides[i];
      if (++at[i] < form.sizes[i]) break;
      offset -= form.strides[i] * form.sizes[i];
      at[i] = 0;
    }
  }
}

}  // namespace
}  // namespace fastdiff::cpu
