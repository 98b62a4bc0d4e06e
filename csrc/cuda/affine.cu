// affine_step on CUDA: the row of ../cpu/step.h, four elements to a thread.
// Bytes per element (fp32 state): 4 per register read or written, 4 or 2 per branch of the model output read and per
// copy of the next model input; DDIM with a bf16 network 10, DPM++2M 18. It must reach 90 % of the bandwidth of a copy,
// 80 % with a noise term: one Philox call gives a thread all four of its normals.
// Everything of a row is read from device memory, so a captured launch replays for any row of any table.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../check.h"
#include "../export.h"
#include "../normal.h"
#include "../scalar.h"

namespace fastdiff {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 3;  // blocks to a multiprocessor: 768 threads with up to 7 loads of 16 bytes each in flight
constexpr int kTile = 4 * kThreads;

// Where a thread's normals come from.
enum Source : int {
  kInOrder,   // memory order is element order: one counter is one thread's four elements
  kStaged,    // channels_last: the block draws whole counters and deals them out through shared memory
  kGathered,  // channels_last with more than kTile / 4 channels: every element draws its own counter
};

// How a sample is cut: tiles of whole pixels when it is channels_last.
struct Cut {
  int64_t plane;
  int tiles, channels, tile, pixels, blocks;
};

struct Quad {
  float v[4];
};

// `left`: elements of the sample from `at` on, at least 1. kVector: all sizes and addresses are multiples of 16 bytes.
template <bool kVector>
__device__ __forceinline__ Quad load(const float* p, int64_t at, int64_t left) {
  Quad q;
  if (kVector) {
    const float4 all = *reinterpret_cast<const float4*>(p + at);
    q.v[0] = all.x, q.v[1] = all.y, q.v[2] = all.z, q.v[3] = all.w;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) q.v[e] = e < left ? p[at + e] : 0.0f;
  }
  return q;
}

template <bool kVector>
__device__ __forceinline__ void store(float* p, int64_t at, int64_t left, const Quad& q) {
  if (kVector) {
    *reinterpret_cast<float4*>(p + at) = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < left) p[at + e] = q.v[e];
  }
}

__device__ __forceinline__ float widen(uint16_t h, int32_t dtype) {
  return dtype == kFloat16 ? __half2float(__ushort_as_half(h)) : __uint_as_float(static_cast<uint32_t>(h) << 16);
}

__device__ __forceinline__ uint32_t narrow(float v, int32_t dtype) {
  return dtype == kFloat16 ? __half_as_ushort(__float2half_rn(v)) : __bfloat16_as_ushort(__float2bfloat16_rn(v));
}

template <bool kVector>
__device__ __forceinline__ Quad load_model(const void* base, int32_t dtype, int64_t at, int64_t left) {
  if (dtype == kFloat32) return load<kVector>(static_cast<const float*>(base), at, left);
  const uint16_t* p = static_cast<const uint16_t*>(base) + at;
  Quad q;
  if (kVector) {
    const uint2 all = *reinterpret_cast<const uint2*>(p);
    q.v[0] = widen(all.x & 0xffff, dtype), q.v[1] = widen(all.x >> 16, dtype);
    q.v[2] = widen(all.y & 0xffff, dtype), q.v[3] = widen(all.y >> 16, dtype);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) q.v[e] = e < left ? widen(p[e], dtype) : 0.0f;
  }
  return q;
}

template <bool kVector>
__device__ __forceinline__ void store_model(void* base, int32_t dtype, int64_t at, int64_t left, const Quad& q) {
  if (dtype == kFloat32) return store<kVector>(static_cast<float*>(base), at, left, q);
  uint16_t* p = static_cast<uint16_t*>(base) + at;
  if (kVector) {
    *reinterpret_cast<uint2*>(p) = make_uint2(narrow(q.v[0], dtype) | narrow(q.v[1], dtype) << 16,
                                              narrow(q.v[2], dtype) | narrow(q.v[3], dtype) << 16);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < left) p[e] = static_cast<uint16_t>(narrow(q.v[e], dtype));
  }
}

// A row in shared memory, and what of it this block needs to know.
struct Row {
  float coef[kTerm];
  int32_t ids[kTermId];
};

struct Sample {
  int b, row;
  PhiloxKey key;
  float w;
  unsigned reads;  // bit j < 5: slot j + 1; and the following
};
constexpr unsigned kReadsX = 32, kReadsOutput = 64, kReadsBoth = 128;

__device__ __forceinline__ float weight(const Row& row, int o, int column) {
  return row.coef[kOutput + kOutputStride * o + column];
}

