#include "server/gateway/files_front.h"

#include <algorithm>
#include <optional>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/small_file.h"
#include "base/status.h"
#include "server/gateway/files_multipart.h"
#include "server/gateway/http_answer.h"
#include "server/http/router.h"

namespace tidepool {
namespace {

constexpr size_t kFieldBytesMax = 4 << 10;
constexpr uint64_t kFormBytes = 1 << 20;  // of an upload, beside the file
constexpr uint64_t kSentWholeMax = 64 << 10;
constexpr size_t kChunkOverhead = 64;  // chunked framing, and what a head takes
constexpr size_t kFilenameBytesMax = 512;
constexpr size_t kFilesListMax = 10'000;                                   // OpenAI's default and limit
constexpr int64_t kTtlSecondsMin = 3600, kTtlSecondsMax = 30 * 24 * 3600;  // OpenAI's

OrderedJson FileJson(const StoredFile& file) {
  OrderedJson out;
  out["id"] = file.id;
  out["object"] = "file";
  out["bytes"] = file.bytes;
  out["created_at"] = file.created_at;
  out["expires_at"] = file.expires_at;
  out["filename"] = file.filename;
  out["purpose"] = file.purpose;
  out["status"] = "processed";
  out["status_details"] = nullptr;
  return out;
}

// UploadForm: an upload's form as it is read: the file to the disk, the fields to checked values.
class UploadForm {
 public:
  UploadForm(FilesStore& files, std::string tenant) : files_(files), tenant_(std::move(tenant)) {}

  absl::Status Begin(const MultipartReader::Part& part) {
    field_ = part.name;
    value_.clear();
    if (field_ != "file") return absl::OkStatus();
    if (upload_ != nullptr) return FieldError("file", "may be given once");
    filename_ = part.filename.substr(0, kFilenameBytesMax);
    if (filename_.empty()) return FieldError("file", "must be a file's contents, with a filename");
    TP_ASSIGN_OR_RETURN(upload_, files_.Begin(tenant_));
    return absl::OkStatus();
  }
  absl::Status Data(std::string_view bytes) {
    if (field_ == "file") return upload_->Append(bytes);
    if (value_.size() + bytes.size() > kFieldBytesMax) {
      return FieldError(field_.substr(0, 64), absl::StrCat("must be at most ", kFieldBytesMax, " bytes"));
    }
    value_.append(bytes);
    return absl::OkStatus();
  }
  absl::Status End() {
    if (field_ == "purpose") {
      purpose_ = value_;
      if (*purpose_ != "batch") {
        return FieldError("purpose", "must be batch; files for other purposes are not kept here");
      }
    } else if (field_ == "expires_after[anchor]") {
      if (value_ != "created_at") return FieldError(field_, "must be created_at");
    } else if (field_ == "expires_after[seconds]") {
      int64_t seconds = 0;
      if (!absl::SimpleAtoi(value_, &seconds) || seconds < kTtlSecondsMin || seconds > kTtlSecondsMax) {
        return FieldError(
            field_, absl::StrCat("must be a whole number from ", kTtlSecondsMin, " to ", kTtlSecondsMax));
      }
      ttl_ = absl::Seconds(seconds);
    }
    return absl::OkStatus();
  }
  absl::StatusOr<StoredFile> Commit(absl::Duration ttl) {
    if (!purpose_) return FieldError("purpose", "is missing; it must be batch");
    if (upload_ == nullptr) return FieldError("file", "is missing");
    return upload_->Commit(filename_, *purpose_, ttl_ ? std::min(*ttl_, ttl) : ttl);
  }

 private:
  FilesStore& files_;
  const std::string tenant_;
  std::string field_, value_, filename_;
  std::optional<std::string> purpose_;
  std::optional<absl::Duration> ttl_;
  std::unique_ptr<FilesStore::Upload> upload_;
};

// UploadSink: the body of an upload, read while it comes in. After an error it wants no more.
class UploadSink final : public HttpBodySink {
 public:
  UploadSink(FilesStore& files, std::string tenant, std::string_view boundary)
      : tenant_(std::move(tenant)),
        form_(files, tenant_),
        reader_(boundary, {[this](const auto& part) { return form_.Begin(part); },
                           [this](std::string_view bytes) { return form_.Data(bytes); },
                           [this] { return form_.End(); }}) {}

