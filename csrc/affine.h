// One row of a plan, as every executor sees it: the argument block, the columns of the table, the per-element maths.
// Torch-free. A row computes, for each element of one sample (see fastdiff/engine/ops.py for the whole equation):
//   F = G + w (Fc - G) + s (Fc - Fp), G = u Fu;  D = post clamp(p x + q F + m M);  E = P x + Q Fu, or D before its clamp
//   out_o = base + k x + b (D - base) + e (E - base) + sum_j a_j (r_j - base) + spread sum_t c_t z_t,  base = d x
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTDIFF_INLINE static __host__ __device__ __forceinline__
#define FASTDIFF_MEMBER __host__ __device__ __forceinline__
#define FASTDIFF_LANE static FASTDIFF_MEMBER
#else
// Internal linkage: the same header is compiled for several instruction sets, and a linker that merged the copies
// could hand AVX-512 code to a machine without it.
#define FASTDIFF_INLINE static inline __attribute__((always_inline))
#define FASTDIFF_MEMBER inline __attribute__((always_inline))
#define FASTDIFF_LANE static FASTDIFF_MEMBER
#endif

extern "C" {

// Mirrored by fastdiff/engine/native_blocks.py; fastdiff_args_size() lets native.py compare the two.
struct AffineArgs {
  float* state;             // [K, B, N] registers
  const void* model_out;    // [B, N]: Fc
  const void* unguided;     // [B, N] or null: Fu
  const void* perturbed;    // [B, N] or null: Fp
  const void* variance;     // [B, N] or null: V, of the model's dtype
  const float* mix;         // [B, kMix] or null
  const float* momentum;    // [B, N] or null: M
  void* model_in;           // [model_in_batch, B, N] or null: next model input, written
  float* model_time;        // [model_time_batch, B] or null: next model time, written
  const float* coef;        // [R, coef_width]
  const int32_t* ids;       // [R, ids_width]
  int32_t* row;             // [B], advanced by one
  const int64_t* seed;      // [B]
  const float* guidance;    // [B]
  const float* noise;       // [noise_count, B, N] or null: replaces the generated normals
  float* denoised;          // [B, N] or null: D, written
  int32_t* status;          // [B]: first row whose model output was not finite, or negative
  int32_t* ticket;          // [B]: blocks arrived, CUDA only; zero between calls
  int64_t B, N, K, R;
  int64_t coef_width, ids_width;
  int64_t channels;         // 1: contiguous; C > 1: channels_last
  int64_t noise_count;
  int32_t model_out_dtype, model_in_dtype;    // enum Dtype
  int32_t model_in_batch, model_time_batch;   // times B; 0: absent
};
}

namespace fastdiff {

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUInt8 = 3 };

enum Error : int {
  kOk = 0,
  kNullPointer = 1,
  kBadShape = 2,
  kBadDtype = 3,
  kBadRegister = 4,
  kBadNoise = 5,
  kThreads = 6,
  kBadRule = 7,
  kOutOfMemory = 8,
  kCuda = 100,  // plus the cudaError_t
};

constexpr int kMaxOutputs = 3;
constexpr int kMaxSlots = 5;     // besides slot 0, which is x
constexpr int kMaxBranches = 3;  // Fc, Fu, Fp: so many copies of the next model input

// Columns of coef.
constexpr int kP = 0, kQ = 1, kGain = 2, kClampLo = 3, kClampHi = 4, kEmitScale = 5, kEmitTime = 6, kPerturb = 7;
constexpr int kOutput = 8, kOutputStride = 9;                    // + the following
constexpr int kOutK = 0, kOutDelta = 1, kOutB = 2, kOutE = 3, kOutA = 4;
constexpr int kSpreadLog = 35, kSpreadSlope = 36;
constexpr int kTerm = 40, kTermStride = 4;                       // + 0..2 weight in outputs 0..2

// Columns of ids.
constexpr int kSlotRegister = 0, kOutputRegister = 6, kFlags = 9, kTermCount = 10, kSlotCount = 11;
constexpr int kTermId = 16, kTermIdStride = 2;                   // + 0 id, + 1 stream
constexpr int32_t kReadsModel = 1, kEUnguided = 2, kSpreadsNoise = 4;

// Columns of mix.
constexpr int kMixW = 0, kMixU = 1, kMixP = 2, kMixQ = 3, kMixM = 4, kMixBound = 5, kMixPost = 6, kMixS = 7;
constexpr int kMix = 8;

// The scalars of one sample in one row. w = 1: Fu plays no part in F; s = 0: neither does Fp; m = 0: nor M in D.
struct Scalars {
  float w, u, s, p, q, m, lo, hi, post;
};

// mix: the sample's, or null.
FASTDIFF_INLINE Scalars scalars(const float* coef, float guidance, const float* mix) {
  const float more = coef[kGain] * (guidance - 1.0f);
  if (!mix) return {1.0f + more, 1.0f, 0.0f, coef[kP], coef[kQ], 0.0f, coef[kClampLo], coef[kClampHi], 1.0f};
  const float bound = mix[kMixBound];
  return {1.0f + mix[kMixW] * more,
          mix[kMixU],
          coef[kPerturb] * mix[kMixS],
          mix[kMixP] * coef[kP],
          mix[kMixQ] * coef[kQ],
          mix[kMixM],
          coef[kClampLo] > -bound ? coef[kClampLo] : -bound,
          coef[kClampHi] < bound ? coef[kClampHi] : bound,
          mix[kMixPost]};
}

// L is a lane type (one float in scalar.h, a register of floats in cpu/): the formulas are written once.
template <class L, class V>
FASTDIFF_INLINE V guide(V conditional, V unguided, V w) {
  return L::fma(w, conditional - unguided, unguided);
}

template <class L, class V>
FASTDIFF_INLINE V denoise(V x, V f, V p, V q) {
  return L::fma(q, f, p * x);
}

}  // namespace fastdiff
