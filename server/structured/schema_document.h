#pragma once

#include <cstdint>
#include <deque>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "server/structured/budget.h"

namespace tidepool::structured {

using Json = nlohmann::ordered_json;

// Types of JSON values; a schema's `number` is kInteger | kFraction.
enum TypeBit : uint32_t {
  kNull = 1,
  kBoolean = 2,
  kObject = 4,
  kArray = 8,
  kString = 16,
  kInteger = 32,
  kFraction = 64,
  kNumber = kInteger | kFraction,
  kAllTypes = 127
};

// 1 equals 1.0; the order of properties is of no consequence. Linear, and charged.
absl::StatusOr<bool> JsonEqual(const Json& a, const Json& b, Budget& budget);
// Charges what it takes to copy `value` or to write it out.
absl::Status ChargeValue(const Json& value, Budget& budget);
TypeBit TypeOf(const Json& value);
// A name as a part of a JSON pointer (RFC 6901).
std::string PointerToken(std::string_view name);

// SchemaDocument: the sub-schemas of one document by number, with references resolved and keywords checked.
// Borrows the document.
class SchemaDocument {
 public:
  using Id = uint32_t;

  SchemaDocument(const Json& root, Budget& budget);

  // Nesting and length within limits, `$schema` known. Once, first.
  absl::Status Open();

  Id root() const { return 0; }
  // The sub-schema at `node`, which is `owner`'s at `path` (as in "/properties/a").
  Id Child(Id owner, const Json& node, std::string_view path);
  // A schema that is made up, standing for the keyword `path` of `owner`.
  Id Synthetic(Id owner, Json node, std::string_view path);
  bool IsSynthetic(Id id) const { return schemas_[id].synthetic; }

  const Json& node(Id id) const { return *schemas_[id].node; }
  const std::string& pointer(Id id) const { return schemas_[id].pointer; }
  const Json* Find(Id id, std::string_view keyword) const;

  // Well-formed and supported, as far as this schema's own keywords go; kept once found good.
  absl::Status Check(Id id);
  // What its $ref refers to.
  absl::StatusOr<Id> Resolve(Id id);
  // Drafts 4 to 7: beside $ref nothing counts.
  bool ref_hides_siblings() const { return legacy_; }
  // TypeBits of `type` and `nullable`, all without.
  uint32_t Types(Id id) const;

  absl::Status Malformed(Id id, std::string_view keyword, std::string_view what) const;
  absl::Status Unsupported(Id id, std::string_view keyword, std::string_view why) const;

 private:
  struct Schema {
    const Json* node;
    std::string pointer;
    bool checked = false;
    bool synthetic = false;
  };
  absl::Status CheckKeyword(Id id, const std::string& name, const Json& value);
  absl::StatusOr<Id> ByPointer(Id from, std::string_view pointer);
  // Null: there is none.
  absl::StatusOr<const Json*> FindAnchor(const Json& node, std::string_view anchor, std::string& path) const;
  bool HasNestedId(const Json& node, bool root) const;

  const Json& document_;
  Budget& budget_;
  std::vector<Schema> schemas_;
  absl::flat_hash_map<const Json*, Id> index_;
  std::deque<Json> synthetic_;
  bool legacy_ = false, nested_ids_ = false;
  std::string base_;
};

}  // namespace tidepool::structured
