// Filling a tensor with the normals of torch's generator on L's lanes. Bytes per element: 4, written; the words stay in
// the first-level cache. About 60 vector instructions per sixteen normals; torch makes its words one at a time.
#pragma once

#include "../mersenne.h"
#include "executor.h"

namespace fastdiff::cpu {
namespace {

template <class L>
struct Mersenne {
  static constexpr int kPad = 16;
  // Behind the words come the first ones of the next turn, so that no load has to wrap around.
  alignas(64) int32_t words[kWords + kPad];
  int64_t at, left;

  explicit Mersenne(const GeneratorBytes& bytes) : at(static_cast<int64_t>(bytes.next)), left(bytes.left - 1) {
    for (int i = 0; i < kWords; ++i) words[i] = static_cast<int32_t>(bytes.words[i]);
    for (int i = kWords; i < kWords + kPad; ++i) words[i] = 0;
  }

  void leave(GeneratorBytes& bytes) const {
    for (int i = 0; i < kWords; ++i) bytes.words[i] = static_cast<uint32_t>(words[i]);
    bytes.next = static_cast<uint64_t>(at);
    bytes.left = static_cast<int32_t>(left + 1);
  }

  void turn() {
    constexpr int w = L::kWidth;
    const auto step = [&](int i, int far) {
      const auto made = twist<L>(L::iload(words + i), L::iload(words + i + 1), L::iload(words + far));
      L::istore(words + i, made);
    };
    int i = 0;
    for (; i < kPad; i += w) {
      step(i, i + kMiddle);
      L::istore(words + kWords + i, L::iload(words + i));
    }
    for (; i <= kWords - kMiddle; i += w) step(i, i + kMiddle);
    for (; i < kWords; i += w) step(i, i + kMiddle - kWords);
    at = 0;
    left = kWords;
  }

  void skip(int64_t count) {
    while (count > 0) {
      if (left == 0) turn();
      const int64_t part = count < left ? count : left;
      at += part;
      left -= part;
      count -= part;
    }
  }

  // The next `count` words, each as a number of [0, 1) with 24 bits; count <= left.
  void uniforms(float* to, int64_t count) {
    constexpr int w = L::kWidth;
    for (int64_t i = 0; i < count; i += w) {
      const auto bits = L::bit_and(temper<L>(L::iload(words + at + i)), L::iset(0x00ffffff));
      const auto u = L::to_float(bits) * L::set(0x1p-24f);
      if (count - i < w) {
        L::store(to + i, u, static_cast<int>(count - i));
      } else {
        L::store(to + i, u);
      }
    }
    at += count;
    left -= count;
  }
};

// Sixteen uniforms become sixteen normals in their place.
template <class L>
FASTDIFF_INLINE void box_muller_group(float* z) {
  for (int i = 0; i < kGroup / 2; i += L::kWidth) {
    const auto u = L::set(1.0f) - L::load(z + i);
    const auto radius = L::sqrt(L::set(-2.0f) * cephes_log<L>(u));
    typename L::F sine, cosine;
    cephes_sincos<L>(L::load(z + i + kGroup / 2) * L::set(6.283185307179586f), sine, cosine);
    L::store(z + i, radius * cosine + L::set(0.0f));
    L::store(z + i + kGroup / 2, radius * sine + L::set(0.0f));
  }
}

// n >= 16 normals; where n is no multiple of 16 the last sixteen are drawn anew, as torch does. z null: passed over.
template <class L>
void torch_normals(GeneratorBytes& bytes, float* z, int64_t n) {
  Mersenne<L> source(bytes);
  if (!z) {
    source.skip(n % kGroup ? n + kGroup : n);
    return source.leave(bytes);
  }
  const auto draw = [&](float* to, int64_t count) {
    int64_t made = 0;
    for (int64_t drawn = 0; drawn < count;) {
      if (source.left == 0) source.turn();
      const int64_t part = count - drawn < source.left ? count - drawn : source.left;
      source.uniforms(to + drawn, part);
      drawn += part;
      for (; made + kGroup <= drawn; made += kGroup) box_muller_group<L>(to + made);
    }
  };
  draw(z, n);
  if (n % kGroup) draw(z + n - kGroup, kGroup);
  source.leave(bytes);
}

}  // namespace
}  // namespace fastdiff::cpu
