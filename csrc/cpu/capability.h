// SPDX-License-Identifier: Apache-2.0
// Hot functions, each compiled for several instruction sets; SAMFAST_CPU_CAPABILITY chooses.
#pragma once

#include <string>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SAMFAST_X86_VARIANTS 1
#endif

namespace samfast {

// In order: each runs wherever a later one does. The names are those of ATEN_CPU_CAPABILITY.
enum Capability : int { kDefault, kAvx2, kAvx512 };

// The one of asked, where best is the most that runs; throws a sentence for any other.
Capability choose(const std::string& asked, Capability best);

// What runs in this process; the environment is read once, at the first call, which may throw.
Capability capability();

// A function object that calls the chosen one of its bodies. A body is always_inline, so that each
// instruction set gets a copy of its own and no other file can share it; so must be what it calls.
// Vectors go by reference: their registers differ.
template <auto kPlainBody, auto kAvx2Body = kPlainBody, auto kAvx512Body = kPlainBody>
struct EachProcessor;

template <typename R, typename... A, R (*kPlainBody)(A...), R (*kAvx2Body)(A...),
          R (*kAvx512Body)(A...)>
struct EachProcessor<kPlainBody, kAvx2Body, kAvx512Body> {
  static R plain(A... a) { return kPlainBody(a...); }
#ifdef SAMFAST_X86_VARIANTS
  __attribute__((target("arch=x86-64-v3"))) static R avx2(A... a) { return kAvx2Body(a...); }
  __attribute__((target("arch=x86-64-v4"))) static R avx512(A... a) { return kAvx512Body(a...); }
  static constexpr R (*table[])(A...) = {plain, avx2, avx512};
#else
  static constexpr R (*table[])(A...) = {plain};
#endif

  R operator()(A... a) const { return table[capability()](a...); }
};

}  // namespace samfast
