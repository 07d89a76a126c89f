// SPDX-License-Identifier: Apache-2.0
// Every native schema on one screen. The public operations and their autograd live in kernels/.
#include "common.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace samfast {
std::string cpu_capability();
std::string choose_cpu_capability(std::string, std::string);

void lora_down(const Tensor&, const Tensor&, Tensor, double, std::optional<Tensor>, int64_t);
void lora_up_(Tensor, const Tensor&, const Tensor&, double);
std::tuple<Tensor, Tensor> lora_up_backward(const Tensor&, const Tensor&, const Tensor&, double);
Tensor lora_down_backward_(std::optional<Tensor>, const Tensor&, std::optional<Tensor>,
                           const Tensor&, double, std::optional<Tensor>, int64_t);

// The same call on the CPU, on a GPU, and on the CPU with the GPU blocks' code.
using ConvExpertsForward = void(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                std::vector<int64_t>, std::vector<int64_t>, bool, bool, Tensor,
                                Tensor);
using ConvExpertsBackward = void(const Tensor&, std::optional<Tensor>, const Tensor&,
                                 const Tensor&, const Tensor&, const Tensor&, std::vector<int64_t>,
                                 std::vector<int64_t>, bool, bool, std::optional<Tensor>,
                                 std::optional<Tensor>, std::optional<Tensor>,
                                 std::optional<Tensor>, std::optional<Tensor>,
                                 std::optional<Tensor>, std::optional<Tensor>,
                                 std::optional<Tensor>);
ConvExpertsForward conv_experts_forward, conv_experts_cuda_forward, conv_experts_tiles_forward;
ConvExpertsBackward conv_experts_backward, conv_experts_cuda_backward, conv_experts_tiles_backward;

// Likewise; "blocks" runs the GPU blocks' code.
using HypercomplexBuild = void(const Tensor&, const Tensor&, std::optional<Tensor>, double, Tensor);
using HypercomplexContract = void(const Tensor&, const Tensor&, const Tensor&, double,
                                  std::optional<Tensor>, std::optional<Tensor>);
HypercomplexBuild hypercomplex_build, hypercomplex_cuda_build, hypercomplex_blocks_build;
HypercomplexContract hypercomplex_contract, hypercomplex_cuda_contract,
    hypercomplex_blocks_contract;

using TaskCoreProduct = void(const Tensor&, const Tensor&, const Tensor&, Tensor);
using TaskCoreProductBackward = void(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                     std::optional<Tensor>, std::optional<Tensor>, int64_t);
using TaskCoreFold = void(const Tensor&, const Tensor&, Tensor);
using TaskCoreFoldBackward = void(const Tensor&, const Tensor&, const Tensor&, Tensor, Tensor,
                                  int64_t);
TaskCoreProduct task_core_product, task_core_cuda_product, task_core_blocks_product;
TaskCoreProductBackward task_core_product_backward, task_core_cuda_product_backward,
    task_core_blocks_product_backward;
TaskCoreFold task_core_fold, task_core_cuda_fold, task_core_blocks_fold;
TaskCoreFoldBackward task_core_fold_backward, task_core_cuda_fold_backward,
    task_core_blocks_fold_backward;

void relpos_attention_forward(const Tensor&, const Tensor&, const Tensor&, std::optional<Tensor>,
                              std::optional<Tensor>, const Tensor&, const Tensor&,
                              std::vector<int64_t>, double, Tensor, Tensor);
void relpos_attention_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                               std::optional<Tensor>, std::optional<Tensor>, const Tensor&,
                               const Tensor&, const Tensor&, const Tensor&, std::vector<int64_t>,
                               double, Tensor, Tensor, Tensor, std::optional<Tensor>,
                               std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>);

void rope_rotate(const Tensor&, const Tensor&, const Tensor&, std::vector<int64_t>, bool, bool,
                 Tensor);
void window_attention_forward(const Tensor&, const Tensor&, const Tensor&, std::optional<Tensor>,
                              std::optional<Tensor>, std::vector<int64_t>, double, Tensor, Tensor);
