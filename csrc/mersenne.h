// The normals torch draws on an x86 CPU, to the bit: mt19937 words (Matsumoto and Nishimura 1998), 24 bits of each, Box
// and Muller on groups of sixteen with the logarithm, sine and cosine of Cephes in single precision (Moshier).
// The roundings are those of torch's own build, which fuses products into sums: which ones, is part of the result.
#pragma once

#include "affine.h"

namespace fastdiff {

constexpr int kWords = 624, kMiddle = 397;  // of the generator's state; what it is twisted with
constexpr int kGroup = 16;                  // normals made together: eight radii, eight angles

// The bytes of torch.Generator().get_state() on a CPU.
struct GeneratorBytes {
  uint64_t seed;
  int32_t left, seeded;
  uint64_t next;
  uint64_t words[kWords];
  double cached[3];
  int32_t has_cached;
  float single;
  uint8_t has_single;
};

template <class L>
FASTDIFF_INLINE typename L::I twist(typename L::I high, typename L::I low, typename L::I far) {
  using I = typename L::I;
  const I joined = L::bit_xor(low, L::bit_and(L::bit_xor(high, low), L::iset(INT32_MIN)));
  const I odd = L::sub(L::iset(0), L::bit_and(low, L::iset(1)));
  const I halved = L::template shift_right_unsigned<1>(joined);
  return L::bit_xor(far, L::bit_xor(halved, L::bit_and(odd, L::iset(static_cast<int32_t>(0x9908b0dfu)))));
}

template <class L>
FASTDIFF_INLINE typename L::I temper(typename L::I y) {
  y = L::bit_xor(y, L::template shift_right_unsigned<11>(y));
  y = L::bit_xor(y, L::bit_and(L::template shift_left<7>(y), L::iset(static_cast<int32_t>(0x9d2c5680u))));
  y = L::bit_xor(y, L::bit_and(L::template shift_left<15>(y), L::iset(static_cast<int32_t>(0xefc60000u))));
  return L::bit_xor(y, L::template shift_right_unsigned<18>(y));
}

// log(u), u in (0, 1].
template <class L>
FASTDIFF_INLINE typename L::F cephes_log(typename L::F u) {
  using F = typename L::F;
  using I = typename L::I;
  const I bits = L::bits(u);
  const I mantissa = L::add(L::bit_and(bits, L::iset(0x007fffff)), L::iset(0x3f000000));
  // -1 where the mantissa is below the root of a half, which doubles it
  const I low = L::template shift_right<31>(L::sub(mantissa, L::iset(0x3f3504f3)));
  const F e = L::to_float(L::add(L::sub(L::template shift_right<23>(bits), L::iset(126)), low));
  const F f = (L::from_bits(mantissa) - L::set(1.0f)) + L::from_bits(L::bit_and(mantissa, low));
  const F f2 = f * f;
  F q = L::set(7.0376836292e-2f);
  q = L::fma(q, f, L::set(-1.1514610310e-1f));
  q = L::fma(q, f, L::set(1.1676998740e-1f));
  q = L::fma(q, f, L::set(-1.2420140846e-1f));
  q = L::fma(q, f, L::set(1.4249322787e-1f));
  q = L::fma(q, f, L::set(-1.6668057665e-1f));
  q = L::fma(q, f, L::set(2.0000714765e-1f));
  q = L::fma(q, f, L::set(-2.4999993993e-1f));
  q = L::fma(q, f, L::set(3.3333331174e-1f));
  F y = L::fma(q * f, f2, e * L::set(-2.12194440e-4f));
  y = L::fma(f2, L::set(-0.5f), y);
  return L::fma(e, L::set(0.693359375f), f + y);
}

// sin(a) and cos(a), a in [0, 2 pi].
template <class L>
FASTDIFF_INLINE void cephes_sincos(typename L::F a, typename L::F& sine, typename L::F& cosine) {
  using F = typename L::F;
  using I = typename L::I;
  const I octant = L::bit_and(L::add(L::truncate(a * L::set(1.27323954473516f)), L::iset(1)), L::iset(-2));
  const F k = L::to_float(octant);
  F x = L::fma(k, L::set(-0.78515625f), a);
  x = L::fma(k, L::set(-2.4187564849853515625e-4f), x);
  x = L::fma(k, L::set(-3.77489497744594108e-8f), x);
  const F x2 = x * x;
  F c = L::set(2.443315711809948e-5f);
  c = L::fma(c, x2, L::set(-1.388731625493765e-3f));
  c = L::fma(c, x2, L::set(4.166664568298827e-2f));
  c = L::fma(c * x2, x2, x2 * L::set(-0.5f)) + L::set(1.0f);
  F s = L::set(-1.9515295891e-4f);
  s = L::fma(s, x2, L::set(8.3321608736e-3f));
  s = L::fma(s, x2, L::set(-1.6666654611e-1f));
  s = L::fma(s * x2, x, x);
  const I odd = L::template shift_left<30>(octant);
  sine = L::flip_sign(L::select_negative(odd, c, s), L::template shift_left<29>(octant));
  cosine = L::flip_sign(L::select_negative(odd, s, c), L::template shift_left<29>(L::sub(L::iset(1), octant)));
}

}  // namespace fastdiff
