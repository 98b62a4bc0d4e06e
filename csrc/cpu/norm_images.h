// The norm op's images on L's lanes: where a patch lies in them, loads and stores in their dtype, and walks over it.
#pragma once

#include <type_traits>

#include "access.h"
#include "executor.h"

namespace fastdiff::cpu {
namespace {

template <class L, int32_t dtype, bool kPartial>
FASTDIFF_INLINE typename L::F read(const void* p, int64_t at, int n) {
  if constexpr (dtype == kFloat32) {
    return load<L, kPartial>(static_cast<const float*>(p) + at, n);
  } else {
    const typename L::H cells = load16<L, kPartial>(p, at, n);
    return dtype == kFloat16 ? L::from_half(cells) : L::from_bfloat(cells);
  }
}

template <class L, int32_t dtype, bool kPartial>
FASTDIFF_INLINE void write(void* p, int64_t at, typename L::F v, int n) {
  if constexpr (dtype == kFloat32) {
    store<L, kPartial>(static_cast<float*>(p) + at, v, n);
  } else {
    const typename L::H cells = dtype == kFloat16 ? L::to_half(v) : L::to_bfloat(v);
    uint16_t* cell = static_cast<uint16_t*>(p) + at;
    if (kPartial) {
      L::store16(cell, cells, n);
    } else {
      L::store16(cell, cells);
    }
  }
}

// Where channel c of pixel 0 of the patch's sample lies in each image; elements from one pixel to the next.
struct Places {
  const void *x, *residual;  // residual: null where the channel has none
  int64_t at, residual_at, out;
  int64_t step, out_step;
};

FASTDIFF_INLINE Places places(const NormPatch& patch, int64_t c) {
  const NormArgs& a = *patch.args;
  const bool first = c < a.C1;
  const int64_t width = first ? a.C1 : a.C - a.C1, own = first ? c : c - a.C1;
  const int64_t channel = a.channels_last ? own : own * a.P;
  Places p{};
  p.x = first ? a.x : a.skip;
  p.residual = first ? a.residual : nullptr;
  p.at = patch.b * width * a.P + channel;
  p.residual_at = patch.b * a.residual_stride + channel;
  p.out = patch.b * a.C * a.P + (a.channels_last ? c : c * a.P);
  p.step = a.channels_last ? width : 1;
  p.out_step = a.channels_last ? a.C : 1;
  return p;
}

// Calls step(first, end) for the patch's channels of x, and for those of the skip.
template <class Step>
FASTDIFF_INLINE void each_image(const NormPatch& patch, const Step& step) {
  const int64_t inner = patch.args->C1 < patch.channel ? patch.channel : patch.args->C1;
  if (patch.channel < inner) step(patch.channel, inner < patch.end ? inner : patch.end);
  if (inner < patch.end) step(inner, patch.end);
}

// Calls step(partial, registers, channel, lanes of the last register) over the channels from c to end.
template <class L, int most = 4, class Step>
FASTDIFF_INLINE void each_channels(int64_t c, int64_t end, const Step& step) {
  constexpr int w = L::kWidth;
  for (; c + most * w <= end; c += most * w) step(std::false_type{}, std::integral_constant<int, most>{}, c, w);
  for (; c + w <= end; c += w) step(std::false_type{}, std::integral_constant<int, 1>{}, c, w);
  if (c < end) step(std::true_type{}, std::integral_constant<int, 1>{}, c, static_cast<int>(end - c));
}

// Calls step(partial, i, lanes) for registers of the elements i .. count.
template <class L, class Step>
FASTDIFF_INLINE void each_register(int64_t count, const Step& step) {
  constexpr int w = L::kWidth;
  int64_t i = 0;
  for (; i + w <= count; i += w) step(std::false_type{}, i, w);
  if (i < count) step(std::true_type{}, i, static_cast<int>(count - i));
}

}  // namespace
}  // namespace fastdiff::cpu
