// guide on CUDA: a block of threads for each part of a sample, the last of them to arrive turns the sums into scalars;
// then, with dynamic thresholding, one block for each sample, which ranks |D| by the digits of its bits.
// Bytes per element: 4 or 2 per branch read (kCfgZero Fc and Fu; kRescale Fp too where it counts; kApg Fc, Fu), and for
// kApg 4 for x and 8 for M; it must reach 80 % of the bandwidth of a copy where the samples together fill the GPU.
// Thresholding reads what D is made of three times, from the second-level cache at the sizes it is used at.
// Everything of a row is read from device memory, so a captured launch replays for any row of any table.
#include "../check.h"
#include "../export.h"
#include "../guide.h"
#include "quad.h"

namespace fastdiff {
namespace {

constexpr int kThreads = kPartUnit / 4;  // of a part
constexpr int kRankThreads = 1024;       // of a sample that is ranked
constexpr unsigned kAll = 0xffffffffu;

// One sample, at its first element.
struct Images {
  const float* x;  // null: P is 0
  const void* conditional;
  const void* unguided;   // null: not read
  const void* perturbed;  // null: not read
  int32_t dtype;
};

__device__ __forceinline__ Images images(const GuideArgs& args, int64_t b, const Asked& a) {
  const int64_t width = args.model_out_dtype == kFloat32 ? 4 : 2, skip = width * b * args.N;
  const auto at = [&](const void* base, bool read) { return read ? static_cast<const char*>(base) + skip : nullptr; };
  const int64_t slot = args.ids[args.row[b] * args.ids_width + kSlotRegister];
  return {a.by.p != 0.0f ? args.state + (slot * args.B + b) * args.N : nullptr, at(args.model_out, true),
          at(args.unguided, a.guided), at(args.perturbed, a.perturbs), args.model_out_dtype};
}

struct Branches {
  Quad c, g, away;  // Fc, Fu, Fp; what is not read is 0
};

template <bool kVector>
__device__ __forceinline__ Branches load_branches(const Images& from, int64_t at, int64_t left) {
  Branches all = {};
  all.c = load_model<kVector>(from.conditional, from.dtype, at, left);
  if (from.unguided) all.g = load_model<kVector>(from.unguided, from.dtype, at, left);
  if (from.perturbed) all.away = load_model<kVector>(from.perturbed, from.dtype, at, left);
  return all;
}

// Deviations of one quantity from its first value in this thread, which keeps a large mean out of the sums.
struct Spread {
  float head, sum, square;

  __device__ __forceinline__ void add(float v) {
    const float away = v - head;
    sum += away;
    square = Scalar::fma(away, away, square);
  }

  __device__ __forceinline__ Moments moments(float n) const {
    if (n == 0.0f) return {0.0f, 0.0f, 0.0f};
    const float above = sum / n;
    return {n, head + above, fmaxf(square - sum * above, 0.0f)};
  }
};

// This thread's share of elements first .. end of a sample. Each branch counts from its value at the sample's first
// element: F is then as exact as its deviations are.
template <bool kVector>
__device__ __forceinline__ Sums rescale_sums(const Images& from, const Asked& a, int64_t first, int64_t end) {
  const Branches origin = load_branches<false>(from, 0, 1);
  Spread of_c = {}, of_f = {};
  float n = 0.0f;
  for (int64_t at = first + 4 * threadIdx.x; at < end; at += kPartUnit) {
    const Branches all = load_branches<kVector>(from, at, end - at);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!kVector && at + e >= end) continue;
      const float c = all.c.v[e] - origin.c.v[0];
      const float f = combine<Scalar>(c, all.g.v[e] - origin.g.v[0], all.away.v[e] - origin.away.v[0], a, a.by);
      if (n == 0.0f) of_c.head = c, of_f.head = f;
      of_c.add(c);
      of_f.add(f);
      n += 1.0f;
    }
  }
  return {of_c.moments(n), of_f.moments(n), {}};
}

template <bool kVector, Rule rule>
__device__ __forceinline__ Sums product_sums(const Images& from, const Asked& a, float beta, float* momentum,
                                             int64_t first, int64_t end) {
  Sums mine = {};
  for (int64_t at = first + 4 * threadIdx.x; at < end; at += kPartUnit) {
    const int64_t left = end - at;
    // Absent elements are 0 and add nothing.
    const Quad c = load_model<kVector>(from.conditional, from.dtype, at, left);
    const Quad g = load_model<kVector>(from.unguided, from.dtype, at, left);
    if (rule == kCfgZero) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        mine.product[0] = Scalar::fma(c.v[e], g.v[e], mine.product[0]);
        mine.product[1] = Scalar::fma(g.v[e], g.v[e], mine.product[1]);
      }
      continue;
    }
    Quad x = {}, m = load<kVector>(momentum, at, left);
    if (from.x) x = load<kVector>(from.x, at, left);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      m.v[e] = Scalar::fma(a.by.q, c.v[e] - g.v[e], beta * m.v[e]);
      const float d = denoise<Scalar>(x.v[e], c.v[e], a.by.p, a.by.q);
      mine.product[0] = Scalar::fma(m.v[e], m.v[e], mine.product[0]);
      mine.product[1] = Scalar::fma(m.v[e], d, mine.product[1]);
      mine.product[2] = Scalar::fma(d, d, mine.product[2]);
    }
    store<kVector>(momentum, at, left, m);
  }
  return mine;
}

