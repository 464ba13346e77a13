#pragma once

#include <string_view>

#include "absl/status/status.h"
#include "server/gateway/request.h"

namespace tidepool {

inline constexpr std::string_view kToolNameRule = "must be 1 to 64 of the letters, digits, _ and -";
bool IsToolName(std::string_view name);

// Codec: `tools`, `tool_choice` and `parallel_tool_calls` of OpenAI's chat requests. `chat.tools` gets what
// the template is to show: none where tool_choice is none. Errors: InvalidArgument "tools[i].field: ...".
// Pure.
absl::Status ReadTools(const OrderedJson& body, ToolOptions& tools, ChatInput& chat);

}  // namespace tidepool
