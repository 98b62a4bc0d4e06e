// Where the pixels of a Winograd convolution's tiles lie.
#pragma once

#include "executor.h"

namespace fastdiff::cpu {
namespace {

struct Grid {
  int64_t H, W, size, rows, columns;  // rows, columns: of tiles in an image

  Grid(int64_t H, int64_t W, int64_t size)
      : H(H), W(W), size(size), rows((H + size - 1) / size), columns((W + size - 1) / size) {}

  int64_t tiles(int64_t batch) const { return batch * rows * columns; }
};

// The place of a tile's first output.
struct Corner {
  int64_t b, y, x;

  Corner(const Grid& grid, int64_t tile)
      : b(tile / (grid.rows * grid.columns)),
        y(tile / grid.columns % grid.rows * grid.size),
        x(tile % grid.columns * grid.size) {}
};

// to[..] = the channels of side x side pixels from `before` pixels before the corner on; `outside` for those not there.
template <class Pointer>
void point(const Grid& grid, const Corner& at, Pointer image, int64_t channels, int64_t side, int64_t before,
           Pointer outside, Pointer* to) {
  for (int64_t row = 0; row < side; ++row) {
    for (int64_t column = 0; column < side; ++column) {
      const int64_t y = at.y + row - before, x = at.x + column - before;
      const bool inside = y >= 0 && y < grid.H && x >= 0 && x < grid.W;
      to[row * side + column] = inside ? image + ((at.b * grid.H + y) * grid.W + x) * channels : outside;
    }
  }
}

}  // namespace
}  // namespace fastdiff::cpu