  bool Write(std::string_view bytes) override {
    status_ = reader_.Feed(bytes);
    return status_.ok();
  }
  // The body is over.
  absl::StatusOr<StoredFile> Commit(absl::Duration ttl) {
    TP_RETURN_IF_ERROR(status_);
    TP_RETURN_IF_ERROR(reader_.Finish());
    return form_.Commit(ttl);
  }
  const std::string& tenant() const { return tenant_; }

 private:
  const std::string tenant_;
  UploadForm form_;
  MultipartReader reader_;
  absl::Status status_;
};

// Download: a file's way out, never more of it in memory than half a stream's buffer. Owns itself until the
// client has it all, or is gone.
class Download final : public std::enable_shared_from_this<Download> {
 public:
  Download(std::shared_ptr<ResponseWriter> writer, FileHandle file, uint64_t bytes, size_t chunk_bytes,
           BatchesService* service)
      : writer_(std::move(writer)),
        file_(std::move(file)),
        bytes_(bytes),
        chunk_bytes_(chunk_bytes),
        service_(service) {}

  // On the service's threads.
  void Next() {
    if (sent_ == bytes_) return writer_->End();
    const auto chunk =
        ReadAt(file_.fd(), sent_, std::min<uint64_t>(chunk_bytes_, bytes_ - sent_), "the file");
    if (!chunk.ok()) return writer_->Abort();
    sent_ += chunk->size();
    if (!writer_->Write(*chunk)) return;
    writer_->OnWritable([self = shared_from_this()] {
      if (!self->service_->Continue([self] { self->Next(); })) self->writer_->Abort();
    });
  }

