// SPDX-License-Identifier: Apache-2.0
// Hot functions, each compiled for several instruction sets; SAMFAST_CPU_CAPABILITY chooses.
#pragma once

#include <string>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SAMFAST_X86_VARIANTS 1
#endif

namespace samfast {

// In order: each runs wherever a later one does. Names are those of ATEN_CPU_CAPABILITY.
enum Capability : int { kDefault, kAvx2, kAvx512 };

// Returns the one asked for, if it is at most best; throws a sentence otherwise.
Capability choose(const std::string& asked, Capability best);

// The choice of this process. The first call reads the environment, and may throw.
Capability capability();

// A function object that calls the chosen one of its bodies. A body and all that it calls must be
// always_inline, so that each instruction set gets its own copy, which no other file shares.
// Vectors are passed by reference: their registers differ.
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
