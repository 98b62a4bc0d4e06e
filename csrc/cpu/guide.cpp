// guide on the CPU: parts of samples, threads, and the ranking that dynamic thresholding needs.
// Thresholding writes and ranks |D| of a sample on one thread: N floats of scratch, and about 10 ns an element.
#include <algorithm>
#include <vector>

#include "../check.h"
#include "../export.h"
#include "parallel.h"

namespace fastdiff::cpu {
namespace {

// Ranking an element takes about as long as this many plain ones.
constexpr int64_t kRankCost = 16;

struct Call {
  const GuideArgs& args;
  const Executor& executor;
  const int64_t parts, size;
};

Part part(const GuideArgs& args, const Asked& asked, int64_t b, int64_t first, int64_t count) {
  const int64_t width = args.model_out_dtype == kFloat32 ? 4 : 2;
  const auto image = [&](const void* base) { return static_cast<const char*>(base) + width * b * args.N; };
  Part p{asked, args.rule, args.model_out_dtype, first, count, args.settings[kBeta], nullptr, nullptr, nullptr, nullptr,
         nullptr};
  const int64_t i = args.row[b];
  if (asked.by.p != 0.0f)
    p.x = args.state + (args.ids[i * args.ids_width + kSlotRegister] * args.B + b) * args.N;
  p.conditional = image(args.model_out);
  if (asked.guided) p.unguided = image(args.unguided);
  if (asked.perturbs) p.perturbed = image(args.perturbed);
  if (args.momentum) p.momentum = args.momentum + b * args.N;
  return p;
}

void run_parts(const Call& call, int64_t begin, int64_t end) {
  const GuideArgs& args = call.args;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / call.parts, which = index % call.parts, first = which * call.size;
    const Asked a = asked(args, b);
    if (!has_sums(args.rule, a)) continue;
    const int64_t count = std::min(call.size, args.N - first);
    keep(args.rule, call.executor.sums(part(args, a, b, first, count)), args.partial + (b * kParts + which) * kSums);
  }
}

// The scalars of the rule, from the parts in their order.
void finish(const Call& call, int64_t b, const Asked& a) {
  const GuideArgs& args = call.args;
  float* mix = args.mix + b * kMix;
  if (!has_sums(args.rule, a)) return solve_plain(mix);
  Sums all = {};
  for (int64_t which = 0; which < call.parts; ++which) {
    const float n = static_cast<float>(std::min(call.size, args.N - which * call.size));
    all = merge(args.rule, all, kept(args.rule, args.partial + (b * kParts + which) * kSums, n));
  }
  solve(args.rule, all, a.by.w, args.settings, mix);
}

// Compared as integers, which for magnitudes is their order and puts NaN, which is less than nothing, at the end.
bool below(float a, float b) { return Scalar::bits(a) < Scalar::bits(b); }

void rank(const Call& call, int64_t b) {
  static thread_local std::vector<float> sizes;
  const GuideArgs& args = call.args;
  const Asked a = asked(args, b);
  if (!a.active) return;
  float* mix = args.mix + b * kMix;
  Part p = part(args, a, b, 0, args.N);
  const Scalars by = scalars(args.coef + args.row[b] * args.coef_width, args.guidance[b], mix);
  if (by.w == 1.0f) p.unguided = nullptr;
  if (by.m == 0.0f) p.momentum = nullptr;
  sizes.resize(static_cast<size_t>(args.N));
  call.executor.magnitudes(p, by, sizes.data());

  const Rank wanted = quantile_rank(args.settings[kPercentile], args.N);
  const auto place = sizes.begin() + wanted.floor;
  std::nth_element(sizes.begin(), place, sizes.end(), below);
  float quantile = *place;
  if (wanted.fraction > 0.0f)
    quantile += wanted.fraction * (*std::min_element(place + 1, sizes.end(), below) - quantile);
  solve_threshold(quantile, args.settings, mix);
}

Error guide(const GuideArgs& args) {
  if (const Error error = check(args); error != kOk) return error;
  int64_t summed = 0, ranked = 0;
  for (int64_t b = 0; b < args.B; ++b) {
    const Asked a = asked(args, b);
    if (!a.active) continue;
    summed += has_sums(args.rule, a) ? args.N : 0;
    ranked += args.threshold ? args.N : 0;
    const int32_t slot = args.ids[args.row[b] * args.ids_width + kSlotRegister];
    if (a.by.p != 0.0f && (slot < 0 || slot >= args.K)) return kBadRegister;
  }

  const Call call{args, executor(), part_count(args.N), part_size(args.N)};
  if (summed) {
    const auto body = [&](int64_t begin, int64_t end) { run_parts(call, begin, end); };
    if (const Error error = in_parallel(args.B * call.parts, summed, body); error != kOk) return error;
  }
  for (int64_t b = 0; b < args.B; ++b)
    if (const Asked a = asked(args, b); a.active) finish(call, b, a);
  if (!ranked) return kOk;
  return in_parallel(args.B, kRankCost * ranked, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) rank(call, b);
  });
}

}  // namespace
}  // namespace fastdiff::cpu

using namespace fastdiff;

FASTDIFF_EXPORT int fastdiff_guide_cpu(const GuideArgs* args) { return cpu::answer(cpu::guide, args); }

FASTDIFF_EXPORT int64_t fastdiff_guide_args_size() { return sizeof(GuideArgs); }
