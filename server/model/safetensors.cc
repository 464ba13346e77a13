#include "server/model/safetensors.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/small_file.h"
#include "base/status.h"
#include "server/model/json_reader.h"

namespace tidepool {

using nlohmann::json;

namespace {

constexpr uint64_t kIndexBytesMax = 64ULL << 20;
constexpr size_t kShardsMax = 4096;
constexpr size_t kDimsMax = 8;

// Element sizes of all that the format knows, also what we cannot compute with: a checkpoint may carry a
// tensor of it that we do not need.
uint64_t ElementBytes(const std::string& dtype) {
  static const std::map<std::string, uint64_t, std::less<>> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U16", 2}, {"I16", 2}, {"F16", 2},
      {"BF16", 2}, {"U32", 4}, {"I32", 4}, {"F32", 4},     {"U64", 8},     {"I64", 8}, {"F64", 8}};
  const auto it = sizes.find(dtype);
  return it == sizes.end() ? 0 : it->second;
}

std::string ShapeString(std::span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape.begin(), shape.end(), ", "), "]");
}

// Tensor names come from the file and go into messages and logs.
std::string Quoted(std::string_view name) { return JsonForMessage(json(std::string(name))); }

absl::Status Bad(const std::string& file, std::string_view tensor, std::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(file, ": tensor ", Quoted(tensor), ": ", std::string(what)));
}

// One entry of the header, checked on its own and against the `data_bytes` that follow the header.
absl::StatusOr<TensorView> ReadEntry(const std::string& file, std::string_view name, const json& entry,
                                     std::span<const std::byte> data) {
  if (!entry.is_object()) return Bad(file, name, "its header entry is not an object");
  TensorView out;
  const auto dtype = entry.find("dtype");
  if (dtype == entry.end() || !dtype->is_string()) return Bad(file, name, "dtype is missing or not a string");
  out.dtype_name = dtype->get<std::string>();
  const uint64_t element = ElementBytes(out.dtype_name);
  if (element == 0) return Bad(file, name, absl::StrCat("unknown dtype ", JsonForMessage(*dtype)));

  const auto shape = entry.find("shape");
  if (shape == entry.end() || !shape->is_array() || shape->size() > kDimsMax) {
    return Bad(file, name, absl::StrCat("shape is missing or not a list of at most ", kDimsMax, " numbers"));
  }
  uint64_t bytes = element;
  for (const json& dim : *shape) {
    if (!dim.is_number_unsigned() || dim.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
      return Bad(file, name,
                 absl::StrCat("shape ", JsonForMessage(*shape), " holds something that is not a count"));
    }
    const uint64_t d = dim.get<uint64_t>();
    if (__builtin_mul_overflow(bytes, d, &bytes)) {
      return Bad(file, name, absl::StrCat("shape ", JsonForMessage(*shape), " overflows 64 bits"));
    }
    out.shape.push_back(static_cast<int64_t>(d));
  }

  const auto offsets = entry.find("data_offsets");
  if (offsets == entry.end() || !offsets->is_array() || offsets->size() != 2 ||
      !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
    return Bad(file, name, "data_offsets is missing or not two counts");
  }
  const uint64_t begin = (*offsets)[0].get<uint64_t>(), end = (*offsets)[1].get<uint64_t>();
  if (begin > end)
    return Bad(file, name, absl::StrCat("data_offsets [", begin, ", ", end, ") run backwards"));
  if (end - begin != bytes) {
    return Bad(file, name,
               absl::StrCat("data_offsets hold ", end - begin, " bytes, but ", out.dtype_name, " of shape ",
                            ShapeString(out.shape), " takes ", bytes));
  }
  if (end > data.size()) {
    return absl::DataLossError(absl::StrCat(file, ": tensor ", Quoted(name), ": truncated: it ends at byte ",
                                            end, " of the data, and the file holds ", data.size()));
  }
  out.data = data.subspan(begin, bytes);
  return out;
}

