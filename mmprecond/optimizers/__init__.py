"""Optimizers: a rule with a preconditioner. Needs torch alone."""

from .base import PreconditionedOptimizer
from .nkfac import NKFAC, AdaNKFAC

__all__ = ['NKFAC', 'AdaNKFAC', 'PreconditionedOptimizer']
