// A sample of the norm op, forward or backward: sums over patches of its pixels, what they give, and a map of the pixels.
// Patches, and so sums, depend on a sample's size alone: not on the batch, not on the number of threads.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>

#include "executor.h"

namespace fastdiff::cpu {
namespace {

constexpr int64_t kPatch = 16384;  // elements of a patch, which stays in the first two levels of the cache

struct Cutting {
  int64_t size, patches;  // pixels of a patch, patches of a sample

  explicit Cutting(const NormArgs& args)
      : size(std::max<int64_t>(kPatch / args.C, 1)), patches((args.P + size - 1) / size) {}

  NormPatch patch(const NormArgs& args, int64_t b, int64_t which) const {
    return {&args, b, which * size, std::min(size, args.P - which * size)};
  }
};

template <class Body>
Error in_parallel(int64_t tasks, bool alone, const Body& body) {
  if (alone) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return kOk;
  }
  const auto run = [](int64_t begin, int64_t end, void* context) {
    for (int64_t task = begin; task < end; ++task) (*static_cast<const Body*>(context))(task);
  };
  const auto code = torch_parallel_for(0, tasks, 1, run, const_cast<Body*>(&body));
  return code == AOTI_TORCH_SUCCESS ? kOk : kThreads;
}

// sum(b, which) of every patch where `sums`, settle(b), map(b, which) of every patch.
template <class Sum, class Settle, class Map>
Error run_passes(const NormArgs& args, int64_t patches, bool sums, const Sum& sum, const Settle& settle, const Map& map) {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  const bool alone = args.B * args.C * args.P < 2 * kGrain || threads == 1;
  const auto sample = [&](int64_t b) {
    for (int64_t which = 0; sums && which < patches; ++which) sum(b, which);
    settle(b);
    for (int64_t which = 0; which < patches; ++which) map(b, which);
  };
  // Where every thread has whole samples, the second pass over one finds it in the cache.
  if (alone || args.B % threads == 0 || args.B >= 4 * static_cast<int64_t>(threads))
    return in_parallel(args.B, alone, sample);

  if (sums) {
    const auto body = [&](int64_t task) { sum(task / patches, task % patches); };
    if (const Error error = in_parallel(args.B * patches, false, body); error != kOk) return error;
  }
  for (int64_t b = 0; b < args.B; ++b) settle(b);
  return in_parallel(args.B * patches, false, [&](int64_t task) { map(task / patches, task % patches); });
}

}  // namespace
}  // namespace fastdiff::cpu
