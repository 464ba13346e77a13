#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "base/dtype.h"

namespace tidepool {

// A tensor of a checkpoint (View into the Checkpoint's mapping; not necessarily aligned).
struct TensorView {
  std::string dtype_name;  // as the file spells it: "BF16"
  std::vector<int64_t> shape;
  std::span<const std::byte> data;  // row-major, little-endian
  std::string_view file;            // name inside the directory

  // kBF16, kF16 or kF32; Unimplemented for what else the format knows.
  absl::StatusOr<DType> dtype() const;
};

// Checkpoint: the tensors of a directory in Hugging Face layout, mapped read-only: model.safetensors, or
// the shards that model.safetensors.index.json lists (Handle; immutable, thread-safe). The files must not
// be truncated while it is open.
//
// The format: u64 little-endian header length N; N bytes of JSON {name: {dtype, shape, data_offsets:
// [begin, end)}}, "__metadata__" apart; then the data that the offsets count from.
// Source: github.com/huggingface/safetensors, README "Format".
class Checkpoint {
 public:
  // A longer header is refused, as the reference implementation does.
  static constexpr uint64_t kHeaderBytesMax = 100'000'000;

  // NotFound: no checkpoint here, or a shard is missing. InvalidArgument: malformed (header length, JSON,
  // dtype, shape or offsets that disagree with each other or with the file's size, tensors that overlap or
  // leave bytes between or after them); the message names file and tensor. DataLoss: the file ends before a
  // tensor does.
  static absl::StatusOr<Checkpoint> Open(const std::string& dir);

  // NotFound names the tensor and the files searched.
  absl::StatusOr<const TensorView*> Find(std::string_view name) const;
  // Find, and InvalidArgument (naming file, tensor, expected and found) where the shape is another.
  absl::StatusOr<const TensorView*> Get(std::string_view name, std::span<const int64_t> shape) const;

  // By name.
  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }
  const std::string& dir() const { return dir_; }

 private:
  class Mapping;
  absl::Status AddFile(const std::string& file, const std::map<std::string, std::string>* weight_map);

  std::string dir_;
  std::vector<std::shared_ptr<const Mapping>> mappings_;
  std::map<std::string, std::shared_ptr<const std::string>> file_names_;
  std::map<std::string, TensorView, std::less<>> tensors_;
};

}  // namespace tidepool
