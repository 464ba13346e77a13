#pragma once

namespace tidepool {

// What this CPU runs natively, asked once. x86-64-v3 (AVX2, FMA) is given.
struct CpuFeatures {
  bool avx512 = false;       // F, BW, DQ, VL
  bool avx512_bf16 = false;  // the same and BF16 dot products
};

inline const CpuFeatures& Cpu() {
  static const CpuFeatures features = [] {
    CpuFeatures f;
    f.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    f.avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
    return f;
  }();
  return features;
}

}  // namespace tidepool
