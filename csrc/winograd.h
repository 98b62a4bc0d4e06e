// A Winograd 3x3 convolution: the argument blocks. Torch-free. See fastdiff/engine/winograd.py, winograd_train.py.
#pragma once

#include <cstdint>

// Channels that lie side by side in a panel of a matrix: a cache line.
constexpr int64_t kWinogradPanel = 16;

extern "C" {

// Mirrored by fastdiff/engine/native_blocks.py; fastdiff_winograd_args_size() lets native.py compare the two.
// An image is [B, C, H, W] with its channels last, cut into tiles of size x size outputs, row by row, image by image.
struct WinogradArgs {
  const float* x;        // [B, C, H, W]: read by the input transform
  float* v;              // [count, (size + 2)^2, C]: written by it
  const float* products; // [count, (size + 2)^2, C]: read by the output transform
  const float* bias;     // [C] or null: added by it
  float* y;              // [B, C, H, W]: written by it
  int64_t B, C, H, W;    // C: channels in of the input transform, out of the output transform
  int64_t first, count;  // tiles
  int64_t size;          // 2 or 4
};

// The whole convolution, or its weight's gradient, by tiles of 4 x 4. C and N: whole panels of channels.
struct WinogradTrainArgs {
  const float* x;     // [B, C, H, W], channels last
  float* y;           // [B, N, H, W], channels last: written by the convolution, the gradient read by the other
  float* weight;      // (c, n, tap) in weight[c row + n column + k tap]: read, or written by its gradient
  const float* bias;  // [N] or null: added by the convolution
  int64_t B, C, N, H, W;
  int64_t row, column, tap;
  int64_t block;      // tiles at a time: of the convolution in each thread, of the gradient in all
};
}
