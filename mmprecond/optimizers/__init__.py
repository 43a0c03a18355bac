"""Optimizers: a rule with a preconditioner. Needs torch alone."""

from .adabk import SGDMBK, AdamWBK
from .afopt import AdaAFOpt, AFOpt
from .base import PreconditionedOptimizer
from .fsgd import FSGD, FAdam
from .nkfac import NKFAC, AdaNKFAC
from .preconditioned import Preconditioned

__all__ = ['AFOpt', 'AdaAFOpt', 'AdaNKFAC', 'AdamWBK', 'FAdam', 'FSGD', 'NKFAC', 'Preconditioned',
           'PreconditionedOptimizer', 'SGDMBK']
