#pragma once

#include <memory>
#include <string_view>

#include "server/model/template/jinja_ast.h"

namespace tidepool::jinja {

// Source → tree, by Jinja2's grammar. Throws Failure (TemplateSyntaxError, "line N: ...").
std::shared_ptr<const Template> ParseTemplate(std::string_view source);

}  // namespace tidepool::jinja
