// Normals of a block, written in the order of memory, so that the step reads them as one more input.
// About 5 vector instructions per normal; the block stays in cache, so no bytes of memory are moved.
#pragma once

#include "../normal.h"
#include "executor.h"

namespace fastdiff::cpu {
namespace {

// Words first, normals after: each loop is short enough that several of its turns are in flight at once, which one
// long chain from counter to normal would not allow (measured 15 % faster).
template <class L>
void fill(float* z, const PhiloxSchedule& key, uint32_t id, uint32_t stream, int64_t first, int64_t count) {
  constexpr int w = L::kWidth, abreast = w > 1 ? 2 : 1;
  // Lane 4L+k takes counter (w/4) k + L: then four unpacks per register put the words in order (see L::transpose).
  uint64_t lane[w];
  for (int i = 0; i < w; ++i) lane[i] = static_cast<uint64_t>(first / 4 + (w >= 4 ? (i % 4) * (w / 4) + i / 4 : i));
  typename L::U q = L::counters(lane);
  for (int64_t done = 0; done < count; done += kBlock) {
    alignas(64) int32_t words[kBlock + kFillSlack];
    const int64_t part = count - done < kBlock ? count - done : kBlock;
    for (int64_t i = 0; i < part; i += 4 * w * abreast) {
      typename L::U c[abreast][4];
      for (int g = 0; g < abreast; ++g) {
        c[g][0] = q;
        c[g][1] = L::high(q);
        c[g][2] = L::uset(id);
        c[g][3] = L::uset(stream);
        q = L::advance(q, w);
      }
      philox<L>(c, key);
      for (int g = 0; g < abreast; ++g)
        for (int j = 0; j < 4; ++j) L::istore(words + i + (4 * g + j) * w, L::words(c[g][j]));
    }
    for (int64_t i = 0; i < part; i += 4 * w) {
      const int32_t* at = words + i;
      typename L::F n[4];
      box_muller<L>(L::iload(at), L::iload(at + w), n[0], n[1]);
      box_muller<L>(L::iload(at + 2 * w), L::iload(at + 3 * w), n[2], n[3]);
      L::transpose(n);
      for (int j = 0; j < 4; ++j) L::store(z + done + i + j * w, n[j]);
    }
  }
}

// Few channels: each channel's run of pixels is generated in order, then dealt out.
template <class L, int kChannels>
void fill_planes(float* z, const PhiloxSchedule& key, uint32_t id, uint32_t stream, const Patch& p) {
  float plane[kBlock + 2 * kFillSlack];
  const int64_t channels = kChannels > 0 ? kChannels : p.channels;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t start = c * p.plane + p.first_pixel, skip = start & 3;
    fill<L>(plane, key, id, stream, start - skip, skip + p.pixels);
    float* to = z + c;
    const float* from = plane + skip;
    for (int64_t i = 0; i < p.pixels; ++i) to[i * channels] = from[i];
  }
}

// Lanes are consecutive channels, each going through its pixels four at a time. A channel's run may start inside a
// quad of elements (phase 1, 2, 3, when the plane is no multiple of 4); its four pixels then straddle two counters, so
// the previous quad is kept and each lane picks its words by its own phase.
template <class L>
void fill_lanes(float* z, const PhiloxSchedule& key, uint32_t id, uint32_t stream, const Patch& p) {
  constexpr int w = L::kWidth;
  for (int64_t c = 0; c < p.channels; c += w) {
    const int lanes = p.channels - c < w ? static_cast<int>(p.channels - c) : w;
    uint64_t lane[w];
    bool phase[3][w];
    bool straddles = false;
    for (int i = 0; i < w; ++i) {
      const int64_t start = (c + (i < lanes ? i : 0)) * p.plane + p.first_pixel;
      lane[i] = static_cast<uint64_t>(start >> 2);
      for (int r = 1; r < 4; ++r) phase[r - 1][i] = (start & 3) == r;
      straddles |= (start & 3) != 0;
    }
    typename L::U q = L::counters(lane);
    const typename L::Mask one = L::mask(phase[0]), two = L::mask(phase[1]), three = L::mask(phase[2]);
    typename L::F now[4], next[4];
    if (straddles) {
      normals<L>(q, id, stream, key, next);
      q = L::advance(q, 1);
    }
    for (int64_t g = 0; g < p.pixels; g += 4) {
      if (straddles)
        for (int j = 0; j < 4; ++j) now[j] = next[j];
      normals<L>(q, id, stream, key, next);
      q = L::advance(q, 1);
      const int rows = p.pixels - g < 4 ? static_cast<int>(p.pixels - g) : 4;
      for (int j = 0; j < rows; ++j) {
        typename L::F v = next[j];
        if (straddles) {
          v = L::select(one, j < 3 ? now[(j + 1) & 3] : next[(j + 1) & 3], now[j]);
          v = L::select(two, j < 2 ? now[(j + 2) & 3] : next[(j + 2) & 3], v);
          v = L::select(three, j < 1 ? now[(j + 3) & 3] : next[(j + 3) & 3], v);
        }
        float* to = z + (g + j) * p.channels + c;
        if (lanes == w) {
          L::store(to, v);
        } else {
          L::store(to, v, lanes);
        }
      }
    }
  }
}

template <class L>
void fill_channels_last(float* z, const PhiloxSchedule& key, uint32_t id, uint32_t stream, const Patch& patch) {
  if (patch.channels >= L::kWidth) return fill_lanes<L>(z, key, id, stream, patch);
  if (patch.channels == 3) return fill_planes<L, 3>(z, key, id, stream, patch);
  if (patch.channels == 4) return fill_planes<L, 4>(z, key, id, stream, patch);
  return fill_planes<L, 0>(z, key, id, stream, patch);
}

}  // namespace
}  // namespace fastdiff::cpu
