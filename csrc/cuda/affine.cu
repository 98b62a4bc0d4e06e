// affine_step on CUDA: the row of ../cpu/step.h, four elements to a thread.
// Bytes per element (fp32 state): 4 per register read or written, 4 or 2 per branch of the model output read and per
// copy of the next model input; DDIM with a bf16 network 10, DPM++2M 18. It must reach 90 % of the bandwidth of a copy,
// 80 % with a noise term: one Philox call gives a thread all four of its normals.
// Everything of a row is read from device memory, so a captured launch replays for any row of any table.
#include "../check.h"
#include "../export.h"
#include "draw.h"

namespace fastdiff {
namespace {

// Blocks to a multiprocessor: 768 threads with up to 7 loads of 16 bytes each in flight; with extras 512 with up to 9.
constexpr int kResident = 3, kResidentWithExtras = 2;

// A row in shared memory, with this sample's scalars, and what of it this block needs to know.
struct Row {
  float coef[kTerm];
  int32_t ids[kTermId];
  Scalars by;
  PhiloxKey key;
};

struct Sample {
  int b, row;
  unsigned reads;  // bit j < 5: slot j + 1; and the following
};
constexpr unsigned kReadsX = 1u << 5, kReadsOutput = 1u << 6, kReadsUnguided = 1u << 7, kGuided = 1u << 8;
constexpr unsigned kReadsE = 1u << 9, kEByUnguided = 1u << 10;
// Of the variant with extras alone.
constexpr unsigned kReadsPerturbed = 1u << 11, kReadsMomentum = 1u << 12, kReadsVariance = 1u << 13;

__device__ __forceinline__ float weight(const Row& row, int o, int column) {
  return row.coef[kOutput + kOutputStride * o + column];
}

// What the network gave for four elements, and the momentum.
struct Branches {
  Quad f, g, h, m;
};

template <bool kVector, bool kExtras>
__device__ __forceinline__ Branches load_branches(const AffineArgs& args, unsigned reads, int64_t at, int64_t left) {
  Branches all = {};
  if (reads & kReadsOutput) all.f = load_model<kVector>(args.model_out, args.model_out_dtype, at, left);
  if (reads & kReadsUnguided) all.g = load_model<kVector>(args.unguided, args.model_out_dtype, at, left);
  if (kExtras && (reads & kReadsPerturbed))
    all.h = load_model<kVector>(args.perturbed, args.model_out_dtype, at, left);
  if (kExtras && (reads & kReadsMomentum)) all.m = load<kVector>(args.momentum, at, left);
  return all;
}

// D of element e before its clamp.
template <bool kExtras>
__device__ __forceinline__ float estimate(const Row& row, unsigned reads, const Branches& all, float x, int e) {
  const float c = all.f.v[e], g = all.g.v[e];
  float f = c;
  if (reads & kGuided) f = guide<Scalar>(c, kExtras ? row.by.u * g : g, row.by.w);
  if (kExtras && (reads & kReadsPerturbed)) f = Scalar::fma(row.by.s, c - all.h.v[e], f);
  const float d = denoise<Scalar>(x, f, row.by.p, row.by.q);
  return kExtras && (reads & kReadsMomentum) ? Scalar::fma(row.by.m, all.m.v[e], d) : d;
}

template <bool kExtras>
__device__ __forceinline__ Quad denoised(const Row& row, unsigned reads, const Branches& all, const Quad& x,
                                         bool& bad) {
  Quad d = {};
  if (!(reads & kReadsOutput)) return d;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    bad |= !isfinite(all.f.v[e]) || !isfinite(all.g.v[e]) || (kExtras && !isfinite(all.h.v[e]));
    d.v[e] = Scalar::clamp(estimate<kExtras>(row, reads, all, x.v[e], e), row.by.lo, row.by.hi);
    if (kExtras) d.v[e] *= row.by.post;
  }
  return d;
}

// out_o += e (E - base).
template <bool kExtras, int kOutputs>
__device__ __forceinline__ void add_second(const Row& row, unsigned reads, const Branches& all, const Quad& x,
                                           Quad (&out)[kOutputs]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float f = reads & kReadsUnguided ? all.g.v[e] : all.f.v[e];
    const float second = reads & kEByUnguided ? denoise<Scalar>(x.v[e], f, row.coef[kP], row.coef[kQ])
                                              : estimate<kExtras>(row, reads, all, x.v[e], e);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o)
      out[o].v[e] = Scalar::fma(weight(row, o, kOutE), second - weight(row, o, kOutDelta) * x.v[e], out[o].v[e]);
  }
}

