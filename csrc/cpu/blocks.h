// How the samples of an op that draws noise are cut into blocks, whose noise stays in the first-level cache.
#pragma once

#include <cstddef>
#include <vector>

#include "executor.h"

namespace fastdiff::cpu {
namespace {

// Drawing a normal takes about as long as this many plain elements held in cache.
constexpr int64_t kNormalCost = 6;
constexpr uintptr_t kLine = 64;

// Where a buffer's use begins: on a cache line, or every load of a full register would touch two.
inline float* aligned(std::vector<float>& buffer) {
  return buffer.data() + (-reinterpret_cast<uintptr_t>(buffer.data()) % kLine) / sizeof(float);
}

// Blocks of whole pixels, so that a block of channels_last noise is complete in itself.
struct Cut {
  int64_t channels, plane, block, blocks;

  Cut(int64_t N, int64_t channels) : channels(channels), plane(N / channels), block(kBlock) {
    if (channels > 1) {
      // A multiple of 64 pixels keeps blocks of few channels whole registers long; 4 is what a counter needs.
      const int64_t unit = channels < 16 ? 64 : 4;
      const int64_t units = kBlock / (unit * channels);
      block = unit * channels * (units > 0 ? units : 1);
    }
    blocks = (N + block - 1) / block;
  }

  // Floats from one block's buffer to the next: room for what drawing writes too much, in whole cache lines.
  int64_t stride() const { return (block + kFillSlack + 15) & ~int64_t{15}; }

  // The normals of elements first .. first + count in the order of memory; first is where a block begins.
  void draw(const Executor& by, float* z, const PhiloxSchedule& key, uint32_t id, uint32_t stream, int64_t first,
            int64_t count) const {
    if (channels > 1) {
      by.normals_channels_last(z, key, id, stream, Patch{first / channels, count / channels, channels, plane});
    } else {
      by.normals(z, key, id, stream, first, count);
    }
  }
};

}  // namespace
}  // namespace fastdiff::cpu
