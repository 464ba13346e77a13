#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "server/model/json_reader.h"

namespace tidepool {

// ConfigReader: reads the fields of one JSON object, and collects what is wrong instead of stopping at it
// (View; borrows the object and the list of problems). A field with a problem reads as 0 or its fallback.
class ConfigReader {
 public:
  // `where` starts every message.
  ConfigReader(const nlohmann::json& object, std::string_view where, std::vector<absl::Status>& problems)
      : fields_(object, where), object_(object), problems_(problems) {}

  // nullptr where absent or null.
  const nlohmann::json* Find(std::string_view field) const { return fields_.Find(field); }

  // See JsonFields; 0 after a problem.
  uint32_t Count(std::string_view field, int64_t lo, int64_t hi,
                 std::optional<int64_t> fallback = std::nullopt);
  // `fallback` after a problem.
  double Number(std::string_view field, double lo, double hi, double fallback);
  // `lo` after a problem.
  double RequiredNumber(std::string_view field, double lo, double hi);
  bool Bool(std::string_view field, bool fallback);
  // A list of exactly `size` numbers in [lo, hi]; empty after a problem.
  std::vector<double> Numbers(std::string_view field, size_t size, double lo, double hi);

  // InvalidArgument: "<where>: <message>".
  void Invalid(std::string_view message);
  // Unimplemented: "<where>: <field> is <value>; supported: <supported>".
  void Unsupported(std::string_view field, const nlohmann::json& value, std::string_view supported);
  void Add(const absl::Status& problem);

  bool ok() const { return problems_.empty(); }
  const nlohmann::json& object() const { return object_; }
  const std::string& where() const { return fields_.where(); }
  std::vector<absl::Status>& problems() { return problems_; }

 private:
  JsonFields fields_;
  const nlohmann::json& object_;
  std::vector<absl::Status>& problems_;
};

}  // namespace tidepool