// Every tile of this block; true when the thread met a model output that is not finite.
template <bool kVector, Source kSource, bool kExtras, int kOutputs>
__device__ __forceinline__ bool run(const AffineArgs& args, const Cut& cut, const Row& row, Sample s, int block,
                                    float* staged) {
  bool bad = false;
  for (int tile = block; tile < cut.tiles; tile += cut.blocks) {
    // Read the row and work out addresses again in each turn: kept in registers they would crowd out threads.
    asm volatile("" : "+r"(s.b), "+r"(s.row) : : "memory");
    const int64_t sample = s.b * args.N, stride = args.B * args.N;
    const int64_t at = int64_t{tile} * cut.tile + 4 * threadIdx.x;
    const bool here = 4 * static_cast<int>(threadIdx.x) < cut.tile && at < args.N;
    const int64_t left = args.N - at;

    // All loads first, none waiting for another.
    Quad x = {}, d, out[kOutputs], r[kMaxSlots];
    Branches all = {};
    if (here) {
      if (s.reads & kReadsX) x = load<kVector>(args.state, row.ids[kSlotRegister] * stride + sample + at, left);
      all = load_branches<kVector, kExtras>(args, s.reads, sample + at, left);
    }
#pragma unroll
    for (int j = 0; j < kMaxSlots; ++j) {
      r[j] = Quad{};
      if (here && (s.reads >> j & 1))
        r[j] = load<kVector>(args.state, row.ids[kSlotRegister + 1 + j] * stride + sample + at, left);
    }

    d = denoised<kExtras>(row, s.reads, all, x, bad);
    if (here && args.denoised && (s.reads & kReadsOutput)) store<kVector>(args.denoised, sample + at, left, d);
    // D and the slots apart: together they would need more registers.
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int o = 0; o < kOutputs; ++o)
        out[o].v[e] = Scalar::fma(weight(row, o, kOutB), d.v[e] - weight(row, o, kOutDelta) * x.v[e],
                                  weight(row, o, kOutK) * x.v[e]);
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int o = 0; o < kOutputs; ++o)
#pragma unroll
        for (int j = 0; j < kMaxSlots; ++j)
          if (s.reads >> j & 1)
            out[o].v[e] =
                Scalar::fma(weight(row, o, kOutA + j), r[j].v[e] - weight(row, o, kOutDelta) * x.v[e], out[o].v[e]);
    if (here && (s.reads & kReadsE)) {
      // Few rows have an E: they read the network's output again, from the cache, so that no other row need hold it.
      asm volatile("" : "+r"(s.b) : : "memory");
      all = load_branches<kVector, kExtras>(args, s.reads, s.b * args.N + at, left);
      add_second<kExtras>(row, s.reads, all, x, out);
    }

    const float* weights = args.coef + s.row * args.coef_width + kTerm;
    const int32_t* names = args.ids + s.row * args.ids_width + kTermId;
    for (int t = 0; t < row.ids[kTermCount]; ++t) {
      float c[kOutputs];
      bool used = false;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        c[o] = weights[kTermStride * t + o];
        used |= c[o] != 0.0f;
      }
      if (!used) continue;
      const uint32_t id = names[kTermIdStride * t], stream = names[kTermIdStride * t + 1];
      Quad z = {};
      if (!args.noise) {
        z = draw<kSource>(cut, row.key, id, stream, at, tile, staged);
      } else if (here) {
        z = load<kVector>(args.noise, id * stride + sample + at, left);
      }
      if (kExtras && here && (s.reads & kReadsVariance)) {
        const Quad v = load_model<kVector>(args.variance, args.model_out_dtype, s.b * args.N + at, left);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          z.v[e] *= exponential<Scalar>(Scalar::fma(row.coef[kSpreadSlope], v.v[e], row.coef[kSpreadLog]));
      }
