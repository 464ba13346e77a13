#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

#include "absl/status/statusor.h"
#include "server/structured/expression.h"

// JSON Schema (2020-12, and drafts 4 to 7 where `$schema` names one; without it 2020-12) to expressions. All
// that the expression matches is valid against the schema; what is valid and is not matched is listed here.
//
// Supported:
//   type (also a list), enum, const, nullable (OpenAPI: adds null to `type`), true and false as schemas
//   properties, required, additionalProperties, patternProperties, propertyNames (of one string schema),
//   minProperties, maxProperties, dependentRequired, dependentSchemas, dependencies
//   items, prefixItems, additionalItems and a list as items (drafts 4 to 7), minItems, maxItems;
//   uniqueItems and contains only where they cannot fail (false; at most one item; minContains 0)
//   minLength, maxLength, pattern (regex.h; ECMAScript's meaning), format (json_formats.h; asserted)
//   minimum, maximum, exclusiveMinimum and -Maximum (numbers, or booleans as in draft 4), multipleOf of a
//   whole number up to 1000 or of a fraction that binary has exactly (0.5, 0.25, ...)
//   allOf (merged), anyOf, oneOf where its branches can be shown to exclude each other, not where it is
//   false or true
//   $ref to the same document (# and JSON pointers, $anchor), $defs, definitions; recursion
// Ignored as annotations: title, description, default, example(s), $schema, $id at the root, $comment,
//   deprecated, readOnly, writeOnly, content* (since 2019-09), OpenAPI's discriminator, externalDocs and xml,
//   markdownDescription, and names that begin with "x-".
// Unimplemented, by JSON pointer: everything else, unknown keywords and formats too (a keyword that belongs
// to
//   a type that `type` beside it excludes is ignored).
//
// Order and spelling: properties come in the order of the schema (of `properties`, then of `required` for
// those that are only named there, then additional ones), those of merged schemas one schema after the other.
// Where `properties` stands and nothing is said of others (additionalProperties, patternProperties,
// propertyNames, a minProperties beyond the named ones) there are no others.
// An additional property may come twice: the values are valid each. Strings and numbers: json_pieces.h;
// numbers with a bound or step have no exponent (json_numbers.h); constants are written as in the schema,
// without white space in the numbers' text. Arrays and objects with an upper bound above
// CompileLimits::repeat_max end there.
namespace tidepool::structured {

// Errors: InvalidArgument (a keyword with a malformed value, a reference that leads nowhere), Unimplemented,
// ResourceExhausted; the message begins with the JSON pointer of the keyword, as in
// "#/properties/a/contains".
absl::StatusOr<ExpressionPool::Id> CompileJsonSchema(const nlohmann::ordered_json& schema,
                                                     JsonWhitespace whitespace, ExpressionPool& pool);

// Strict JSON: no duplicate keys, bounded nesting and length.
absl::StatusOr<nlohmann::ordered_json> ParseSchemaText(std::string_view text, const CompileLimits& limits);

}  // namespace tidepool::structured
