// A sample of the norm op, forward or backward: sums over patches of it, what they give, and a map of the same patches.
// A sample is cut into columns of whole groups, which have nothing to do with each other, and a column into patches of
// pixels. Both, and so sums, depend on a sample's size alone: not on the batch, not on the number of threads.
#pragma once

#include <algorithm>

#include "parallel.h"

namespace fastdiff::cpu {
namespace {

// Elements of a patch, which stays in the second-level cache with what is made of it; and channels next to each other in
// a column of a channels_last image, so that memory is read in long runs. One group may have more.
constexpr int64_t kPatch = 24576, kWide = 384;
// Pixels of a channels_last image beyond which a column is the whole sample: each narrower one would go through all of
// its pages again, more than the processor keeps the addresses of.
constexpr int64_t kLong = 256;
// Pixels a patch has at least, where the image has them: what is done once per patch and channel is then little.
constexpr int64_t kTall = 64;
// Elements a thread has at least: about ten microseconds.
constexpr int64_t kThreadGrain = 8192;

struct Cutting {
  int64_t width, columns, size, patches;  // channels of a column, columns; pixels of a patch, patches of a column
  int64_t channels;

  explicit Cutting(const NormArgs& args) : channels(args.C) {
    const int64_t fitting = kPatch / args.P, rows = args.P > kLong ? channels : std::max(kWide, fitting);
    const int64_t most = args.channels_last ? rows : fitting;
    width = args.y ? channels / args.groups : 1;
    while (2 * width <= most && width < channels) width *= 2;
    if (channels <= most) width = channels;
    columns = (channels + width - 1) / width;
    const int64_t tall = (args.P + kTall - 1) / kTall, fit = std::max(kPatch / width / kTall, int64_t{1});
    const int64_t least = (tall + fit - 1) / fit;
    size = (tall + least - 1) / least * kTall;  // patches of about the same size
    patches = (args.P + size - 1) / size;
  }

  // First channel of a column, and one past the last of the one before.
  int64_t channel(int64_t column) const { return std::min(column * width, channels); }

  NormPatch patch(const NormArgs& args, int64_t b, int64_t column, int64_t which) const {
    const int64_t first = which * size;
    return {&args, b, first, std::min(size, args.P - first), channel(column), channel(column + 1)};
  }
};

template <class Body>
Error each(int64_t tasks, bool alone, const Body& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
  };
  if (!alone) return on_pool(tasks, 1, run);
  run(0, tasks);
  return kOk;
}

// sum(b, column, which) of every patch where `sums`, settle(b, column), map(b, column, which) of every patch.
template <class Sum, class Settle, class Map>
Error run_passes(const NormArgs& args, const Cutting& cut, bool sums, const Sum& sum, const Settle& settle,
                 const Map& map) {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  const bool alone = args.B * args.C * args.P < 2 * kThreadGrain || threads == 1;
  const int64_t columns = args.B * cut.columns;
  // Where every thread has whole columns, the second pass over one finds it in the cache.
  if (alone || columns % threads == 0 || columns >= 4 * static_cast<int64_t>(threads))
    return each(columns, alone, [&](int64_t task) {
      const int64_t b = task / cut.columns, column = task % cut.columns;
      for (int64_t which = 0; sums && which < cut.patches; ++which) sum(b, column, which);
      settle(b, column);
      for (int64_t which = 0; which < cut.patches; ++which) map(b, column, which);
    });

  const auto each_patch = [&](const auto& pass) {
    return each(columns * cut.patches, false, [&](int64_t task) {
      const int64_t column = task / cut.patches;
      pass(column / cut.columns, column % cut.columns, task % cut.patches);
    });
  };
  if (sums)
    if (const Error error = each_patch(sum); error != kOk) return error;
  for (int64_t column = 0; column < columns; ++column) settle(column / cut.columns, column % cut.columns);
  return each_patch(map);
}

}  // namespace
}  // namespace fastdiff::cpu
