// What a sample of a training step draws on the host, as fastdiff/training/objectives/counters.py defines it.
#pragma once

#include "../philox.h"
#include "../scalar.h"
#include "../train.h"

namespace fastdiff::cpu {
namespace {

// A sample's key, and four uniform numbers within (0, 1) of it.
int64_t host_draw(int64_t seed, uint64_t step, double* uniforms) {
  constexpr uint64_t kKey = 0xFFFFFFFF, kUniforms = 2;
  const auto draw = [](int64_t key, uint64_t index, uint64_t id, uint64_t (&pair)[2]) {
    uint64_t c[1][4] = {{index & 0xFFFFFFFF, index >> 32, id, kStreamTraining}};
    philox<Scalar>(c, PhiloxKey{static_cast<uint32_t>(key), static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32)});
    for (int i = 0; i < 2; ++i)
      pair[i] = static_cast<uint32_t>(c[0][2 * i]) | static_cast<uint64_t>(static_cast<uint32_t>(c[0][2 * i + 1])) << 32;
  };
  uint64_t pair[2];
  draw(seed, step, kKey, pair);
  const auto key = static_cast<int64_t>(pair[0]);
  for (uint64_t i = 0; i < 2; ++i) {
    draw(key, 0, kUniforms + i, pair);
    for (int half = 0; half < 2; ++half) *uniforms++ = (static_cast<double>(pair[half] >> 12) + 0.5) * 0x1p-52;
  }
  return key;
}

}  // namespace
}  // namespace fastdiff::cpu
