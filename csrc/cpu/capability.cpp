// SPDX-License-Identifier: Apache-2.0
#include "capability.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>

namespace samfast {
namespace {

constexpr const char* kVariable = "SAMFAST_CPU_CAPABILITY";
constexpr const char* kNames[] = {"default", "avx2", "avx512"};

// The widest instruction set that was compiled and that processor and system support.
Capability best() {
#ifdef SAMFAST_X86_VARIANTS
  if (__builtin_cpu_supports("x86-64-v4")) return kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return kAvx2;
#endif
  return kDefault;
}

std::string names(int count) {
  std::string all = kNames[0];
  for (int i = 1; i < count; ++i) all += std::string(", ") + kNames[i];
  return all;
}

}  // namespace

Capability choose(const std::string& asked, Capability best) {
  for (int i = 0; i <= best; ++i)
    if (asked == kNames[i]) return static_cast<Capability>(i);
  throw std::runtime_error(std::string(kVariable) + " is '" + asked + "', expected one of " +
                           names(std::size(kNames)) + "; this processor and this build run " +
                           names(best + 1));
}

Capability capability() {
  static const Capability chosen = [] {
    const char* asked = std::getenv(kVariable);
    return asked == nullptr ? best() : choose(asked, best());
  }();
  return chosen;
}

std::string cpu_capability() { return kNames[capability()]; }

std::string choose_cpu_capability(std::string asked, std::string best) {
  return kNames[choose(asked, choose(best, kAvx512))];
}

}  // namespace samfast
