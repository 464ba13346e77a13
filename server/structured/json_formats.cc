#include "server/structured/json_formats.h"

#include <array>
#include <string>
#include <utility>

namespace tidepool::structured {
namespace {

// A day that exists; the year 0000 is left out, which Python's date does not have. Source: RFC 3339, 5.7 and
// appendix C.
constexpr char kDate[] =
    "(((000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-"
    "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])))"
    "|([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29)";
// RFC 3339, 5.6, without leap seconds (valid in one minute of some years only); at most 9 digits of a second.
constexpr char kTime[] =
    "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])";

// RFC 3339, appendix A; numbers of at most 6 digits.
constexpr char kDuration[] =
    "P(([0-9]{1,6}D|[0-9]{1,6}M([0-9]{1,6}D)?|[0-9]{1,6}Y([0-9]{1,6}M([0-9]{1,6}D)?)?)"
    "(T([0-9]{1,6}H([0-9]{1,6}M([0-9]{1,6}S)?)?|[0-9]{1,6}M([0-9]{1,6}S)?|[0-9]{1,6}S))?"
    "|T([0-9]{1,6}H([0-9]{1,6}M([0-9]{1,6}S)?)?|[0-9]{1,6}M([0-9]{1,6}S)?|[0-9]{1,6}S)|[0-9]{1,6}W)";

// Labels of at most 41 characters, at most six, without two hyphens in a row (which internationalised names
// have and which are valid in some of these only): less than the 63 and 253 characters of RFC 1123.
#define LABEL "[A-Za-z0-9](-?[A-Za-z0-9]){0,20}"
constexpr char kHostname[] = LABEL "(\\." LABEL "){0,5}";

// RFC 5321 without quoted local parts and address literals; at most 64 characters before the @.
constexpr char kEmail[] =
    "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-](\\.?[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]){0,31}@" LABEL "(\\." LABEL "){0,5}";
#undef LABEL

#define OCTET "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
constexpr char kIpv4[] = OCTET "(\\." OCTET "){3}";

// RFC 4291, 2.2.
#define H "[0-9A-Fa-f]{1,4}"
#define LS "(" H ":" H "|" OCTET "(\\." OCTET "){3})"
constexpr char kIpv6[] =
    "((" H ":){6}" LS "|::(" H ":){5}" LS "|(" H ")?::(" H ":){4}" LS "|((" H ":){0,1}" H ")?::(" H ":){3}" LS
    "|((" H ":){0,2}" H ")?::(" H ":){2}" LS "|((" H ":){0,3}" H ")?::" H ":" LS "|((" H ":){0,4}" H ")?::" LS
    "|((" H ":){0,5}" H ")?::" H "|((" H ":){0,6}" H ")?::)";
#undef LS
#undef H
#undef OCTET

constexpr char kUuid[] = "[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}";

// RFC 3986 with a registered name or an IPv4 address as host. `iri` and its kin take these too: each URI is
// an IRI.
#define PCHAR "([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
#define AUTHORITY                                                                                            \
  "([A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@)?([A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*(:[0-9]{1," \
  "5})?"
#define TAIL "(\\?(" PCHAR "|[/?])*)?(#(" PCHAR "|[/?])*)?"
constexpr char kUri[] =
    "[A-Za-z][A-Za-z0-9+.-]*:(//(" AUTHORITY "(/" PCHAR "*)*|/?(" PCHAR "+(/" PCHAR "*)*)?)" TAIL;
constexpr char kUriReference[] =
    "([A-Za-z][A-Za-z0-9+.-]*:(//(" AUTHORITY "(/" PCHAR "*)*|/?(" PCHAR "+(/" PCHAR
    "*)*)?)"
    "|//(" AUTHORITY "(/" PCHAR
    "*)*"
    "|/(" PCHAR "+(/" PCHAR
    "*)*)?"
    "|(([A-Za-z0-9._~!$&'()*+,;=@-]|%[0-9A-Fa-f]{2})+(/" PCHAR "*)*)?)" TAIL;
// RFC 6570, level 1.
constexpr char kUriTemplate[] = "(" PCHAR "|[/?#]|\\{[A-Za-z0-9_]+(\\.[A-Za-z0-9_]+)*\\})*";
#undef TAIL
#undef AUTHORITY
#undef PCHAR

// RFC 6901.
constexpr char kJsonPointer[] = "(/([^/~]|~[01])*)*";
constexpr char kRelativeJsonPointer[] = "(0|[1-9][0-9]{0,8})(#|(/([^/~]|~[01])*)*)";

}  // namespace

std::optional<std::string_view> FormatPattern(std::string_view format) {
  static const std::string date_time = std::string(kDate) + "T" + kTime;
  static const std::array<std::pair<std::string_view, std::string_view>, 20> formats{{
      {"date", kDate},
      {"time", kTime},
      {"date-time", date_time},
      {"duration", kDuration},
      {"email", kEmail},
      {"idn-email", kEmail},
      {"hostname", kHostname},
      {"idn-hostname", kHostname},
      {"ipv4", kIpv4},
      {"ipv6", kIpv6},
      {"uuid", kUuid},
      {"uri", kUri},
      {"iri", kUri},
      {"uri-reference", kUriReference},
      {"iri-reference", kUriReference},
      {"uri-template", kUriTemplate},
      {"json-pointer", kJsonPointer},
      {"relative-json-pointer", kRelativeJsonPointer},
      {"ip-address", kIpv4},  // draft 3
      {"host-name", kHostname},
  }};
  for (const auto& [name, pattern] : formats) {
    if (name == format) return pattern;
  }
  return std::nullopt;
}

}  // namespace tidepool::structured
