#include "kernels/kv_codec_lanes.h"

namespace tidepool {

const KvCodecOps kKvCodecAvx512 = {QuantizeAny, DequantizeAny, WidenAny, NarrowAny};

}  // namespace tidepool
