// A Winograd convolution and its weight's gradient on the CPU, whole: transforms, products, threads.
//
// What is larger, all tiles or all weights, is transformed in blocks that stay in a core's cache, between the products
// that need them; the other one before. All sums are in the order of channels, or of tiles: no number of threads, and
// no other split, changes a bit.
#include <algorithm>
#include <memory>
#include <vector>

#include "../check.h"
#include "../export.h"
#include "blocks.h"
#include "parallel.h"
#include "winograd_tiles.h"

namespace fastdiff::cpu {
namespace {

constexpr int64_t kSize = 4, kTaps = (kSize + 2) * (kSize + 2);
constexpr int64_t kSlice = 4 * kPanel;  // channels of a gradient in one task

// Floats on a cache line, not set to zero.
class Room {
 public:
  explicit Room(int64_t count) : room_(new float[static_cast<size_t>(count) + kLine / sizeof(float)]) {}
  float* get() const { return room_.get() + (-reinterpret_cast<uintptr_t>(room_.get()) % kLine) / sizeof(float); }

 private:
  std::unique_ptr<float[]> room_;
};

// Matrices of all taps, one after the other, a cache line apart, or their lines would compete for one place in a cache.
struct Taps {
  int64_t matrix;
  Room room;

  explicit Taps(int64_t floats) : matrix(floats + kPanel), room(kTaps * matrix) {}
  float* at(int64_t k) const { return room.get() + k * matrix; }
};

struct Pass {
  const WinogradTrainArgs& args;
  const Executor& by;
  Grid grid;
  int64_t tiles;
  std::vector<float> zeros;  // a pixel outside of the image

  explicit Pass(const WinogradTrainArgs& args)
      : args(args), by(executor()), grid(args.H, args.W, kSize), tiles(grid.tiles(args.B)),
        zeros(static_cast<size_t>(std::max(args.C, args.N)), 0.0f) {}

  // Tile `which` of x, or of the gradient y, to v.
  void into(int64_t which, float* v, int64_t tap, int64_t panel) const {
    TileIn tile{{}, v, tap, panel};
    point(grid, Corner(grid, which), args.x, args.C, kSize + 2, 1, zeros.data(), tile.pixel);
    by.winograd_into(tile, args.C, kSize);
  }

  void spread(int64_t which, float* v, int64_t tap, int64_t panel) const {
    TileIn tile{{}, v, tap, panel};
    point<const float*>(grid, Corner(grid, which), args.y, args.N, kSize, 0, zeros.data(), tile.pixel);
    by.winograd_spread(tile, args.N);
  }

  // Channels first .. first + count of tile `which` of y.
  void out(int64_t which, const float* products, int64_t tap, int64_t panel, int64_t first, int64_t count) const {
    TileOut tile{products, args.bias ? args.bias + first : nullptr, {}, tap, panel};
    point(grid, Corner(grid, which), args.y, args.N, kSize, 0, static_cast<float*>(nullptr), tile.pixel);
    for (float*& pixel : tile.pixel) pixel = pixel ? pixel + first : nullptr;
    by.winograd_out(tile, count, kSize);
  }

  // Columns first .. first + kPanel of the weight, to panels [C, kPanel].
  void weights(int64_t first, float* u, int64_t matrix) const {
    by.winograd_weights({args.weight + first * args.column, u, args.C, args.row, args.column, args.tap, matrix});
  }
};

Error of_few_tiles(const Pass& pass) {
  const auto& args = pass.args;
  const Taps v(pass.tiles * args.C);  // [tiles, C]
  const auto transform = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) pass.into(t, v.at(0) + t * args.C, v.matrix, kPanel);
  };
  if (const Error error = in_parallel(pass.tiles, pass.tiles * kTaps * args.C, transform); error != kOk) return error;
  const int64_t work = pass.tiles * kTaps * args.C * args.N;
  return in_parallel(args.N / kPanel, work, [&](int64_t begin, int64_t end) {
    const Taps u(args.C * kPanel), m(pass.tiles * kPanel);
    for (int64_t p = begin; p < end; ++p) {
      pass.weights(p * kPanel, u.at(0), u.matrix);
      for (int64_t k = 0; k < kTaps; ++k)
        pass.by.panel_product({v.at(k), u.at(k), m.at(k), pass.tiles, args.C, args.C, false, false});
      for (int64_t t = 0; t < pass.tiles; ++t) pass.out(t, m.at(0) + t * kPanel, m.matrix, kPanel, p * kPanel, kPanel);
    }
  });
}

