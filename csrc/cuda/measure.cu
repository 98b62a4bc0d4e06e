// measure on CUDA: a block of threads for each part of a sample, the last of them to arrive adds the parts up.
// Bytes per element: kError 12 read; kChange 8 read and 4 written; it must reach 80 % of the bandwidth of a copy where
// the samples together fill the GPU. Sums are in double precision: to the last bits of single precision they are the
// same in any order, so a sample's number does not depend on how it lies in memory.
#include "../check.h"
#include "../export.h"
#include "../measure.h"
#include "quad.h"

namespace fastdiff {
namespace {

constexpr int kThreads = kPartUnit / 4;  // of a part
constexpr unsigned kAll = 0xffffffffu;

// Lane 0 ends with the sum of the first 2 * offset lanes, always added in the same order.
__device__ __forceinline__ double add_lanes(double mine, int offset) {
  for (; offset > 0; offset /= 2) mine += __shfl_down_sync(kAll, mine, offset);
  return mine;
}

template <bool kVector, Quantity quantity>
__global__ void __launch_bounds__(kThreads) measure_kernel(const __grid_constant__ MeasureArgs args, int parts,
                                                           int64_t size) {
  __shared__ double warps[kThreads / 32];
  __shared__ bool last;
  const int64_t b = blockIdx.x / parts, which = blockIdx.x % parts;
  const int64_t first = which * size, end = first + size < args.N ? first + size : args.N;
  const float* value = args.value + b * args.N;
  float* before = args.before + b * args.N;

  double mine = 0.0;
  for (int64_t at = first + 4 * threadIdx.x; at < end; at += kPartUnit) {
    const int64_t left = end - at;
    const Quad v = load<kVector>(value, at, left), u = load<kVector>(before, at, left);
    Quad after = {};
    if (quantity == kError) after = load<kVector>(args.after + b * args.N, at, left);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      // absent elements are 0, and so are their terms
      const float term = quantity == kError
                             ? error_term<Scalar>(v.v[e], u.v[e], after.v[e], args.rtol, args.atol)
                             : change_term<Scalar>(v.v[e], u.v[e]);
      mine += static_cast<double>(term);
    }
    if (quantity == kChange) store<kVector>(before, at, left, v);
  }

  mine = add_lanes(mine, 16);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  double* places = args.partial + b * kParts;
  if (threadIdx.x < 32) {
    mine = add_lanes(threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : 0.0, kThreads / 64);
    if (threadIdx.x == 0) {
      places[which] = mine;
      __threadfence();
      last = atomicAdd(args.ticket + b, 1) == parts - 1;
    }
  }
  __syncthreads();
  if (!last || threadIdx.x >= 32) return;

  // All parts have arrived: one warp adds them up, two to a lane.
  __threadfence();
  const auto part = [&](int p) { return p < parts ? __ldcg(places + p) : 0.0; };
  const double sum = add_lanes(part(threadIdx.x) + part(threadIdx.x + 32), 16);
  if (threadIdx.x != 0) return;
  args.found[2 * b] = measured(quantity, sum, args.N);
  args.found[2 * b + 1] = args.status ? static_cast<float>(args.status[b]) : -1.0f;
  args.ticket[b] = 0;
}

int run(const MeasureArgs& args, cudaStream_t stream) {
  if (const Error error = check(args); error != kOk) return error;
  if (!args.ticket) return kNullPointer;
  if (args.B == 0) return kOk;
  const int64_t size = part_size(args.N), parts = part_count(args.N);
  if (args.B * parts > INT32_MAX) return kBadShape;
  const bool vector = aligned({args.value, args.before, args.after}, args.N);
  const auto kernel = args.quantity == kError ? vector ? measure_kernel<true, kError> : measure_kernel<false, kError>
                      : vector                ? measure_kernel<true, kChange>
                                              : measure_kernel<false, kChange>;
  kernel<<<static_cast<unsigned>(args.B * parts), kThreads, 0, stream>>>(args, static_cast<int>(parts), size);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? kOk : kCuda + error;
}

}  // namespace
}  // namespace fastdiff

FASTDIFF_EXPORT int fastdiff_measure_cuda(const MeasureArgs* args, void* stream) {
  return args ? fastdiff::run(*args, static_cast<cudaStream_t>(stream)) : fastdiff::kNullPointer;
}
