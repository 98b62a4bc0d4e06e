// The guide op, as the CPU and CUDA see it: the argument block, how a sample is cut into parts, and the formulas that
// turn its sums into the scalars of `mix` (see fastdiff/engine/guide.py for the rules). Torch-free.
#pragma once

#include "scalar.h"

extern "C" {

// Mirrored by fastdiff/engine/native_blocks.py; fastdiff_guide_args_size() lets native.py compare the two.
struct GuideArgs {
  const float* state;       // [K, B, N] registers
  const void* model_out;    // [B, N]: Fc
  const void* unguided;     // [B, N] or null: Fu
  const void* perturbed;    // [B, N] or null: Fp
  const float* coef;        // [R, coef_width]
  const int32_t* ids;       // [R, ids_width]
  const int32_t* row;       // [B]
  const float* guidance;    // [B]
  const float* settings;    // [kSettings]
  float* mix;               // [B, kMix], all but the last column written
  float* partial;           // [B, kParts, kSums]: scratch
  float* momentum;          // [B, N] or null: M, read; rule kApg replaces it
  int32_t* ticket;          // [B]: blocks arrived, CUDA only; zero between calls
  int64_t B, N, K, R;
  int64_t coef_width, ids_width;
  int32_t model_out_dtype;  // enum Dtype
  int32_t rule, threshold;
  int32_t reserved;
};
}

