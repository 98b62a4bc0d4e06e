// Work shared out over torch's thread pool: a second pool would fight it for the cores.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>

#include "executor.h"

namespace fastdiff::cpu {
namespace {

// body(begin, end) over 0 .. tasks; `work` is all there is to do, in element operations.
template <class Body>
Error in_parallel(int64_t tasks, int64_t work, const Body& body) {
  if (work < 2 * kGrain) {
    body(0, tasks);
    return kOk;
  }
  const auto run = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  const int64_t grain = std::max<int64_t>(tasks * kGrain / work, 1);
  const auto code = torch_parallel_for(0, tasks, grain, run, const_cast<Body*>(&body));
  return code == AOTI_TORCH_SUCCESS ? kOk : kThreads;
}

}  // namespace
}  // namespace fastdiff::cpu
