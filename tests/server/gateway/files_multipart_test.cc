#include "server/gateway/files_multipart.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "base/rng.h"

namespace tidepool {
namespace {

struct Seen {
  std::string name, filename, data;
  bool ended = false;
};

struct Form {
  std::vector<Seen> parts;
  absl::Status status;
};

// Fed in pieces of `step` bytes.
Form Read(std::string_view body, size_t step, std::string_view boundary = "B") {
  Form form;
  MultipartReader reader(boundary, {[&](const MultipartReader::Part& part) {
                                      form.parts.push_back({part.name, part.filename, "", false});
                                      return absl::OkStatus();
                                    },
                                    [&](std::string_view bytes) {
                                      form.parts.back().data.append(bytes);
                                      return absl::OkStatus();
                                    },
                                    [&] {
                                      form.parts.back().ended = true;
                                      return absl::OkStatus();
                                    }});
  for (size_t at = 0; at < body.size() && form.status.ok(); at += step) {
    form.status = reader.Feed(body.substr(at, step));
  }
  if (form.status.ok()) form.status = reader.Finish();
  return form;
}

const std::string kTwoParts =
    "--B\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n"
    "--B\r\ncontent-disposition: form-data; name=file; filename=\"a \\\"b\\\".jsonl\"\r\nContent-Type: "
    "x\r\n\r\n"
    "line 1\r\n--not\r\n-B\r\n--C\nline 2\r\n\r\n--B--\r\nepilogue";

TEST(MultipartReader, ReadsAFormWhereverItIsCut) {
  for (size_t step = 1; step <= kTwoParts.size(); ++step) {
    const Form form = Read(kTwoParts, step);
    ASSERT_TRUE(form.status.ok()) << form.status << " at " << step;
    ASSERT_EQ(form.parts.size(), 2u);
    EXPECT_EQ(form.parts[0].name, "purpose");
    EXPECT_EQ(form.parts[0].data, "batch");
    EXPECT_EQ(form.parts[1].name, "file");
    EXPECT_EQ(form.parts[1].filename, "a \"b\".jsonl");
    EXPECT_EQ(form.parts[1].data, "line 1\r\n--not\r\n-B\r\n--C\nline 2\r\n");
    EXPECT_TRUE(form.parts[1].ended);
  }
}

TEST(MultipartReader, BinaryDataComesOutAsItWentIn) {
  Rng rng(5);
  for (int round = 0; round < 50; ++round) {
    std::string data;
    const size_t size = rng.Next() % 300'000;
    // Mostly bytes that delimiters are made of.
    while (data.size() < size) data.push_back("\r\n--B\0x"[rng.Next() % 7]);
    while (data.find("\r\n--B") != data.npos) data.erase(data.find("\r\n--B"), 2);
    const Form form = Read("--B\r\nContent-Disposition: form-data; name=f\r\n\r\n" + data + "\r\n--B--",
                           1 + rng.Next() % 100'000);
    ASSERT_TRUE(form.status.ok()) << form.status;
    EXPECT_TRUE(form.parts[0].data == data);
  }
}

TEST(MultipartReader, AnEmptyPartIsAPart) {
  const Form form = Read("--B\r\nContent-Disposition: form-data; name=f\r\n\r\n\r\n--B--\r\n", 3);
  ASSERT_TRUE(form.status.ok());
  EXPECT_EQ(form.parts[0].data, "");
  EXPECT_TRUE(form.parts[0].ended);
}

TEST(MultipartReader, RefusesWhatIsBroken) {
  const auto bad = [](const std::string& body) { return absl::IsInvalidArgument(Read(body, 7).status); };
  EXPECT_TRUE(bad(""));
  EXPECT_TRUE(bad("{\"no\": \"form\"}"));
  EXPECT_TRUE(bad("--B\r\n\r\ndata\r\n--B--"));                                          // no name
  EXPECT_TRUE(bad("--B\r\nContent-Disposition: attachment; name=f\r\n\r\nx\r\n--B--"));  // no form-data
  EXPECT_TRUE(bad("--B\r\nContent-Disposition: form-data; name=f\r\n\r\nx\r\n"));        // cut
  EXPECT_TRUE(bad("--Bx\r\nContent-Disposition: form-data; name=f\r\n\r\nx\r\n--B--"));
  EXPECT_TRUE(bad("--B\r\nX: " + std::string(9000, 'x') + "\r\n\r\nx\r\n--B--"));
  std::string many;
  for (int i = 0; i < 20; ++i) many += "--B\r\nContent-Disposition: form-data; name=f\r\n\r\nx\r\n";
  EXPECT_TRUE(bad(many + "--B--"));
}

TEST(MultipartReader, AnErrorIsFinal) {
  MultipartReader reader(
      "B", {[](const auto&) { return absl::OutOfRangeError("too large"); },
            [](std::string_view) { return absl::OkStatus(); }, [] { return absl::OkStatus(); }});
  EXPECT_TRUE(absl::IsOutOfRange(reader.Feed("--B\r\nContent-Disposition: form-data; name=f\r\n\r\n")));
  EXPECT_FALSE(reader.Feed("x").ok());
  EXPECT_FALSE(reader.Finish().ok());
}

TEST(MultipartReader, FindsTheBoundary) {
  EXPECT_EQ(*MultipartReader::BoundaryOf("multipart/form-data; boundary=abc"), "abc");
  EXPECT_EQ(*MultipartReader::BoundaryOf("Multipart/Form-Data; charset=utf-8; Boundary=\"a b\""), "a b");
  EXPECT_FALSE(MultipartReader::BoundaryOf("application/json").ok());
  EXPECT_FALSE(MultipartReader::BoundaryOf("multipart/form-data").ok());
  EXPECT_FALSE(MultipartReader::BoundaryOf("multipart/form-data; boundary=").ok());
  EXPECT_FALSE(MultipartReader::BoundaryOf("multipart/form-data; boundary=" + std::string(71, 'x')).ok());
}

}  // namespace
}  // namespace tidepool
