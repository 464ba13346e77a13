#include "kernels/kv_codec_lanes.h"

namespace tidepool {

const KvCodecOps kKvCodecAvx2 = {QuantizeAny, DequantizeAny, WidenAny, NarrowAny};

}  // namespace tidepool
