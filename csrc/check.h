// What both executors refuse before they touch anything. Shapes and dtypes of tensors are checked in Python, once.
#pragma once

#include "affine.h"

namespace fastdiff {

inline Error check(const AffineArgs& args) {
  if (!args.state || !args.coef || !args.ids || !args.row || !args.seed || !args.guidance || !args.status)
    return kNullPointer;
  if ((args.model_in_batch != 0) != (args.model_in != nullptr)) return kNullPointer;
  if ((args.model_time_batch != 0) != (args.model_time != nullptr)) return kNullPointer;
  if (args.B < 0 || args.N < 0 || args.K < 1 || args.R < 0 || args.channels < 1 || args.N % args.channels != 0 ||
      args.coef_width < kTerm || args.ids_width < kTermId)
    return kBadShape;
  for (const int32_t batch : {args.model_out_batch, args.model_in_batch, args.model_time_batch})
    if (batch < 0 || batch > 2) return kBadShape;
  for (const int32_t dtype : {args.model_out_dtype, args.model_in_dtype})
    if (dtype < kFloat32 || dtype > kBFloat16) return kBadDtype;
  return kOk;
}

}  // namespace fastdiff
