// n registers of L side by side, as a lane type for normal.h: what is written for one runs on all of them step by step.
// A chain of dependent multiply-adds alone leaves three cycles of four idle, and the next chain begins too many
// instructions later for the processor to find it.
#pragma once

#include "../affine.h"

namespace fastdiff::cpu {
namespace {

template <class L, int n>
struct Abreast {
  struct F {
    typename L::F v[n];
    friend FASTDIFF_MEMBER F operator+(const F& a, const F& b) {
      return each<F>([&](int i) { return a.v[i] + b.v[i]; });
    }
    friend FASTDIFF_MEMBER F operator-(const F& a, const F& b) {
      return each<F>([&](int i) { return a.v[i] - b.v[i]; });
    }
    friend FASTDIFF_MEMBER F operator*(const F& a, const F& b) {
      return each<F>([&](int i) { return a.v[i] * b.v[i]; });
    }
  };
  struct I {
    typename L::I v[n];
  };

  template <class Many, class Step>
  FASTDIFF_LANE Many each(const Step& step) {
    Many out;
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) out.v[i] = step(i);
    return out;
  }

  FASTDIFF_LANE F set(float v) {
    return each<F>([&](int) { return L::set(v); });
  }
  FASTDIFF_LANE F fma(const F& a, const F& b, const F& c) {
    return each<F>([&](int i) { return L::fma(a.v[i], b.v[i], c.v[i]); });
  }
  FASTDIFF_LANE F sqrt(const F& v) {
    return each<F>([&](int i) { return L::sqrt(v.v[i]); });
  }
  FASTDIFF_LANE I bits(const F& v) {
    return each<I>([&](int i) { return L::bits(v.v[i]); });
  }
  FASTDIFF_LANE F from_bits(const I& v) {
    return each<F>([&](int i) { return L::from_bits(v.v[i]); });
  }
  FASTDIFF_LANE I iset(int32_t v) {
    return each<I>([&](int) { return L::iset(v); });
  }
  FASTDIFF_LANE I add(const I& a, const I& b) {
    return each<I>([&](int i) { return L::add(a.v[i], b.v[i]); });
  }
  FASTDIFF_LANE I sub(const I& a, const I& b) {
    return each<I>([&](int i) { return L::sub(a.v[i], b.v[i]); });
  }
  FASTDIFF_LANE I bit_and(const I& a, const I& b) {
    return each<I>([&](int i) { return L::bit_and(a.v[i], b.v[i]); });
  }
  template <int by>
  FASTDIFF_LANE I shift_left(const I& v) {
    return each<I>([&](int i) { return L::template shift_left<by>(v.v[i]); });
  }
  template <int by>
  FASTDIFF_LANE I shift_right(const I& v) {
    return each<I>([&](int i) { return L::template shift_right<by>(v.v[i]); });
  }
  FASTDIFF_LANE F to_float(const I& v) {
    return each<F>([&](int i) { return L::to_float(v.v[i]); });
  }
  FASTDIFF_LANE F to_float_unsigned(const I& v) {
    return each<F>([&](int i) { return L::to_float_unsigned(v.v[i]); });
  }
  FASTDIFF_LANE F select_negative(const I& sign, const F& yes, const F& no) {
    return each<F>([&](int i) { return L::select_negative(sign.v[i], yes.v[i], no.v[i]); });
  }
  FASTDIFF_LANE F flip_sign(const F& v, const I& sign) {
    return each<F>([&](int i) { return L::flip_sign(v.v[i], sign.v[i]); });
  }
};

}  // namespace
}  // namespace fastdiff::cpu
