// Normals of a block, written in the order of memory, so that the step reads them as one more input.
// 240 vector instructions make 32 normals on AVX2; the block stays in cache, so no bytes of memory are moved.
#pragma once

#include "../normal.h"
#include "abreast.h"
#include "executor.h"
#include "words.h"

namespace fastdiff::cpu {
namespace {

// `count` normals of as many words, in the order of memory. Four radii abreast keep the multipliers busy; the turns are
// shorter chains, and four would not fit in the registers.
template <class L>
FASTDIFF_INLINE void normals_of(const int32_t* words, int64_t count, float* z) {
  constexpr int w = L::kWidth, groups = w > 1 ? 2 : 1;
  using Many = Abreast<L, 2 * groups>;
  using Two = Abreast<L, 2>;
  for (int64_t i = 0; i < count; i += 4 * w * groups) {
    const int32_t* at = words + i;
    typename Many::I w0;
    for (int j = 0; j < 2 * groups; ++j) w0.v[j] = L::iload(at + 2 * j * w);
    const typename Many::F r = box_muller_radius<Many>(w0);
    for (int g = 0; g < groups; ++g) {
      typename Two::I w1;
      typename Two::F radius, n0, n1;
      for (int j = 0; j < 2; ++j) {
        radius.v[j] = r.v[2 * g + j];
        w1.v[j] = L::iload(at + (4 * g + 2 * j + 1) * w);
      }
      box_muller_turn<Two>(radius, w1, n0, n1);
      typename L::F n[4] = {n0.v[0], n1.v[0], n0.v[1], n1.v[1]};
      L::transpose(n);
      for (int j = 0; j < 4; ++j) L::store(z + i + (4 * g + j) * w, n[j]);
    }
  }
}

// Words first, normals after: each loop is short enough that several of its turns are in flight at once, which one
// long chain from counter to normal would not allow (measured 20 % faster).
template <class L>
void fill(float* z, const PhiloxSchedule& key, uint32_t id, uint32_t stream, int64_t first, int64_t count) {
  constexpr int w = L::kWidth, abreast = w > 1 ? 2 : 1;
  // Lane 4L+k takes counter (w/4) k + L: then four unpacks per register put the words in order (see L::transpose).
  uint64_t lane[w];
  for (int i = 0; i < w; ++i) lane[i] = static_cast<uint64_t>(w >= 4 ? (i % 4) * (w / 4) + i / 4 : i);
  const typename L::U lanes = L::counters(lane);
  for (int64_t done = 0; done < count;) {
    alignas(64) int32_t words[kBlock + kFillSlack];
    const uint64_t start = static_cast<uint64_t>(first + done) / 4, low = start & 0xffffffffu;
    // to the end of the noise, of the block, or of the counters that share their high word
    const int64_t left = 4 * static_cast<int64_t>(0x100000000u - low);
    int64_t part = count - done < kBlock ? count - done : kBlock;
    if (part > left) part = left;
    const WordKeys keys(key, id, stream, static_cast<uint32_t>(start >> 32));
    typename L::U product = L::multiply(L::advance(lanes, low), kPhiloxM0);
    for (int64_t i = 0; i < part; i += 4 * w * abreast) {
      typename L::U each[abreast];
      typename L::I made[abreast][4];
      for (int g = 0; g < abreast; ++g) {
        each[g] = product;
        product = L::advance(product, uint64_t{w} * kPhiloxM0);
      }
      words_of<L>(each, keys, made);
      for (int g = 0; g < abreast; ++g)
        for (int j = 0; j < 4; ++j) L::istore(words + i + (4 * g + j) * w, made[g][j]);
    }
    normals_of<L>(words, part, z + done);
    done += part;
  }
}

// Few channels: each channel's run of pixels is generated in order, then dealt out.
template <class L>
void fill_planes(float* z, const PhiloxSchedule& key, uint32_t id, uint32_t stream, const Patch& p) {
  float plane[kBlock + 2 * kFillSlack];
  for (int64_t c = 0; c < p.channels; ++c) {
    const int64_t start = c * p.plane + p.first_pixel, skip = start & 3;
    fill<L>(plane, key, id, stream, start - skip, skip + p.pixels);
    float* to = z + c;
    const float* from = plane + skip;
    for (int64_t i = 0; i < p.pixels; ++i) to[i * p.channels] = from[i];
  }
}

// Dealing `channels` registers of one channel each into as many of interleaved pixels: lane i of register j holds
// element j * width + i, so its pixel is that over `channels`, its channel the rest.
template <int channels, int width>
struct Dealing {
  int32_t pixel[channels][width];
  uint32_t from[channels][channels];  // one bit per lane

  constexpr Dealing() : pixel(), from() {
    for (int j = 0; j < channels; ++j) {
      for (int i = 0; i < width; ++i) {
        pixel[j][i] = (j * width + i) / channels;
        from[j][(j * width + i) % channels] |= 1u << i;
      }
    }
  }
};

// The same for the usual channel counts, dealt in registers.
template <class L, int channels>
void fill_planes(float* z, const PhiloxSchedule& key, uint32_t id, uint32_t stream, const Patch& p) {
  constexpr int w = L::kWidth;
  static constexpr Dealing<channels, w> dealing;
  float plane[channels][kBlock / channels + 2 * kFillSlack];
  const float* from[channels];
  for (int c = 0; c < channels; ++c) {
    const int64_t start = c * p.plane + p.first_pixel, skip = start & 3;
    fill<L>(plane[c], key, id, stream, start - skip, skip + p.pixels);
    from[c] = plane[c] + skip;
  }
  for (int64_t i = 0; i < p.pixels; i += w) {
#pragma GCC unroll 4
    for (int j = 0; j < channels; ++j) {
      const typename L::I pixel = L::iload(dealing.pixel[j]);
      typename L::F v = L::permute(L::load(from[0] + i), pixel);
#pragma GCC unroll 4
      for (int c = 1; c < channels; ++c)
        v = L::select(L::mask(dealing.from[j][c]), L::permute(L::load(from[c] + i), pixel), v);
      L::store(z + i * channels + j * w, v);
    }
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
    uint32_t phase[4] = {};  // one bit per lane
    for (int i = 0; i < w; ++i) {
      const int64_t start = (c + (i < lanes ? i : 0)) * p.plane + p.first_pixel;
      lane[i] = static_cast<uint64_t>(start >> 2);
      phase[start & 3] |= 1u << i;
    }
    const bool straddles = (phase[1] | phase[2] | phase[3]) != 0;
    const typename L::Mask one = L::mask(phase[1]), two = L::mask(phase[2]), three = L::mask(phase[3]);
    typename L::U q = L::counters(lane);
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
  return fill_planes<L>(z, key, id, stream, patch);
}

}  // namespace
}  // namespace fastdiff::cpu
