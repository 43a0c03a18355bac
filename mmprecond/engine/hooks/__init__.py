"""Hooks for MMEngine's runner."""

from .calibration_hook import CalibrationHook
from .curvature_hook import CurvatureHook

__all__ = ['CalibrationHook', 'CurvatureHook']
