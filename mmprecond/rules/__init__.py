"""Rules: updates from directions, without any knowledge of curvature."""

from .adam import AdamW
from .adan import Adan
from .adaptive import AdaBelief, AdaGrad, RAdam
from .aro import ARORule
from .base import Group, Rule, State, moments_of
from .dct import DCTAdamWRule
from .matrix import MatrixRule, matrix_shape
from .partial_hessian import PartialHessianSGDM
from .ramda import RAMDARule
from .registry import ADAPTIVE, RULES, build_rule, register_rule, rule_name
from .sgd import EMASGD, SGDM
from .soaa import TrustRegionAdam

__all__ = [
    'ADAPTIVE',
    'EMASGD',
    'RULES',
    'SGDM',
    'ARORule',
    'AdaBelief',
    'AdaGrad',
    'AdamW',
    'Adan',
    'DCTAdamWRule',
    'Group',
    'MatrixRule',
    'RAdam',
    'PartialHessianSGDM',
    'RAMDARule',
    'Rule',
    'State',
    'TrustRegionAdam',
    'build_rule',
    'matrix_shape',
    'moments_of',
    'register_rule',
    'rule_name',
]
