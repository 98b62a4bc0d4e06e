// How CUDA kernels cut samples into tiles, and how a block draws the normals of one: four to a thread.
#pragma once

#include "../normal.h"
#include "../scalar.h"
#include "quad.h"

namespace fastdiff {
namespace {

constexpr int kThreads = 256;
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

inline Source source_of(int64_t channels) {
  return channels == 1 ? kInOrder : channels > kTile / 4 ? kGathered : kStaged;
}

// `blocks` is left for the launch to choose.
inline Cut cut_into_tiles(int64_t N, int64_t channels) {
  Cut cut{N / channels, 0, static_cast<int>(channels), kTile, 0, 0};
  if (source_of(channels) == kStaged) {
    cut.pixels = kTile / cut.channels & ~3;
    cut.tile = cut.pixels * cut.channels;
  }
  cut.tiles = static_cast<int>((N + cut.tile - 1) / cut.tile);
  return cut;
}

// Floats of shared memory that drawing takes.
template <Source kSource>
constexpr int kStagedFloats = kSource == kInOrder ? 4 : kTile;

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
      staged[4 * threadIdx.x + e] = word == 0 ? n[0] : word == 1 ? n[1] : word == 2 ? n[2] : n[3];
    }
    const float4 all = reinterpret_cast<const float4*>(staged)[threadIdx.x];
    z.v[0] = all.x, z.v[1] = all.y, z.v[2] = all.z, z.v[3] = all.w;
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

}  // namespace
}  // namespace fastdiff