Error of_many_tiles(const Pass& pass) {
  const auto& args = pass.args;
  const Taps u(args.C * args.N);  // panels [C, kPanel]
  const int64_t panels = args.N / kPanel, blocks = (pass.tiles + args.block - 1) / args.block;
  const auto transform = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pass.weights(p * kPanel, u.at(0) + p * args.C * kPanel, u.matrix);
  };
  if (const Error error = in_parallel(panels, kTaps * args.C * args.N, transform); error != kOk) return error;
  const int64_t work = pass.tiles * kTaps * args.C * args.N;
  return in_parallel(blocks, work, [&](int64_t begin, int64_t end) {
    const Taps v(args.block * args.C), m(args.block * args.N);  // [tiles, C], panels of tiles
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * args.block, count = std::min(args.block, pass.tiles - first);
      for (int64_t t = 0; t < count; ++t) pass.into(first + t, v.at(0) + t * args.C, v.matrix, kPanel);
      for (int64_t k = 0; k < kTaps; ++k)
        for (int64_t p = 0; p < panels; ++p)
          pass.by.panel_product({v.at(k), u.at(k) + p * args.C * kPanel, m.at(k) + p * args.block * kPanel, count,
                                 args.C, args.C, false, false});
      for (int64_t t = 0; t < count; ++t)
        pass.out(first + t, m.at(0) + t * kPanel, m.matrix, args.block * kPanel, 0, args.N);
    }
  });
}

Error convolution(const WinogradTrainArgs& args) {
  if (const Error error = check(args); error != kOk) return error;
  const Pass pass(args);
  return pass.tiles <= std::max<int64_t>(96, args.C * args.N / 2048) ? of_few_tiles(pass) : of_many_tiles(pass);
}

Error gradient(const WinogradTrainArgs& args) {
  if (const Error error = check(args); error != kOk) return error;
  const Pass pass(args);
  const int64_t block = std::min(args.block, pass.tiles);
  const Taps v(block * args.C), m(block * args.N);  // panels of tiles
  const bool once = block == pass.tiles;
  const Taps sums(once ? 0 : args.C * args.N);  // [N / kPanel, C, kPanel rows, kPanel]
  const int64_t slices = (args.C + kSlice - 1) / kSlice;
  for (int64_t first = 0; first < pass.tiles; first += block) {
    const int64_t count = std::min(block, pass.tiles - first);
    const auto transform = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        pass.into(first + t, v.at(0) + t * kPanel, v.matrix, block * kPanel);
        pass.spread(first + t, m.at(0) + t * kPanel, m.matrix, block * kPanel);
      }
    };
    const int64_t pixels = count * kTaps * (args.C + args.N);
    if (const Error error = in_parallel(count, pixels, transform); error != kOk) return error;
    const auto multiply = [&](int64_t begin, int64_t end) {
      const Taps own(once ? kSlice * kPanel : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / slices * kPanel, c = i % slices * kSlice, channels = std::min(kSlice, args.C - c);
        float* const u = once ? own.at(0) : sums.at(0) + n * args.C + c * kPanel;
        const int64_t matrix = once ? own.matrix : sums.matrix;
        for (int64_t k = 0; k < kTaps; ++k)
          for (int64_t d = 0; d < channels; d += kPanel)
            pass.by.panel_product({m.at(k) + n * block, v.at(k) + (c + d) * block, u + k * matrix + d * kPanel, kPanel,
                                   count, 0, true, first > 0});
        if (first + count < pass.tiles) continue;
        for (int64_t d = 0; d < channels; d += kPanel) {
          float* const weight = args.weight + n * args.column + (c + d) * args.row;
          pass.by.winograd_weights_gradient({weight, u + d * kPanel, kPanel, args.column, args.row, args.tap, matrix});
        }
      }
    };
    const int64_t work = count * kTaps * args.C * args.N;
    if (const Error error = in_parallel(args.N / kPanel * slices, work, multiply); error != kOk) return error;
  }
  return kOk;
}

}  // namespace
}  // namespace fastdiff::cpu

using namespace fastdiff;

FASTDIFF_EXPORT int fastdiff_winograd_convolution_cpu(const WinogradTrainArgs* args) {
  return cpu::answer(cpu::convolution, args);
}

FASTDIFF_EXPORT int fastdiff_winograd_gradient_cpu(const WinogradTrainArgs* args) {
  return cpu::answer(cpu::gradient, args);
}

FASTDIFF_EXPORT int64_t fastdiff_winograd_train_args_size() { return sizeof(WinogradTrainArgs); }
