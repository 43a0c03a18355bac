"""Rules: updates from directions, without any knowledge of curvature."""

from .adam import AdamW
from .adan import Adan
from .aro import ARORule
from .base import Group, Rule, State, moments_of
from .dct import DCTAdamWRule
from .matrix import MatrixRule, matrix_shape
from .partial_hessian import PartialHessianSGDM
from .registry import RULES, build_rule, register_rule, rule_name
from .sgd import EMASGD, SGDM
from .soaa import TrustRegionAdam

__all__ = [
    'EMASGD',
    'RULES',
    'SGDM',
    'ARORule',
    'AdamW',
    'Adan',
    'DCTAdamWRule',
    'Group',
    'MatrixRule',
    'PartialHessianSGDM',
    'Rule',
    'State',
    'TrustRegionAdam',
    'build_rule',
    'matrix_shape',
    'moments_of',
    'register_rule',
    'rule_name',
]
