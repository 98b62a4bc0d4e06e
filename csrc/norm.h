// Group normalisation of a sum, its affine map, a scale and shift, and SiLU: the argument block every executor sees.
// Torch-free. See fastdiff/engine/norm.py for the equation.
#pragma once

#include <cstdint>

extern "C" {

// Mirrored by fastdiff/engine/native_blocks.py; fastdiff_norm_args_size() lets native.py compare the two.
// An image is [B, channels, P], its channels last or first; strides count elements from one sample to the next.
struct NormArgs {
  const void* x;          // [B, C1, P]
  const void* residual;   // [B, C1, P] or null; stride 0: one image for all samples
  const void* skip;       // [B, C - C1, P], or null where C1 = C
  const float* before;    // [B, C] or null: added to every pixel
  const float* scale;     // [B, C] or null
  const float* shift;     // [B, C] or null
  const float* weight;    // [C]
  const float* bias;      // [C]
  void* y;                // [B, C, P] or null: nothing but the sum is wanted
  void* total;            // [B, C, P] or null: receives the sum
  float* stats;           // [B, groups, 2] or null: receives mean and 1 / sqrt(variance + eps), for the gradient
  const void* grad;       // [B, C, P]: of y, where the gradient is asked for; then x is the sum and y receives du
  float* sums;            // [B, 3, C] or null: receives the gradient's sums over pixels: g, g n and du
  int64_t B, C, C1, P, groups;
  int64_t residual_stride, before_stride, scale_stride, shift_stride;
  float eps;
  int32_t act;            // SiLU or not
  int32_t dtype;          // enum Dtype, of every image
  int32_t channels_last;
};
}
