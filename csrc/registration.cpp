// SPDX-License-Identifier: Apache-2.0
// Every native schema on one screen. The public operations and their autograd live in kernels/.
#include "common.h"

#include <optional>
#include <tuple>

namespace samfast {
void lora_down(const Tensor&, const Tensor&, Tensor, double, std::optional<Tensor>, int64_t);
void lora_up_(Tensor, const Tensor&, const Tensor&, double);
std::tuple<Tensor, Tensor> lora_up_backward(const Tensor&, const Tensor&, const Tensor&, double);
Tensor lora_down_backward_(std::optional<Tensor>, const Tensor&, std::optional<Tensor>,
                           const Tensor&, double, std::optional<Tensor>, int64_t);
}  // namespace samfast

STABLE_TORCH_LIBRARY(samfast_native, m) {
  m.def(
      "lora_down(Tensor x, Tensor a, Tensor(h!) h, float p, Tensor? seed, int threshold) -> ()");
  m.def("lora_up_(Tensor(y!) y, Tensor z, Tensor b, float scaling) -> ()");
  m.def("lora_up_backward(Tensor dy, Tensor z, Tensor b, float scaling) -> (Tensor, Tensor)");
  m.def(
      "lora_down_backward_(Tensor(dx!)? dx, Tensor dh, Tensor? x, Tensor a, float p, "
      "Tensor? seed, int threshold) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(samfast_native, CPU, m) {
  m.impl("lora_down", TORCH_BOX(&samfast::lora_down));
  m.impl("lora_up_", TORCH_BOX(&samfast::lora_up_));
  m.impl("lora_up_backward", TORCH_BOX(&samfast::lora_up_backward));
  m.impl("lora_down_backward_", TORCH_BOX(&samfast::lora_down_backward_));
}
