# Writes build_info.h with the commit that is built, and only where it changed. Run at each build.
execute_process(COMMAND git describe --always --dirty --exclude=* WORKING_DIRECTORY ${SOURCE}
                OUTPUT_VARIABLE git OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT git)
  set(git "unknown")
endif()
file(CONFIGURE OUTPUT ${OUTPUT} CONTENT [[
#pragma once

namespace tidepool {

inline constexpr char kBuildVersion[] = "@VERSION@";
inline constexpr char kBuildGit[] = "@git@";

}  // namespace tidepool
]] @ONLY)
