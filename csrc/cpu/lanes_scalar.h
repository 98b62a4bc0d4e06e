// One float at a time, for any machine: what scalar.h has, and the loads and stores the step needs.
#pragma once

#include "../scalar.h"

namespace fastdiff::cpu {
namespace {

struct Plain : Scalar {
  static constexpr int kUnroll = 1;
  static constexpr const char* kName = "scalar";

  FASTDIFF_LANE U cells(uint64_t v) { return v; }
  FASTDIFF_LANE U counters(const uint64_t* q) { return *q; }
  FASTDIFF_LANE U advance(U q, uint64_t by) { return q + by; }
  FASTDIFF_LANE void transpose(F (&)[4]) {}

  FASTDIFF_LANE I iload(const int32_t* p) { return *p; }
  FASTDIFF_LANE void istore(int32_t* p, I v) { *p = v; }
  FASTDIFF_LANE F load(const float* p) { return *p; }
  FASTDIFF_LANE F load(const float* p, int n) { return n > 0 ? *p : 0.0f; }
  FASTDIFF_LANE void store(float* p, F v) { *p = v; }
  FASTDIFF_LANE void store(float* p, F v, int n) {
    if (n > 0) *p = v;
  }

  using H = uint16_t;
  FASTDIFF_LANE H load16(const uint16_t* p) { return *p; }
  FASTDIFF_LANE H load16(const uint16_t* p, int n) { return n > 0 ? *p : H{0}; }
  FASTDIFF_LANE void store16(uint16_t* p, H v) { *p = v; }
  FASTDIFF_LANE void store16(uint16_t* p, H v, int n) {
    if (n > 0) *p = v;
  }

  FASTDIFF_LANE F from_half(H h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // inf keeps its bits, NaN turns quiet
      const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
      return from_bits(static_cast<I>(sign | 0x7f800000u | quiet | ((magnitude & 0x3ffu) << 13)));
    }
    // Below the smallest normal the value is an integer multiple of 2^-24, which fp32 holds exactly.
    const F small = static_cast<F>(magnitude) * 0x1p-24f;
    const F value = magnitude < 0x400u ? small : from_bits(static_cast<I>((magnitude << 13) + 0x38000000u));
    return from_bits(bits(value) | static_cast<I>(sign));
  }
  FASTDIFF_LANE H to_half(F v) {
    const uint32_t b = static_cast<uint32_t>(bits(v)), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<H>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) return static_cast<H>(sign | 0x7c00u);  // rounds to 2^16 or is inf
    if (magnitude < 0x38800000u) {
      // Adding 0.5 makes the unit of the last place 2^-24, the spacing of denormal halves.
      const F sum = from_bits(static_cast<I>(magnitude)) + 0.5f;
      return static_cast<H>(sign | (static_cast<uint32_t>(bits(sum)) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<H>(sign | (rounded >> 13));
  }
  FASTDIFF_LANE F from_bfloat(H h) { return from_bits(static_cast<I>(static_cast<uint32_t>(h) << 16)); }
  FASTDIFF_LANE H to_bfloat(F v) {
    const uint32_t b = static_cast<uint32_t>(bits(v));
    return v != v ? H{0x7fc0} : static_cast<H>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
  }

  FASTDIFF_LANE bool any_nan(F v) { return v != v; }
  struct Mask {
    bool m;
  };
  FASTDIFF_LANE Mask mask(uint32_t lanes) { return {lanes != 0}; }
  FASTDIFF_LANE F permute(F v, I) { return v; }
  FASTDIFF_LANE F select(Mask m, F yes, F no) { return m.m ? yes : no; }
};

}  // namespace
}  // namespace fastdiff::cpu
