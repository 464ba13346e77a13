#include <string>
#include <vector>

#include "tests/server/structured/grammar_testing.h"
#include "tests/server/structured/guided_writer.h"

namespace tidepool {
namespace {

struct Case {
  const char* schema;
  std::vector<std::string> yes, no;
};

void Check(const std::vector<Case>& cases, JsonWhitespace whitespace = JsonWhitespace::kFlexible) {
  for (const Case& c : cases) {
    const auto grammar = CompileSchema(c.schema, Patient(), whitespace);
    ASSERT_TRUE(grammar.ok()) << c.schema << ": " << grammar.status();
    for (const std::string& text : c.yes) EXPECT_TRUE(Matches(*grammar, text)) << c.schema << " ~ " << text;
    for (const std::string& text : c.no) EXPECT_FALSE(Matches(*grammar, text)) << c.schema << " !~ " << text;
  }
}

TEST(JsonSchema, StringsAreValidJson) {
  Check(
      {{R"({"type": "string"})",
        {R"("")", R"("a\n\"\\\/\u00e9\ud83d\ude00")", "\"日本\"", "\"\x7F\""},
        {"\"", "\"\n\"", R"("\ud83d")", R"("\ude00\ud83d")", R"("\x")", "\"\xC3\"", "\"\xC0\x80\"",
         "\"\xED\xA0\x80\""}},
       {R"({"type": "string", "minLength": 2, "maxLength": 3})",
        {R"("ab")", "\"日本語\"", R"("\ud83d\ude00\n")", R"("\u00e9é\"")"},
        {R"("a")", R"("abcd")", R"("\ud83d\ude00")"}},
       {R"({"type": "string", "pattern": "b\"|\n$"})", {R"("ab\"c")", R"("xx\n")"}, {R"("ab")", R"("\nx")"}},
       {R"({"type": "string", "pattern": "^a+$", "minLength": 2, "maxLength": 4})",
        {R"("aa")", R"("aaaa")"},
        {R"("a")", R"("aaaaa")"}},
       {R"({"type": "string", "pattern": "^[^0-9]{3,500}$", "maxLength": 400})",
        {"\"abc\"", "\"日本語\""},
        {"\"ab\"", "\"ab1\"", "\"" + std::string(401, 'x') + "\""}}});
}

TEST(JsonSchema, NumbersKeepTheirBounds) {
  Check(
      {{R"({"type": "integer"})",
        {"0", "-12", "999999999999999999"},
        {"01", "1.0", "+1", "1e3", "-", "1234567890123456789"}},
       {R"({"type": "number"})", {"0.5", "-1e10", "12.25E-3"}, {".5", "1.", "1e100", "0.12345678901234567"}},
       {R"({"type": "integer", "minimum": -5, "exclusiveMaximum": 117})",
        {"-5", "0", "99", "116"},
        {"-6", "117", "-50", "200", "1000"}},
       {R"({"type": "number", "minimum": 0.5, "maximum": 12.75})",
        {"0.5", "0.50", "1", "9.999", "12.75", "12.750", "12"},
        {"0.4999", "12.751", "13", "-1", "0", "100"}},
       {R"({"type": "number", "exclusiveMinimum": -2.5, "exclusiveMaximum": -1})",
        {"-2", "-2.49", "-1.01"},
        {"-2.5", "-1", "0", "-3", "-1.0"}},
       {R"({"type": "number", "maximum": 5, "exclusiveMaximum": true})", {"4.9", "-100"}, {"5", "5.0"}},
       {R"({"type": "integer", "multipleOf": 7, "minimum": 10})", {"14", "700"}, {"7", "15"}},
       {R"({"type": "number", "multipleOf": 0.25})", {"0.5", "1.75", "3", "-0.25"}, {"0.3", "0.125"}},
       {R"({"type": "integer", "allOf": [{"multipleOf": 4}, {"multipleOf": 6}]})",
        {"12", "0"},
        {"4", "6", "8"}}});
}

