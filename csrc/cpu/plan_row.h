// Reading one row of the table into what the executors run, and refusing one that names what is not there.
#pragma once

#include <vector>

#include "executor.h"

namespace fastdiff::cpu {

// Keeps its storage from one use to the next, so that decoding allocates nothing after the first row.
struct Decoder {
  Row row;
  std::vector<Term> terms;

  Error decode(const AffineArgs& args, int64_t i) {
    const float* coef = args.coef + i * args.coef_width;
    const int32_t* ids = args.ids + i * args.ids_width;
    row = Row{};
    row.reads_model = (ids[kFlags] & kReadsModel) != 0;
    row.p = coef[kP];
    row.q = coef[kQ];
    row.coef = coef;
    row.e_unguided = (ids[kFlags] & kEUnguided) != 0;
    row.spreads_noise = (ids[kFlags] & kSpreadsNoise) != 0;
    row.spread_log = coef[kSpreadLog];
    row.spread_slope = coef[kSpreadSlope];
    row.emit_scale = coef[kEmitScale];
    row.emit_time = coef[kEmitTime];
    row.reads_x = row.reads_model && row.p != 0.0f;

    int column[kMaxOutputs];
    for (int o = 0; o < kMaxOutputs && ids[kOutputRegister + o] >= 0; ++o) {
      const float* output = coef + kOutput + o * kOutputStride;
      column[row.outputs] = kOutput + o * kOutputStride;
      row.to[row.outputs] = ids[kOutputRegister + o];
      if (row.to[row.outputs] >= args.K) return kBadRegister;
      row.k[row.outputs] = output[kOutK];
      row.d[row.outputs] = output[kOutDelta];
      row.b[row.outputs] = output[kOutB];
      row.e[row.outputs] = output[kOutE];
      row.reads_x |= output[kOutK] != 0.0f || output[kOutDelta] != 0.0f;
      row.reads_e |= output[kOutE] != 0.0f;
      ++row.outputs;
    }
    if (row.outputs == 0) return kBadRegister;
    row.e_unguided &= row.reads_e;
    row.x = ids[kSlotRegister];
    if (row.reads_x && (row.x < 0 || row.x >= args.K)) return kBadRegister;

    if (ids[kSlotCount] < 0 || ids[kSlotCount] > kMaxSlots) return kBadRegister;
    for (int j = 0; j < ids[kSlotCount]; ++j) {
      bool used = false;
      for (int o = 0; o < row.outputs; ++o) {
        row.a[row.slots][o] = coef[column[o] + kOutA + j];
        used |= row.a[row.slots][o] != 0.0f;
      }
      if (!used) continue;
      row.from[row.slots] = ids[kSlotRegister + 1 + j];
      if (row.from[row.slots] < 0 || row.from[row.slots] >= args.K) return kBadRegister;
      ++row.slots;
    }

    const int32_t count = ids[kTermCount];
    if (count < 0 || kTermId + kTermIdStride * static_cast<int64_t>(count) > args.ids_width ||
        kTerm + kTermStride * static_cast<int64_t>(count) > args.coef_width)
      return kBadNoise;
    terms.clear();
    for (int32_t t = 0; t < count; ++t) {
      Term term{static_cast<uint32_t>(ids[kTermId + kTermIdStride * t]),
                static_cast<uint32_t>(ids[kTermId + kTermIdStride * t + 1]), {}};
      bool used = false;
      for (int o = 0; o < row.outputs; ++o) {
        term.weight[o] = coef[kTerm + kTermStride * t + o];
        used |= term.weight[o] != 0.0f;
      }
      if (!used) continue;
      if (args.noise && term.id >= static_cast<uint64_t>(args.noise_count)) return kBadNoise;
      terms.push_back(term);
    }
    row.terms = static_cast<int>(terms.size());
    row.term = terms.data();
    row.copy = -1;
    if (const int last = row.outputs - 1; last > 0 && is_copy(last)) {
      row.copy = row.to[last];
      row.outputs = last;
    }
    return kOk;
  }

 private:
  // Whether output o is D and nothing else, as the record is that multistep solvers keep.
  bool is_copy(int o) const {
    if (row.k[o] != 0.0f || row.d[o] != 0.0f || row.b[o] != 1.0f || row.e[o] != 0.0f) return false;
    for (int j = 0; j < row.slots; ++j)
      if (row.a[j][o] != 0.0f) return false;
    for (const Term& term : terms)
      if (term.weight[o] != 0.0f) return false;
    return true;
  }
};

}  // namespace fastdiff::cpu
