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
#include "kvstore/disk/record.h"
#include "server/cli/doctor_checks.h"
#include "tests/transport/test_certificates.h"

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

TEST_F(DoctorTest, AUcxTransportThatIsNotThereIsNamed) {
  EXPECT_EQ(Find("ucx").level, Finding::kOk) << Find("ucx").detail;
  EXPECT_THAT(Find("ucx").detail, HasSubstr("tcp ("));
  EXPECT_THAT(Find("ucx memory").detail, HasSubstr("host"));
  config_.transport.ucx_tls = "tcp,warp";
  EXPECT_EQ(Find("ucx").level, Finding::kFail);
  EXPECT_THAT(Find("ucx").detail, HasSubstr("names warp"));
}

TEST_F(DoctorTest, UcxOnAnInterfaceThatOthersReachIsAWarning) {
  config_.transport.net_devices = "lo,eth0";
  EXPECT_EQ(Find("ucx network").level, Finding::kWarn);
  EXPECT_THAT(Find("ucx network").detail, HasSubstr("transport.kind"));
}

TEST_F(DoctorTest, CertificatesAreLookedAtWhereTheyAreUsed) {
  config_.transport.kind = "tls";
  EXPECT_EQ(Find("certificate").level, Finding::kFail);
  EXPECT_THAT(Find("certificate").detail, HasSubstr("transport.tls_cert is empty"));
  TestAuthority authority;
  authority.Issue("w");
  config_.transport.tls_cert = authority.cert_file("w");
  config_.transport.tls_key = authority.key_file("w");
  config_.transport.tls_ca = authority.ca_file();
  // Those of the test are good for a day.
  EXPECT_EQ(Find("certificate").level, Finding::kWarn);
  EXPECT_THAT(Find("certificate").detail, HasSubstr("is valid for "));
}

TEST_F(DoctorTest, ATransportPortThatIsTakenIsAFailure) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(listen(fd, 1), 0);
  socklen_t length = sizeof address;
  ASSERT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length), 0);
  config_.transport.port = ntohs(address.sin_port);
  EXPECT_EQ(Find("port").level, Finding::kFail);
  EXPECT_THAT(Find("port").detail, HasSubstr("transport.port"));
  close(fd);
}

TEST_F(DoctorTest, HugePagesThatAreDemandedAndNotThereAreAFailure) {
  config_.kv.host_bytes = 1ull << 50;
  config_.kv.huge_pages = "on";
  EXPECT_EQ(Find("huge pages").level, Finding::kFail);
  EXPECT_THAT(Find("huge pages").detail, HasSubstr("sysctl vm.nr_hugepages="));
  config_.kv.huge_pages = "off";
  EXPECT_EQ(Find("huge pages").level, Finding::kOk);
}

TEST_F(DoctorTest, TheClocksAreLookedAt) {
  EXPECT_EQ(Find("clock").level, Finding::kOk) << Find("clock").detail;
  EXPECT_THAT(Find("ntp").detail, testing::Not(HasSubstr("not found")));
}

TEST_F(DoctorTest, MoreDiskThanThereIsIsAFailure) {
  EXPECT_THAT(Find("disk").detail, HasSubstr("no disk tier"));
  config_.kv.disk.path = dir_ + "/made/later";
  config_.kv.disk.bytes = 1 << 20;
  EXPECT_EQ(Find("disk").level, Finding::kOk) << Find("disk").detail;
  config_.kv.disk.bytes = 1ull << 60;
  EXPECT_EQ(Find("disk").level, Finding::kFail);
  EXPECT_THAT(Find("disk").detail, HasSubstr("kv.disk.bytes"));
}

TEST_F(DoctorTest, TheDisksSpeedIsMeasuredAndNothingIsLeftBehind) {
  config_.kv.disk.path = dir_;
  const auto files = [&] {
    return std::distance(std::filesystem::directory_iterator(dir_), std::filesystem::directory_iterator());
  };
  const auto before = files();
  const Finding found = MeasureDisk(config_.kv);
  EXPECT_NE(found.level, Finding::kFail) << found.detail;
  EXPECT_THAT(found.detail, HasSubstr("GB/s"));
  EXPECT_EQ(files(), before);
}

