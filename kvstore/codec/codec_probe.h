#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "base/probe.h"

namespace tidepool {

// CodecProbe: metrics of one place where blocks are coded ("disk", "wire"). Every series exists from the
// start.
struct CodecProbe {
  CodecProbe(MetricRegistry& m, std::string_view place)
      : raw_bytes(Bytes(m, place, "raw")),
        coded_bytes(Bytes(m, place, "coded")),
        encode_seconds(Seconds(m, place, "encode")),
        decode_seconds(Seconds(m, place, "decode")),
        encode_failures(Failures(m, place, "encode")),
        decode_failures(Failures(m, place, "decode")) {}

  Counter& raw_bytes;    // of blocks that were encoded
  Counter& coded_bytes;  // and what they became
  Histogram& encode_seconds;
  Histogram& decode_seconds;
  Counter& encode_failures;  // numbers that are not finite
  Counter& decode_failures;  // damaged, of another codec

 private:
  static Counter& Bytes(MetricRegistry& m, std::string_view place, const char* what) {
    return m.AddCounter("tidepool_kv_codec_bytes_total", "KV bytes before and after encoding",
                        {{"place", std::string(place)}, {"form", what}});
  }
  static Histogram& Seconds(MetricRegistry& m, std::string_view place, const char* what) {
    return m.AddHistogram("tidepool_kv_codec_seconds", "Time to code one block", LatencyBuckets(),
                          {{"place", std::string(place)}, {"direction", what}});
  }
  static Counter& Failures(MetricRegistry& m, std::string_view place, const char* what) {
    return m.AddCounter("tidepool_kv_codec_failures_total", "Blocks that a KV codec refused",
                        {{"place", std::string(place)}, {"direction", what}});
  }
};

}  // namespace tidepool
