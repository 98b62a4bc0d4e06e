// norm on the CPU: the statistics of groups, what they make of channels, and threads.
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
  double* sums;         // [B, patches, groups, 2]
  float* coefficients;  // [B, 3, C]
};

// In four chains, which do not wait for each other.
double add_up(const double* v, int64_t count) {
  double lane[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) lane[k] += v[i + k];
  for (; i < count; ++i) lane[0] += v[i];
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

void sum_up(const Job& job, int64_t b, int64_t column, int64_t which) {
  static thread_local std::vector<double> of_channels;
  const NormArgs& a = job.args;
  const NormPatch patch = job.cut.patch(a, b, column, which);
  const int64_t width = patch.end - patch.channel, channels = a.C / a.groups;
  of_channels.assign(static_cast<size_t>(2 * width), 0.0);
  job.executor.norm_sums(patch, of_channels.data());
  double* to = job.sums + 2 * ((b * job.cut.patches + which) * a.groups + patch.channel / channels);
  for (const double* from = of_channels.data(); from < of_channels.data() + width; from += channels) {
    *to++ = add_up(from, channels);
    *to++ = add_up(from + width, channels);
  }
}

// Mean and reciprocal deviation of every group, and with them y = (u - middle) factor + constant of every channel.
void settle(const Job& job, int64_t b, int64_t column) {
  const NormArgs& a = job.args;
  const int64_t channels = a.C / a.groups, end = job.cut.channel(column + 1);
  float *factor = job.coefficients + 3 * a.C * b, *middle = factor + a.C, *constant = middle + a.C;
  for (int64_t first = job.cut.channel(column); first < end; first += channels) {
    const int64_t g = first / channels;
    double sum = 0.0, square = 0.0;
    for (int64_t which = 0; which < job.cut.patches; ++which) {
      const double* from = job.sums + 2 * ((b * job.cut.patches + which) * a.groups + g);
      sum += from[0];
      square += from[1];
    }
    const double n = static_cast<double>(channels * a.P), mean = sum / n;
    const double variance = square / n - mean * mean;
    // written so that NaN stays NaN
    const double rstd = 1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + static_cast<double>(a.eps));
    if (a.stats) {
      a.stats[2 * (b * a.groups + g)] = static_cast<float>(mean);
      a.stats[2 * (b * a.groups + g) + 1] = static_cast<float>(rstd);
    }
    for (int64_t c = first; c < first + channels; ++c) {
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
void settle_sum(const Job& job, int64_t b, int64_t column) {
  const NormArgs& a = job.args;
  float *factor = job.coefficients + 3 * a.C * b, *middle = factor + a.C, *constant = middle + a.C;
  for (int64_t c = job.cut.channel(column); c < job.cut.channel(column + 1); ++c) {
    factor[c] = 1.0f;
    middle[c] = a.before ? -a.before[b * a.before_stride + c] : 0.0f;
    constant[c] = 0.0f;
  }
}

void map(const Job& job, int64_t b, int64_t column, int64_t which) {
  const NormArgs& a = job.args;
  const float* factor = job.coefficients + 3 * a.C * b;
  const bool normalises = a.y != nullptr;
  const NormMap how{factor, factor + a.C, factor + 2 * a.C, normalises ? a.y : a.total,
                    normalises && a.total != nullptr, normalises && a.act != 0, nullptr, nullptr};
  job.executor.norm_map(job.cut.patch(a, b, column, which), how);
}

Error norm(const NormArgs& args) {
  if (const Error error = check(args); error != kOk) return error;
  if (args.B == 0 || args.C == 0 || args.P == 0) return kOk;
  static thread_local std::vector<double> sums;
  static thread_local std::vector<float> coefficients;
  const Cutting cut(args);
  const bool normalises = args.y != nullptr;
  coefficients.resize(static_cast<size_t>(3 * args.B * args.C));
  if (normalises) sums.resize(static_cast<size_t>(2 * args.B * cut.patches * args.groups));
  const Job job{args, executor(), cut, sums.data(), coefficients.data()};
  return run_passes(
      args, cut, normalises, [&](int64_t b, int64_t column, int64_t which) { sum_up(job, b, column, which); },
      [&](int64_t b, int64_t column) { normalises ? settle(job, b, column) : settle_sum(job, b, column); },
      [&](int64_t b, int64_t column, int64_t which) { map(job, b, column, which); });
}

}  // namespace
}  // namespace fastdiff::cpu

using namespace fastdiff;

FASTDIFF_EXPORT int fastdiff_norm_cpu(const NormArgs* args) { return cpu::answer(cpu::norm, args); }

FASTDIFF_EXPORT int64_t fastdiff_norm_args_size() { return sizeof(NormArgs); }
