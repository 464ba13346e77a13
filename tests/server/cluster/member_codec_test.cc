#include "server/cluster/member_codec.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

v1::Member Someone() {
  v1::Member m;
  m.set_id("decode-1");
  m.set_role("decode");
  m.set_boot_id(std::string(32, 'a'));
  m.set_address("10.0.0.1:8100");
  m.set_pid(4711);
  m.set_term(uint64_t{1} << 60);
  return m;
}

TEST(MemberCodec, ReadsWhatItWrote) {
  const auto read = DecodeMember(EncodeMember(Someone()));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->SerializeAsString(), Someone().SerializeAsString());
}

TEST(MemberCodec, LeavesFieldsOfANewerVersionAlone) {
  std::string json = EncodeMember(Someone());
  json.insert(1, R"("colour":{"of":["the","sea"]},)");
  EXPECT_TRUE(DecodeMember(json).ok());
}

TEST(MemberCodec, RefusesWhatIsNoMemberAndNamesTheField) {
  const auto without = [](auto change) {
    v1::Member m = Someone();
    change(m);
    return std::string(DecodeMember(EncodeMember(m)).status().message());
  };
  EXPECT_EQ(without([](v1::Member& m) { m.clear_id(); }), "id: is empty");
  EXPECT_EQ(without([](v1::Member& m) { m.clear_role(); }), "role: is empty");
  EXPECT_EQ(without([](v1::Member& m) { m.clear_boot_id(); }), "boot_id: is empty");
  EXPECT_EQ(without([](v1::Member& m) { m.set_address("nowhere"); }).substr(0, 8), "address:");
  for (const std::string& garbage :
       {std::string(), std::string("\xff\xfe"), std::string("[]"), std::string("null"),
        std::string("{\"pid\":-1}"), std::string("{\"pid\":1e99}"), std::string("{\"id\":\"a\""),
        std::string(5000, ' '), std::string(2000, '[') + std::string(2000, ']')}) {
    EXPECT_EQ(DecodeMember(garbage).status().code(), absl::StatusCode::kInvalidArgument)
        << garbage.substr(0, 20);
  }
}

}  // namespace
}  // namespace tidepool
