// The ops of a training step on the CPU: samples cut into parts, parts into blocks whose image and noise stay in cache.
// A sample's parts, and so its sum, depend on its size alone: not on its batch nor on the threads.
#include <algorithm>

#include "../check.h"
#include "../export.h"
#include "../scalar.h"
#include "blocks.h"
#include "parallel.h"
#include "train_draw.h"

namespace fastdiff::cpu {
namespace {

struct Call {
  const TrainArgs& args;
  const Executor& executor;
  const Cut cut;
  const bool loss;
  const int64_t part, parts;  // blocks of a part, parts of a sample
};

int64_t width_of(int32_t dtype) { return dtype == kFloat32 ? 4 : dtype == kUInt8 ? 1 : 2; }

// Buffers of a thread for one block: the image, z and y.
struct Scratch {
  std::vector<float> buffer;

  float* of(const Cut& cut, int which) {
    const size_t want = static_cast<size_t>(3 * cut.stride()) + kLine / sizeof(float);
    if (buffer.size() < want) buffer.resize(want);
    return aligned(buffer) + which * cut.stride();
  }
};

void run_parts(const Call& call, int64_t begin, int64_t end) {
  static thread_local Scratch own;
  const TrainArgs& args = call.args;
  const Cut& cut = call.cut;
  const int64_t model_width = width_of(args.model_dtype);
  float* const x0 = own.of(cut, 0);
  float* const z = own.of(cut, 1);
  float* const y = own.of(cut, 2);

  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / call.parts, which = index % call.parts;
    const float* row = args.table + b * kTrainColumns;
    const PhiloxSchedule key = philox_schedule(static_cast<uint64_t>(args.key[b]));
    Lesson lesson{};
    lesson.by = call.loss ? target_blend(row) : input_blend(row);
    lesson.model_dtype = args.model_dtype;
    if (call.loss) lesson.scale = args.weight[b] * args.factor;
    const bool flip = row[kFlip] != 0.0f, as_it_is = args.image_dtype == kFloat32 && !flip;
    const char* images = static_cast<const char*>(args.images) + b * args.N * width_of(args.image_dtype);

    double total = 0.0;
    const int64_t last = std::min((which + 1) * call.part, cut.blocks);
    for (int64_t block = which * call.part; block < last; ++block) {
      const int64_t first = block * cut.block;
      lesson.count = std::min(cut.block, args.N - first);
      lesson.x0 = lesson.z = lesson.y = nullptr;
      if (lesson.by.reads() && as_it_is) {
        lesson.x0 = reinterpret_cast<const float*>(images) + first;
      } else if (lesson.by.reads()) {
        call.executor.pixels(
            {images, args.image_dtype, flip, first / cut.channels, lesson.count / cut.channels, cut.channels, args.width},
            x0);
        lesson.x0 = x0;
      }
      if (lesson.by.first != 0.0f) {
        cut.draw(call.executor, z, key, kNoiseZ, kStreamTraining, first, lesson.count);
        lesson.z = z;
      }
      if (lesson.by.second != 0.0f) {
        cut.draw(call.executor, y, key, kNoiseY, kStreamTraining, first, lesson.count);
        lesson.y = y;
      }
      const int64_t at = (b * args.N + first) * model_width;
      lesson.out = args.out ? static_cast<char*>(args.out) + at : nullptr;
      if (call.loss) {
        lesson.model_out = static_cast<const char*>(args.model_out) + at;
        total += call.executor.squares(lesson);
      } else {
        call.executor.noised(lesson);
      }
    }
    if (call.loss) args.partial[b * kParts + which] = static_cast<float>(total);
  }
}

Error run(const TrainArgs& args, bool loss) {
  if (const Error error = check(args, loss); error != kOk) return error;
  const Cut cut(args.N, args.channels);
  const int64_t part = (cut.blocks + kParts - 1) / kParts, parts = (cut.blocks + part - 1) / part;
  const Call call{args, executor(), cut, loss, part, parts};
  if (loss)
    for (int64_t b = 0; b < args.B; ++b)
      std::fill(args.partial + b * kParts + parts, args.partial + (b + 1) * kParts, 0.0f);

  const int64_t work = args.B * args.N * (1 + kNormalCost);
  return in_parallel(args.B * parts, work, [&](int64_t begin, int64_t end) { run_parts(call, begin, end); });
}

}  // namespace
}  // namespace fastdiff::cpu

using namespace fastdiff;

FASTDIFF_EXPORT int fastdiff_noise_images_cpu(const TrainArgs* args) {
  return cpu::answer([](const TrainArgs& own) { return cpu::run(own, false); }, args);
}

FASTDIFF_EXPORT int fastdiff_loss_cpu(const TrainArgs* args) {
  return cpu::answer([](const TrainArgs& own) { return cpu::run(own, true); }, args);
}

// What n samples draw on the host: keys[n] and uniforms[n, 4] as fastdiff/training/objectives/counters.py defines them.
FASTDIFF_EXPORT void fastdiff_training_draws(int64_t n, const int64_t* seeds, uint64_t step, int64_t* keys,
                                             double* uniforms) {
  for (int64_t b = 0; b < n; ++b, uniforms += 4) keys[b] = cpu::host_draw(seeds[b], step, uniforms);
}

FASTDIFF_EXPORT int64_t fastdiff_train_args_size() { return sizeof(TrainArgs); }
