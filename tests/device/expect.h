// Counting failures, and memory of an exact size.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace bsfast::test {

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("failed: %s\n", what.c_str());
}

// The body must throw an error that contains the text.
template <class Body>
void expect_error(const std::string& text, Body body) {
  try {
    body();
  } catch (const std::exception& error) {
    return expect(std::string(error.what()).find(text) != std::string::npos, text + ", got: " + error.what());
  }
  expect(false, "no error: " + text);
}

// Exactly so many elements, all bits set (NaN) at first, at a multiple of 256 bytes like memory of a device.
template <class T>
struct Memory {
  T* data;
  int64_t count;
  explicit Memory(int64_t count) : count(count) {
    void* p = nullptr;
    if (posix_memalign(&p, 256, bytes()) != 0) std::abort();
    data = static_cast<T*>(p);
    poison();
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data); }
  size_t bytes() const { return size_t(count) * sizeof(T); }
  void poison() { std::memset(static_cast<void*>(data), 0xff, bytes()); }
};

}  // namespace bsfast::test
