#include "server/gateway/answer_encoder.h"

namespace tidepool {

void AppendEvent(std::string_view name, std::string_view json, std::string& out) {
  if (!name.empty()) {
    out += "event: ";
    out += name;
    out += '\n';
  }
  out += "data: ";
  out += json;
  out += "\n\n";
}

}  // namespace tidepool