TEST_F(DoctorTest, BandwidthIsMeasuredBetweenTwoProcesses) {
  const Finding found = MeasureTransport(config_.transport);
  EXPECT_EQ(found.level, Finding::kOk) << found.detail;
  EXPECT_THAT(found.detail, HasSubstr("GB/s between two processes over ucx"));
  config_.transport.net_devices = "nope0";
  EXPECT_EQ(MeasureTransport(config_.transport).level, Finding::kFail);
}

TEST_F(DoctorTest, TheSharedArenaIsMeasuredBetweenTwoProcesses) {
  const Finding found = MeasureArena(config_.transport);
  EXPECT_EQ(found.level, Finding::kOk) << found.detail;
  EXPECT_THAT(found.detail, HasSubstr("16 blocks of 1 MiB"));
  EXPECT_THAT(found.detail, HasSubstr("over arena"));
}

ModelSeen Seen(const std::string& who) {
  ModelSeen out;
  out.who = who;
  out.version = "1";
  out.model.set_fingerprint("0123456789abcdef");
  out.model.set_layers(2);
  out.model.set_kv_heads(2);
  out.model.set_head_dim(16);
  out.model.set_block_tokens(32);
  out.model.set_kv_dtype(static_cast<uint32_t>(DType::kBF16));
  out.model.set_max_model_len(512);
  return out;
}

TEST(DoctorClusterTest, WhatKeepsAWorkerFromExchangingKvIsNamedWithItsFix) {
  const ModelSeen local = Seen("this configuration");
  ModelSeen same = Seen("worker a"), tokens = Seen("worker b"), codec = Seen("worker c"),
            weights = Seen("worker d"), shape = Seen("worker e"), version = Seen("worker f");
  tokens.model.set_block_tokens(16);
  tokens.model.set_fingerprint("ffff");
  codec.model.set_kv_codec("int8");
  weights.model.set_fingerprint("fedcba9876543210");
  shape.model.set_layers(3);
  version.version = "2";
  const auto found = CompareModels(local, {same, tokens, codec, weights, shape, version});
  ASSERT_EQ(found.size(), 6u);
  EXPECT_EQ(found[0].level, Finding::kOk);
  EXPECT_EQ(found[1].level, Finding::kFail);
  EXPECT_THAT(found[1].detail, HasSubstr("worker b cannot exchange KV"));
  EXPECT_THAT(found[1].detail, HasSubstr("block_tokens 32 here, 16 there"));
  EXPECT_THAT(found[1].detail, HasSubstr("kv.block_tokens"));
  EXPECT_THAT(found[2].detail, HasSubstr("codec none here, int8 there"));
  EXPECT_THAT(found[3].detail, HasSubstr("another checkpoint, tokenizer or config.json"));
  EXPECT_THAT(found[4].detail, HasSubstr("model.path"));
  EXPECT_EQ(found[5].level, Finding::kWarn);
}

// A tier's directory with one record in its first extent.
TEST_F(DoctorTest, RecordsOfAnotherModelOnTheDiskAreAWarning) {
  const ModelSeen local = Seen("this configuration");
  const BlockLayout layout{.layers = 2, .kv_heads = 2, .head_dim = 16, .block_tokens = 32};
  config_.kv.disk.path = dir_ + "/kv";
  const std::string tier = config_.kv.disk.path + "/both";
  std::filesystem::create_directories(tier);
  std::ofstream(tier + "/FORMAT") << "some format\n";
  const auto write = [&](const std::string& fingerprint) {
    RecordHeader header;
    header.space = RecordSpace(fingerprint, layout, "none");
    header.layout = layout.ToString();
    header.info.tokens.assign(32, 7);
    header.payload_bytes = layout.block_bytes();
    std::vector<std::byte> area(RecordHeaderBytes(32));
    ASSERT_TRUE(EncodeRecordHeader(header, area).ok());
    std::ofstream file(tier + "/blocks", std::ios::binary | std::ios::trunc);
    file << std::string(kDiskPageBytes, '\0')
         << std::string(reinterpret_cast<const char*>(area.data()), area.size());
  };
  EXPECT_THAT(CompareDisk(config_.kv, local)[0].detail, HasSubstr("none yet"));
  write(local.model.fingerprint());
  auto found = CompareDisk(config_.kv, local);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].level, Finding::kOk);
  EXPECT_THAT(found[0].detail, HasSubstr("of this model"));
  write("another");
  found = CompareDisk(config_.kv, local);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].level, Finding::kWarn);
  EXPECT_THAT(found[0].detail, HasSubstr("another model, layout or codec"));
}

}  // namespace
}  // namespace tidepool
