// What a peer with a certificate writes into the TLS transport's stream, cut anywhere: whole and cut streams
// read the same, memory follows what arrived, bulk data lies within its bulk, an error ends it.
#include <algorithm>
#include <cstring>

#include "tests/fuzz/fuzz_target.h"
#include "transport/tls_frame.h"
#include "transport/transport.h"

namespace tidepool {
namespace {

// Memory given to one bulk; larger ones are dropped, as a handler without a slot for them does.
constexpr uint64_t kSlotBytes = 4096;

struct Outcome {
  std::vector<std::string> log;
  bool ok = true;
};

Outcome Read(std::string_view stream, size_t step) {
  using Event = TlsFrameReader::Event;
  Outcome out;
  std::byte scratch[64];
  std::vector<std::byte> slot;
  TlsFrameReader reader(scratch);
  while (!stream.empty()) {
    const std::span<std::byte> next = reader.Next();
    TP_CHECK(!next.empty() && next.size() <= 16 * 1024);
    // Where it writes is ours to give: the slot, the scratch buffer, or its own small memory.
    const size_t n = std::min({step, next.size(), stream.size()});
    std::memcpy(next.data(), stream.data(), n);
    stream.remove_prefix(n);
    const auto event = reader.Advance(n);
    if (!event.ok()) {
      TP_CHECK(!event.status().message().empty());
      out.log.push_back(std::string(event.status().message()));
      out.ok = false;
      return out;
    }
    switch (*event) {
      case Event::kNone:
        break;
      case Event::kMessage:
        TP_CHECK(reader.message().size() <= Transport::kMaxMessageBytes);
        out.log.push_back("message " + std::string(reader.message()));
        break;
      case Event::kBulk:
        TP_CHECK(reader.bulk_header().size() <= kTlsMaxBulkHeaderBytes);
        TP_CHECK(reader.bulk_length() <= kTlsMaxBulkBytes);
        TP_CHECK(reader.bulk_open() == (reader.bulk_length() > 0));
        slot.assign(reader.bulk_length() <= kSlotBytes ? reader.bulk_length() : 0, std::byte{0});
        if (reader.bulk_length() > 0) reader.SetSink(slot);
        out.log.push_back("bulk " + std::to_string(reader.bulk_length()));
        break;
      case Event::kBulkDone:
        TP_CHECK(!reader.bulk_open());
        out.log.push_back("done " + std::string(reinterpret_cast<const char*>(slot.data()), slot.size()));
        break;
    }
  }
  return out;
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(tls_frame) {
  const Outcome whole = Read(input, SIZE_MAX);
  for (const size_t step : {size_t{1}, size_t{7}, size_t{16}, size_t{100}}) {
    const Outcome cut = Read(input, step);
    TP_CHECK(cut.ok == whole.ok && cut.log == whole.log);
  }
}

}  // namespace tidepool