TEST(JsonSchema, ObjectsFollowTheSchemasOrder) {
  Check(
      {{R"({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}},
             "required": ["b"], "additionalProperties": false})",
        {R"({"b":null})", R"({"a":null,"b":null,"c":null})", "{ \"b\": null }", "{\n  \"b\": null\n}"},
        {"{}", R"({"a":null})", R"({"b":null,"a":null})", R"({"b":null,"b":null})", R"({"b":null,"d":null})",
         R"({"b":null,})", "{  \"b\":null}"}},
       {R"({"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}})",
        {"{}", R"({"a":null,"b":1})", R"({"ab":1,"c":2})", R"({"":1})"},
        {R"({"a":1})", R"({"b":null})", R"({"\u0061":1})"}},
       // Nothing is said of other properties: there are none.
       {R"({"type": "object", "properties": {"a": {"type": "null"}}})",
        {"{}", R"({"a":null})"},
        {R"({"b":1})", R"({"a":null,"b":1})"}},
       {R"({"type": "object", "properties": {}})", {"{}"}, {R"({"b":1})"}},
       {R"({"type": "object", "properties": {"a": true}, "minProperties": 2})",
        {R"({"a":1,"b":1})"},
        {R"({"a":1})"}},
       {R"({"type": "object", "required": ["x"], "properties": {"y": true}})",
        {R"({"y":1,"x":[]})"},
        {R"({"y":1})"}},
       {R"({"type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"minimum": 5}},
             "additionalProperties": false})",
        {R"({"a":1})", R"({"ab":5})", R"({"b":"x"})", "{}"},
        {R"({"a":"x"})", R"({"ab":4})", R"({"c":1})", R"({"b":4})"}},
       {R"({"type": "object", "propertyNames": {"pattern": "^[a-z]+$", "maxLength": 3}})",
        {R"({"abc":1})"},
        {R"({"abcd":1})", R"({"A":1})"}},
       {R"({"type": "object", "properties": {"a": true, "b": true, "c": true}, "additionalProperties": false,
             "minProperties": 2, "maxProperties": 2})",
        {R"({"a":1,"c":2})"},
        {"{}", R"({"a":1})", R"({"a":1,"b":2,"c":3})"}},
       {R"({"type": "object", "dependentRequired": {"a": ["b"]}})",
        {"{}", R"({"c":1})", R"({"b":1,"c":2})"},
        {R"({"a":1})", R"({"a":1,"c":2})"}},
       {R"({"type": "object", "properties": {"a": true, "b": true}, "dependentRequired": {"a": ["b"]},
             "additionalProperties": false})",
        {"{}", R"({"b":1})", R"({"a":1,"b":2})"},
        {R"({"a":1})"}}});
}

TEST(JsonSchema, ArraysCountTheirItems) {
  Check(
      {{R"({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3})",
        {"[true]", "[true, false,true]", "[\n  true\n]"},
        {"[]", "[true,true,true,true]", "[1]", "[true,]"}},
       {R"({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": false})",
        {"[]", "[1]", "[1,null]"},
        {"[null]", "[1,null,1]"}},
       {R"({"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [{"type": "integer"}],
             "additionalItems": {"type": "null"}})",
        {"[1,null,null]"},
        {"[1,1]"}},
       {R"({"type": "array", "maxItems": 0})", {"[]", "[ ]"}, {"[1]"}}});
}

TEST(JsonSchema, CombinatorsMerge) {
  Check({{R"({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
             {"properties": {"a": {"minimum": 3}, "b": {"type": "null"}}}]})",
          {R"({"a":3,"b":null})"},
          {R"({"a":2})", R"({"a":3,"b":1})"}},
         {R"({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}]})",
          {"\"ab\"", "12"},
          {"\"abc\"", "1.5"}},
         {R"({"type": "object", "properties": {"k": {"type": "string"}}, "required": ["k"], "anyOf": [
             {"properties": {"k": {"const": "a"}, "v": {"type": "integer"}}},
             {"properties": {"k": {"const": "b"}, "v": {"type": "null"}}}]})",
          {R"({"k":"a","v":1})", R"({"k":"b","v":null})"},
          {R"({"k":"a","v":null})", R"({"k":"c"})"}},
         {R"({"oneOf": [{"type": "object", "properties": {"k": {"const": 1}}, "required": ["k"]},
             {"type": "object", "properties": {"k": {"const": 2}}, "required": ["k"]}, {"type": "null"}]})",
          {R"({"k":1})", R"({"k":2})", "null"},
          {R"({"k":3})"}},
         {R"({"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 4}]})",
          {"3", "4"},
          {"1.5"}},
         {R"({"enum": [1, "a\"b", null, {"x": [1.5, {}]}]})",
          {"1", R"("a\"b")", "null", R"({"x":[1.5, {}]})"},
          {"2", "{}"}},
         {R"({"enum": ["a", "bb", 3], "type": "string", "minLength": 2})", {"\"bb\""}, {"\"a\"", "3"}},
         {R"({"type": "string", "nullable": true})", {"null", "\"\""}, {"1"}},
         {R"({"anyOf": [{"$ref": "#"}, {"type": "null"}]})", {"null"}, {"1"}}});
}

TEST(JsonSchema, RecursionNests) {
  Check(
      {{R"({"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"v": {"type": "integer"},
             "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "required": ["v"],
             "additionalProperties": false}}})",
        {R"({"v":1,"kids":[{"v":2,"kids":[]},{"v":3}]})"},
        {R"({"v":1,"kids":[{"kids":[]}]})"}},
       {R"({"$anchor": "t", "type": ["array", "null"], "items": {"$ref": "#t"}})",
        {"[[],[null,[[]]]]"},
        {"[1]"}}});
}

