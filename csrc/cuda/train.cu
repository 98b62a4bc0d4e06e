// The ops of a training step on CUDA, four elements to a thread.
// Bytes per element: noising reads the image (1, 2 or 4) and writes x_in (4 or 2); the loss reads F (4 or 2), writes the
// gradient (as much), and reads the image where the target has it. It must reach 80 % of the bandwidth of a copy; with a
// bf16 network and byte images (3 and 4 bytes) the integer arithmetic of Philox may be the limit.
// A sample is cut into at most kParts parts, which its size alone decides; a block sums one, in an order that is fixed.
#include "../check.h"
#include "../export.h"
#include "draw.h"

namespace fastdiff {
namespace {

constexpr int kResident = 4;  // blocks to a multiprocessor

// Four elements of a sample's images as fp32; `at` counts from the sample's first.
template <bool kVector>
__device__ __forceinline__ Quad load_image(const TrainArgs& args, int64_t sample, int64_t at, int64_t left, bool flip) {
  Quad q;
  const bool by_pixel = args.channels > 1 || args.width % 4 != 0;
  if (flip && (!kVector || by_pixel)) {
#pragma unroll 1
    for (int e = 0; e < 4; ++e) {
      const int64_t unit = (at + e) / args.channels, channel = (at + e) % args.channels;
      const int64_t from = sample + mirrored(unit, args.width) * args.channels + channel;
      float v = 0.0f;
      if (e < left) {
        if (args.image_dtype == kUInt8) {
          v = unit_range(static_cast<const uint8_t*>(args.images)[from]);
        } else if (args.image_dtype == kFloat32) {
          v = static_cast<const float*>(args.images)[from];
        } else {
          v = widen(static_cast<const uint16_t*>(args.images)[from], args.image_dtype);
        }
      }
#pragma unroll
      for (int s = 0; s < 4; ++s)
        if (s == e) q.v[s] = v;
    }
    return q;
  }
  // a mirrored quad of a row of whole quads is another quad, backwards
  const int64_t from = sample + (flip ? mirrored(at, args.width) - 3 : at);
  if (args.image_dtype != kUInt8) {
    q = load_model<kVector>(args.images, args.image_dtype, from, left);
  } else {
    const uint8_t* p = static_cast<const uint8_t*>(args.images) + from;
    if (kVector) {
      const uchar4 all = *reinterpret_cast<const uchar4*>(p);
      q.v[0] = unit_range(all.x), q.v[1] = unit_range(all.y), q.v[2] = unit_range(all.z), q.v[3] = unit_range(all.w);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) q.v[e] = e < left ? unit_range(p[e]) : 0.0f;
    }
  }
  return flip ? Quad{{q.v[3], q.v[2], q.v[1], q.v[0]}} : q;
}

// The sum over the block, in thread 0.
__device__ __forceinline__ float add_block(float sum) {
  __shared__ float warps[kThreads / 32];
#pragma unroll
  for (int away = 16; away > 0; away /= 2) sum += __shfl_down_sync(0xffffffffu, sum, away);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0.0f;
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
  return total;
}

// each: tiles of a part.
template <bool kVector, Source kSource, bool kLoss>
__global__ void __launch_bounds__(kThreads, kResident)
    train_kernel(const __grid_constant__ TrainArgs args, const __grid_constant__ Cut cut, const int each) {
  __shared__ alignas(16) float staged[kStagedFloats<kSource>];
  const int64_t b = blockIdx.x / cut.blocks, sample = b * args.N;
  const int part = blockIdx.x % cut.blocks;
  const float* row = args.table + b * kTrainColumns;
  const Blend by = kLoss ? target_blend(row) : input_blend(row);
  const bool flip = row[kFlip] != 0.0f;
  const uint64_t seed = static_cast<uint64_t>(args.key[b]);
  const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const float scale = kLoss ? args.weight[b] * args.factor : 0.0f;

  float sum = 0.0f;
  const int last = min((part + 1) * each, cut.tiles);
  for (int tile = part * each; tile < last; ++tile) {
    const int64_t at = int64_t{tile} * cut.tile + 4 * threadIdx.x;
    const bool here = 4 * static_cast<int>(threadIdx.x) < cut.tile && at < args.N;
    const int64_t left = args.N - at;
    Quad f = {}, x0 = {}, z = {}, y = {};
    if (kLoss && here) f = load_model<kVector>(args.model_out, args.model_dtype, sample + at, left);
    if (here && by.reads()) x0 = load_image<kVector>(args, sample, at, left, flip);
    if (by.first != 0.0f) z = draw<kSource>(cut, key, kNoiseZ, kStreamTraining, at, tile, staged);
    if (by.second != 0.0f) y = draw<kSource>(cut, key, kNoiseY, kStreamTraining, at, tile, staged);
    if (!here) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float mixed = blend<Scalar>(x0.v[e], z.v[e], y.v[e], by);
      if (!kLoss) {
        x0.v[e] = mixed;
      } else if (e < left) {
        const float rest = f.v[e] - mixed;
        sum = Scalar::fma(rest, rest, sum);
        x0.v[e] = scale * rest;
      }
    }
    if (args.out) store_model<kVector>(args.out, args.model_dtype, sample + at, left, x0);
  }
  if (!kLoss) return;
  const float total = add_block(sum);
  if (threadIdx.x == 0) args.partial[b * kParts + part] = total;
  if (part == 0 && threadIdx.x < kParts && static_cast<int>(threadIdx.x) >= cut.blocks)
    args.partial[b * kParts + threadIdx.x] = 0.0f;
}

template <bool kVector, bool kLoss>
void launch(Source source, const TrainArgs& args, const Cut& cut, int each, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(args.B * cut.blocks);
  if (source == kInOrder) {
    train_kernel<kVector, kInOrder, kLoss><<<blocks, kThreads, 0, stream>>>(args, cut, each);
  } else if (source == kStaged) {
    train_kernel<kVector, kStaged, kLoss><<<blocks, kThreads, 0, stream>>>(args, cut, each);
  } else {
    train_kernel<kVector, kGathered, kLoss><<<blocks, kThreads, 0, stream>>>(args, cut, each);
  }
}

int run(const TrainArgs& args, bool loss, cudaStream_t stream) {
  if (const Error error = check(args, loss); error != kOk) return error;
  if (args.channels > INT32_MAX || args.N / 4 > INT32_MAX) return kBadShape;
  Cut cut = cut_into_tiles(args.N, args.channels);
  const int each = (cut.tiles + kParts - 1) / kParts;
  cut.blocks = (cut.tiles + each - 1) / each;
  if (args.B > INT32_MAX / cut.blocks) return kBadShape;
  const Source source = source_of(args.channels);
  const bool vector = aligned({args.images, args.model_out, args.out}, args.N);
  if (loss) {
    (vector ? launch<true, true> : launch<false, true>)(source, args, cut, each, stream);
  } else {
    (vector ? launch<true, false> : launch<false, false>)(source, args, cut, each, stream);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? kOk : kCuda + error;
}

}  // namespace
}  // namespace fastdiff

FASTDIFF_EXPORT int fastdiff_noise_images_cuda(const TrainArgs* args, void* stream) {
  return args ? fastdiff::run(*args, false, static_cast<cudaStream_t>(stream)) : fastdiff::kNullPointer;
}

FASTDIFF_EXPORT int fastdiff_loss_cuda(const TrainArgs* args, void* stream) {
  return args ? fastdiff::run(*args, true, static_cast<cudaStream_t>(stream)) : fastdiff::kNullPointer;
}
