#pragma once

#include <cstring>
#include <string>
#include <string_view>

namespace tidepool {

// Numbers in the index's values, little-endian as this machine has them.
template <typename T>
void Put(std::string& out, T v) {
  out.append(reinterpret_cast<const char*>(&v), sizeof v);
}
// `in` holds at least sizeof(T) bytes.
template <typename T>
T Take(std::string_view& in) {
  T v;
  std::memcpy(&v, in.data(), sizeof v);
  in.remove_prefix(sizeof v);
  return v;
}

}  // namespace tidepool
