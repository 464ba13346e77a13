#include "kernels/gated_act.h"

#include "base/status.h"
#include "kernels/gated_act_cpu.h"

namespace tidepool {

void GatedAct(GateFunction function, const float* gate_up, int64_t rows, int64_t inter, float* y,
              ThreadPool& pool) {
  TP_CHECK(rows >= 0 && inter >= 0);
  if (rows == 0 || inter == 0) return;
  const auto run = function == GateFunction::kSilu ? SiluMulRowCpu : GeluTanhMulRowCpu;
  const int64_t grain = 16384 / inter + 1;
  pool.ParallelFor(rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* gate = gate_up + r * 2 * inter;
      run(gate, gate + inter, inter, y + r * inter);
    }
  });
}

}  // namespace tidepool
