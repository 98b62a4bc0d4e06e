// measure on the CPU: parts of samples on threads, then each sample's parts in their order.
#include <algorithm>

#include "../check.h"
#include "../export.h"
#include "parallel.h"

namespace fastdiff::cpu {
namespace {

Error measure(const MeasureArgs& args) {
  if (const Error error = check(args); error != kOk) return error;
  const int64_t parts = part_count(args.N), size = part_size(args.N);
  const Executor& on = executor();
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / parts, which = index % parts, first = which * size;
      args.partial[b * kParts + which] = on.measure(args, b * args.N + first, std::min(size, args.N - first));
    }
  };
  if (const Error error = in_parallel(args.B * parts, args.B * args.N, body); error != kOk) return error;
  for (int64_t b = 0; b < args.B; ++b) {
    double sum = 0.0;
    for (int64_t which = 0; which < parts; ++which) sum += args.partial[b * kParts + which];
    args.found[2 * b] = measured(args.quantity, sum, args.N);
    args.found[2 * b + 1] = args.status ? static_cast<float>(args.status[b]) : -1.0f;
  }
  return kOk;
}

}  // namespace
}  // namespace fastdiff::cpu

using namespace fastdiff;

FASTDIFF_EXPORT int fastdiff_measure_cpu(const MeasureArgs* args) { return cpu::answer(cpu::measure, args); }

FASTDIFF_EXPORT int64_t fastdiff_measure_args_size() { return sizeof(MeasureArgs); }