 private:
  const std::shared_ptr<ResponseWriter> writer_;
  const FileHandle file_;
  const uint64_t bytes_;
  const size_t chunk_bytes_;
  BatchesService* const service_;
  uint64_t sent_ = 0;
};

}  // namespace

void InService(HttpFront& front, BatchesService& service, const HttpCall& call, std::function<void()> work) {
  bool ever = false;
  if (const std::string why = service.WhyNot(ever); !why.empty()) {
    return front.Refuse(call,
                        ever ? MakeRetryable(errors::kStorage, why, 1) : MakeError(errors::kBatchesOff, why));
  }
  const bool queued = service.Submit([&service, &front, call, work = std::move(work)] {
    bool waiting_helps = false;
    if (const std::string why = service.WhyNot(waiting_helps); !why.empty()) {
      return front.Refuse(call, MakeRetryable(errors::kStorage, why, 1));
    }
    work();
  });
  if (queued) return;
  front.Refuse(call,
               MakeRetryable(errors::kTooManyRequests,
                             "too many requests for files and batches are waiting; try again later", 1));
}

ApiError ServiceError(const absl::Status& status, std::string_view param) {
  const std::string message(status.message());
  switch (status.code()) {
    case absl::StatusCode::kNotFound:
      return MakeError(errors::kNotFound, message, std::string(param));
    case absl::StatusCode::kInvalidArgument:
      return FromFieldError(errors::kInvalidRequest, status);
    case absl::StatusCode::kFailedPrecondition:
      return MakeError(errors::kInvalidRequest, message, std::string(param));
    case absl::StatusCode::kOutOfRange:
      return MakeError(errors::kFileTooLarge, message, "file");
    case absl::StatusCode::kAborted:
      return MakeError(errors::kStorageLimit, message);
    default:
      return MakeRetryable(errors::kStorage, "the files cannot be read or written now; try again", 5);
  }
}

std::map<std::string, std::string, std::less<>> QueryOf(const HttpRequest& http) {
  std::map<std::string, std::string, std::less<>> out;
  for (const std::string& pair :
       std::vector<std::string>(absl::StrSplit(http.query, '&', absl::SkipEmpty()))) {
    const size_t equals = std::min(pair.find('='), pair.size());
    std::string value = pair.substr(std::min(equals + 1, pair.size()));
    std::ranges::replace(value, '+', ' ');
    out[PercentDecode(pair.substr(0, equals)).value_or("")] = PercentDecode(value).value_or("");
  }
  return out;
}

OrError<PageRequest> ReadPage(const HttpRequest& http, size_t limit_default, size_t limit_max) {
  PageRequest page;
  page.limit = limit_default;
  const auto query = QueryOf(http);
  if (const auto after = query.find("after"); after != query.end()) page.after = after->second;
  if (const auto limit = query.find("limit"); limit != query.end() && !limit->second.empty()) {
    uint64_t number = 0;
    if (!absl::SimpleAtoi(limit->second, &number) || number < 1 || number > limit_max) {
      return MakeError(errors::kInvalidRequest,
                       absl::StrCat("limit: must be a whole number from 1 to ", limit_max), "limit");
    }
    page.limit = number;
  }
  return page;
}

OrError<OrderedJson> PageJson(const std::vector<OrderedJson>& entries, const PageRequest& page) {
  size_t begin = 0;
  if (!page.after.empty()) {
    const auto it =
        std::ranges::find_if(entries, [&](const OrderedJson& e) { return e["id"] == page.after; });
    if (it == entries.end()) {
      return MakeError(errors::kInvalidRequest, "after: is the id of none of the list's entries", "after");
    }
    begin = static_cast<size_t>(it - entries.begin()) + 1;
  }
  const size_t end = std::min(entries.size(), begin + page.limit);
  OrderedJson out{{"object", "list"}, {"data", OrderedJson::array()}};
  for (size_t i = begin; i < end; ++i) out["data"].push_back(entries[i]);
  out["first_id"] = begin < end ? entries[begin]["id"] : OrderedJson();
  out["last_id"] = begin < end ? entries[end - 1]["id"] : OrderedJson();
  out["has_more"] = end < entries.size();
  return out;
}

FilesFront::FilesFront(HttpFront* front, BatchesService* service, const GatewayConfig& config)
    : front_(front),
      service_(service),
      upload_bytes_max_(config.batch_max_file_bytes + kFormBytes),
      chunk_bytes_(std::max<size_t>(256, config.max_stream_buffer_bytes / 2) - kChunkOverhead) {}

void FilesFront::AddRoutes(HttpServer& server) {
  const auto own = [this](void (FilesFront::*handler)(HttpCall)) {
    return [this, handler](HttpCall call) { (this->*handler)(std::move(call)); };
  };
  server.TakeUploads("POST", "/v1/files",
                     {upload_bytes_max_, [this](const HttpRequest& head) { return Open(head); }});
  front_->Add(server, {"POST", "/v1/files", own(&FilesFront::Upload)});
  front_->Add(server, {"GET", "/v1/files", own(&FilesFront::List)});
  front_->Add(server, {"GET", "/v1/files/{id}", own(&FilesFront::One)});
  front_->Add(server, {"DELETE", "/v1/files/{id}", own(&FilesFront::Delete)});
}

std::shared_ptr<HttpBodySink> FilesFront::Open(const HttpRequest& head) {
  bool ever = false;
  const auto tenant = front_->TenantOf(head);
  const auto boundary = MultipartReader::BoundaryOf(head.Header("content-type"));
  // The handler finds the same, and says so.
  if (!tenant.ok() || !boundary.ok() || !service_->WhyNot(ever).empty()) return nullptr;
  return std::make_shared<UploadSink>(service_->files(), *tenant, *boundary);
}

void FilesFront::Upload(HttpCall call) {
  const auto sink = std::dynamic_pointer_cast<UploadSink>(call.http.sink);
  const auto boundary = MultipartReader::BoundaryOf(call.http.Header("content-type"));
  if (!boundary.ok()) return front_->Refuse(call, ServiceError(boundary.status(), "file"));
  InService(*front_, *service_, call, [this, call, sink] {
    // Keys may have changed since the head came in.
    if (sink == nullptr || sink->tenant() != call.tenant) {
      return front_->Refuse(call, MakeRetryable(errors::kStorage, "the upload was not taken; try again", 1));
    }
    const auto file = sink->Commit(service_->file_ttl());
    if (!file.ok()) return front_->Refuse(call, ServiceError(file.status(), "file"));
    front_->Reply(call, FileJson(*file));
  });
}

void FilesFront::List(HttpCall call) {
  auto page = ReadPage(call.http, kFilesListMax, kFilesListMax);
  if (const auto* error = std::get_if<ApiError>(&page)) return front_->Refuse(call, *error);
  const auto query = QueryOf(call.http);
  const auto purpose = query.find("purpose"), order = query.find("order");
  const bool ascending = order != query.end() && order->second == "asc";
  if (order != query.end() && !ascending && order->second != "desc") {
    return front_->Refuse(call, MakeError(errors::kInvalidRequest, "order: must be asc or desc", "order"));
  }
  InService(*front_, *service_, call,
            [this, call, ascending, page = std::get<PageRequest>(page),
             purpose = purpose == query.end() ? "" : purpose->second] {
              std::vector<OrderedJson> entries;
              for (const StoredFile& file : service_->files().List(call.tenant)) {
                if (purpose.empty() || file.purpose == purpose) entries.push_back(FileJson(file));
              }
              if (!ascending) std::ranges::reverse(entries);
              const auto json = PageJson(entries, page);
              if (const auto* error = std::get_if<ApiError>(&json)) return front_->Refuse(call, *error);
              front_->Reply(call, std::get<OrderedJson>(json));
            });
}

void FilesFront::One(HttpCall call) {
  InService(*front_, *service_, call, [this, call] {
    std::string_view id = call.http.param;
    constexpr std::string_view kContent = "/content";
    const bool content = id.ends_with(kContent);
    if (content) id.remove_suffix(kContent.size());
    const auto file = service_->files().Get(call.tenant, id);
    if (!file.ok()) return front_->Refuse(call, ServiceError(file.status(), "id"));
    content ? SendContent(call, *file) : front_->Reply(call, FileJson(*file));
  });
}

void FilesFront::SendContent(const HttpCall& call, const StoredFile& file) {
  const auto path = service_->files().PathOf(call.tenant, file.id);
  if (!path.ok()) return front_->Refuse(call, ServiceError(path.status(), "id"));
  uint64_t bytes = 0;
  const auto fd = OpenRegularFile(*path, bytes);
  if (!fd.ok()) return front_->Refuse(call, ServiceError(absl::UnavailableError(""), "id"));
  FileHandle handle(*fd);
  HttpHeaders headers = JsonHeaders(call.id);
  headers[0].second = "application/octet-stream";
  if (bytes <= kSentWholeMax) {
    auto text = ReadAt(handle.fd(), 0, bytes, file.id);
    if (!text.ok()) return front_->Refuse(call, ServiceError(absl::UnavailableError(""), "id"));
    return call.writer->Send(200, std::move(headers), *std::move(text));
  }
  call.writer->StartStream(200, std::move(headers));
  std::make_shared<Download>(call.writer, std::move(handle), bytes, chunk_bytes_, service_)->Next();
}

void FilesFront::Delete(HttpCall call) {
  InService(*front_, *service_, call, [this, call] {
    if (const auto status = service_->files().Delete(call.tenant, call.http.param); !status.ok()) {
      return front_->Refuse(call, ServiceError(status, "id"));
    }
    front_->Reply(call, {{"id", call.http.param}, {"object", "file"}, {"deleted", true}});
  });
}

}  // namespace tidepool
