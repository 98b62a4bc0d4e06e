// What both executors refuse before they touch anything. Shapes and dtypes of tensors are checked in Python, once.
#pragma once

#include <initializer_list>

#include "affine.h"
#include "attention.h"
#include "guide.h"
#include "measure.h"
#include "norm.h"
#include "train.h"
#include "winograd.h"

namespace fastdiff {

inline Error check(const AffineArgs& args) {
  if (!args.state || !args.coef || !args.ids || !args.row || !args.seed || !args.guidance || !args.status)
    return kNullPointer;
  if ((args.model_in_batch != 0) != (args.model_in != nullptr)) return kNullPointer;
  if ((args.model_time_batch != 0) != (args.model_time != nullptr)) return kNullPointer;
  if (args.B < 0 || args.N < 0 || args.K < 1 || args.R < 0 || args.channels < 1 || args.N % args.channels != 0 ||
      args.coef_width < kTerm || args.ids_width < kTermId)
    return kBadShape;
  for (const int32_t batch : {args.model_in_batch, args.model_time_batch})
    if (batch < 0 || batch > kMaxBranches) return kBadShape;
  for (const int32_t dtype : {args.model_out_dtype, args.model_in_dtype})
    if (dtype < kFloat32 || dtype > kBFloat16) return kBadDtype;
  return kOk;
}

inline Error check(const GuideArgs& args) {
  if (!args.state || !args.model_out || !args.coef || !args.ids || !args.row || !args.guidance || !args.settings ||
      !args.mix || !args.partial)
    return kNullPointer;
  if (args.rule == kApg && !args.momentum) return kNullPointer;
  if (args.B < 0 || args.N < 1 || args.K < 1 || args.R < 0 || args.coef_width < kTerm || args.ids_width < kTermId)
    return kBadShape;
  if (args.model_out_dtype < kFloat32 || args.model_out_dtype > kBFloat16) return kBadDtype;
  return args.rule < kPlain || args.rule > kCfgZero ? kBadRule : kOk;
}

inline Error check(const MeasureArgs& args) {
  if (!args.value || !args.before || !args.found || !args.partial) return kNullPointer;
  if (args.quantity == kError && !args.after) return kNullPointer;
  if (args.B < 0 || args.N < 1) return kBadShape;
  return args.quantity < kError || args.quantity > kChange ? kBadRule : kOk;
}

// `loss`: of the loss, else of the noising.
inline Error check(const TrainArgs& args, bool loss) {
  if (!args.images || !args.table || !args.key) return kNullPointer;
  if (loss ? !args.model_out || !args.weight || !args.partial : !args.out) return kNullPointer;
  if (args.B < 1 || args.N < 1 || args.channels < 1 || args.width < 1 || args.N % (args.channels * args.width) != 0)
    return kBadShape;
  if (args.image_dtype < kFloat32 || args.image_dtype > kUInt8) return kBadDtype;
  return args.model_dtype < kFloat32 || args.model_dtype > kBFloat16 ? kBadDtype : kOk;
}

inline Error check(const NormArgs& args) {
  if (!args.x || (args.y && (!args.weight || !args.bias)) || (!args.y && !args.total)) return kNullPointer;
  if ((args.C1 < args.C) != (args.skip != nullptr)) return kNullPointer;
  if (args.B < 0 || args.P < 0 || args.C1 < 1 || args.C < args.C1) return kBadShape;
  if (args.y && (args.groups < 1 || args.C % args.groups != 0)) return kBadShape;
  return args.dtype < kFloat32 || args.dtype > kBFloat16 ? kBadDtype : kOk;
}

inline Error check(const AttentionArgs& args) {
  if (!args.q || !args.k || !args.v || !args.out || !args.stats) return kNullPointer;
  if (args.grad && (!args.dq || !args.dk || !args.dv)) return kNullPointer;
  return args.B < 1 || args.T < 1 || args.H < 1 || args.d < 1 ? kBadShape : kOk;
}

// `out`: of the output transform, else of the input transform.
inline Error check(const WinogradArgs& args, bool out) {
  if (out ? !args.products || !args.y : !args.x || !args.v) return kNullPointer;
  if (args.size != 2 && args.size != 4) return kBadShape;
  if (args.B < 1 || args.C < 1 || args.H < 1 || args.W < 1 || args.first < 0 || args.count < 1) return kBadShape;
  const int64_t rows = (args.H + args.size - 1) / args.size, columns = (args.W + args.size - 1) / args.size;
  return args.first + args.count > args.B * rows * columns ? kBadShape : kOk;
}

inline Error check(const WinogradTrainArgs& args) {
  if (!args.x || !args.y || !args.weight) return kNullPointer;
  if (args.B < 1 || args.H < 1 || args.W < 1 || args.block < 1) return kBadShape;
  return args.C < 1 || args.C % kWinogradPanel != 0 || args.N < 1 || args.N % kWinogradPanel != 0 ? kBadShape : kOk;
}

}  // namespace fastdiff
