#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/http/http_server.h"

namespace tidepool {

// Router: method and path to handler. Filled before the server starts, then only read.
class Router {
 public:
  // See HttpServer::Handle.
  void Add(std::string_view method, std::string_view path, HttpHandler handler);

  struct Match {
    const HttpHandler* handler = nullptr;  // null: no such path, or not with this method
    std::string param;                     // what a trailing {name} matched
    std::string allow;                     // the path's methods, where handler is null and the path exists
  };
  // `path` is decoded. An exact route wins over a prefix, the longest prefix over shorter ones.
  Match Find(std::string_view method, std::string_view path) const;

 private:
  using Methods = std::map<std::string, HttpHandler, std::less<>>;
  std::map<std::string, Methods, std::less<>> exact_;
  std::map<std::string, Methods, std::less<>> prefix_;  // key ends in '/'
};

// Resolves %XX; nullopt for a malformed escape or an embedded NUL.
std::optional<std::string> PercentDecode(std::string_view text);

}  // namespace tidepool
