// The transforms of a Winograd convolution on the CPU: where the pixels of every tile lie, and threads.
// A tile's results depend on its pixels alone.
#include <vector>

#include "../check.h"
#include "../export.h"
#include "parallel.h"
#include "winograd_tiles.h"

namespace fastdiff::cpu {
namespace {

template <class Body>
Error each_tile(const WinogradArgs& args, int64_t taps, const Body& body) {
  const Grid grid(args.H, args.W, args.size);
  return in_parallel(args.count, args.count * taps * args.C, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i, grid, Corner(grid, args.first + i));
  });
}

Error into(const WinogradArgs& args) {
  if (const Error error = check(args, false); error != kOk) return error;
  const int64_t side = args.size + 2, taps = side * side;
  const std::vector<float> zeros(static_cast<size_t>(args.C), 0.0f);  // a pixel outside of the image
  const Executor& by = executor();
  return each_tile(args, taps, [&](int64_t i, const Grid& grid, const Corner& at) {
    TileIn tile;
    tile.v = args.v + i * taps * args.C;
    tile.tap = args.C, tile.panel = kPanel;
    point(grid, at, args.x, args.C, side, 1, zeros.data(), tile.pixel);
    by.winograd_into(tile, args.C, args.size);
  });
}

Error out(const WinogradArgs& args) {
  if (const Error error = check(args, true); error != kOk) return error;
  const int64_t taps = (args.size + 2) * (args.size + 2);
  const Executor& by = executor();
  return each_tile(args, taps, [&](int64_t i, const Grid& grid, const Corner& at) {
    TileOut tile;
    tile.products = args.products + i * taps * args.C;
    tile.bias = args.bias;
    tile.tap = args.C, tile.panel = kPanel;
    point(grid, at, args.y, args.C, args.size, 0, static_cast<float*>(nullptr), tile.pixel);
    by.winograd_out(tile, args.C, args.size);
  });
}

}  // namespace
}  // namespace fastdiff::cpu

using namespace fastdiff;

FASTDIFF_EXPORT int fastdiff_winograd_into_cpu(const WinogradArgs* args) { return cpu::answer(cpu::into, args); }

FASTDIFF_EXPORT int fastdiff_winograd_out_cpu(const WinogradArgs* args) { return cpu::answer(cpu::out, args); }

FASTDIFF_EXPORT int64_t fastdiff_winograd_args_size() { return sizeof(WinogradArgs); }
