"""Optimizers: a rule with a preconditioner. Needs torch alone."""

from .adabk import SGDMBK, AdamWBK
from .adamr import AdamR
from .afopt import AdaAFOpt, AFOpt
from .base import PreconditionedOptimizer
from .fsgd import FSGD, FAdam
from .kfac import KFAC, SKFAC
from .nkfac import NKFAC, AdaNKFAC
from .preconditioned import Preconditioned
from .rule_optimizer import RuleOptimizer
from .sgdph import SGDPH
from .weight_norm import WeightNormConv2d, weight_norm

__all__ = ['AFOpt', 'AdaAFOpt', 'AdaNKFAC', 'AdamR', 'AdamWBK', 'FAdam', 'FSGD', 'KFAC', 'NKFAC',
           'Preconditioned', 'PreconditionedOptimizer', 'RuleOptimizer', 'SGDMBK', 'SGDPH',
           'SKFAC', 'WeightNormConv2d', 'weight_norm']
