// What one instruction set offers: plain functions over plain structs, so that nothing else of a translation unit
// compiled for a newer CPU can leak into code that an older one runs.
#pragma once

#include "../affine.h"
#include "../philox.h"

namespace fastdiff::cpu {

// A noise term of a row that some output uses.
struct Term {
  uint32_t id, stream;
  float weight[kMaxOutputs];
};

// A table row without what it does not use: slots and terms whose weights are all zero are dropped, outputs that
// have no register too.
struct Row {
  bool reads_model, reads_x, clamps;
  float p, q, gain, lo, hi, emit_scale, emit_time;
  int outputs, slots, terms;
  int64_t x;  // registers
  int64_t to[kMaxOutputs], from[kMaxSlots];
  float k[kMaxOutputs], d[kMaxOutputs], b[kMaxOutputs];
  float a[kMaxSlots][kMaxOutputs];
  const Term* term;
};

// A run of consecutive elements of one sample, every pointer at its first element.
struct Stretch {
  const Row* row;
  int64_t count;
  float w;  // guidance weight, of use when `unconditional` is there
  int32_t model_out_dtype, model_in_dtype;
  const float* x;
  const void* conditional;
  const void* unconditional;       // null: the conditional branch alone
  const float* slot[kMaxSlots];
  const float* const* z;           // one pointer per term
  float* out[kMaxOutputs];
  float* denoised;                 // null: not wanted
  void* emit[2];                   // null: not wanted
};

// A block of `pixels` pixels times `channels` channels of a channels_last sample of `plane` pixels.
struct Patch {
  int64_t first_pixel, pixels, channels, plane;
};

struct Executor {
  const char* name;
  // Runs the row on the stretch; true when the model output held an inf or a NaN.
  bool (*step)(const Stretch&);
  // Normals of elements first.. (a multiple of 4) in the order of memory; writes up to kFillSlack beyond z + count.
  void (*normals)(float* z, const PhiloxSchedule&, uint32_t id, uint32_t stream, int64_t first, int64_t count);
  void (*normals_channels_last)(float* z, const PhiloxSchedule&, uint32_t id, uint32_t stream, const Patch&);
};

constexpr int64_t kFillSlack = 128;
// Elements worked on at a time: noise of a block stays in the first-level cache.
constexpr int64_t kBlock = 1024;

extern const Executor scalar_executor;
extern const Executor avx2_executor;
extern const Executor avx512_executor;

}  // namespace fastdiff::cpu