#pragma unroll
      for (int o = 0; o < kOutputs; ++o)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[o].v[e] = Scalar::fma(c[o], z.v[e], out[o].v[e]);
    }

    if (!here) continue;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[o].v[e] = out[o].v[e] + weight(row, o, kOutDelta) * x.v[e];
      store<kVector>(args.state, row.ids[kOutputRegister + o] * stride + sample + at, left, out[o]);
    }
    if (args.model_in) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[0].v[e] *= row.coef[kEmitScale];
      for (int copy = 0; copy < args.model_in_batch; ++copy)
        store_model<kVector>(args.model_in, args.model_in_dtype, copy * stride + sample + at, left, out[0]);
    }
  }
  return bad;
}

// kExtras: mix, a third branch, a momentum or a learned spread is given.
template <bool kVector, Source kSource, bool kExtras>
__global__ void __launch_bounds__(kThreads, kExtras ? kResidentWithExtras : kResident)
    affine_step_kernel(const __grid_constant__ AffineArgs args, const __grid_constant__ Cut cut) {
  __shared__ Row row;
  __shared__ alignas(16) float staged[kStagedFloats<kSource>];
  const int64_t b = blockIdx.x / cut.blocks;
  const int block = blockIdx.x % cut.blocks;
  const int64_t i = args.row[b];
  if (i < 0 || i >= args.R) return;  // the same for all blocks of the sample: none of them arrives below

  const float* coef = args.coef + i * args.coef_width;
  const int32_t* ids = args.ids + i * args.ids_width;
  if (threadIdx.x < kTerm) row.coef[threadIdx.x] = coef[threadIdx.x];
  if (threadIdx.x < kTermId) row.ids[threadIdx.x] = ids[threadIdx.x];
  if (threadIdx.x == 0) {
    row.by = scalars(coef, args.guidance[b], kExtras && args.mix ? args.mix + b * kMix : nullptr);
    const uint64_t seed = static_cast<uint64_t>(args.seed[b]);
    row.key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  }
  __syncthreads();

  const int outputs = row.ids[kOutputRegister + 1] < 0 ? 1 : row.ids[kOutputRegister + 2] < 0 ? 2 : 3;
  Sample s;
  s.b = static_cast<int>(b);
  s.row = static_cast<int>(i);
  s.reads = 0;
  for (int o = 0; o < outputs; ++o) {
    if (weight(row, o, kOutK) != 0.0f || weight(row, o, kOutDelta) != 0.0f) s.reads |= kReadsX;
    if (weight(row, o, kOutE) != 0.0f) s.reads |= kReadsE;
    for (int j = 0; j < row.ids[kSlotCount]; ++j)
      s.reads |= static_cast<unsigned>(weight(row, o, kOutA + j) != 0.0f) << j;
  }
  const int flags = row.ids[kFlags];
  if (flags & kReadsModel) {
    s.reads |= kReadsOutput;
    if (row.coef[kP] != 0.0f) s.reads |= kReadsX;
    if ((flags & kEUnguided) && (s.reads & kReadsE)) s.reads |= kEByUnguided;
    if (args.unguided && row.by.w != 1.0f) s.reads |= kGuided;
    if (args.unguided && (s.reads & (kGuided | kEByUnguided))) s.reads |= kReadsUnguided;
    if (kExtras && args.perturbed && row.by.s != 0.0f) s.reads |= kReadsPerturbed;
    if (kExtras && args.momentum && row.by.m != 0.0f) s.reads |= kReadsMomentum;
  }
  if (kExtras && args.variance && (flags & kSpreadsNoise) && row.ids[kTermCount] > 0) s.reads |= kReadsVariance;

  bool bad;
  if (outputs == 1) {
    bad = run<kVector, kSource, kExtras, 1>(args, cut, row, s, block, staged);
  } else if (outputs == 2) {
    bad = run<kVector, kSource, kExtras, 2>(args, cut, row, s, block, staged);
  } else {
    bad = run<kVector, kSource, kExtras, 3>(args, cut, row, s, block, staged);
  }

  const bool any = __syncthreads_or(bad);
  if (threadIdx.x != 0) return;
  if (any && args.status[b] < 0) args.status[b] = static_cast<int32_t>(i);  // all writers write the same
  if (block == 0)
    for (int copy = 0; copy < args.model_time_batch; ++copy)
      args.model_time[copy * args.B + b] = row.coef[kEmitTime];
  // The last block to arrive advances the row: by then all have read it.
  __threadfence();
  if (atomicAdd(args.ticket + b, 1) == cut.blocks - 1) {
    args.ticket[b] = 0;
    args.row[b] = static_cast<int32_t>(i + 1);
  }
}