// Lane 0 ends with the sums of the first 2 * offset lanes, always added in the same order.
template <Rule rule>
__device__ __forceinline__ Sums merge_lanes(Sums mine, int offset) {
  for (; offset > 0; offset /= 2) {
    Sums other = {};
    const auto down = [&](float v) { return __shfl_down_sync(kAll, v, offset); };
    const auto moments = [&](const Moments& m) { return Moments{down(m.n), down(m.mean), down(m.m2)}; };
    if (rule == kRescale) {
      other.conditional = moments(mine.conditional);
      other.guided = moments(mine.guided);
    } else {
#pragma unroll
      for (int i = 0; i < 3; ++i) other.product[i] = down(mine.product[i]);
    }
    mine = merge(rule, mine, other);
  }
  return mine;
}

// Thread 0 ends with the sums of the block.
template <Rule rule>
__device__ __forceinline__ Sums merge_block(Sums mine) {
  __shared__ Sums warps[kThreads / 32];
  mine = merge_lanes<rule>(mine, 16);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x < 32) mine = merge_lanes<rule>(threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : Sums{}, kThreads / 64);
  return mine;
}

template <bool kVector, Rule rule>
__global__ void __launch_bounds__(kThreads) guide_kernel(const __grid_constant__ GuideArgs args, int parts,
                                                         int64_t size) {
  __shared__ bool last;
  const int64_t b = blockIdx.x / parts, which = blockIdx.x % parts;
  const Asked a = asked(args, b);
  if (!a.active) return;
  float* mix = args.mix + b * kMix;
  if (rule == kPlain || !has_sums(rule, a)) {
    if (which == 0 && threadIdx.x == 0) solve_plain(mix);
    return;
  }

  const Images from = images(args, b, a);
  const int64_t first = which * size, end = first + size < args.N ? first + size : args.N;
  Sums mine;
  if (rule == kRescale) {
    mine = rescale_sums<kVector>(from, a, first, end);
  } else {
    float* momentum = args.momentum ? args.momentum + b * args.N : nullptr;
    mine = product_sums<kVector, rule>(from, a, args.settings[kBeta], momentum, first, end);
  }
  mine = merge_block<rule>(mine);

  float* places = args.partial + b * kParts * kSums;
  if (threadIdx.x == 0) {
    keep(rule, mine, places + which * kSums);
    __threadfence();
    last = atomicAdd(args.ticket + b, 1) == parts - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x >= 32) return;

  // All parts have arrived: one warp adds them up, two to a lane.
  __threadfence();
  const auto part = [&](int64_t p) {
    float place[4] = {};
    if (p >= parts) return kept(rule, place, 0.0f);
#pragma unroll
    for (int i = 0; i < 4; ++i) place[i] = __ldcg(places + p * kSums + i);
    return kept(rule, place, static_cast<float>(args.N - p * size < size ? args.N - p * size : size));
  };
  const Sums all = merge_lanes<rule>(merge(rule, part(threadIdx.x), part(threadIdx.x + 32)), 16);
  if (threadIdx.x != 0) return;
  solve(rule, all, a.by.w, args.settings, mix);
  args.ticket[b] = 0;
}

constexpr int kDigits = 3, kBins = 2048, kCopies = 4;  // copies: threads of one warp seldom wait for the same cell

struct Histogram {
  unsigned count[kCopies][kBins];
  unsigned warps[32];
  unsigned bin, below, next, least;
};

__device__ __forceinline__ unsigned total(const Histogram& h, int bin) {
  return h.count[0][bin] + h.count[1][bin] + h.count[2][bin] + h.count[3][bin];
}

// Sets h.bin to the bin that holds the element of this rank, h.below to how many lie in bins before it.
__device__ void locate(Histogram& h, unsigned rank) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, bin = 2 * threadIdx.x;
  const unsigned even = total(h, bin), both = even + total(h, bin + 1);
  unsigned up_to = both;
  for (int offset = 1; offset < 32; offset *= 2) {
    const unsigned before = __shfl_up_sync(kAll, up_to, offset);
    if (lane >= offset) up_to += before;
  }
  if (lane == 31) h.warps[warp] = up_to;
  __syncthreads();
  unsigned before = up_to - both;
  for (int w = 0; w < warp; ++w) before += h.warps[w];
  if (before <= rank && rank < before + both) {
    const bool second = rank >= before + even;
    h.bin = bin + second;
    h.below = second ? before + even : before;
  }
  __syncthreads();
}

