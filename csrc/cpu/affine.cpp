// affine_step on the CPU: checks, blocks, threads. The only symbol wanted of torch is a C function of its stable
// interface, so one binary serves every torch from 2.11 on and every Python.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../check.h"
#include "../export.h"
#include "../scalar.h"
#include "blocks.h"
#include "parallel.h"
#include "plan_row.h"

namespace fastdiff::cpu {
namespace {

// Per-thread storage for the noise of a block, grown once.
struct Scratch {
  Decoder decoder;
  std::vector<float> normals;
  std::vector<const float*> z;

};

Scratch& scratch() {
  static thread_local Scratch own;
  return own;
}

// Where the caller has x and the first output, for a batch of one; null: in their registers.
struct Apart {
  const float* x = nullptr;
  float* next = nullptr;
};

struct Call {
  const AffineArgs& args;
  const Apart apart;
  const Executor& executor;
  const Cut cut;
};

int64_t width_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Where an image stack of the given element width holds element `at` of sample b.
template <class T>
T* locate(T* base, int64_t width, int64_t sample, const AffineArgs& args, int64_t at) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<Byte*>(base) + width * (sample * args.N + at);
}

// What of a sample, besides its registers and Fc, the row reads.
struct Reads {
  bool unguided, perturbed, momentum, variance;
};

Reads settle(Stretch& s, const AffineArgs& args, int64_t b) {
  const Row& row = *s.row;
  s.by = scalars(row.coef, args.guidance[b], args.mix ? args.mix + b * kMix : nullptr);
  s.clamps = s.by.lo > -INFINITY || s.by.hi < INFINITY;
  const Reads reads = {row.reads_model && args.unguided && (s.by.w != 1.0f || row.e_unguided),
                       row.reads_model && args.perturbed && s.by.s != 0.0f,
                       row.reads_model && args.momentum && s.by.m != 0.0f,
                       row.spreads_noise && args.variance && row.terms};
  s.extras = row.reads_e || reads.perturbed || reads.momentum || reads.variance || s.by.post != 1.0f ||
             (reads.unguided && s.by.u != 1.0f);
  return reads;
}

// decoded: the row that this thread's decoder holds, or -1.
void run_blocks(const Call& call, int64_t begin, int64_t end, int64_t decoded) {
  const AffineArgs& args = call.args;
  const Cut& cut = call.cut;
  Scratch& own = scratch();
  Row& row = own.decoder.row;
  int64_t sample = -1;
  PhiloxSchedule key{};
  Stretch s{};
  Reads reads{};
  s.row = &row;
  s.model_out_dtype = args.model_out_dtype;
  s.model_in_dtype = args.model_in_dtype;
  const int64_t out_width = width_of(args.model_out_dtype), in_width = width_of(args.model_in_dtype);
  const int64_t noise_stride = cut.stride();

  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / cut.blocks, first = index % cut.blocks * cut.block;
    const int64_t i = args.row[b];
    if (i < 0 || i >= args.R) {
      index = (b + 1) * cut.blocks - 1;
      continue;
    }
    if (i != decoded) {
      own.decoder.decode(args, i);  // was found sound before the threads started
      decoded = i;
      sample = -1;
    }
    if (b != sample) {
      sample = b;
      reads = settle(s, args, b);
      if (row.terms) {
        key = philox_schedule(static_cast<uint64_t>(args.seed[b]));
        own.z.resize(static_cast<size_t>(row.terms));
        const size_t want = static_cast<size_t>(row.terms * noise_stride) + kLine / sizeof(float);
        if (!args.noise && own.normals.size() < want) own.normals.resize(want);
      }
    }

    int64_t span = 1;  // blocks are for the noise that is drawn: without it, what there is of the sample at once
    if (!row.terms || args.noise) span = std::min(end - index, cut.blocks - index % cut.blocks);
    s.count = std::min(args.N - first, span * cut.block);
    const auto cell = [&](float* base, int64_t r) { return base + (r * args.B + b) * args.N + first; };
    s.x = row.reads_x ? cell(args.state, row.x) : nullptr;
    for (int j = 0; j < row.slots; ++j) s.slot[j] = cell(args.state, row.from[j]);
    for (int o = 0; o < row.outputs; ++o) s.out[o] = cell(args.state, row.to[o]);
    s.copy = row.copy >= 0 ? cell(args.state, row.copy) : nullptr;
    if (row.reads_x && call.apart.x) s.x = call.apart.x + first;
    if (call.apart.next) s.out[0] = call.apart.next + first;
    const auto branch = [&](const void* base) { return locate(base, out_width, b, args, first); };
    if (row.reads_model) {
      s.conditional = branch(args.model_out);
      s.unguided = reads.unguided ? branch(args.unguided) : nullptr;
    }
    if (s.extras) {
      s.perturbed = reads.perturbed ? branch(args.perturbed) : nullptr;
      s.momentum = reads.momentum ? args.momentum + b * args.N + first : nullptr;
      s.variance = reads.variance ? branch(args.variance) : nullptr;
    }
    s.denoised = args.denoised && row.reads_model ? cell(args.denoised, 0) : nullptr;
    for (int64_t copy = 0; copy < args.model_in_batch; ++copy)
      s.emit[copy] = locate(args.model_in, in_width, copy * args.B + b, args, first);

    for (int t = 0; t < row.terms; ++t) {
      const Term& term = row.term[t];
      if (args.noise) {
        own.z[static_cast<size_t>(t)] = args.noise + (term.id * args.B + b) * args.N + first;
        continue;
      }
      float* z = aligned(own.normals) + t * noise_stride;
      own.z[static_cast<size_t>(t)] = z;
      cut.draw(call.executor, z, key, term.id, term.stream, first, s.count);
    }
    s.z = own.z.data();

    // Every thread that finds the sample bad writes the same number.
    if (call.executor.step(s) && __atomic_load_n(args.status + b, __ATOMIC_RELAXED) < 0)
      __atomic_store_n(args.status + b, static_cast<int32_t>(i), __ATOMIC_RELAXED);
    index += span - 1;
  }
}

