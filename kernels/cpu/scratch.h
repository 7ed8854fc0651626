// Memory that a thread keeps between calls.
#pragma once
#include <cstddef>
#include <cstdlib>

namespace winnow {
namespace TARGET {

struct Scratch {
  char* bytes = nullptr;
  size_t size = 0;
  char* need(size_t n) {
    if (n > size) { std::free(bytes); bytes = (char*)std::malloc(n); size = bytes ? n : 0; }
    return bytes;
  }
};

}  // namespace TARGET
}  // namespace winnow
