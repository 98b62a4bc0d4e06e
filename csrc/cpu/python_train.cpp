// A training step's ops and draws as Python functions: between two of its passes over memory nothing of Python is left in
// the caches, so that whoever looks at the same tensors there takes a tenth of the step.
#include "python_train.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "../export.h"
#include "tensor_view.h"
#include "train_draw.h"

namespace fastdiff::cpu {
namespace {

// The tensors of `train`, in the order of TrainTensors.arguments(), and the two results of the loss.
enum Which { kImages, kTable, kKey, kOut, kModelOut, kWeight, kPartial, kError, kMean, kTensors };

struct Operand {
  Form form{};
  void* at = nullptr;  // null: not given

  // False unless it is None or a plain tensor of this type with its memory on the CPU.
  bool take(PyObject* tensor, PyObject* type) {
    if (tensor == Py_None) return true;
    View view;
    return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == type && view.of(tensor) && view.form(form) &&
           form.device == aoti_torch_device_type_cpu() && !negated(tensor) && view.locate(form, at) && at;
  }

  int64_t elements() const {
    return std::accumulate(form.sizes, form.sizes + form.dims, int64_t{1}, std::multiplies<int64_t>());
  }

  bool contiguous() const {
    int64_t strides[kMostDims], stride = 1;
    for (int64_t i = form.dims - 1; i >= 0; stride *= form.sizes[i--]) strides[i] = stride;
    return form.lies_as(form.sizes, strides);
  }

  bool channels_last() const {
    const int64_t* n = form.sizes;
    const int64_t strides[] = {n[1] * n[2] * n[3], 1, n[1] * n[3], n[1]};
    return form.dims == 4 && form.lies_as(n, strides);
  }

  // Dense and of these sizes.
  bool is(int32_t dtype, std::initializer_list<int64_t> sizes) const {
    return form.dtype == dtype && form.dims == static_cast<int64_t>(sizes.size()) &&
           std::equal(sizes.begin(), sizes.end(), form.sizes) && contiguous();
  }

  // Of the sizes of `like`, and in its order of memory, which is channels_last where channels > 1.
  bool lies_like(const Operand& like, int64_t channels) const {
    return form.dims == like.form.dims && std::equal(form.sizes, form.sizes + form.dims, like.form.sizes) &&
           (channels > 1 ? channels_last() : contiguous());
  }
};

int32_t dtype_of(const Operand& tensor) {
  const int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16(),
                            aoti_torch_dtype_uint8()};  // in the order of Dtype
  return static_cast<int32_t>(std::find(dtypes, dtypes + 4, tensor.form.dtype) - dtypes);
}

// Whether these are the tensors of a call, then in `block`, as engine.train_ops.check asks of them.
bool fill(const Operand (&t)[kTensors], TrainArgs& block) {
  const Operand& images = t[kImages];
  const bool loss = t[kModelOut].at != nullptr;
  if (!images.at || images.form.dims < 2 || images.elements() == 0) return false;
  const int64_t batch = images.form.sizes[0];
  block.channels = images.contiguous() ? 1 : images.channels_last() ? images.form.sizes[1] : 0;
  const Operand& model = loss ? t[kModelOut] : t[kOut];
  block.image_dtype = dtype_of(images), block.model_dtype = dtype_of(model);
  const int32_t single = aoti_torch_dtype_float32();
  if (block.channels == 0 || block.image_dtype > kUInt8 || block.model_dtype > kBFloat16 || !model.at ||
      !model.lies_like(images, block.channels) || !t[kTable].is(single, {batch, kTrainColumns}) ||
      !t[kKey].is(aoti_torch_dtype_int64(), {batch}))
    return false;
  if (loss && (!t[kWeight].is(single, {batch}) || !t[kPartial].is(single, {batch, kParts}) ||
               !t[kError].is(single, {batch}) || !t[kMean].is(single, {})))
    return false;
  if (loss && t[kOut].at && (t[kOut].form.dtype != model.form.dtype || !t[kOut].lies_like(images, block.channels)))
    return false;
  block.images = images.at, block.model_out = t[kModelOut].at, block.out = t[kOut].at;
  block.table = static_cast<const float*>(t[kTable].at), block.key = static_cast<const int64_t*>(t[kKey].at);
  block.weight = static_cast<const float*>(t[kWeight].at), block.partial = static_cast<float*>(t[kPartial].at);
  block.B = batch, block.N = images.elements() / batch, block.width = images.form.sizes[images.form.dims - 1];
  return true;
}

// Each sample's mean over its elements, and the mean of weight * error.
void means(const TrainArgs& block, float* error, float* mean) {
  double total = 0.0;
  const float* partial = block.partial;
  for (int64_t b = 0; b < block.B; ++b, partial += kParts) {
    error[b] = static_cast<float>(std::accumulate(partial, partial + kParts, 0.0) / static_cast<double>(block.N));
    total += static_cast<double>(block.weight[b]) * error[b];
  }
  *mean = static_cast<float>(total / static_cast<double>(block.B));
}

}  // namespace

