"""Optimizers: a rule with a preconditioner. The subpackage needs only torch."""

from ..second_order import WeightNormConv2d, weight_norm
from .adaact import AdaAct
from .adabk import SGDMBK, AdamWBK
from .adafisher import AdaFisher, AdaFisherW
from .adamr import AdamR
from .afopt import AdaAFOpt, AFOpt
from .aro import ARO
from .base import PreconditionedOptimizer
from .catalogue import OptimizerInfo, get_optimizer_info, list_optimizers
from .dct import DCTAdamW
from .fsgd import FSGD, FAdam
from .kfac import KFAC, SKFAC
from .mac import MAC, SMAC
from .nkfac import NKFAC, AdaNKFAC
from .nysact import NysAct
from .preconditioned import Preconditioned
from .ramda import RAMDA, Sparsity
from .replacement import precondition
from .rule_optimizer import RuleOptimizer
from .sgdph import SGDPH
from .shampoo import Shampoo
from .soaa import SOAA
from .soap import SOAP

__all__ = [
    'AFOpt',
    'ARO',
    'AdaAFOpt',
    'AdaAct',
    'AdaFisher',
    'AdaFisherW',
    'AdaNKFAC',
    'AdamR',
    'AdamWBK',
    'DCTAdamW',
    'FAdam',
    'FSGD',
    'KFAC',
    'MAC',
    'NKFAC',
    'NysAct',
    'OptimizerInfo',
    'Preconditioned',
    'PreconditionedOptimizer',
    'RAMDA',
    'RuleOptimizer',
    'SGDMBK',
    'SGDPH',
    'SKFAC',
    'SMAC',
    'SOAA',
    'SOAP',
    'Shampoo',
    'Sparsity',
    'WeightNormConv2d',
    'get_optimizer_info',
    'list_optimizers',
    'precondition',
    'weight_norm',
]
