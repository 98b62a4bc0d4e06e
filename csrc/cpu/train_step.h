// A training step's two passes on a run of elements, on L's lanes: noising, and squared error with gradient.
// Bytes per element, noise and target staying in the first-level cache: noising 1, 2 or 4 read (the image) and 4 or 2
// written; loss 4 or 2 read (F), as much written (the gradient), and the image again where the target has it (eps and
// score do not). With one normal drawn the limit is its arithmetic: 40 % of a copy's bandwidth while that is the cache's.
#pragma once

#include "access.h"
#include "executor.h"
#include "sums.h"

namespace fastdiff::cpu {
namespace {

template <class L, class T, class Convert>
FASTDIFF_INLINE void unpack(const Pixels& p, float* to, const Convert& convert) {
  const T* images = static_cast<const T*>(p.images);
  if (!p.flip) {
    const T* from = images + p.first * p.channels;
    for (int64_t i = 0; i < p.units * p.channels; ++i) to[i] = convert(from[i]);
    return;
  }
  for (int64_t u = 0; u < p.units;) {
    // a stretch of one row, from its mirrored end backwards
    const int64_t row = (p.first + u) % p.width, left = p.units - u, run = left < p.width - row ? left : p.width - row;
    const T* from = images + mirrored(p.first + u, p.width) * p.channels;
    float* at = to + u * p.channels;
    if (p.channels == 1) {
      for (int64_t i = 0; i < run; ++i) at[i] = convert(from[-i]);
    } else {
      for (int64_t i = 0; i < run; ++i)
        for (int64_t c = 0; c < p.channels; ++c) at[i * p.channels + c] = convert(from[c - i * p.channels]);
    }
    u += run;
  }
}

template <class L>
void pixels(const Pixels& p, float* to) {
  constexpr int w = L::kWidth;
  if (p.dtype != kUInt8 && !p.flip) {
    const int64_t first = p.first * p.channels;
    each_group(first, p.units * p.channels, [&](auto partial, int64_t at, int64_t n) {
      typename L::F v[registers<L>];
      load_model<L, partial.value>(p.images, p.dtype, at, n, v);
      for (int u = 0; u < registers<L>; ++u)
        store<L, partial.value>(to + at - first + u * w, v[u], clip(n - u * w, w));
    });
    return;
  }
  const auto half = [](uint16_t h) {
    float lane[w];
    uint16_t cell[w] = {h};
    L::store(lane, L::from_half(L::load16(cell)));
    return lane[0];
  };
  const auto bfloat = [](uint16_t h) { return Scalar::from_bits(static_cast<int32_t>(uint32_t{h} << 16)); };
  if (p.dtype == kUInt8) return unpack<L, uint8_t>(p, to, [](uint8_t pixel) { return unit_range(pixel); });
  if (p.dtype == kFloat16) return unpack<L, uint16_t>(p, to, half);
  if (p.dtype == kBFloat16) return unpack<L, uint16_t>(p, to, bfloat);
  return unpack<L, float>(p, to, [](float v) { return v; });
}

// image x0 + first z + second y of one group of kLanes elements.
template <class L, bool kPartial>
FASTDIFF_INLINE void blend_group(const Lesson& s, int64_t at, int64_t n, typename L::F (&v)[registers<L>]) {
  constexpr int w = L::kWidth;
  const auto read = [&](const float* p, int u) {
    return p ? load<L, kPartial>(p + at + u * w, clip(n - u * w, w)) : L::set(0.0f);
  };
  for (int u = 0; u < registers<L>; ++u) v[u] = blend<L>(read(s.x0, u), read(s.z, u), read(s.y, u), s.by);
}

template <class L>
void noised(const Lesson& s) {
  each_group(0, s.count, [&](auto partial, int64_t at, int64_t n) {
    typename L::F v[registers<L>];
    blend_group<L, partial.value>(s, at, n, v);
    store_model<L, partial.value>(s.out, s.model_dtype, at, n, v);
  });
}

template <class L>
double squares(const Lesson& s) {
  double total = 0.0;
  for (int64_t done = 0; done < s.count; done += kSpan) {
    typename L::F sum[registers<L>];
    for (int u = 0; u < registers<L>; ++u) sum[u] = L::set(0.0f);
    each_group(done, s.count - done < kSpan ? s.count - done : kSpan, [&](auto partial, int64_t at, int64_t n) {
      typename L::F f[registers<L>], target[registers<L>];
      load_model<L, partial.value>(s.model_out, s.model_dtype, at, n, f);
      blend_group<L, partial.value>(s, at, n, target);
      for (int u = 0; u < registers<L>; ++u) {
        f[u] = f[u] - target[u];
        sum[u] = L::fma(f[u], f[u], sum[u]);
        f[u] = L::set(s.scale) * f[u];
      }
      if (s.out) store_model<L, partial.value>(s.out, s.model_dtype, at, n, f);
    });
    total += add_lanes<L>(sum);
  }
  return total;
}

}  // namespace
}  // namespace fastdiff::cpu
