#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"

namespace tidepool {

// CompileLimits: what one grammar may cost. Exceeding `states`, `bytes` or `cpu_time` is ResourceExhausted,
// the others are InvalidArgument; the message names the limit. Everything that a client can make large is
// bounded by these before it is allocated.
struct CompileLimits {
  // States of all automata together, while they are built and as they end up.
  size_t states_max = 400'000;
  // Of the serialised grammar, which travels with each request to the workers.
  size_t bytes_max = size_t{2} << 20;
  // CPU time of the compiling thread from the builder's construction to the end of Build; checked in all
  // loops. CPU and not wall time, so that a busy machine refuses nothing that an idle one takes.
  absl::Duration cpu_time_max = absl::Milliseconds(50);
  // Of the source: parentheses in a regex or EBNF, sub-schemas in a schema.
  int nesting_max = 64;
  // Largest count of a repetition that is written out: {m,n} of a regex or EBNF, minItems, minProperties.
  // Upper bounds of arrays and objects that are larger than this are clamped to it: fewer items than a schema
  // allows are still valid. The lengths of JSON strings are counted, not written out: no limit.
  uint32_t repeat_max = 2'000;
  // Of the source text of one regex, EBNF grammar or (as compact JSON) schema.
  size_t source_bytes_max = size_t{512} << 10;
};

}  // namespace tidepool
