"""Models of quickstart.py and results.py, with their optimizers."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import ROOT

FOLDER = ROOT / 'configs/quickstart'
RATE = 'optim_wrapper.optimizer.lr'
DECAY = 'optim_wrapper.optimizer.weight_decay'
#: Argument of tools/train.py that adds curvature to a config's own optimizer.
ATTACH = '--precondition'
#: Weight decay for optimizers like SGD (added to the gradient) and like Adam (outside it).
DECAYS = (1e-4, 0.05)
#: Optimizers like Adam that still add weight decay to the gradient.
ADDED_DECAY = ('AdaFisher', 'Adam', 'Adagrad')


@dataclass(frozen=True)
class Contestant:
    """Settings for the training of one optimizer.

    Attributes:
        config: Name of a config in `FOLDER`.
        lr: Learning rate, unless the user gives one.
        arguments: Arguments of tools/train.py.
        options: Settings for its --cfg-options.
        adaptive: Whether the rule is like Adam, rather than like SGD.
        script: Training script, relative to tools/.
    """

    config: str
    lr: float
    arguments: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    adaptive: bool = False
    script: str = 'train.py'


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model with the optimizers that are compared on it.

    Attributes:
        title: Title of the picture.
        plain: Name of the first-order optimizer.
        contestants: Optimizers by name that are compared by default.
        grid: Further learning rates for the plain optimizer.
        iterations: Length of a run.
        rates: Learning rates of other optimizers: for those like SGD, and for those like Adam.
        metrics: Titles of the reported metrics by name in the log; the first is the headline.
        data: Default folder of the data.
    """

    title: str
    plain: str
    contestants: dict[str, Contestant]
    metrics: dict[str, str]
    grid: str = ''
    iterations: int = 0
    rates: tuple[float, float] = (0.0, 0.0)
    data: str = 'shapes'

    @property
    def detects(self) -> bool:
        return self.headline.startswith('coco/')

    @property
    def headline(self) -> str:
        return next(iter(self.metrics))

    def make_data(self, folder: Path, images: int) -> None:
        """Makes the model's data: images for training, and a quarter as many for validation."""
        from mmprecond import datasets

        makers = {
            'shapes': datasets.make_shapes,
            'shapes-cls': datasets.make_shape_folders,
            'digits': datasets.make_digits,
            'digits-cls': datasets.make_digit_folders,
        }
        for split, count in (('train', images), ('val', max(10, images // 4))):
            makers[self.data](folder, images=count, split=split)

    def contestant(self, name: str) -> Contestant:
        """Returns one of `contestants`, or any other optimizer with the plain one's config.

        The other optimizer may be ours, a baseline, or one of the package pytorch_optimizer, such
        as pytorch_optimizer.SOAP. A name such as AFOpt+NKFAC adds curvature to the plain one.
        """
        if name in self.contestants:
            return self.contestants[name]
        if '+' in name:
            return self._attached(name)
        from mmprecond.checks import did_you_mean
        from mmprecond.engine.presets import BASELINES
        from mmprecond.engine.registration import optimizer_types
        from mmprecond.optimizers.catalogue import has_adam_scale
        from mmprecond.optimizers.peers import find_peer, is_peer

        kinds: dict[str, type] = {
            kind.__name__: kind for kind in optimizer_types() if kind.__name__ != 'Preconditioned'
        }
        kinds |= {baseline: kind for baseline, (kind, _) in BASELINES.items()}
        if is_peer(name):
            try:
                kinds[name] = find_peer(name)
            except (ImportError, ValueError) as error:
                sys.exit(str(error))
        choices = sorted({*self.contestants, *kinds})
        if name not in choices:
            sys.exit(
                f'there is no optimizer {name}; {did_you_mean(name, choices)}choose from '
                f'{", ".join(choices)}'
            )
        adaptive = has_adam_scale(kinds[name])
        decays = 'weight_decay' in inspect.signature(kinds[name]).parameters
        decay = DECAYS[adaptive and name not in ADDED_DECAY]
        return Contestant(
            self.contestants[self.plain].config,
            self.rates[adaptive],
            ('--optimizer', name),
            {DECAY: decay} if decays else {},
            adaptive=adaptive,
        )

    def _attached(self, words: str) -> Contestant:
        """The plain optimizer with curvature, by the words of `precondition`."""
        from mmprecond.core import parse_layers

        try:
            parse_layers(words)
        except ValueError as error:
            sys.exit(str(error))
        plain = self.contestants[self.plain]
        return replace(plain, lr=self.rates[plain.adaptive], arguments=(ATTACH, words))


R18, SWIN = 'faster-rcnn_r18_fpn_shapes', 'mask-rcnn_swin_shapes'
RETINA = 'retinanet_swin_shapes'
RESNET_CLS, SWIN_CLS = 'resnet18_shapes-cls', 'swin_shapes-cls'
DIGITS, DIGITS_CLS = 'faster-rcnn_r18_fpn_digits_narrow', 'resnet18_digits-cls'
BOXES = {'coco/bbox_mAP': 'box AP', 'coco/bbox_mAP_50': 'box AP50'}
MASKS = {'coco/segm_mAP': 'mask AP', 'coco/segm_mAP_50': 'mask AP50'}
TOP_1 = {'accuracy/top1': 'top-1 %'}
MODELS = {
    'r18': Model(
        title='Faster R-CNN R18-FPN',
        plain='SGD',
        contestants={
            'SGD': Contestant(R18, 0.01),
            'NKFAC': Contestant(R18, 0.01, ('--optimizer', 'NKFAC')),
        },
        grid='0.02',
        iterations=150,
        rates=(0.01, 1e-3),
        metrics=BOXES,
    ),
    'r18-narrow': Model(
        title='Faster R-CNN R18-FPN at half width',
        plain='SGD',
        contestants={'SGD': Contestant(f'{R18}_narrow', 0.02)},
        iterations=200,
        rates=(0.02, 1e-3),
        metrics=BOXES,
    ),
    'digits': Model(
        title='Faster R-CNN R18-FPN at half width, digits in photographs',
        plain='SGD',
        contestants={
            'SGD': Contestant(DIGITS, 0.02),
            'NKFAC': Contestant(DIGITS, 0.02, ('--optimizer', 'NKFAC')),
        },
        iterations=400,
        rates=(0.02, 1e-3),
        metrics=BOXES,
        data='digits',
    ),
    'swin': Model(
        title='Mask R-CNN, small Swin',
        plain='AdamW',
        contestants={
            'AdamW': Contestant(SWIN, 2.5e-4, adaptive=True),
            'AdaAFOpt': Contestant(f'{SWIN}_adaafopt', 1e-3, adaptive=True),
            'AFOpt+NKFAC': Contestant(SWIN, 1e-3, (ATTACH, 'AFOpt+NKFAC'), adaptive=True),
            'AFOpt+AdamR': Contestant(SWIN, 1e-3, (ATTACH, 'AFOpt+AdamR'), adaptive=True),
        },
        iterations=300,
        rates=(0.02, 1e-3),
        metrics=BOXES | MASKS,
    ),
    'retinanet': Model(
        title='RetinaNet, small Swin',
        plain='SGD',
        contestants={
            'SGD': Contestant(RETINA, 0.01),
            'AFOpt+NKFAC': Contestant(RETINA, 0.01, (ATTACH, 'AFOpt+NKFAC')),
        },
        iterations=300,
        rates=(0.01, 1e-3),
        metrics=BOXES,
    ),
    'resnet-cls': Model(
        title='ResNet-18 classifier',
        plain='SGD',
        contestants={
            'SGD': Contestant(RESNET_CLS, 0.05),
            'NKFAC': Contestant(RESNET_CLS, 0.05, ('--optimizer', 'NKFAC')),
        },
        grid='0.02,0.1',
        iterations=400,
        rates=(0.05, 1e-3),
        metrics=TOP_1,
        data='shapes-cls',
    ),
    'digits-cls': Model(
        title='ResNet-18 classifier, digits',
        plain='SGD',
        contestants={
            'SGD': Contestant(DIGITS_CLS, 0.05),
            'NKFAC': Contestant(DIGITS_CLS, 0.05, ('--optimizer', 'NKFAC')),
        },
        grid='0.02,0.1',
        iterations=200,
        rates=(0.05, 1e-3),
        metrics=TOP_1,
        data='digits-cls',
    ),
    'swin-cls': Model(
        title='small Swin classifier',
        plain='AdamW',
        contestants={
            'AdamW': Contestant(SWIN_CLS, 1e-3, adaptive=True),
            'AdaAFOpt': Contestant(
                SWIN_CLS, 1e-3, ('--optimizer', 'AdaAFOpt'), {DECAY: 0.05}, adaptive=True
            ),
            'AFOpt+NKFAC': Contestant(SWIN_CLS, 1e-3, (ATTACH, 'AFOpt+NKFAC'), adaptive=True),
            'AFOpt+AdamR': Contestant(SWIN_CLS, 1e-3, (ATTACH, 'AFOpt+AdamR'), adaptive=True),
        },
        iterations=400,
        rates=(0.05, 1e-3),
        metrics=TOP_1,
        data='shapes-cls',
    ),
}
