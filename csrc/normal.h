// Two uniform words to two unit normals: Box and Muller 1958, and e^v, with polynomials instead of libm so that every
// executor rounds alike. log(u): error 1.2 ulp; sin and cos of pi*(k/2 + s), |s| <= 1/4: error 1 ulp, no range reduction.
#pragma once

#include "philox.h"

namespace fastdiff {

// Natural logarithm of u in (0, 1].
template <class L>
FASTDIFF_INLINE typename L::F log_unit(typename L::F u) {
  const typename L::I bits = L::bits(u);
  const typename L::I away = L::sub(bits, L::iset(0x3f3504f3)), e = L::bit_and(away, L::iset(-(1 << 23)));
  const typename L::F f = L::from_bits(L::sub(bits, e)) - L::set(1.0f);
  const typename L::F ef = L::to_float(L::template shift_right<23>(away));
  typename L::F q = L::set(0.06915578246116638f);
  q = L::fma(q, f, L::set(-0.11788799613714218f));
  q = L::fma(q, f, L::set(0.11872309446334839f));
  q = L::fma(q, f, L::set(-0.1238449439406395f));
  q = L::fma(q, f, L::set(0.14218780398368835f));
  q = L::fma(q, f, L::set(-0.16669245064258575f));
  q = L::fma(q, f, L::set(0.20002219080924988f));
  q = L::fma(q, f, L::set(-0.24999986588954926f));
  q = L::fma(q, f, L::set(0.3333331048488617f));
  const typename L::F f2 = f * f;
  typename L::F y = (f2 * f) * q;
  y = L::fma(ef, L::set(-2.12194440e-4f), y);
  y = L::fma(L::set(-0.5f), f2, y);
  return L::fma(ef, L::set(0.693359375f), f + y);
}

// sqrt(-2 ln((w0 + 1/2) / 2^32)).
template <class L>
FASTDIFF_INLINE typename L::F box_muller_radius(typename L::I w0) {
  const typename L::F u = L::fma(L::to_float_unsigned(w0), L::set(0x1p-32f), L::set(0x1p-33f));
  return L::sqrt(L::set(-2.0f) * log_unit<L>(u));
}

// r exp(i pi int32(w1) / 2^31).
template <class L>
FASTDIFF_INLINE void box_muller_turn(typename L::F r, typename L::I w1, typename L::F& n0, typename L::F& n1) {
  // The nearest quarter turn k is in the two highest bits.
  const typename L::I k = L::add(w1, L::iset(1 << 29));
  const typename L::F s = L::to_float(L::sub(w1, L::bit_and(k, L::iset(-(1 << 30))))) * L::set(0x1p-31f);
  const typename L::F s2 = s * s;
  typename L::F sp = L::set(-0.5890786647796631f);
  sp = L::fma(sp, s2, L::set(2.549767255783081f));
  sp = L::fma(sp, s2, L::set(-5.167707920074463f));
  sp = L::fma(sp, s2, L::set(3.1415927410125732f));
  const typename L::F sn = s * sp;
  typename L::F cp = L::set(0.23146937787532806f);
  cp = L::fma(cp, s2, L::set(-1.3350635766983032f));
  cp = L::fma(cp, s2, L::set(4.058708190917969f));
  cp = L::fma(cp, s2, L::set(-4.934802055358887f));
  const typename L::F cs = L::fma(s2, cp, L::set(1.0f));
  // Rotation by k quarter turns: odd k swaps, the signs come straight from k.
  const typename L::I odd = L::template shift_left<1>(k);
  const typename L::F c = L::select_negative(odd, sn, cs);
  const typename L::F d = L::select_negative(odd, cs, sn);
  n0 = r * L::flip_sign(c, L::add(k, L::iset(1 << 30)));
  n1 = r * L::flip_sign(d, k);
}

template <class L>
FASTDIFF_INLINE void box_muller(typename L::I w0, typename L::I w1, typename L::F& n0, typename L::F& n1) {
  box_muller_turn<L>(box_muller_radius<L>(w0), w1, n0, n1);
}

// e^v to 1.2e-7 relative for v in [-86, 88]; beyond, as at the nearer end. A NaN stays one.
template <class L>
FASTDIFF_INLINE typename L::F exponential(typename L::F v) {
  using F = typename L::F;
  v = L::clamp(v, L::set(-86.0f), L::set(88.0f));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const F shifted = L::fma(v, L::set(1.44269504f), L::set(12582912.0f));
  const typename L::I k = L::sub(L::bits(shifted), L::iset(0x4b400000));
  const F n = shifted - L::set(12582912.0f);
  F r = L::fma(n, L::set(-0.693359375f), v);  // ln 2 in two pieces
  r = L::fma(n, L::set(2.12194440e-4f), r);
  F q = L::set(0.00138636329f);
  q = L::fma(q, r, L::set(0.00836765487f));
  q = L::fma(q, r, L::set(0.0416672453f));
  q = L::fma(q, r, L::set(0.166665331f));
  q = L::fma(q, r, L::set(0.5f));
  const F y = L::fma(q, r * r, r) + L::set(1.0f);
  const F scaled = L::from_bits(L::add(L::bits(y), L::template shift_left<23>(k)));
  return L::fma(v, L::set(0.0f), scaled);
}

// The four normals of the counters q, as n[word][lane].
template <class L, class Key>
FASTDIFF_INLINE void normals(typename L::U q, uint32_t id, uint32_t stream, const Key& key, typename L::F (&n)[4]) {
  typename L::U c[1][4] = {{q, L::high(q), L::uset(id), L::uset(stream)}};
  philox<L>(c, key);
  box_muller<L>(L::words(c[0][0]), L::words(c[0][1]), n[0], n[1]);
  box_muller<L>(L::words(c[0][2]), L::words(c[0][3]), n[2], n[3]);
}

}  // namespace fastdiff
