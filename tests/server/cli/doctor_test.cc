#include "server/cli/doctor.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace tidepool {
namespace {

using ::testing::HasSubstr;

class DoctorTest : public testing::Test {
 protected:
  DoctorTest() : dir_(testing::TempDir() + "/tidepool_doctor_XXXXXX") {
    TP_CHECK(mkdtemp(dir_.data()) != nullptr);
    for (const char* file : {"config.json", "tokenizer.json", "model.safetensors"})
      std::ofstream(dir_ + "/" + file) << "{}";
    config_.model.path = dir_;
    config_.kv.host_bytes = 1 << 20;
    config_.gateway.http_listen = "127.0.0.1:0";
    config_.gateway.grpc_listen = "127.0.0.1:0";
  }
  ~DoctorTest() override { std::filesystem::remove_all(dir_); }

  // The worst finding of that name.
  Finding Find(const std::string& check) const {
    Finding worst{"", Finding::kOk, "not found"};
    for (const Finding& finding : Diagnose(config_)) {
      if (finding.check == check && (worst.check.empty() || finding.level > worst.level)) worst = finding;
    }
    return worst;
  }

  std::string dir_;
  Config config_;
};

TEST_F(DoctorTest, AModelDirectoryWithItsFilesIsFine) {
  EXPECT_EQ(Find("model").level, Finding::kOk) << Find("model").detail;
}

TEST_F(DoctorTest, MissingModelFilesAreNamed) {
  std::filesystem::remove(dir_ + "/tokenizer.json");
  EXPECT_EQ(Find("model").level, Finding::kFail);
  EXPECT_THAT(Find("model").detail, HasSubstr("tokenizer.json"));
}

TEST_F(DoctorTest, ATokenizerElsewhereIsLookedForThere) {
  std::filesystem::remove(dir_ + "/tokenizer.json");
  const std::string other = dir_ + "/other";
  std::filesystem::create_directory(other);
  std::ofstream(other + "/tokenizer.json") << "{}";
  config_.model.tokenizer = other;
  EXPECT_EQ(Find("model").level, Finding::kOk) << Find("model").detail;
}

TEST_F(DoctorTest, ATakenPortIsAFailure) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(listen(fd, 1), 0);
  socklen_t length = sizeof address;
  ASSERT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length), 0);
  config_.gateway.grpc_listen = absl::StrCat("127.0.0.1:", ntohs(address.sin_port));
  EXPECT_EQ(Find("port").level, Finding::kFail);
  EXPECT_THAT(Find("port").detail, HasSubstr("gateway.grpc_listen"));
  close(fd);
}

TEST_F(DoctorTest, MorePoolThanMemoryIsAFailure) {
  config_.kv.host_bytes = 1ull << 50;
  EXPECT_EQ(Find("memory").level, Finding::kFail);
  EXPECT_THAT(Find("memory").detail, HasSubstr("kv.host_bytes"));
}

TEST_F(DoctorTest, UnknownInterfacesAreNamed) {
  config_.transport.net_devices = "lo";
  EXPECT_EQ(Find("interfaces").level, Finding::kOk);
  config_.transport.net_devices = "lo,nope0";
  EXPECT_EQ(Find("interfaces").level, Finding::kFail);
  EXPECT_THAT(Find("interfaces").detail, HasSubstr("nope0"));
}

TEST_F(DoctorTest, MoreConnectionsThanOpenFilesIsAWarning) {
  config_.gateway.max_connections = 1u << 31;
  EXPECT_EQ(Find("nofile").level, Finding::kWarn);
}

}  // namespace
}  // namespace tidepool