void window_attention_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                               std::optional<Tensor>, std::optional<Tensor>, const Tensor&,
                               const Tensor&, std::vector<int64_t>, double, Tensor, Tensor, Tensor,
                               std::optional<Tensor>, std::optional<Tensor>);
}  // namespace samfast

STABLE_TORCH_LIBRARY(samfast_native, m) {
  m.def("cpu_capability() -> str");
  m.def("choose_cpu_capability(str asked, str best) -> str");
  m.def(
      "lora_down(Tensor x, Tensor a, Tensor(h!) h, float p, Tensor? seed, int threshold) -> ()");
  m.def("lora_up_(Tensor(y!) y, Tensor z, Tensor b, float scaling) -> ()");
  m.def("lora_up_backward(Tensor dy, Tensor z, Tensor b, float scaling) -> (Tensor, Tensor)");
  m.def(
      "lora_down_backward_(Tensor(dx!)? dx, Tensor dh, Tensor? x, Tensor a, float p, "
      "Tensor? seed, int threshold) -> Tensor");
  const std::string given = "Tensor h, Tensor weight, Tensor bias, Tensor index, int[] windows, "
                            "int[] ratios, bool residual, bool gelu";
  const std::string forward = "(" + given + ", Tensor(z!) z, Tensor(p!) z_pad) -> ()";
  const std::string backward = "(Tensor dz, Tensor? dz_pad, " + given +
                               ", Tensor? daux, Tensor? dpool, Tensor? dgate, Tensor(a!)? dh, "
                               "Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dw_gate, "
                               "Tensor(e!)? dw_noise) -> ()";
  m.def(("conv_experts_forward" + forward).c_str());
  m.def(("conv_experts_backward" + backward).c_str());
  m.def(("conv_experts_tiles_forward" + forward).c_str());
  m.def(("conv_experts_tiles_backward" + backward).c_str());
  const std::string build = "(Tensor rules, Tensor weights, Tensor? base, float scaling, "
                            "Tensor(h!) h) -> ()";
  const std::string contract = "(Tensor grad, Tensor rules, Tensor weights, float scaling, "
                               "Tensor(a!)? drules, Tensor(b!)? dweights) -> ()";
  m.def(("hypercomplex_build" + build).c_str());
  m.def(("hypercomplex_contract" + contract).c_str());
  m.def(("hypercomplex_blocks_build" + build).c_str());
  m.def(("hypercomplex_blocks_contract" + contract).c_str());
  for (const std::string where : {"task_core_", "task_core_blocks_"}) {
    m.def((where + "product(Tensor h, Tensor m, Tensor task, Tensor(z!) z) -> ()").c_str());
    m.def((where + "product_backward(Tensor dz, Tensor h, Tensor m, Tensor task, Tensor(a!)? dh, "
                   "Tensor(b!)? dm, int parts) -> ()").c_str());
    m.def((where + "fold(Tensor cores, Tensor factors, Tensor(a!) m) -> ()").c_str());
    m.def((where + "fold_backward(Tensor dm, Tensor cores, Tensor factors, Tensor(a!) dcores, "
                   "Tensor(b!) dfactors, int parts) -> ()").c_str());
  }
  const std::string plain = "Tensor q, Tensor k, Tensor v, Tensor? pad_k, Tensor? pad_v, ";
  const std::string tokens = plain + "Tensor table_h, Tensor table_w, ";
  m.def(("relpos_attention_forward(" + tokens +
         "int[] windows, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()").c_str());
  m.def(("relpos_attention_backward(Tensor dout, " + tokens +
         "Tensor out, Tensor lse, int[] windows, float scale, Tensor(a!) dq, Tensor(b!) dk, "
         "Tensor(c!) dv, Tensor(d!)? dpad_k, Tensor(e!)? dpad_v, Tensor(f!)? dtable_h, "
         "Tensor(g!)? dtable_w) -> ()").c_str());
  m.def(
      "rope_rotate(Tensor x, Tensor cos, Tensor sin, int[] windows, bool halves, bool inverse, "
      "Tensor(a!) out) -> ()");
  m.def(("window_attention_forward(" + plain +
         "int[] windows, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()").c_str());
  m.def(("window_attention_backward(Tensor dout, " + plain +
         "Tensor out, Tensor lse, int[] windows, float scale, Tensor(a!) dq, Tensor(b!) dk, "
         "Tensor(c!) dv, Tensor(d!)? dpad_k, Tensor(e!)? dpad_v) -> ()").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(samfast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&samfast::cpu_capability));
  m.impl("choose_cpu_capability", TORCH_BOX(&samfast::choose_cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(samfast_native, CPU, m) {
  m.impl("lora_down", TORCH_BOX(&samfast::lora_down));
  m.impl("lora_up_", TORCH_BOX(&samfast::lora_up_));
  m.impl("lora_up_backward", TORCH_BOX(&samfast::lora_up_backward));
  m.impl("lora_down_backward_", TORCH_BOX(&samfast::lora_down_backward_));
  m.impl("conv_experts_forward", TORCH_BOX(&samfast::conv_experts_forward));
  m.impl("conv_experts_backward", TORCH_BOX(&samfast::conv_experts_backward));
  m.impl("conv_experts_tiles_forward", TORCH_BOX(&samfast::conv_experts_tiles_forward));
  m.impl("conv_experts_tiles_backward", TORCH_BOX(&samfast::conv_experts_tiles_backward));
  m.impl("hypercomplex_build", TORCH_BOX(&samfast::hypercomplex_build));
  m.impl("hypercomplex_contract", TORCH_BOX(&samfast::hypercomplex_contract));
  m.impl("hypercomplex_blocks_build", TORCH_BOX(&samfast::hypercomplex_blocks_build));
  m.impl("hypercomplex_blocks_contract", TORCH_BOX(&samfast::hypercomplex_blocks_contract));
  m.impl("task_core_product", TORCH_BOX(&samfast::task_core_product));
  m.impl("task_core_product_backward", TORCH_BOX(&samfast::task_core_product_backward));
  m.impl("task_core_fold", TORCH_BOX(&samfast::task_core_fold));
  m.impl("task_core_fold_backward", TORCH_BOX(&samfast::task_core_fold_backward));
  m.impl("task_core_blocks_product", TORCH_BOX(&samfast::task_core_blocks_product));
  m.impl("task_core_blocks_product_backward",
         TORCH_BOX(&samfast::task_core_blocks_product_backward));
  m.impl("task_core_blocks_fold", TORCH_BOX(&samfast::task_core_blocks_fold));
  m.impl("task_core_blocks_fold_backward",
         TORCH_BOX(&samfast::task_core_blocks_fold_backward));
  m.impl("relpos_attention_forward", TORCH_BOX(&samfast::relpos_attention_forward));
  m.impl("relpos_attention_backward", TORCH_BOX(&samfast::relpos_attention_backward));
  m.impl("rope_rotate", TORCH_BOX(&samfast::rope_rotate));
  m.impl("window_attention_forward", TORCH_BOX(&samfast::window_attention_forward));
  m.impl("window_attention_backward", TORCH_BOX(&samfast::window_attention_backward));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(samfast_native, CUDA, m) {
  m.impl("conv_experts_forward", TORCH_BOX(&samfast::conv_experts_cuda_forward));
  m.impl("conv_experts_backward", TORCH_BOX(&samfast::conv_experts_cuda_backward));
  m.impl("hypercomplex_build", TORCH_BOX(&samfast::hypercomplex_cuda_build));
  m.impl("hypercomplex_contract", TORCH_BOX(&samfast::hypercomplex_cuda_contract));
  m.impl("task_core_product", TORCH_BOX(&samfast::task_core_cuda_product));
  m.impl("task_core_product_backward", TORCH_BOX(&samfast::task_core_cuda_product_backward));
  m.impl("task_core_fold", TORCH_BOX(&samfast::task_core_cuda_fold));
  m.impl("task_core_fold_backward", TORCH_BOX(&samfast::task_core_cuda_fold_backward));
}
#endif
