#include "kernels/paged_attention_tile.h"

namespace tidepool {

void RunAttentionTileAvx2(const AttentionTile& tile) { RunTile(tile); }

}  // namespace tidepool
