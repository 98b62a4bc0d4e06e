// What one instruction set offers: plain functions over plain structs, so that nothing else of a translation unit
// compiled for a newer CPU can leak into code that an older one runs.
#pragma once

#include "../attention.h"
#include "../guide.h"
#include "../measure.h"
#include "../mersenne.h"
#include "../norm.h"
#include "../philox.h"
#include "../train.h"
#include "../winograd.h"

namespace fastdiff::cpu {

// A noise term of a row that some output uses.
struct Term {
  uint32_t id, stream;
  float weight[kMaxOutputs];
};

// A table row without what it does not use: slots and terms whose weights are all zero are dropped, outputs that
// have no register too.
struct Row {
  bool reads_model, reads_x, reads_e, e_unguided, spreads_noise;
  float p, q, spread_log, spread_slope, emit_scale, emit_time;
  const float* coef;  // the row itself
  int outputs, slots, terms;
  int64_t x, copy;  // registers; copy: receives D as it is, or -1
  int64_t to[kMaxOutputs], from[kMaxSlots];
  float k[kMaxOutputs], d[kMaxOutputs], b[kMaxOutputs], e[kMaxOutputs];
  float a[kMaxSlots][kMaxOutputs];
  const Term* term;
};

// A run of consecutive elements of one sample, every pointer at its first element.
struct Stretch {
  const Row* row;
  int64_t count;
  Scalars by;
  bool clamps;
  bool extras;  // the row has an E, or the sample a factor u or post, a third branch, a momentum or a learned spread
  int32_t model_out_dtype, model_in_dtype;
  const float* x;
  const void* conditional;
  const void* unguided;            // null: not read; there without extras only if w is not 1
  const void* perturbed;           // null: not read
  const float* momentum;           // null: not read
  const void* variance;            // null: the noise is as wide as its weights say
  const float* slot[kMaxSlots];
  const float* const* z;           // one pointer per term
  float* out[kMaxOutputs];
  float* copy;                     // null: no output is D as it is
  float* denoised;                 // null: not wanted
  void* emit[kMaxBranches];                   // null: not wanted
};

// A block of `pixels` pixels times `channels` channels of a channels_last sample of `plane` pixels.
struct Patch {
  int64_t first_pixel, pixels, channels, plane;
};

// A part of one sample for the guide op: elements first .. first + count, pointers at the sample's first element.
struct Part {
  Asked asked;
  int32_t rule, model_out_dtype;
  int64_t first, count;
  float beta;
  const float* x;          // null: P is 0
  const void* conditional;
  const void* unguided;    // null: not read
  const void* perturbed;   // null: not read
  float* momentum;         // null: not read; rule kApg writes it
};

// A run of consecutive elements of one sample in a training step, every pointer at its first element.
struct Lesson {
  Blend by;
  int64_t count;
  const float* x0;  // null: not read
  const float* z;   // null: not drawn
  const float* y;
  int32_t model_dtype;
  const void* model_out;  // of the loss
  float scale;            // of the gradient
  void* out;              // null: not wanted
};

// Where a run of images is read: units of `channels` elements from `first` on, rows of `width` units.
struct Pixels {
  const void* images;  // the sample's first element
  int32_t dtype;
  bool flip;
  int64_t first, units, channels, width;
};

// Pixels first .. first + count of channels channel .. end of sample b for the norm op.
struct NormPatch {
  const NormArgs* args;
  int64_t b, first, count, channel, end;
};

// y = (u - middle) factor + constant of every channel, then SiLU; backward du = factor g + slope (u - middle) + rest.
struct NormMap {
  const float *factor, *middle, *constant;
  void* to;
  bool from_total, act;
  const float *slope, *rest;  // null: forward
};

constexpr int64_t kPanel = kWinogradPanel;

// One tile of a Winograd convolution: where its pixels lie, row by row. Channel c of tap k is in
// [k tap + c / kPanel panel + c % kPanel] of the transformed tile.
struct TileIn {
  const float* pixel[36];
  float* v;
  int64_t tap, panel;
};

struct TileOut {
  const float* products;
  const float* bias;      // null: none
  float* pixel[16];       // null: outside of the image
  int64_t tap, panel;
};

// A panel of `rows` rows of kPanel weights with 3x3 taps, and its transform; or the gradient of the one from the other's.
struct WeightPanel {
  float* weight;       // row, column, tap: strides
  float* transformed;  // 36 matrices [rows, kPanel], `matrix` apart
  int64_t rows, row, column, tap, matrix;
};

// to[n][..] = sum over m of a[n, m] x[m][..], x and to panels. a: rows a_row apart or, turned, a panel of columns.
struct PanelProduct {
  const float *a, *x;
  float* to;
  int64_t N, M, a_row;
  bool turned, add;  // add: to what is there; turned only
};

struct Executor {
  const char* name;
  // Runs the row on the stretch; true when the model output held an inf or a NaN.
  bool (*step)(const Stretch&);
  // Normals of elements first.. (a multiple of 4) in the order of memory; writes up to kFillSlack beyond z + count.
  void (*normals)(float* z, const PhiloxSchedule&, uint32_t id, uint32_t stream, int64_t first, int64_t count);
  void (*normals_channels_last)(float* z, const PhiloxSchedule&, uint32_t id, uint32_t stream, const Patch&);
  // What the rule sums over the part; kApg moves M on.
  Sums (*sums)(const Part&);
  // |D| before its clamp, as the row will make it from `by`, into to[0 .. count).
  void (*magnitudes)(const Part&, const Scalars& by, float* to);
  // The sum of the measure op's terms over elements first .. first + count of all samples' memory.
  double (*measure)(const MeasureArgs&, int64_t first, int64_t count);
  // n >= 16 normals of torch's generator, whose state is moved on; z null: nothing else.
  void (*torch_normals)(GeneratorBytes&, float* z, int64_t n);
  // Images as fp32 in [-1, 1], mirrored where asked, into to[0 .. units * channels).
  void (*pixels)(const Pixels&, float* to);
  void (*noised)(const Lesson&);
  // The sum of squared errors, and the gradient.
  double (*squares)(const Lesson&);
  // Adds sums of u and of u squared to [2, channels], of which only the sum over a group's channels counts: a run of
  // short planes (channels first) puts it in the run's first channel. Writes u where the total is wanted.
  void (*norm_sums)(const NormPatch&, double* sums);
  void (*norm_map)(const NormPatch&, const NormMap&);
  // Adds the patch's sums of g, g (u - middle) and u - middle to [C, 3].
  void (*norm_gradient_sums)(const NormPatch&, const NormMap&, double* sums);
  void (*norm_gradient_map)(const NormPatch&, const NormMap&);
  // Head `which` of all samples' heads; scratch begins on a cache line (attention.cpp says how much).
  void (*attend)(const AttentionArgs&, int64_t which, float* scratch);
  void (*attend_backward)(const AttentionArgs&, int64_t which, float* scratch);
  // size: outputs of a tile in each direction, 2 or 4.
  void (*winograd_into)(const TileIn&, int64_t channels, int64_t size);
  void (*winograd_out)(const TileOut&, int64_t channels, int64_t size);
  // For training, with size 4. The gradient of the products from that of the pixels: the output transform's adjoint.
  void (*winograd_spread)(const TileIn&, int64_t channels);
  void (*winograd_weights)(const WeightPanel&);
  void (*winograd_weights_gradient)(const WeightPanel&);
  void (*panel_product)(const PanelProduct&);
};

constexpr int64_t kFillSlack = 128;
// Elements worked on at a time: noise of a block stays in the first-level cache.
constexpr int64_t kBlock = 1024;

// In groups of eight and eight, for which wider registers have no use.
void torch_normals_avx2(GeneratorBytes&, float* z, int64_t n);

extern const Executor scalar_executor;
extern const Executor avx2_executor;
extern const Executor avx512_executor;

// The executor in use: the best of this machine unless a test chose another (isa.cpp).
const Executor& executor();

// Below this many element operations a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

}  // namespace fastdiff::cpu
