// The ops of a training step, as the CPU and CUDA see them: the argument block, the columns of the table and the
// per-element maths (see fastdiff/engine/train_ops.py for the equations). Torch-free.
#pragma once

#include "guide.h"

extern "C" {

// Mirrored by fastdiff/engine/native_blocks.py; fastdiff_train_args_size() lets native.py compare the two.
struct TrainArgs {
  const void* images;      // [B, N]
  const float* table;      // [B, kTrainColumns]
  const int64_t* key;      // [B]
  const void* model_out;   // [B, N]: F; of the loss only
  const float* weight;     // [B]; of the loss only
  float* partial;          // [B, kParts]: sums of squares, written; of the loss only
  void* out;               // [B, N] of the model's dtype: the network's input, or the gradient (null: not wanted)
  int64_t B, N;
  int64_t width;           // of an image's last axis, which is the one that is mirrored
  int64_t channels;        // 1: contiguous; C > 1: channels_last
  int32_t image_dtype, model_dtype;  // enum Dtype
  float factor;            // of the gradient: factor * weight * (F - F*)
  int32_t reserved;
};
}

namespace fastdiff {

constexpr int kInputX0 = 0, kInputZ = 1, kInputY = 2, kTargetX0 = 3, kTargetZ = 4, kTargetY = 5, kFlip = 6;
constexpr int kTrainColumns = 8;
constexpr int kNoiseZ = 0, kNoiseY = 1, kStreamTraining = 3;

// image x0 + first z + second y: what a factor of 0 stands before is not read and not drawn.
struct Blend {
  float image, first, second;
  FASTDIFF_MEMBER bool reads() const { return image != 0.0f; }
};

FASTDIFF_INLINE Blend input_blend(const float* row) { return {row[kInputX0], row[kInputZ], row[kInputY]}; }
FASTDIFF_INLINE Blend target_blend(const float* row) { return {row[kTargetX0], row[kTargetZ], row[kTargetY]}; }

template <class L, class V>
FASTDIFF_INLINE V blend(V x0, V z, V y, const Blend& by) {
  V total = L::set(by.first) * z;
  if (by.second != 0.0f) total = L::fma(L::set(by.second), y, total);
  return by.image != 0.0f ? L::fma(L::set(by.image), x0, total) : total;
}

// 0 .. 255 to -1 .. 1; the difference is exact, so there is one rounding.
FASTDIFF_INLINE float unit_range(uint8_t pixel) { return (static_cast<float>(pixel) - 127.5f) * (1.0f / 127.5f); }

// Where element `at` of a mirrored sample comes from, in units of `channels` elements.
FASTDIFF_INLINE int64_t mirrored(int64_t unit, int64_t width) {
  const int64_t column = unit % width;
  return unit - column + (width - 1 - column);
}

}  // namespace fastdiff