// Decodes each run of equal rows once, before anything is written; `work` is what there is to do, in elements, `decoded`
// the row decoded last.
Error survey(const AffineArgs& args, int64_t& work, int64_t& decoded) {
  Decoder& decoder = scratch().decoder;
  int64_t elements = 0;
  for (int64_t b = 0; b < args.B; ++b) {
    const int64_t i = args.row[b];
    if (i < 0 || i >= args.R) continue;
    if (i != decoded) {
      if (const Error error = decoder.decode(args, i); error != kOk) return error;
      if (decoder.row.reads_model && !args.model_out) return kNullPointer;
      decoded = i;
      elements = args.N * (1 + (args.noise ? 0 : kNormalCost * decoder.row.terms));
    }
    work += elements;
  }
  return kOk;
}

// After all elements are done: the next model time, and on to the next row.
void finish(const AffineArgs& args) {
  for (int64_t b = 0; b < args.B; ++b) {
    const int64_t i = args.row[b];
    if (i < 0 || i >= args.R) continue;
    for (int64_t copy = 0; copy < args.model_time_batch; ++copy)
      args.model_time[copy * args.B + b] = args.coef[i * args.coef_width + kEmitTime];
    args.row[b] = static_cast<int32_t>(i + 1);
  }
}

Error affine_step(const AffineArgs& args, const Apart& apart = {}) {
  if (const Error error = check(args); error != kOk) return error;
  int64_t work = 0, decoded = -1;
  if (const Error error = survey(args, work, decoded); error != kOk) return error;
  if (work > 0) {
    const Call call{args, apart, executor(), Cut(args.N, args.channels)};
    const int64_t blocks = args.B * call.cut.blocks;
    const int64_t known = work < 2 * kGrain ? decoded : -1;  // to this thread alone
    const auto body = [&](int64_t begin, int64_t end) { run_blocks(call, begin, end, known); };
    if (const Error error = in_parallel(blocks, work, body); error != kOk) return error;
  }
  finish(args);
  return kOk;
}

}  // namespace
}  // namespace fastdiff::cpu