template <bool kVector, Source kSource, bool kExtras>
int launch(const AffineArgs& args, Cut cut, cudaStream_t stream) {
  const auto kernel = affine_step_kernel<kVector, kSource, kExtras>;
  int device = 0, processors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0);
  if (error != cudaSuccess) return kCuda + error;
  // Two rounds of blocks: enough to even out, few enough that reading the row is paid seldom.
  const int64_t wanted = (2 * int64_t{processors} * resident + args.B - 1) / args.B;
  cut.blocks = static_cast<int>(wanted < 1 ? 1 : wanted < cut.tiles ? wanted : cut.tiles);
  if (args.B * cut.blocks > INT32_MAX) return kBadShape;
  kernel<<<static_cast<unsigned>(args.B * cut.blocks), kThreads, 0, stream>>>(args, cut);
  error = cudaGetLastError();
  return error == cudaSuccess ? kOk : kCuda + error;
}

template <bool kVector, bool kExtras>
int launch_from(Source source, const AffineArgs& args, const Cut& cut, cudaStream_t stream) {
  if (source == kInOrder) return launch<kVector, kInOrder, kExtras>(args, cut, stream);
  if (source == kStaged) return launch<kVector, kStaged, kExtras>(args, cut, stream);
  return launch<kVector, kGathered, kExtras>(args, cut, stream);
}

int affine_step(const AffineArgs& args, cudaStream_t stream) {
  if (const Error error = check(args); error != kOk) return error;
  if (!args.ticket || !args.model_out) return kNullPointer;
  if (args.B == 0 || args.N == 0) return kOk;
  if (args.B > INT32_MAX || args.R > INT32_MAX || args.channels > INT32_MAX || args.N / 4 > INT32_MAX) return kBadShape;
  const Cut cut = cut_into_tiles(args.N, args.channels);
  const Source source = source_of(args.channels);
  const bool vector = aligned({args.state, args.model_out, args.unguided, args.perturbed, args.variance, args.momentum,
                               args.model_in, args.noise, args.denoised},
                              args.N);
  const bool extras = args.mix || args.perturbed || args.momentum || args.variance;
  if (extras) return (vector ? launch_from<true, true> : launch_from<false, true>)(source, args, cut, stream);
  return (vector ? launch_from<true, false> : launch_from<false, false>)(source, args, cut, stream);
}

}  // namespace
}  // namespace fastdiff

FASTDIFF_EXPORT int fastdiff_affine_step_cuda(const AffineArgs* args, void* stream) {
  return args ? fastdiff::affine_step(*args, static_cast<cudaStream_t>(stream)) : fastdiff::kNullPointer;
}
