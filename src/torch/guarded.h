// How C++ exceptions leave the shim: as a string that the caller frees with hr_free; null is success.
#pragma once

#include <c10/util/Exception.h>

#include <cstring>
#include <exception>

namespace {

inline char* describe(const char* what) noexcept {
  char* copy = strdup(what);
  return copy ? copy : strdup("out of memory");
}

template <typename F>
char* guarded(F&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& e) {
    return describe(e.what_without_backtrace());
  } catch (const std::exception& e) {
    return describe(e.what());
  } catch (...) {
    return describe("unknown C++ exception");
  }
}

}  // namespace
