"""Hooks for MMEngine's runner."""

from .calibration_hook import CalibrationHook
from .curvature_hook import CurvatureHook
from .landscape_hook import LandscapeHook

__all__ = ['CalibrationHook', 'CurvatureHook', 'LandscapeHook']
