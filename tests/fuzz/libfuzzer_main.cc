// The one target that this program links, for libFuzzer.
#include "tests/fuzz/fuzz_target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const tidepool::fuzz::Target target = [] {
    TP_CHECK(tidepool::fuzz::Targets().size() == 1);
    return tidepool::fuzz::Targets().begin()->second;
  }();
  target({reinterpret_cast<const char*>(data), size});
  return 0;
}