namespace fastdiff {

enum Rule : int32_t { kPlain = 0, kRescale = 1, kApg = 2, kCfgZero = 3 };

// Columns of settings.
constexpr int kPhi = 0, kEta = 1, kBeta = 2, kRadius = 3, kPercentile = 4, kCeiling = 5;
constexpr int kSettings = 8, kParts = 64, kSums = 8;

// Elements of a part: decided by N alone, so that a sample's sums do not depend on its batch or on the threads.
constexpr int64_t kPartUnit = 1024;
FASTDIFF_INLINE int64_t part_size(int64_t N) {
  const int64_t unit = kParts * kPartUnit;
  return (N + unit - 1) / unit * kPartUnit;
}
FASTDIFF_INLINE int64_t part_count(int64_t N) { return (N + part_size(N) - 1) / part_size(N); }

// What of a sample's row the sums and the estimate D need. A row that is not there, or reads no model, is not `active`.
struct Asked {
  Scalars by;  // of the row as it is, without what a rule has found
  bool active, guided, perturbs;
};

FASTDIFF_INLINE Asked asked(const GuideArgs& args, int64_t b) {
  const int64_t i = args.row[b];
  if (i < 0 || i >= args.R || !(args.ids[i * args.ids_width + kFlags] & kReadsModel)) return {};
  const float* coef = args.coef + i * args.coef_width;
  Asked found = {scalars(coef, args.guidance[b], nullptr), true, false, false};
  found.by.s = coef[kPerturb] * args.mix[b * kMix + kMixS];
  found.guided = args.unguided && found.by.w != 1.0f;
  found.perturbs = args.perturbed && found.by.s != 0.0f;
  return found;
}

// Whether the rule has anything to sum for this sample.
FASTDIFF_INLINE bool has_sums(int32_t rule, const Asked& a) {
  return rule == kRescale ? a.guided || a.perturbs : rule != kPlain && a.guided;
}

// Count, mean and sum of squared deviations from it, of values that count from the sample's first; merging two as Chan,
// Golub and LeVeque 1983 do. A mean far from zero costs no digits.
struct Moments {
  float n, mean, m2;
};

FASTDIFF_INLINE Moments merge(const Moments& a, const Moments& b) {
  const float n = a.n + b.n;
  if (n == 0.0f) return {0.0f, 0.0f, 0.0f};
  const float delta = b.mean - a.mean, share = b.n / n;
  return {n, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.n * share};
}

// What a part, and in the end a sample, is summed to. kRescale: the moments of Fc and of F; kCfgZero: <Fc, Fu>,
// <Fu, Fu>; kApg: <M, M>, <M, Dc>, <Dc, Dc>.
struct Sums {
  Moments conditional, guided;
  float product[3];
};

FASTDIFF_INLINE Sums merge(int32_t rule, const Sums& a, const Sums& b) {
  Sums both = {};
  if (rule == kRescale) {
    both.conditional = merge(a.conditional, b.conditional);
    both.guided = merge(a.guided, b.guided);
  } else {
    for (int i = 0; i < 3; ++i) both.product[i] = a.product[i] + b.product[i];
  }
  return both;
}

// To and from a part's place in `partial`; n: the elements of the part, 0 for none.
FASTDIFF_INLINE void keep(int32_t rule, const Sums& sums, float* place) {
  if (rule == kRescale) {
    place[0] = sums.conditional.mean, place[1] = sums.conditional.m2;
    place[2] = sums.guided.mean, place[3] = sums.guided.m2;
  } else {
    for (int i = 0; i < 3; ++i) place[i] = sums.product[i];
  }
}

FASTDIFF_INLINE Sums kept(int32_t rule, const float* place, float n) {
  if (n == 0.0f) return {};
  if (rule == kRescale) return {{n, place[0], place[1]}, {n, place[2], place[3]}, {}};
  return {{}, {}, {place[0], place[1], place[2]}};
}

// The scalars that leave a row as it is; the perturbed branch's scale is the caller's.
FASTDIFF_INLINE void solve_plain(float* mix) {
  mix[kMixW] = mix[kMixU] = mix[kMixP] = mix[kMixQ] = mix[kMixPost] = 1.0f;
  mix[kMixM] = 0.0f;
  mix[kMixBound] = Scalar::from_bits(0x7f800000);
}

// The scalars of a rule from the sums of the whole sample. A ratio with denominator 0 leaves its scalar at 1.
FASTDIFF_INLINE void solve(int32_t rule, const Sums& sums, float w, const float* settings, float* mix) {
  solve_plain(mix);
  if (rule == kRescale && sums.guided.m2 > 0.0f) {
    const float phi = settings[kPhi];
    mix[kMixQ] = phi * Scalar::sqrt(sums.conditional.m2 / sums.guided.m2) + (1.0f - phi);
  } else if (rule == kCfgZero && sums.product[1] > 0.0f) {
    mix[kMixU] = sums.product[0] / sums.product[1];
  } else if (rule == kApg) {
    const float length = Scalar::sqrt(sums.product[0]), radius = settings[kRadius];
    const float shrink = 0.0f < radius && radius < length ? radius / length : 1.0f;
    const float along = sums.product[2] > 0.0f ? sums.product[1] / sums.product[2] : 0.0f;
    const float both = length + along;
    if (both - both != 0.0f) return;  // not finite: the row must read Fu itself to report it
    mix[kMixW] = 0.0f;
    mix[kMixM] = (w - 1.0f) * shrink;
    mix[kMixP] = mix[kMixQ] = 1.0f - mix[kMixM] * (1.0f - settings[kEta]) * along;
  }
}

// The bound of dynamic thresholding from the quantile of |D|.
FASTDIFF_INLINE void solve_threshold(float quantile, const float* settings, float* mix) {
  const float least = quantile < 1.0f ? 1.0f : quantile;
  mix[kMixBound] = least > settings[kCeiling] ? settings[kCeiling] : least;
  mix[kMixPost] = 1.0f / mix[kMixBound];
}

// The rank percentile (N - 1) as an order statistic and the way from it to the next, which is there if fraction > 0.
struct Rank {
  int64_t floor;
  float fraction;
};

FASTDIFF_INLINE Rank quantile_rank(float percentile, int64_t N) {
  const float p = percentile > 0.0f ? percentile < 1.0f ? percentile : 1.0f : 0.0f, last = static_cast<float>(N - 1);
  const float product = p * last, rest = Scalar::fma(p, last, -product);  // the two are the product to the last bit
  Rank rank = {static_cast<int64_t>(product), 0.0f};
  rank.fraction = product - static_cast<float>(rank.floor) + rest;
  if (rank.fraction < 0.0f) {
    rank.floor -= 1;
    rank.fraction += 1.0f;
  }
  if (rank.floor >= N - 1) return {N - 1, 0.0f};
  return rank;
}

// F, as the row will make it from `by`.
template <class L, class V>
FASTDIFF_INLINE V combine(V conditional, V unguided, V perturbed, const Asked& a, const Scalars& by) {
  V f = conditional;
  if (a.guided && by.w != 1.0f) f = guide<L>(f, L::set(by.u) * unguided, L::set(by.w));
  return a.perturbs ? L::fma(L::set(by.s), conditional - perturbed, f) : f;
}

}  // namespace fastdiff