// The four normals of elements at .. at + 3 in memory order.
template <Source kSource>
__device__ __forceinline__ Quad draw(const Cut& cut, PhiloxKey key, uint32_t id, uint32_t stream, int64_t at,
                                     int tile, float* staged) {
  asm volatile("" : "+r"(key.k0), "+r"(key.k1));  // likewise for the twenty round keys
  Quad z;
  if (kSource == kInOrder) {
    normals<Scalar>(static_cast<uint64_t>(at) >> 2, id, stream, key, z.v);
  } else if (kSource == kGathered) {
#pragma unroll 1
    for (int e = 0; e < 4; ++e) {
      const int64_t element = (at + e) % cut.channels * cut.plane + (at + e) / cut.channels;
      float n[4];
      normals<Scalar>(static_cast<uint64_t>(element) >> 2, id, stream, key, n);
      const int word = static_cast<int>(element & 3);
      const float v = word == 0 ? n[0] : word == 1 ? n[1] : word == 2 ? n[2] : n[3];
#pragma unroll
      for (int i = 0; i < 4; ++i) z.v[i] = i == e ? v : z.v[i];
    }
  } else {
    // A channel's run of pixels may start inside a counter's four elements; it then touches one counter more.
    const int each = cut.pixels / 4 + (cut.plane % 4 != 0);
    __syncthreads();
    for (int unit = threadIdx.x; unit < each * cut.channels; unit += kThreads) {
      const int c = unit % cut.channels;
      const int64_t first = c * cut.plane + int64_t{tile} * cut.pixels;
      const int64_t q = (first >> 2) + unit / cut.channels;
      float n[4];
      normals<Scalar>(static_cast<uint64_t>(q), id, stream, key, n);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int64_t pixel = 4 * q + w - first;
        if (pixel >= 0 && pixel < cut.pixels) staged[pixel * cut.channels + c] = n[w];
      }
    }
    __syncthreads();
    const float4 all = reinterpret_cast<const float4*>(staged)[threadIdx.x];
    z.v[0] = all.x, z.v[1] = all.y, z.v[2] = all.z, z.v[3] = all.w;
  }
  return z;
}

// Every tile of this block; true when the thread met a model output that is not finite.
template <bool kVector, Source kSource, int kOutputs>
__device__ __forceinline__ bool run(const AffineArgs& args, const Cut& cut, const Row& row, Sample s, int block,
                                    float* staged) {
  bool bad = false;
  for (int tile = block; tile < cut.tiles; tile += cut.blocks) {
    // Read the row and work out addresses again in each turn: kept in registers they would crowd out threads.
    asm volatile("" : "+r"(s.b), "+r"(s.row) : : "memory");
    const int64_t sample = s.b * args.N, stride = args.B * args.N;
    const int64_t other = (args.B + s.b) * args.N;  // the same sample in the second half of a stack of two
    const int64_t at = int64_t{tile} * cut.tile + 4 * threadIdx.x;
    const bool here = 4 * static_cast<int>(threadIdx.x) < cut.tile && at < args.N;
    const int64_t left = args.N - at;

    // All loads first, none waiting for another.
    Quad x = {}, f = {}, g = {}, r[kMaxSlots];
    if (here) {
      if (s.reads & kReadsX) x = load<kVector>(args.state, row.ids[kSlotRegister] * stride + sample + at, left);
      if (s.reads & kReadsOutput) f = load_model<kVector>(args.model_out, args.model_out_dtype, sample + at, left);
      if (s.reads & kReadsBoth) g = load_model<kVector>(args.model_out, args.model_out_dtype, other + at, left);
    }
#pragma unroll
    for (int j = 0; j < kMaxSlots; ++j) {
      r[j] = Quad{};
      if (here && (s.reads >> j & 1))
        r[j] = load<kVector>(args.state, row.ids[kSlotRegister + 1 + j] * stride + sample + at, left);
    }

    Quad d = {}, out[kOutputs];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (s.reads & kReadsOutput) {
        bad |= !isfinite(f.v[e]) || !isfinite(g.v[e]);
        if (s.reads & kReadsBoth) f.v[e] = guide<Scalar>(f.v[e], g.v[e], s.w);
        d.v[e] = denoise<Scalar>(x.v[e], f.v[e], row.coef[kP], row.coef[kQ]);
        d.v[e] = Scalar::clamp(d.v[e], row.coef[kClampLo], row.coef[kClampHi]);
      }
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const float base = weight(row, o, 1) * x.v[e];
        out[o].v[e] = Scalar::fma(weight(row, o, 2), d.v[e] - base, weight(row, o, 0) * x.v[e]);
#pragma unroll
        for (int j = 0; j < kMaxSlots; ++j)
          if (s.reads >> j & 1)
            out[o].v[e] = Scalar::fma(weight(row, o, 3 + j), r[j].v[e] - base, out[o].v[e]);
      }
    }

    if (here && args.denoised && (s.reads & kReadsOutput)) store<kVector>(args.denoised, sample + at, left, d);

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
        z = draw<kSource>(cut, s.key, id, stream, at, tile, staged);
      } else if (here) {
        z = load<kVector>(args.noise, id * stride + sample + at, left);
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
      for (int e = 0; e < 4; ++e) out[o].v[e] = out[o].v[e] + weight(row, o, 1) * x.v[e];
      store<kVector>(args.state, row.ids[kOutputRegister + o] * stride + sample + at, left, out[o]);
    }
    if (args.model_in) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[0].v[e] *= row.coef[kEmitScale];
      store_model<kVector>(args.model_in, args.model_in_dtype, sample + at, left, out[0]);
      if (args.model_in_batch == 2) store_model<kVector>(args.model_in, args.model_in_dtype, other + at, left, out[0]);
    }
  }
  return bad;
}

