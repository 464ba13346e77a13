#include "server/model/strings/utf8.h"

namespace tidepool::utf8 {

void Append(uint32_t cp, std::string& out) {
  if (cp < 0x80) {
    out.push_back(static_cast<char>(cp));
  } else if (cp < 0x800) {
    out.push_back(static_cast<char>(0xC0 | (cp >> 6)));
    out.push_back(static_cast<char>(0x80 | (cp & 0x3F)));
  } else if (cp < 0x10000) {
    if (cp >= 0xD800 && cp < 0xE000) {
      out.append(kReplacement);
      return;
    }
    out.push_back(static_cast<char>(0xE0 | (cp >> 12)));
    out.push_back(static_cast<char>(0x80 | ((cp >> 6) & 0x3F)));
    out.push_back(static_cast<char>(0x80 | (cp & 0x3F)));
  } else if (cp < 0x110000) {
    out.push_back(static_cast<char>(0xF0 | (cp >> 18)));
    out.push_back(static_cast<char>(0x80 | ((cp >> 12) & 0x3F)));
    out.push_back(static_cast<char>(0x80 | ((cp >> 6) & 0x3F)));
    out.push_back(static_cast<char>(0x80 | (cp & 0x3F)));
  } else {
    out.append(kReplacement);
  }
}

uint32_t Next(std::string_view text, size_t& pos) {
  const auto byte = [&](size_t i) {
    return i < text.size() ? static_cast<uint32_t>(static_cast<unsigned char>(text[i])) : 0u;
  };
  const uint32_t lead = byte(pos);
  switch (SequenceLength(static_cast<unsigned char>(lead))) {
    case 2: {
      const uint32_t cp = ((lead & 0x1F) << 6) | (byte(pos + 1) & 0x3F);
      pos += 2;
      return cp;
    }
    case 3: {
      const uint32_t cp = ((lead & 0x0F) << 12) | ((byte(pos + 1) & 0x3F) << 6) | (byte(pos + 2) & 0x3F);
      pos += 3;
      return cp;
    }
    case 4: {
      const uint32_t cp = ((lead & 0x07) << 18) | ((byte(pos + 1) & 0x3F) << 12) |
                          ((byte(pos + 2) & 0x3F) << 6) | (byte(pos + 3) & 0x3F);
      pos += 4;
      return cp;
    }
    default:
      ++pos;
      return lead;
  }
}

Prefix Classify(std::string_view bytes) {
  const auto at = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char lead = at(0);
  if (lead < 0x80) return {Prefix::kWhole, 1};
  // The second byte's range is narrower for some leads (no overlong forms, no surrogates, at most U+10FFFF).
  unsigned char low = 0x80, high = 0xBF;
  size_t length = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {Prefix::kInvalid, 1};
  }
  for (size_t i = 1; i < length; ++i) {
    if (i >= bytes.size()) return {Prefix::kPartial, bytes.size()};
    if (at(i) < low || at(i) > high) return {Prefix::kInvalid, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Prefix::kWhole, length};
}

bool IsValid(std::string_view bytes) {
  size_t pos = 0;
  while (pos < bytes.size()) {
    if (static_cast<unsigned char>(bytes[pos]) < 0x80) {
      ++pos;
      continue;
    }
    const Prefix p = Classify(bytes.substr(pos));
    if (p.kind != Prefix::kWhole) return false;
    pos += p.bytes;
  }
  return true;
}

std::string Sanitize(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  size_t pos = 0;
  while (pos < bytes.size()) {
    const Prefix p = Classify(bytes.substr(pos));
    if (p.kind == Prefix::kWhole) {
      out.append(bytes.substr(pos, p.bytes));
    } else {
      out.append(kReplacement);
    }
    pos += p.bytes;
  }
  return out;
}

size_t Count(std::string_view text) {
  size_t n = 0;
  for (const char c : text) n += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  return n;
}

}  // namespace tidepool::utf8
