// The lane type of one float: the maths of normal.h and affine.h on a plain CPU and, unchanged, in a CUDA thread.
#pragma once

#include <cmath>
#include <cstring>

#include "affine.h"

namespace fastdiff {

#if defined(__CUDA_ARCH__)
#define FASTDIFF_ON_DEVICE(device, host) device
#else
#define FASTDIFF_ON_DEVICE(device, host) host
#endif

struct Scalar {
  using F = float;
  using I = int32_t;
  using U = uint64_t;
  static constexpr int kWidth = 1;

  FASTDIFF_LANE F set(float v) { return v; }
  FASTDIFF_LANE F fma(F a, F b, F c) { return FASTDIFF_ON_DEVICE(__fmaf_rn(a, b, c), ::fmaf(a, b, c)); }
  FASTDIFF_LANE F sqrt(F v) { return FASTDIFF_ON_DEVICE(__fsqrt_rn(v), ::sqrtf(v)); }
  // Comparisons rather than fmin/fmax: a NaN passes through.
  FASTDIFF_LANE F clamp(F v, F lo, F hi) {
    v = v < lo ? lo : v;
    return v > hi ? hi : v;
  }

  FASTDIFF_LANE I bits(F v) {
#if defined(__CUDA_ARCH__)
    return __float_as_int(v);
#else
    I out;
    std::memcpy(&out, &v, sizeof out);
    return out;
#endif
  }
  FASTDIFF_LANE F from_bits(I v) {
#if defined(__CUDA_ARCH__)
    return __int_as_float(v);
#else
    F out;
    std::memcpy(&out, &v, sizeof out);
    return out;
#endif
  }

  FASTDIFF_LANE I iset(int32_t v) { return v; }
  // Unsigned arithmetic wraps; signed overflow would be undefined.
  FASTDIFF_LANE I add(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
  FASTDIFF_LANE I sub(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
  template <int n>
  FASTDIFF_LANE I shift_left(I v) { return static_cast<I>(static_cast<uint32_t>(v) << n); }
  template <int n>
  FASTDIFF_LANE I shift_right(I v) { return v >> n; }
  template <int n>
  FASTDIFF_LANE I shift_right_unsigned(I v) { return static_cast<I>(static_cast<uint32_t>(v) >> n); }
  FASTDIFF_LANE I bit_and(I a, I b) { return a & b; }
  FASTDIFF_LANE I bit_xor(I a, I b) { return a ^ b; }
  FASTDIFF_LANE I truncate(F v) { return static_cast<I>(v); }
  FASTDIFF_LANE F to_float(I v) { return static_cast<F>(v); }
  FASTDIFF_LANE F to_float_unsigned(I v) { return static_cast<F>(static_cast<uint32_t>(v)); }
  FASTDIFF_LANE F select_negative(I sign, F yes, F no) { return sign < 0 ? yes : no; }
  FASTDIFF_LANE F flip_sign(F v, I sign) { return from_bits(bits(v) ^ (sign & INT32_MIN)); }

  FASTDIFF_LANE U uset(uint32_t v) { return v; }
  FASTDIFF_LANE U multiply(U a, uint32_t m) { return static_cast<uint64_t>(static_cast<uint32_t>(a)) * m; }
  FASTDIFF_LANE U high(U v) { return v >> 32; }
  FASTDIFF_LANE U xor3(U a, U b, uint64_t k) { return a ^ b ^ k; }
  FASTDIFF_LANE U xor2(U a, U b) { return a ^ b; }
  FASTDIFF_LANE I words(U v) { return static_cast<I>(static_cast<uint32_t>(v)); }
  FASTDIFF_LANE I high_words(U v) { return static_cast<I>(static_cast<uint32_t>(v >> 32)); }
};

}  // namespace fastdiff
