// One row of a plan, as every executor sees it: the argument block, the columns of the table, the per-element maths.
// Torch-free. A row computes, for each element of one sample (see fastdiff/engine/ops.py for the equation):
//   F = Fu + w (Fc - Fu);  D = clamp(P x + Q F);  out_o = d x + k x + b (D - d x) + sum_j a_j (r_j - d x) + sum_t c_t z_t
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

// Mirrored by fastdiff/engine/native.py; fastdiff_args_size() lets it check that both sides agree.
struct AffineArgs {
  float* state;             // [K, B, N] registers
  const void* model_out;    // [B or 2B, N]: conditional first, then unconditional
  void* model_in;           // [B or 2B, N] or null: next model input, written
  float* model_time;        // [B or 2B] or null: next model time, written
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
  int32_t model_out_dtype, model_in_dtype;  // enum Dtype
  int32_t model_out_batch, model_in_batch, model_time_batch;  // times B; 0: absent
  int32_t reserved;
};
}

namespace fastdiff {

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum Error : int {
  kOk = 0,
  kNullPointer = 1,
  kBadShape = 2,
  kBadDtype = 3,
  kBadRegister = 4,
  kBadNoise = 5,
  kThreads = 6,
  kCuda = 100,  // plus the cudaError_t
};

constexpr int kMaxOutputs = 3;
constexpr int kMaxSlots = 5;  // besides slot 0, which is x

// Columns of coef.
constexpr int kP = 0, kQ = 1, kGain = 2, kClampLo = 3, kClampHi = 4, kEmitScale = 5, kEmitTime = 6;
constexpr int kOutput = 8, kOutputStride = 8;                    // + 0 k, + 1 d, + 2 b, + 3.. a_1..a_5
constexpr int kTerm = kOutput + kMaxOutputs * kOutputStride;     // + 0..2 weight in outputs 0..2
constexpr int kTermStride = 4;

// Columns of ids.
constexpr int kSlotRegister = 0, kOutputRegister = 6, kFlags = 9, kTermCount = 10, kSlotCount = 11;
constexpr int kTermId = 16, kTermIdStride = 2;                   // + 0 id, + 1 stream
constexpr int32_t kReadsModel = 1;

// Guidance weight of a sample in a row of gain g: 1 means the conditional branch alone, and Fu is not read.
FASTDIFF_INLINE float guidance_weight(float gain, float guidance) { return 1.0f + gain * (guidance - 1.0f); }

// L is a lane type (one float in scalar.h, a register of floats in cpu/): the formulas are written once.
template <class L, class V>
FASTDIFF_INLINE V guide(V conditional, V unconditional, V w) {
  return L::fma(w, conditional - unconditional, unconditional);
}

template <class L, class V>
FASTDIFF_INLINE V denoise(V x, V f, V p, V q) {
  return L::fma(q, f, p * x);
}

}  // namespace fastdiff
