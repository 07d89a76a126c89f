# SPDX-License-Identifier: Apache-2.0
# Types of what samfast/__init__.py imports on first use.

from samfast import backends as backends
from samfast import counters as counters
from samfast import functional as functional
from samfast import integrations as integrations
from samfast import models as models
from samfast import modules as modules
from samfast import profiling as profiling
from samfast import training as training
from samfast.adapters.aux_loss import aux_loss as aux_loss
from samfast.export.form import export_form as export_form
from samfast.files.adapter_files import load_adapter as load_adapter
from samfast.files.adapter_files import save_adapter as save_adapter
from samfast.files.format import read_adapter_config as read_adapter_config
from samfast.fused.fuse import fuse as fuse
from samfast.fused.fuse import unfuse as unfuse
from samfast.fused.report import report as report
from samfast.kernels._common.ranges import ranges as ranges
from samfast.methods.adapt_former.method import AdaptFormer as AdaptFormer
from samfast.methods.attach import attach as attach
from samfast.methods.attach import merge as merge
from samfast.methods.attach import merged_state_dict as merged_state_dict
from samfast.methods.attach import parameter_groups as parameter_groups
from samfast.methods.attach import trainable_parameters as trainable_parameters
from samfast.methods.attach import unmerge as unmerge
from samfast.methods.cobot.method import CobotLora as CobotLora
from samfast.methods.conv_lora.method import ConvLora as ConvLora
from samfast.methods.kronecker.method import Kronecker as Kronecker
from samfast.methods.lora.method import Lora as Lora
from samfast.methods.registry import DecoderOnly as DecoderOnly
from samfast.methods.ta_lora.method import TaLora as TaLora
from samfast.methods.ta_lora.tasks import set_task as set_task
from samfast.profiling.context import profile as profile
from samfast.training.adapted import load_adapted as load_adapted

__version__: str