// |D|'s bits are 31, read as digits of 11, 10 and 10 from the top: magnitudes are in the order of their bits.
template <bool kVector>
__global__ void __launch_bounds__(kRankThreads, 1) threshold_kernel(const __grid_constant__ GuideArgs args) {
  __shared__ Histogram h;
  const int64_t b = blockIdx.x;
  const Asked a = asked(args, b);
  if (!a.active) return;
  float* mix = args.mix + b * kMix;
  const Scalars by = scalars(args.coef + args.row[b] * args.coef_width, args.guidance[b], mix);
  Images from = images(args, b, a);
  if (by.w == 1.0f) from.unguided = nullptr;
  const float* momentum = args.momentum && by.m != 0.0f ? args.momentum + b * args.N : nullptr;

  const Rank wanted = quantile_rank(args.settings[kPercentile], args.N);
  unsigned rank = static_cast<unsigned>(wanted.floor), found = 0;
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = 20 - 10 * digit;
    for (int i = threadIdx.x; i < kCopies * kBins; i += kRankThreads) h.count[i / kBins][i % kBins] = 0;
    if (threadIdx.x == 0) h.next = kBins, h.least = 0x7fffffffu;
    __syncthreads();
    unsigned least = 0x7fffffffu;  // of the magnitudes beyond the digits found so far
    for (int64_t at = 4 * threadIdx.x; at < args.N; at += 4 * kRankThreads) {
      const Branches all = load_branches<kVector>(from, at, args.N - at);
      Quad x = {}, m = {};
      if (from.x) x = load<kVector>(from.x, at, args.N - at);
      if (momentum) m = load<kVector>(momentum, at, args.N - at);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!kVector && at + e >= args.N) continue;
        const float f = combine<Scalar>(all.c.v[e], all.g.v[e], all.away.v[e], a, by);
        float d = denoise<Scalar>(x.v[e], f, by.p, by.q);
        if (momentum) d = Scalar::fma(by.m, m.v[e], d);
        const unsigned bits = static_cast<unsigned>(Scalar::bits(d)) & 0x7fffffffu;
        const unsigned above = digit == 0 ? 0 : bits >> (shift + 10);
        if (above == found) atomicAdd(&h.count[threadIdx.x % kCopies][bits >> shift & (digit == 0 ? 2047 : 1023)], 1u);
        if (above > found && bits < least) least = bits;
      }
    }
    if (digit == kDigits - 1) atomicMin(&h.least, __reduce_min_sync(kAll, least));
    __syncthreads();
    locate(h, rank);
    rank -= h.below;
    found = found << (digit == 0 ? 11 : 10) | h.bin;
    if (digit == kDigits - 1) {
      for (unsigned bin = threadIdx.x; bin < kBins; bin += kRankThreads)
        if (bin > h.bin && total(h, bin)) atomicMin(&h.next, bin);
    }
    __syncthreads();
  }

  if (threadIdx.x != 0) return;
  const float floor = Scalar::from_bits(static_cast<int32_t>(found));
  unsigned next = found;
  if (rank + 1 >= total(h, h.bin)) next = h.next < kBins ? (found & ~1023u) | h.next : h.least;
  float quantile = floor;
  if (wanted.fraction > 0.0f)
    quantile += wanted.fraction * (Scalar::from_bits(static_cast<int32_t>(next)) - floor);
  solve_threshold(quantile, args.settings, mix);
}

template <bool kVector>
int launch(const GuideArgs& args, cudaStream_t stream) {
  const int64_t size = part_size(args.N), parts = args.rule == kPlain ? 1 : part_count(args.N);
  if (args.B * parts > INT32_MAX || args.N > INT32_MAX) return kBadShape;
  const auto kernel = args.rule == kRescale ? guide_kernel<kVector, kRescale>
                      : args.rule == kApg   ? guide_kernel<kVector, kApg>
                      : args.rule == kCfgZero ? guide_kernel<kVector, kCfgZero>
                                              : guide_kernel<false, kPlain>;
  kernel<<<static_cast<unsigned>(args.B * parts), kThreads, 0, stream>>>(args, static_cast<int>(parts), size);
  if (args.threshold) threshold_kernel<kVector><<<static_cast<unsigned>(args.B), kRankThreads, 0, stream>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? kOk : kCuda + error;
}

int find_scalars(const GuideArgs& args, cudaStream_t stream) {
  if (const Error error = check(args); error != kOk) return error;
  if (!args.ticket) return kNullPointer;
  if (args.B == 0) return kOk;
  const bool vector = aligned({args.state, args.model_out, args.unguided, args.perturbed, args.momentum}, args.N);
  return vector ? launch<true>(args, stream) : launch<false>(args, stream);
}

}  // namespace
}  // namespace fastdiff

FASTDIFF_EXPORT int fastdiff_guide_cuda(const GuideArgs* args, void* stream) {
  return args ? fastdiff::find_scalars(*args, static_cast<cudaStream_t>(stream)) : fastdiff::kNullPointer;
}
