// attention on the CPU: one task for each head of each sample, so that no result depends on the number of threads.
#include <vector>

#include "../check.h"
#include "../export.h"
#include "blocks.h"
#include "parallel.h"

namespace fastdiff::cpu {
namespace {

// Floats that one head needs at most, forward or backward, with registers of sixteen.
int64_t room(const AttentionArgs& args) {
  constexpr int64_t lanes = 32;
  const int64_t wide = (args.d + 15) / 16 * 16;
  return 4 * args.T * wide + 2 * args.T * lanes + 5 * wide * lanes + 4 * lanes;
}

Error attention(const AttentionArgs& args) {
  if (const Error error = check(args); error != kOk) return error;
  const auto run = args.grad ? executor().attend_backward : executor().attend;
  const int64_t heads = args.B * args.H;
  return in_parallel(heads, heads * args.T * args.T * args.d, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> own;
    const size_t want = static_cast<size_t>(room(args)) + kLine / sizeof(float);
    if (own.size() < want) own.resize(want);
    for (int64_t which = begin; which < end; ++which) run(args, which, aligned(own));
  });
}

}  // namespace
}  // namespace fastdiff::cpu

using namespace fastdiff;

FASTDIFF_EXPORT int fastdiff_attention_cpu(const AttentionArgs* args) {
  return cpu::answer(cpu::attention, args);
}

FASTDIFF_EXPORT int64_t fastdiff_attention_args_size() { return sizeof(AttentionArgs); }