// The tensors fill the data from its first byte to its last, as the reference implementation demands: a hole
// could carry anything, and overlapping tensors are no checkpoint's.
absl::Status CheckCover(const std::string& file,
                        std::vector<std::pair<std::span<const std::byte>, std::string>> ranges,
                        std::span<const std::byte> data) {
  std::sort(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first.data(), a.first.size()) < std::pair(b.first.data(), b.first.size());
  });
  const std::byte* end = data.data();
  std::string_view last;
  for (const auto& [range, name] : ranges) {
    if (range.data() < end) return Bad(file, name, absl::StrCat("overlaps tensor ", Quoted(last)));
    if (range.data() > end) {
      return Bad(
          file, name,
          absl::StrCat("a hole of ", range.data() - end, " bytes lies before it, which no tensor has"));
    }
    end = range.data() + range.size();
    last = name;
  }
  const int64_t rest = data.data() + data.size() - end;
  if (rest == 0) return absl::OkStatus();
  if (ranges.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": ", rest, " bytes of data, but no tensor"));
  }
  return Bad(file, last, absl::StrCat(rest, " bytes follow it, the last, which no tensor has"));
}

}  // namespace

absl::StatusOr<DType> TensorView::dtype() const {
  if (dtype_name == "BF16") return DType::kBF16;
  if (dtype_name == "F16") return DType::kF16;
  if (dtype_name == "F32") return DType::kF32;
  return absl::UnimplementedError(absl::StrCat(std::string(file), ": dtype ", dtype_name,
                                               " is not supported; supported: BF16, F16, F32"));
}

// A file mapped read-only for as long as it lives.
class Checkpoint::Mapping {
 public:
  static absl::StatusOr<std::shared_ptr<const Mapping>> Open(const std::string& path) {
    uint64_t size = 0;
    TP_ASSIGN_OR_RETURN(const int fd, OpenRegularFile(path, size));
    void* p = size < 8 ? MAP_FAILED : mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    const int error = errno;
    close(fd);
    if (size < 8) {
      return absl::DataLossError(absl::StrCat(path, ": ", size, " bytes; a safetensors file has at least 8"));
    }
    if (p == MAP_FAILED) {
      return absl::ResourceExhaustedError(absl::StrCat(path, ": cannot be mapped: ", std::strerror(error)));
    }
    return std::shared_ptr<const Mapping>(new Mapping(static_cast<const std::byte*>(p), size));
  }
  ~Mapping() { munmap(const_cast<std::byte*>(data_), size_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  Mapping(const std::byte* data, size_t size) : data_(data), size_(size) {}
  const std::byte* data_;
  size_t size_;
};

absl::Status Checkpoint::AddFile(const std::string& file,
                                 const std::map<std::string, std::string>* weight_map) {
  TP_ASSIGN_OR_RETURN(auto mapping, Mapping::Open(dir_ + "/" + file));
  const std::span<const std::byte> bytes = mapping->bytes();
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | std::to_integer<uint64_t>(bytes[i]);
  if (header_bytes > kHeaderBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": header length ", header_bytes,
                                                   " is above the limit of ", kHeaderBytesMax,
                                                   " bytes: not a safetensors file?"));
  }
  if (header_bytes > bytes.size() - 8) {
    return absl::DataLossError(absl::StrCat(file, ": truncated: header length ", header_bytes, ", but only ",
                                            bytes.size() - 8, " bytes follow"));
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, header_bytes);
  TP_ASSIGN_OR_RETURN(const json header, ParseJson(text, absl::StrCat(file, ": header")));
  if (!header.is_object())
    return absl::InvalidArgumentError(absl::StrCat(file, ": header is not a JSON object"));

