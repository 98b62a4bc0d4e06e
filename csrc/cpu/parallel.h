// Work shared out over torch's thread pool: a second pool would fight it for the cores.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>

#include "executor.h"
#include "guard.h"

namespace fastdiff::cpu {
namespace {

// body(begin, end) over 0 .. tasks on the pool's threads, none of which an exception leaves.
template <class Body>
Error on_pool(int64_t tasks, int64_t grain, const Body& body) {
  struct Shared {
    const Body& body;
    std::atomic<bool> starved;
  } shared{body, {false}};
  const auto run = [](int64_t begin, int64_t end, void* context) {
    auto& own = *static_cast<Shared*>(context);
    const auto part = [&] { return own.body(begin, end), kOk; };
    if (guarded(part) != kOk) own.starved = true;
  };
  if (torch_parallel_for(0, tasks, grain, run, &shared) != AOTI_TORCH_SUCCESS) return kThreads;
  return shared.starved ? kOutOfMemory : kOk;
}

// The same for `work` to do in all, in element operations: here, where it is little.
template <class Body>
Error in_parallel(int64_t tasks, int64_t work, const Body& body) {
  if (work >= 2 * kGrain) return on_pool(tasks, std::max<int64_t>(tasks * kGrain / work, 1), body);
  body(0, tasks);
  return kOk;
}

}  // namespace
}  // namespace fastdiff::cpu
