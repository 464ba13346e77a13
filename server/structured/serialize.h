#pragma once

#include <string>

namespace tidepool::structured {

struct Automaton;

// What CompiledGrammar::Parse reads.
std::string Serialize(const Automaton& automaton);

}  // namespace tidepool::structured