  auto name_holder = std::make_shared<const std::string>(file);
  file_names_[file] = name_holder;
  const std::span<const std::byte> data = bytes.subspan(8 + header_bytes);
  std::vector<std::pair<std::span<const std::byte>, std::string>> ranges;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    TP_ASSIGN_OR_RETURN(TensorView view, ReadEntry(file, name, entry, data));
    view.file = *name_holder;
    ranges.emplace_back(view.data, name);
    // Of a shard, only what the index places there: a stray copy elsewhere is not an error.
    if (weight_map != nullptr) {
      const auto it = weight_map->find(name);
      if (it == weight_map->end() || it->second != file) continue;
    }
    tensors_.emplace(name, std::move(view));
  }
  TP_RETURN_IF_ERROR(CheckCover(file, std::move(ranges), data));
  mappings_.push_back(std::move(mapping));
  return absl::OkStatus();
}

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& dir) {
  static constexpr char kSingle[] = "model.safetensors";
  static constexpr char kIndex[] = "model.safetensors.index.json";
  Checkpoint out;
  out.dir_ = dir;
  std::error_code ec;
  if (std::filesystem::exists(dir + "/" + kSingle, ec)) {
    TP_RETURN_IF_ERROR(out.AddFile(kSingle, nullptr));
    return out;
  }
  auto index_text = ReadSmallFile(dir + "/" + kIndex, kIndexBytesMax);
  if (absl::IsNotFound(index_text.status())) {
    return absl::NotFoundError(
        absl::StrCat(dir, ": neither ", kSingle, " nor ", kIndex, " is there (only safetensors is read)"));
  }
  TP_RETURN_IF_ERROR(index_text.status());
  TP_ASSIGN_OR_RETURN(const json index, ParseJson(*index_text, kIndex));
  const auto map = index.is_object() ? index.find("weight_map") : index.end();
  if (!index.is_object() || map == index.end() || !map->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(kIndex, ": weight_map is missing or not an object"));
  }
  std::map<std::string, std::string> weight_map;
  std::set<std::string> files;
  for (const auto& [name, file] : map->items()) {
    // A shard lies beside the index: a path could read what the operator did not point at. Its name stands in
    // messages of one line, and no real one has a control character.
    const std::string f = file.is_string() ? file.get<std::string>() : std::string();
    if (f.empty() || f == "." || f == ".." || f.find('/') != std::string::npos ||
        std::ranges::any_of(f, [](unsigned char c) { return c < 0x20 || c == 0x7f; })) {
      return absl::InvalidArgumentError(absl::StrCat(kIndex, ": tensor ", Quoted(name), ": ",
                                                     JsonForMessage(file),
                                                     " is not the name of a file beside the index"));
    }
    weight_map.emplace(name, f);
    files.insert(f);
  }
  if (files.size() > kShardsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(kIndex, ": ", files.size(), " shards; at most ", kShardsMax, " are read"));
  }
  for (const std::string& f : files) TP_RETURN_IF_ERROR(out.AddFile(f, &weight_map));
  for (const auto& [name, file] : weight_map) {
    if (!out.tensors_.contains(name)) {
      return absl::NotFoundError(
          absl::StrCat(file, ": tensor ", Quoted(name), " is missing, though ", kIndex, " places it there"));
    }
  }
  return out;
}

absl::StatusOr<const TensorView*> Checkpoint::Find(std::string_view name) const {
  const auto it = tensors_.find(name);
  if (it != tensors_.end()) return &it->second;
  std::vector<std::string> files;
  for (const auto& [file, holder] : file_names_) files.push_back(file);
  return absl::NotFoundError(
      absl::StrCat("tensor ", Quoted(name), " is missing from ", absl::StrJoin(files, ", ")));
}

absl::StatusOr<const TensorView*> Checkpoint::Get(std::string_view name,
                                                  std::span<const int64_t> shape) const {
  TP_ASSIGN_OR_RETURN(const TensorView* view, Find(name));
  if (!std::equal(view->shape.begin(), view->shape.end(), shape.begin(), shape.end())) {
    return Bad(
        std::string(view->file), name,
        absl::StrCat("shape is ", ShapeString(view->shape), "; config.json implies ", ShapeString(shape)));
  }
  return view;
}

}  // namespace tidepool