using namespace fastdiff;

FASTDIFF_EXPORT int fastdiff_affine_step_cpu(const AffineArgs* args) {
  return cpu::answer([](const AffineArgs& own) { return cpu::affine_step(own); }, args);
}

// Row i of a batch of one on tensors that are other ones each time. x, next: instead of a register where they are given,
// or else model_in: the first output in another dtype.
int fastdiff_affine_step_apart_cpu(const AffineArgs* args, int32_t i, const void* model_out, const float* x,
                                   float* next, void* model_in, float* denoised) {
  if (!args) return kNullPointer;
  if (args->B != 1) return kBadShape;
  AffineArgs own = *args;
  own.row = &i;
  own.model_out = model_out;
  own.model_in = model_in;
  own.model_in_batch = model_in ? 1 : 0;
  own.denoised = denoised;
  return cpu::guarded([&] { return cpu::affine_step(own, {x, next}); });
}

FASTDIFF_EXPORT int64_t fastdiff_args_size() { return sizeof(AffineArgs); }

FASTDIFF_EXPORT const char* fastdiff_error(int code) {
  if (code >= kCuda) return "the CUDA launch failed; its cudaError_t is the code less 100";
  switch (code) {
    case kOk: return "ok";
    case kNullPointer: return "a buffer the row needs was not given";
    case kBadShape: return "a size, batch factor or table width does not fit";
    case kBadDtype: return "the model's dtype is none of float32, float16, bfloat16";
    case kBadRegister: return "a row names a register the state does not hold, or has no output";
    case kBadNoise: return "a row names more noise terms, or another noise id, than it was given";
    case kBadRule: return "the guide op has no such rule";
    case kOutOfMemory: return "memory ran out for a buffer of the op";
    case kThreads: return "torch's thread pool reported a failure";
    default: return "unknown error";
  }
}

FASTDIFF_EXPORT void fastdiff_philox(int64_t n, uint64_t seed, uint32_t id, uint32_t stream, uint32_t* words) {
  const PhiloxSchedule key = philox_schedule(seed);
  for (int64_t i = 0; i < n; i += 4) {
    const uint64_t q = static_cast<uint64_t>(i / 4);
    uint64_t c[1][4] = {{q, q >> 32, id, stream}};
    philox<Scalar>(c, key);
    for (int64_t w = 0; w < 4 && i + w < n; ++w) words[i + w] = static_cast<uint32_t>(c[0][w]);
  }
}

// n blocks, each of its own counter (four words) and key (two): for known answers.
FASTDIFF_EXPORT void fastdiff_philox_blocks(int64_t n, const uint32_t* counter, const uint32_t* key, uint32_t* words) {
  for (int64_t i = 0; i < n; ++i, counter += 4, key += 2, words += 4) {
    uint64_t c[1][4] = {{counter[0], counter[1], counter[2], counter[3]}};
    philox<Scalar>(c, PhiloxKey{key[0], key[1]});
    for (int w = 0; w < 4; ++w) words[w] = static_cast<uint32_t>(c[0][w]);
  }
}

// Normals of elements first .. first + n of a sample; first is a multiple of 4.
FASTDIFF_EXPORT void fastdiff_normal_from(int64_t first, int64_t n, uint64_t seed, uint32_t id, uint32_t stream,
                                          float* out) {
  const PhiloxSchedule key = philox_schedule(seed);
  float block[cpu::kBlock + cpu::kFillSlack];
  for (int64_t i = 0; i < n; i += cpu::kBlock) {
    const int64_t count = n - i < cpu::kBlock ? n - i : cpu::kBlock;
    cpu::executor().normals(block, key, id, stream, first + i, count);
    std::memcpy(out + i, block, static_cast<size_t>(count) * sizeof *out);
  }
}

FASTDIFF_EXPORT void fastdiff_normal(int64_t n, uint64_t seed, uint32_t id, uint32_t stream, float* out) {
  fastdiff_normal_from(0, n, seed, id, stream, out);
}
