// norm on the CPU: samples cut into patches of pixels, threads, and the statistics of groups.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../check.h"
#include "../export.h"
#include "norm_passes.h"

namespace fastdiff::cpu {
namespace {

struct Job {
  const NormArgs& args;
  const Executor& executor;
  const Cutting cut;
  double* sums;           // [B, patches, C, 2]
  float* coefficients;    // [B, 3, C]
};

void sum_up(const Job& job, int64_t b, int64_t which) {
  double* to = job.sums + 2 * job.args.C * (b * job.cut.patches + which);
  std::fill(to, to + 2 * job.args.C, 0.0);
  job.executor.norm_sums(job.cut.patch(job.args, b, which), to);
}

// Mean and reciprocal deviation of every group, and with them y = (u - middle) factor + constant of every channel.
void settle(const Job& job, int64_t b) {
  const NormArgs& a = job.args;
  const int64_t channels = a.C / a.groups;
  float *factor = job.coefficients + 3 * a.C * b, *middle = factor + a.C, *constant = middle + a.C;
  for (int64_t g = 0; g < a.groups; ++g) {
    double sum = 0.0, square = 0.0;
    for (int64_t which = 0; which < job.cut.patches; ++which) {
      const double* from = job.sums + 2 * (a.C * (b * job.cut.patches + which) + g * channels);
      for (int64_t c = 0; c < channels; ++c) {
        sum += from[2 * c];
        square += from[2 * c + 1];
      }
    }
    const double n = static_cast<double>(channels * a.P), mean = sum / n;
    const double variance = square / n - mean * mean;
    // written so that NaN stays NaN
    const double rstd = 1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + static_cast<double>(a.eps));
    a.stats[2 * (b * a.groups + g)] = static_cast<float>(mean);
    a.stats[2 * (b * a.groups + g) + 1] = static_cast<float>(rstd);
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
      const double more = a.scale ? 1.0 + a.scale[b * a.scale_stride + c] : 1.0;
      const double moved = a.shift ? a.shift[b * a.shift_stride + c] : 0.0;
      const double added = a.before && !a.total ? a.before[b * a.before_stride + c] : 0.0;
      const double slope = rstd * a.weight[c] * more;
      factor[c] = static_cast<float>(slope);
      middle[c] = static_cast<float>(mean - added);
      // the constant takes what the rounding of the mean leaves
      constant[c] = static_cast<float>(a.bias[c] * more + moved + (middle[c] - (mean - added)) * slope);
    }
  }
}

// Only the sum is wanted: u = x + residual - (-before).
void settle_sum(const Job& job, int64_t b) {
  const NormArgs& a = job.args;
  float *factor = job.coefficients + 3 * a.C * b, *middle = factor + a.C, *constant = middle + a.C;
  for (int64_t c = 0; c < a.C; ++c) {
    factor[c] = 1.0f;
    middle[c] = a.before ? -a.before[b * a.before_stride + c] : 0.0f;
    constant[c] = 0.0f;
  }
}

void map(const Job& job, int64_t b, int64_t which) {
  const NormArgs& a = job.args;
  const float* factor = job.coefficients + 3 * a.C * b;
  const bool normalises = a.y != nullptr;
  const NormMap how{factor, factor + a.C, factor + 2 * a.C, normalises ? a.y : a.total,
                    normalises && a.total != nullptr, normalises && a.act != 0, nullptr, nullptr};
  job.executor.norm_map(job.cut.patch(a, b, which), how);
}

Error norm(const NormArgs& args) {
  if (const Error error = check(args); error != kOk) return error;
  if (args.B == 0 || args.C == 0 || args.P == 0) return kOk;
  static thread_local std::vector<double> sums;
  static thread_local std::vector<float> coefficients;
  const Cutting cut(args);
  const bool normalises = args.y != nullptr;
  coefficients.resize(static_cast<size_t>(3 * args.B * args.C));
  if (normalises) sums.resize(static_cast<size_t>(2 * args.B * cut.patches * args.C));
  const Job job{args, executor(), cut, sums.data(), coefficients.data()};
  return run_passes(
      args, cut.patches, normalises, [&](int64_t b, int64_t which) { sum_up(job, b, which); },
      [&](int64_t b) { normalises ? settle(job, b) : settle_sum(job, b); },
      [&](int64_t b, int64_t which) { map(job, b, which); });
}

}  // namespace
}  // namespace fastdiff::cpu

using namespace fastdiff;

FASTDIFF_EXPORT int fastdiff_norm_cpu(const NormArgs* args) { return args ? cpu::norm(*args) : kNullPointer; }

FASTDIFF_EXPORT int64_t fastdiff_norm_args_size() { return sizeof(NormArgs); }
