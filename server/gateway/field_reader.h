#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/gateway/json.h"

namespace tidepool {

// FieldReader: checked access to the fields of one JSON object (View; borrows it). A field that is absent or
// null reads as nullopt. Errors: InvalidArgument "field: what it must be". Never converts: nlohmann's
// get<int> turns 1e30 into INT_MIN and -1 into 4294967295.
class FieldReader {
 public:
  explicit FieldReader(const OrderedJson& object) : object_(object) {}

  // Null pointer: absent or null.
  const OrderedJson* Find(std::string_view field) const;

  absl::StatusOr<std::optional<bool>> Bool(std::string_view field) const;
  // Whole numbers in [min, max]; 3.0 counts as whole.
  absl::StatusOr<std::optional<int64_t>> Int(std::string_view field, int64_t min, int64_t max) const;
  // Any unsigned or negative 64-bit integer, as its two's complement (seeds).
  absl::StatusOr<std::optional<uint64_t>> Bits(std::string_view field) const;
  // Finite, in [min, max]; `open_below`: in (min, max].
  absl::StatusOr<std::optional<double>> Number(std::string_view field, double min, double max,
                                               bool open_below = false) const;
  // At most max_chars Unicode code points.
  absl::StatusOr<std::optional<std::string>> String(std::string_view field, size_t max_chars) const;
  absl::StatusOr<std::optional<std::vector<int32_t>>> TokenIds(std::string_view field,
                                                               size_t max_count) const;

 private:
  const OrderedJson& object_;
};

// One list of token ids; `field` names it in errors.
absl::StatusOr<std::vector<int32_t>> ReadTokenIds(std::string_view field, const OrderedJson& list,
                                                  size_t max_count);
size_t CountCodePoints(std::string_view utf8);

}  // namespace tidepool
