#include "server/cluster/member_codec.h"

#include <google/protobuf/util/json_util.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "config/address.h"

namespace tidepool {
namespace {

constexpr size_t kBytesMax = 4096;
constexpr size_t kDepthMax = 16;

// The parser recurses.
bool TooDeep(std::string_view json) {
  size_t depth = 0, deepest = 0;
  for (const char c : json) {
    if (c == '{' || c == '[') deepest = std::max(deepest, ++depth);
    if ((c == '}' || c == ']') && depth > 0) --depth;
  }
  return deepest > kDepthMax;
}

}  // namespace

std::string EncodeMember(const v1::Member& member) {
  std::string out;
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  TP_CHECK(google::protobuf::util::MessageToJsonString(member, &out, options).ok());
  return out;
}

absl::StatusOr<v1::Member> DecodeMember(std::string_view json) {
  if (json.size() > kBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("has ", json.size(), " bytes; a member has at most ", kBytesMax));
  }
  v1::Member member;
  google::protobuf::util::JsonParseOptions options;
  options.ignore_unknown_fields = true;
  if (TooDeep(json) ||
      !google::protobuf::util::JsonStringToMessage({json.data(), json.size()}, &member, options).ok()) {
    return absl::InvalidArgumentError("is not the JSON of a member");
  }
  if (member.id().empty()) return absl::InvalidArgumentError("id: is empty");
  if (member.role().empty()) return absl::InvalidArgumentError("role: is empty");
  if (member.boot_id().empty()) return absl::InvalidArgumentError("boot_id: is empty");
  TP_RETURN_IF_ERROR(Annotate(ParseHostPort(member.address()).status(), "address"));
  return member;
}

}  // namespace tidepool