TEST(JsonSchema, FormatsAreEnforced) {
  Check({{R"({"type": "string", "format": "date"})",
          {"\"2024-02-29\"", "\"2023-12-31\""},
          {"\"2023-02-29\"", "\"1900-02-29\"", "\"2023-13-01\""}},
         {R"({"type": "string", "format": "date-time"})",
          {"\"2024-02-29T23:59:59.5+01:00\""},
          {"\"2024-02-29 23:59:59Z\"", "\"2024-02-29T24:00:00Z\""}},
         {R"({"type": "string", "format": "ipv4"})", {"\"255.0.10.1\""}, {"\"256.0.0.1\"", "\"01.1.1.1\""}},
         {R"({"type": "string", "format": "ipv6"})",
          {"\"::1\"", "\"1:2:3:4:5:6:7:8\"", "\"::ffff:1.2.3.4\""},
          {"\":::\"", "\"1:2\""}},
         {R"({"type": "string", "format": "uuid"})",
          {"\"2eb8aa08-aa98-11ea-b4aa-73b441d16380\""},
          {"\"2eb8aa08aa98-11ea-b4aa-73b441d16380\""}},
         {R"({"type": "string", "format": "email"})",
          {"\"joe.bloggs@example.com\""},
          {"\"joe\"", "\".joe@x.y\""}},
         {R"({"type": "string", "format": "uri"})",
          {"\"https://a.b/c?d=e#f\"", "\"urn:x:y\""},
          {"\"//a.b\"", "\"a b\""}},
         {R"({"type": "integer", "format": "int64"})", {"1"}, {"\"1\""}}});
}

TEST(JsonSchema, WhatIsNotSupportedIsRefusedByItsPointer) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"type": "array", "uniqueItems": true})", "#/uniqueItems"},
      {R"({"properties": {"a/b": {"contains": {}}}})", "#/properties/a~1b/contains"},
      {R"({"if": {}, "then": false})", "#/if"},
      {R"({"not": {"type": "string"}})", "#/not"},
      {R"({"unevaluatedProperties": false})", "#/unevaluatedProperties"},
      {R"({"items": {"frobnicate": 1}})", "#/items/frobnicate"},
      {R"({"$ref": "http://example.com/x.json"})", "#/$ref"},
      {R"({"type": "string", "format": "regex"})", "#/format"},
      {R"({"type": "number", "multipleOf": 0.01})", "#/multipleOf"},
      {R"({"type": "string", "pattern": "(?=a)b"})", "#/pattern"},
      {R"({"oneOf": [{"type": "integer"}, {"type": "number"}]})", "#/oneOf"},
      {R"({"type": "object", "minProperties": 3})", "#/minProperties"},
      {R"({"allOf": [{"anyOf": [{"$dynamicRef": "#x"}]}]})", "#/allOf/0/anyOf/0/$dynamicRef"},
  };
  for (const auto& [schema, pointer] : cases) {
    const auto grammar = CompileSchema(schema);
    EXPECT_EQ(grammar.status().code(), absl::StatusCode::kUnimplemented) << schema << grammar.status();
    EXPECT_EQ(grammar.status().message().substr(0, std::string(pointer).size() + 1),
              absl::string_view(std::string(pointer) + ":"))
        << grammar.status();
  }
  // What says nothing about the types that are possible, or cannot fail, is not in the way.
  for (const char* schema :
       {R"({"type": "string", "uniqueItems": true})", R"({"type": "array", "uniqueItems": false})",
        R"({"not": false})", R"({"if": {}})", R"({"type": "array", "maxItems": 1, "uniqueItems": true})",
        R"({"title": "t", "x-order": 3, "readOnly": true})"}) {
    EXPECT_TRUE(CompileSchema(schema).ok()) << schema << CompileSchema(schema).status();
  }
}

TEST(JsonSchema, MalformedSchemasNameTheKeyword) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"type": "strnig"})", "#/type"},
      {R"({"type": []})", "#/type"},
      {R"({"minLength": -1})", "#/minLength"},
      {R"({"minLength": 1.5})", "#/minLength"},
      {R"({"properties": []})", "#/properties"},
      {R"({"properties": {"a": 3}})", "#/properties"},
      {R"({"required": true})", "#/required"},
      {R"({"anyOf": []})", "#/anyOf"},
      {R"({"$ref": "#/$defs/x"})", "#/$ref"},
      {R"({"$ref": "#nowhere"})", "#/$ref"},
      {R"({"items": 3})", "#/items"},
      {R"({"multipleOf": 0})", "#/multipleOf"},
      {R"({"type": "string", "pattern": "("})", "#/pattern"},
      {R"(3)", "#"},
      {R"({"type": "integer", "minimum": 5, "maximum": 4})", "nothing at all"},
      {R"(false)", "nothing at all"},
      {R"({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})", "nothing at all"},
      {R"({"a": 1, "a": 2})", "duplicate"},
      {R"({"type": )", "not valid JSON"},
  };
  for (const auto& [schema, start] : cases) {
    const auto grammar = CompileSchema(schema);
    EXPECT_EQ(grammar.status().code(), absl::StatusCode::kInvalidArgument) << schema << grammar.status();
    EXPECT_NE(grammar.status().message().find(start), absl::string_view::npos) << schema << grammar.status();
  }
}

TEST(JsonSchema, CompactMeansNoWhiteSpace) {
  Check({{R"({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "null"}}}})",
          {R"({"a":[null,null]})"},
          {R"({ "a":[null]})", R"({"a": [null]})", R"({"a":[null, null]})", R"({"a":[null] })"}}},
        JsonWhitespace::kCompact);
}

}  // namespace
}  // namespace tidepool
