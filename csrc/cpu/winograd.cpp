// The transforms of a Winograd convolution on the CPU: where the pixels of every tile lie, and threads.
// A tile's results depend on its pixels alone.
#include <vector>

#include "../check.h"
#include "../export.h"
#include "parallel.h"

namespace fastdiff::cpu {
namespace {

struct Grid {
  int64_t rows, columns;  // of tiles in an image

  explicit Grid(const WinogradArgs& args)
      : rows((args.H + args.size - 1) / args.size), columns((args.W + args.size - 1) / args.size) {}
};

// The place of a tile's first output.
struct Corner {
  int64_t b, y, x;

  Corner(const WinogradArgs& args, const Grid& grid, int64_t tile)
      : b(tile / (grid.rows * grid.columns)),
        y(tile / grid.columns % grid.rows * args.size),
        x(tile % grid.columns * args.size) {}
};

template <class Body>
Error each_tile(const WinogradArgs& args, int64_t taps, const Body& body) {
  const Grid grid(args);
  return in_parallel(args.count, args.count * taps * args.C, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i, Corner(args, grid, args.first + i));
  });
}

Error into(const WinogradArgs& args) {
  if (const Error error = check(args, false); error != kOk) return error;
  const int64_t side = args.size + 2, taps = side * side;
  const std::vector<float> zeros(static_cast<size_t>(args.C), 0.0f);  // a pixel outside of the image
  const Executor& by = executor();
  return each_tile(args, taps, [&](int64_t i, const Corner& at) {
    TileIn tile;
    tile.v = args.v + i * taps * args.C;
    for (int64_t row = 0; row < side; ++row) {
      for (int64_t column = 0; column < side; ++column) {
        const int64_t y = at.y + row - 1, x = at.x + column - 1;
        const bool inside = y >= 0 && y < args.H && x >= 0 && x < args.W;
        const int64_t pixel = (at.b * args.H + y) * args.W + x;
        tile.pixel[row * side + column] = inside ? args.x + pixel * args.C : zeros.data();
      }
    }
    by.winograd_into(tile, args.C, args.size);
  });
}

Error out(const WinogradArgs& args) {
  if (const Error error = check(args, true); error != kOk) return error;
  const int64_t taps = (args.size + 2) * (args.size + 2);
  const Executor& by = executor();
  return each_tile(args, taps, [&](int64_t i, const Corner& at) {
    TileOut tile;
    tile.products = args.products + i * taps * args.C;
    tile.bias = args.bias;
    for (int64_t row = 0; row < args.size; ++row) {
      for (int64_t column = 0; column < args.size; ++column) {
        const int64_t y = at.y + row, x = at.x + column, pixel = (at.b * args.H + y) * args.W + x;
        tile.pixel[row * args.size + column] = y < args.H && x < args.W ? args.y + pixel * args.C : nullptr;
      }
    }
    by.winograd_out(tile, args.C, args.size);
  });
}

}  // namespace
}  // namespace fastdiff::cpu

using namespace fastdiff;

FASTDIFF_EXPORT int fastdiff_winograd_into_cpu(const WinogradArgs* args) {
  return args ? cpu::into(*args) : kNullPointer;
}

FASTDIFF_EXPORT int fastdiff_winograd_out_cpu(const WinogradArgs* args) { return args ? cpu::out(*args) : kNullPointer; }

FASTDIFF_EXPORT int64_t fastdiff_winograd_args_size() { return sizeof(WinogradArgs); }