// train(torch.Tensor, factor, images, table, key, out, model_out, weight, partial, error, mean) -> error code, or None where
// these are not tensors that it takes as they are. Without model_out it is noise_images; else the loss.
PyObject* train(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 + kTensors) return PyErr_Format(PyExc_TypeError, "expected 11 arguments, got %zd", count);
  Operand tensors[kTensors];
  for (int i = 0; i < kTensors; ++i)
    if (!tensors[i].take(args[2 + i], args[0])) Py_RETURN_NONE;
  TrainArgs block{};
  block.factor = static_cast<float>(PyFloat_AsDouble(args[1]));
  if (PyErr_Occurred()) return nullptr;
  if (!fill(tensors, block)) Py_RETURN_NONE;
  int code;
  Py_BEGIN_ALLOW_THREADS
  code = block.model_out ? fastdiff_loss_cpu(&block) : fastdiff_noise_images_cpu(&block);
  if (!code && block.model_out)
    means(block, static_cast<float*>(tensors[kError].at), static_cast<float*>(tensors[kMean].at));
  Py_END_ALLOW_THREADS
  return PyLong_FromLong(code);
}

// train_rows(B, step, T, flip, drop_label, seeds, times, shown, rows, weights, key, time, model_time, table, weight,
// dropped): the draws of B samples whose times are one of T, each as likely as another. What the objective says of a
// sample's time is copied; of its other uniforms, one decides with `flip` whether it is mirrored, one whether it drops its
// label. The tensors, [B] or [T] and [., kTrainColumns], are not looked at but for where they lie.
PyObject* train_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kGiven = 5, kRead = 5, kMade = 6;
  if (count != kGiven + kRead + kMade) return PyErr_Format(PyExc_TypeError, "expected 16 arguments, got %zd", count);
  const int64_t batch = PyLong_AsLongLong(args[0]), choices = PyLong_AsLongLong(args[2]);
  const uint64_t step = PyLong_AsUnsignedLongLong(args[1]);
  const long flip = PyLong_AsLong(args[3]);
  const double drop_label = PyFloat_AsDouble(args[4]);
  if (PyErr_Occurred()) return nullptr;
  void* at[kRead + kMade];
  for (int i = 0; i < kRead + kMade; ++i)
    if (!locate(args[kGiven + i], at[i])) return nullptr;
  const auto* seeds = static_cast<const int64_t*>(at[0]);
  const auto* times = static_cast<const double*>(at[1]);
  const auto *shown = static_cast<const float*>(at[2]), *rows = static_cast<const float*>(at[3]);
  const auto* weights = static_cast<const float*>(at[4]);
  auto *key = static_cast<int64_t*>(at[5]);
  auto* time = static_cast<double*>(at[6]);
  auto *model_time = static_cast<float*>(at[7]), *table = static_cast<float*>(at[8]), *weight = static_cast<float*>(at[9]);
  auto* dropped = static_cast<bool*>(at[10]);
  for (int64_t b = 0; b < batch; ++b, table += kTrainColumns) {
    double uniforms[4];
    key[b] = host_draw(seeds[b], step, uniforms);
    const int64_t i = std::min(static_cast<int64_t>(uniforms[0] * static_cast<double>(choices)), choices - 1);
    time[b] = times[i];
    model_time[b] = shown[i];
    weight[b] = weights[i];
    std::copy_n(rows + i * kTrainColumns, kTrainColumns, table);
    if (flip) table[kFlip] = uniforms[2] < 0.5 ? 1.0f : 0.0f;
    dropped[b] = uniforms[3] < drop_label;
  }
  Py_RETURN_NONE;
}

}  // namespace fastdiff::cpu