template <bool kVector, Source kSource>
__global__ void __launch_bounds__(kThreads, kResident) affine_step_kernel(const __grid_constant__ AffineArgs args,
                                                               const __grid_constant__ Cut cut) {
  __shared__ Row row;
  __shared__ alignas(16) float staged[kSource == kStaged ? kTile : 4];
  const int64_t b = blockIdx.x / cut.blocks;
  const int block = blockIdx.x % cut.blocks;
  const int64_t i = args.row[b];
  if (i < 0 || i >= args.R) return;  // the same for all blocks of the sample: none of them arrives below

  const float* coef = args.coef + i * args.coef_width;
  const int32_t* ids = args.ids + i * args.ids_width;
  if (threadIdx.x < kTerm) row.coef[threadIdx.x] = coef[threadIdx.x];
  if (threadIdx.x < kTermId) row.ids[threadIdx.x] = ids[threadIdx.x];
  __syncthreads();

  const int outputs = row.ids[kOutputRegister + 1] < 0 ? 1 : row.ids[kOutputRegister + 2] < 0 ? 2 : 3;
  Sample s;
  s.b = static_cast<int>(b);
  s.row = static_cast<int>(i);
  const uint64_t seed = static_cast<uint64_t>(args.seed[b]);
  s.key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  s.w = guidance_weight(row.coef[kGain], args.guidance[b]);
  s.reads = 0;
  if (row.ids[kFlags] & kReadsModel) {
    s.reads |= kReadsOutput;
    if (row.coef[kP] != 0.0f) s.reads |= kReadsX;
    if (args.model_out_batch == 2 && s.w != 1.0f) s.reads |= kReadsBoth;
  }
  for (int o = 0; o < outputs; ++o) {
    if (weight(row, o, 0) != 0.0f || weight(row, o, 1) != 0.0f) s.reads |= kReadsX;
    for (int j = 0; j < row.ids[kSlotCount]; ++j) s.reads |= static_cast<unsigned>(weight(row, o, 3 + j) != 0.0f) << j;
  }

  bool bad;
  if (outputs == 1) {
    bad = run<kVector, kSource, 1>(args, cut, row, s, block, staged);
  } else if (outputs == 2) {
    bad = run<kVector, kSource, 2>(args, cut, row, s, block, staged);
  } else {
    bad = run<kVector, kSource, 3>(args, cut, row, s, block, staged);
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

template <bool kVector, Source kSource>
int launch(const AffineArgs& args, Cut cut, cudaStream_t stream) {
  const auto kernel = affine_step_kernel<kVector, kSource>;
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

bool aligned(const AffineArgs& args) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(args.state) | reinterpret_cast<uintptr_t>(args.model_out) |
                              reinterpret_cast<uintptr_t>(args.model_in) | reinterpret_cast<uintptr_t>(args.noise) |
                              reinterpret_cast<uintptr_t>(args.denoised);
  return args.N % 4 == 0 && addresses % 16 == 0;
}

int affine_step(const AffineArgs& args, cudaStream_t stream) {
  if (const Error error = check(args); error != kOk) return error;
  if (!args.ticket || !args.model_out) return kNullPointer;
  if (args.B == 0 || args.N == 0) return kOk;
  Cut cut{args.N / args.channels, 0, static_cast<int>(args.channels), kTile, 0, 0};
  if (args.B > INT32_MAX || args.R > INT32_MAX || args.channels > INT32_MAX || args.N / 4 > INT32_MAX) return kBadShape;
  Source source = kInOrder;
  if (args.channels > kTile / 4) {
    source = kGathered;
  } else if (args.channels > 1) {
    source = kStaged;
    cut.pixels = kTile / cut.channels & ~3;
    cut.tile = cut.pixels * cut.channels;
  }
  cut.tiles = static_cast<int>((args.N + cut.tile - 1) / cut.tile);
  if (aligned(args)) {
    if (source == kInOrder) return launch<true, kInOrder>(args, cut, stream);
    if (source == kStaged) return launch<true, kStaged>(args, cut, stream);
    return launch<true, kGathered>(args, cut, stream);
  }
  if (source == kInOrder) return launch<false, kInOrder>(args, cut, stream);
  if (source == kStaged) return launch<false, kStaged>(args, cut, stream);
  return launch<false, kGathered>(args, cut, stream);
}

}  // namespace
}  // namespace fastdiff

FASTDIFF_EXPORT int fastdiff_affine_step_cuda(const AffineArgs* args, void* stream) {
  return args ? fastdiff::affine_step(*args, static_cast<cudaStream_t>(stream)) : fastdiff::kNullPointer;
}
