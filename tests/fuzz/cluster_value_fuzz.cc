// What stands in etcd: whoever can write there may have written anything. The input's first byte: 'm' a
// member or the leader, 't' the count of terms, 'a' who wrote the configuration, 'c' the configuration of the
// cluster.
#include <optional>
#include <string>

#include "absl/strings/numbers.h"
#include "config/cluster_document.h"
#include "config/fields.h"
#include "server/cluster/config_author.h"
#include "server/cluster/member_codec.h"
#include "server/cluster/member_core.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

// Of the README: what a member has at most.
constexpr size_t kMemberBytesMax = 4096;

// A term that is won is above all that is known, and none that cannot be counted on from.
void CheckTerm(uint64_t known, std::optional<uint64_t> counted) {
  known = std::min(known, MemberCore::kTermMax);
  const uint64_t next = MemberCore::NextTerm(known, counted);
  TP_CHECK(next > 0 && next <= MemberCore::kTermMax);
  TP_CHECK(next > known || known == MemberCore::kTermMax);
}

void CheckMember(std::string_view json) {
  const auto member = DecodeMember(json);
  if (!member.ok()) {
    TP_CHECK(!member.status().message().empty());
    return;
  }
  TP_CHECK(json.size() <= kMemberBytesMax);
  TP_CHECK(!member->id().empty() && !member->role().empty() && !member->boot_id().empty());
  const std::string again = EncodeMember(*member);
  if (again.size() <= kMemberBytesMax) {
    const auto back = DecodeMember(again);
    TP_CHECK(back.ok() && back->SerializeAsString() == member->SerializeAsString());
  }
  CheckTerm(member->term(), std::nullopt);
  CheckTerm(0, member->term());
  // As a leader's key tells it to a candidate and to somebody who only watches.
  for (const bool candidate : {true, false}) {
    MemberCore core({.candidate = candidate, .boot_id = "me"});
    if (member->term() == 0 || member->term() > MemberCore::kTermMax) {
      core.OnUnreadableKey(1);
      TP_CHECK(!core.leading() && core.leader().term == 0);
    } else {
      core.OnLeaderKey(
          Leader{.address = member->address(), .boot_id = member->boot_id(), .term = member->term()}, 1);
      TP_CHECK(core.leader().term == member->term());
      TP_CHECK(core.leading() == (candidate && member->boot_id() == "me"));
    }
  }
}

void CheckAuthor(std::string_view json) {
  const auto author = DecodeConfigAuthor(json);
  if (!author.ok()) return;
  for (const char c : author->who) TP_CHECK(static_cast<unsigned char>(c) >= 0x20);
}

void CheckDocument(std::string_view yaml) {
  const auto document = ParseClusterDocument(yaml, "etcd");
  if (!document.ok()) {
    TP_CHECK(absl::IsInvalidArgument(document.status()) && !document.status().message().empty());
    return;
  }
  for (const auto& [path, place] : document->sources) {
    TP_CHECK(FindField(path) != nullptr && ClusterRuleOf(path).use != ClusterUse::kRefused);
  }
  // Nothing that it does not say is changed by it.
  for (const Field& field : Fields()) {
    if (!document->IsDefault(field.path)) continue;
    TP_CHECK(FormatField(field, document->config) == FormatField(field, Config()));
  }
  const auto live = ParseClusterDocument(FormatLiveFields(document->config), "again");
  // Alone it may lack what it went together with.
  if (!live.ok()) return;
  for (const std::string_view path :
       CompareConfigs(document->config, live->config, ConfigRole::kServe).live) {
    TP_CHECK(path.empty());  // none: what was read is what was written
  }
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(cluster_value) {
  if (input.empty()) return;
  const std::string_view value = input.substr(1);
  switch (input[0]) {
    case 'm':
      return CheckMember(value);
    case 't': {
      uint64_t counted = 0;
      const bool number = absl::SimpleAtoi(absl::string_view(value.data(), value.size()), &counted);
      for (const uint64_t known : {uint64_t{0}, uint64_t{7}, MemberCore::kTermMax}) {
        CheckTerm(known, number ? std::optional(counted) : std::nullopt);
      }
      return;
    }
    case 'a':
      return CheckAuthor(value);
    case 'c':
      return CheckDocument(value);
    default:
      return;
  }
}

}  // namespace tidepool
