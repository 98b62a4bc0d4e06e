// The transforms of a Winograd 3x3 convolution: the argument block. Torch-free. See fastdiff/engine/winograd.py.
#pragma once

#include <cstdint>

extern "C" {

// Mirrored by fastdiff/engine/native.py; fastdiff_winograd_args_size() lets it check that both sides agree.
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
}
