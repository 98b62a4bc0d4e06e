// The gradient of norm on the CPU; see norm_passes.h for what decides the order of its sums.
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
  double* sums;         // [B, patches, C, 3]: g, g (u - middle), u - middle
  float* coefficients;  // [B, 5, C]

  NormMap map(int64_t b) const {
    const float* const first = coefficients + 5 * args.C * b;
    return {first, first + args.C, first + 2 * args.C, nullptr, false, false, first + 3 * args.C, first + 4 * args.C};
  }
};

// What the forward pass did to every channel: v = (u - middle) factor + constant.
void prepare(const Job& job, int64_t b) {
  const NormArgs& a = job.args;
  float *factor = job.coefficients + 5 * a.C * b, *middle = factor + a.C, *constant = middle + a.C;
  for (int64_t c = 0; c < a.C; ++c) {
    const float* stats = a.stats + 2 * (b * a.groups + c / (a.C / a.groups));
    const double mean = stats[0], rstd = stats[1];
    const double more = a.scale ? 1.0 + a.scale[b * a.scale_stride + c] : 1.0;
    const double moved = a.shift ? a.shift[b * a.shift_stride + c] : 0.0;
    const double away = mean - (a.before ? a.before[b * a.before_stride + c] : 0.0);
    const double slope = rstd * a.weight[c] * more;
    factor[c] = static_cast<float>(slope);
    middle[c] = static_cast<float>(away);
    constant[c] = static_cast<float>(a.bias[c] * more + moved + (middle[c] - away) * slope);
  }
}

// du = rstd (g gamma - mean of g gamma - n mean of g gamma n) of every channel, with n = (u - mean) rstd, and its sums.
void settle(const Job& job, int64_t b, int64_t column) {
  const NormArgs& a = job.args;
  const int64_t channels = a.C / a.groups, begin = job.cut.channel(column), end = job.cut.channel(column + 1);
  const double pixels = static_cast<double>(a.P), count = static_cast<double>(channels) * pixels;
  const float *factor = job.coefficients + 5 * a.C * b, *middle = factor + a.C;
  float *slope = job.coefficients + 5 * a.C * b + 3 * a.C, *rest = slope + a.C;
  float* const out = a.sums + 3 * a.C * b;
  double* const own = job.sums + 3 * a.C * b * job.cut.patches;  // those of all patches go to the first one's
  for (int64_t which = 1; which < job.cut.patches; ++which)
    for (int64_t i = 3 * begin; i < 3 * end; ++i) own[i] += own[3 * a.C * which + i];
  for (int64_t first = begin; first < end; first += channels) {
    const float* stats = a.stats + 2 * (b * a.groups + first / channels);
    const double mean = stats[0], rstd = stats[1];
    double straight = 0.0, crossed = 0.0;
    for (int64_t c = first; c < first + channels; ++c) {
      // u - mean is u - middle and what the rounding of the middle left
      const double left = middle[c] + (a.before ? a.before[b * a.before_stride + c] : 0.0) - mean;
      own[3 * c + 1] = rstd * (own[3 * c + 1] + left * own[3 * c]);
      own[3 * c + 2] = rstd * (own[3 * c + 2] + left * pixels);
      straight += factor[c] * own[3 * c];
      crossed += factor[c] * own[3 * c + 1];
    }
    straight /= count;  // of rstd g gamma
    crossed /= count;
    for (int64_t c = first; c < first + channels; ++c) {
      const double left = middle[c] + (a.before ? a.before[b * a.before_stride + c] : 0.0) - mean;
      slope[c] = static_cast<float>(-crossed * rstd);
      rest[c] = static_cast<float>(-straight - crossed * rstd * left);
      out[c] = static_cast<float>(own[3 * c]);
      out[a.C + c] = static_cast<float>(own[3 * c + 1]);
      out[2 * a.C + c] = static_cast<float>(factor[c] * own[3 * c] - straight * pixels - crossed * own[3 * c + 2]);
    }
  }
}

Error norm_backward(const NormArgs& args) {
  if (const Error error = check(args); error != kOk) return error;
  if (!args.grad || !args.sums || !args.y || !args.stats) return kNullPointer;
  if (args.B == 0 || args.P == 0) return kOk;
  static thread_local std::vector<double> sums;
  static thread_local std::vector<float> coefficients;
  const Cutting cut(args);
  sums.assign(static_cast<size_t>(3 * args.B * cut.patches * args.C), 0.0);
  coefficients.resize(static_cast<size_t>(5 * args.B * args.C));
  const Job job{args, executor(), cut, sums.data(), coefficients.data()};
  for (int64_t b = 0; b < args.B; ++b) prepare(job, b);
  return run_passes(
      args, cut, true,
      [&](int64_t b, int64_t column, int64_t which) {
        double* const to = job.sums + 3 * args.C * (b * cut.patches + which);
        job.executor.norm_gradient_sums(cut.patch(args, b, column, which), job.map(b), to);
      },
      [&](int64_t b, int64_t column) { settle(job, b, column); },
      [&](int64_t b, int64_t column, int64_t which) {
        job.executor.norm_gradient_map(cut.patch(args, b, column, which), job.map(b));
      });
}

}  // namespace
}  // namespace fastdiff::cpu

using namespace fastdiff;

FASTDIFF_EXPORT int fastdiff_norm_backward_cpu(const NormArgs* args) {
  return cpu::answer(cpu::norm_backward, args);
}
